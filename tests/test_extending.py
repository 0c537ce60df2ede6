"""The pages of docs/ that show code: it is the code that runs, and the training commands of docs/extending.md work."""

import itertools
import json
import re
import shlex
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

import denoiselab
from denoiselab import trust
from denoiselab.checks import check
from denoiselab.cli import parse
from denoiselab.compose import compose, options
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.sampler import LogSNR
from denoiselab.training import Job
from exact import make, normals, rms, triangle

ROOT = Path(__file__).parents[1]
LAB = ROOT / "tests" / "examples" / "mylab"
PAGE = (ROOT / "docs" / "extending.md").read_text()

BLOCKS = dict(re.findall(r"^`mylab/(\S+)`:\n\n```(?:python|yaml)\n(.*?)^```$", PAGE, re.M | re.S))
COMMANDS = re.findall(r"^denoiselab (train --config-dir mylab .*)$", PAGE, re.M)
OWN = {group: names for group, names in options(LAB).items() if (LAB / group).is_dir()}


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    """--config-dir extends sys.path, which must not outlive a test."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def own(*overrides: str) -> Parts:
    """The parts of a training configuration that may name options of the folder."""
    return Parts(resolve(compose("train", [*overrides, "metrics=none", "callbacks=none"], LAB)))


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Points, four steps, along the schedule of the folder; the run directory."""
    small = ["data=8gaussians", "data.n=200", "model=mlp", "model.width=16", "callbacks=none"]
    output = f"output_dir={tmp_path_factory.mktemp('own')}"
    job = Job(compose("train", ["schedule=power", "debug=quick", "metrics=none", *small, output], LAB))
    job.run()
    return job.folder.path


