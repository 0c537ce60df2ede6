"""What holds for every diagnostic: it looks, keeps, and draws the same picture again from what it kept."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from denoiselab.compose import options
from denoiselab.diagnostics import Diagnostic, Finding
from denoiselab.diagnostics.figure import WIDTH
from denoiselab.inspection import inspect_once
from healthy import subject
from looks import SMALL

SEVERAL = {"none", "overview"}
"""Options that are no diagnostic of their own."""


@pytest.mark.parametrize("name", [option for option in options()["diagnostics"] if option not in SEVERAL])
def test_a_finding_is_kept_and_drawn_again(
    name: str, healthy: list[Path], example_run: Path, capsys: pytest.CaptureFixture[str]
):
    kind, overrides = SMALL[name]
    run = {"points": healthy[0], "digits": example_run}[kind]
    seen = subject(run, f"diagnostics={name}", *overrides)
    ((key, diagnostic),) = seen.parts.diagnostics.items()
    assert isinstance(diagnostic, Diagnostic)
    folder = inspect_once(key, diagnostic, seen.parts.config["diagnostics"][key], seen, rerun=True)
    assert str(folder) in capsys.readouterr().err
    found = Finding.load(folder)
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert rows
    assert [*rows[0]] == [*found.table]
    assert len({len(column) for column in found.table.values()}) == 1
    assert json.loads((folder / "finding.json").read_text())["protocol"]["step"] == seen.run.step
    again = diagnostic.picture(found)
    with Image.open(folder / "picture.png") as kept:
        assert kept.width >= WIDTH
        assert ImageChops.difference(kept.convert("RGB"), again).getbbox() is None
    for record in found.records:
        assert record.protocol or record.controls, f"{record.name}: what does it depend on?"


def fresh(run: Path, folder: Path) -> Path:
    """A copy that nothing has looked at."""
    return Path(shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("diagnostics", "evaluations")))


def test_the_command_looks_at_what_is_named_and_measures_what_is_named(healthy: list[Path], tmp_path: Path, called):
    """Diagnostics alone measure nothing else; a look that exists is not made again; several are made in turn."""
    run = fresh(healthy[0], tmp_path)
    looks = ("evaluate", f"ckpt={run}", "sampler.steps=2", "evaluation.n=20", "device=cpu")
    first = called(*looks, "diagnostics=[forward,loss_curve]")
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in (run / "diagnostics").iterdir()) == ["forward", "loss_curve"]
    assert not (run / "evaluations").exists()
    again = called(*looks, "diagnostics=[forward,loss_curve]", "metrics=none")
    assert again.stderr.count("already looked at") == 2
    assert len(list(run.glob("evaluations/*/evaluation.json"))) == 1
    changed = called(*looks, "diagnostics=forward", "diagnostics.forward.times=[0.5]")
    assert "already" not in changed.stderr
    assert len(list(run.glob("diagnostics/forward/*"))) == 2


def test_an_overview_is_several(healthy: list[Path]):
    assert set(subject(healthy[0], "diagnostics=overview").parts.diagnostics) >= {"forward", "loss_by_t", "mismatch"}


MISTAKES = {
    ("diagnostics=frward",): "did you mean forward?",
    ("diagnostics=[loss_curve,frward]",): "no option 'frward' here; did you mean forward?",
    ("diagnostics=forward", "diagnostics.forward.tims=[1]"): "did you mean times?",
    ("diagnostics=forward", "diagnostics.forward.n=0"): "diagnostics.forward.n=0: need at least 1",
    ("diagnostics=forward", "diagnostics.forward.times=[2]"): "times=[2]: need times in [0, 1]",
    ("diagnostics=forward", "diagnostics.forward.budget=5"): "need a text, as in diagnostics.forward.budget=5%",
    ("diagnostics=forward", "diagnostics.forward.every=0"): "every=0: need a number of steps >= 1",
    ("diagnostics=best_target", "diagnostics.best_target.others=[nowhere]"): "nowhere: no such run directory",
}


@pytest.mark.parametrize("options", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_leaves_nothing(
    options: tuple[str, ...], healthy: list[Path], tmp_path: Path, called
):
    run = fresh(healthy[0], tmp_path)
    result = called("evaluate", f"ckpt={run}", *options, "device=cpu", "lint.level=none")
    assert result.returncode == 2
    assert MISTAKES[options] in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (run / "diagnostics").exists()