def test_lines_of_code_in_the_architecture_are_those_of_the_source():
    source = [[line.strip() for line in path.read_text().splitlines()] for path in ROOT.glob("src/denoiselab/**/*.py")]
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "architecture.md").read_text(), re.M | re.S)
    assert len(blocks) >= 5
    for block in blocks:
        lines = [line.strip() for line in block.splitlines()]
        found = [file[i : i + len(lines)] == lines for file in source for i in range(len(file))]
        assert any(found), block


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(page):
    """Files that pages point to exist, and so do the headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        if ":" in name:
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if heading else []
        anchors = {re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") for words in headings}
        assert not heading or heading in anchors, link


MATHEMATICS = (ROOT / "docs" / "mathematics.md").read_text()
AXES = {"schedule", "target", "weighting", "loss", "timesteps", "sampler", "spacing", "guidance"}


def table(heading: str) -> list[list[str]]:
    """The cells of a section's rows, option names first."""
    section = re.split(r"^## ", MATHEMATICS, flags=re.M)
    (found,) = [part for part in section if part.lower().startswith(heading)]
    return [line.strip("| ").split(" | ") for line in found.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("group", sorted(AXES))
def test_the_mathematics_lists_every_option_and_no_other(group):
    heading = group if group in ("timesteps", "guidance") else "losses" if group == "loss" else f"{group}s"
    assert sorted(re.findall(r"`(\w+)`", " ".join(row[0] for row in table(heading)))) == sorted(options()[group])


def test_the_table_of_samplers_says_their_orders_and_calls():
    for cells in table("samplers"):
        names, _, orders, calls = ([part.strip(" `") for part in cell.split(", ")] for cell in cells)
        for i, name in enumerate(names):
            found, order, formula = make("sampler", name, steps=10), orders[i % len(orders)], calls[i % len(calls)]
            if order != "stochastic":
                assert str(found.order) == order.replace("by tolerance", "None"), name
            n = None if formula == "counted" else eval(re.sub(r"(\d)N", r"\1 * N", formula), {"N": 10})
            assert found.nfe == n, name


def test_the_page_shows_every_file_as_it_is():
    files = {path.relative_to(LAB).as_posix(): path.read_text() for path in LAB.rglob("*.*") if path.suffix != ".pyc"}
    assert files == BLOCKS


def test_no_other_block_of_the_page_is_code():
    """A block without a file name above it is a command, a tree, an error or a piece of a pyproject.toml."""
    kinds = re.findall(r"^```(\w+)$", PAGE, re.M)
    assert sorted(kinds) == sorted(
        ["bash"] * (len(COMMANDS) + 1)
        + ["text"] * 2
        + ["toml"]
        + ["python"] * len(list(LAB.glob("*.py")))
        + ["yaml"] * len(list(LAB.rglob("*.yaml")))
    )


def test_own_options_have_names_that_the_shipped_ones_leave_free():
    shipped = options()
    assert all(
        (LAB / group / f"{name}.yaml").is_file() for group in OWN for name in set(OWN[group]) - {*shipped[group]}
    )
    assert {path.relative_to(LAB).with_suffix("").as_posix() for path in LAB.rglob("*.yaml")}.isdisjoint(
        f"{group}/{name}" for group, names in shipped.items() for name in names
    )


def test_every_option_has_a_command():
    chosen = {word for command in COMMANDS for word in re.findall(r"[\w=]+", command)}
    for path in LAB.rglob("*.yaml"):
        assert path.stem in {word.partition("=")[2] or word for word in chosen}, path


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_train_and_evaluate(command, tmp_path, monkeypatch):
    monkeypatch.chdir(LAB.parent)
    overrides, config_dir, multirun = parse(shlex.split(command)[1:], "train", "")
    cheap = [] if "callbacks" in command else ["callbacks=none"]
    cheap += [] if "model" in command else ["model=tiny_conv"]
    job = Job(compose("train", [*overrides, *cheap, f"output_dir={tmp_path}", "evaluation.n=10"], config_dir))
    job.run()
    assert not multirun
    assert json.loads((job.folder.path / "status.json").read_text())["state"] == "done"
    (evaluation,) = job.folder.path.glob("evaluations/*/evaluation.json")
    names = {record["name"] for record in json.loads(evaluation.read_text())["records"]}
    logged = (job.folder.path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert ("mean_gap" in names) == ("mean_gap" in command)
    assert ("mmd2" in names) == ("metrics=points" in command)
    assert ("ema/distance" in logged) == ("ema_distance" in command)


def test_shared_parts_are_one_object():
    parts = own("model=tiny_conv", "data.size=16")
    assert parts.denoiser.net is parts.model
    assert parts.model.first.in_channels == 1
    assert parts.model.condition.num_classes == 10
    assert parts.sampler.spacing is parts.spacing


def test_a_bad_value_is_one_line_with_the_group():
    with pytest.raises(UserError, match=r"^schedule\.power=0\.5: need a number >= 1$"):
        check(own("schedule=power", "schedule.power=0.5"))


def test_arguments_that_the_file_leaves_out_are_added():
    assert own("schedule=power", "+schedule.low=-8").schedule.low == -8


def test_own_schedule_falls_from_high_to_low():
    log_snr = own("schedule=power").schedule.log_snr(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(log_snr[[0, -1]], torch.tensor([10.0, -10.0], dtype=torch.float64))


def test_own_target_says_its_weight():
    target = own("target=difference").target
    alpha_t, sigma_t = torch.tensor([0.8, 0.1]), torch.tensor([0.6, 0.99])
    expected = ((alpha_t / sigma_t) + 1).square()
    torch.testing.assert_close(target.precision(alpha_t, sigma_t), expected)
    assert own("target=difference", "weighting=unit").weighting.formula == "(sqrt(SNR) + 1)^2"


def test_own_weighting_lies_between_those_of_x0_and_eps():
    alpha_t, sigma_t = torch.tensor([0.8, 0.1]), torch.tensor([0.6, 0.99])
    found = [own("weighting=power_of_snr", f"weighting.exponent={k}").weighting for k in (0.0, 1.0)]
    for weighting, target in zip(found, ("x0", "eps"), strict=True):
        plain = own(f"target={target}", "weighting=unit").weighting
        args = alpha_t, sigma_t, torch.ones(2)
        torch.testing.assert_close(weighting.weight(*args), plain.weight(*args))


def test_own_timesteps_have_the_stated_density():
    """P(t < 1/2) = 2^(-1/exponent), for independent draws and, to 1/n, for stratified ones."""
    parts = own("timesteps=skewed", "timesteps.exponent=0.5")
    t, w = parts.timesteps(1000, parts.schedule, denoiselab.timesteps.Place(seed=0, samples_seen=0))
    assert abs((t < 0.5).double().mean().item() - 0.25) <= 1e-3
    assert bool((w == 1).all())


def test_own_sampler_is_of_the_order_it_says():
    parts = own("schedule=power", "schedule.power=1", "sampler=multistep")
    start, spacing, kind = normals(100, 2), LogSNR(), type(parts.sampler)

    def last_noisy(steps: int) -> torch.Tensor:
        *_, state, _ = kind(spacing, steps).walk(triangle(), parts.schedule, start)
        return state.x_t

    truth = last_noisy(1280)
    errors = [rms(last_noisy(steps) - truth) for steps in (40, 80, 160)]
    orders = [torch.tensor(a / b).log2().item() for a, b in itertools.pairwise(errors)]
    assert all(abs(order - parts.sampler.order) < 0.2 for order in orders), orders


def test_a_run_that_names_own_classes_is_refused_until_they_are_allowed(quick_run, monkeypatch):
    monkeypatch.syspath_prepend(LAB)
    with pytest.raises(UserError, match=r"schedule\._target_='my_schedule\.Power' is not among the allowed classes"):
        denoiselab.load(quick_run)
    monkeypatch.setenv("DENOISELAB_ALLOW_TARGETS", "my_schedule.Power,my_metric.MeanGap")
    assert denoiselab.load(quick_run).sample(n=2, steps=2).shape == (2, 2)


def test_an_entry_point_allows_a_class(quick_run, monkeypatch):
    monkeypatch.syspath_prepend(LAB)
    (name, value) = re.search(r'^(\w+) = "([\w:]+)"$', PAGE, re.M).groups()  # type: ignore[union-attr]
    group = re.search(r'^\[project\.entry-points\."(.+)"\]$', PAGE, re.M)[1]  # type: ignore[index]
    known = EntryPoints([EntryPoint(name, value, group)])
    monkeypatch.setattr(trust, "entry_points", lambda group: known.select(group=group))
    assert denoiselab.load(quick_run).sample(n=2, steps=2).shape == (2, 2)
