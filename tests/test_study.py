"""Studies: every one that is shipped works, and the command makes what its file says."""

import json
from pathlib import Path

import pytest

from denoiselab.cli.train import Training
from denoiselab.compose import _parse, option, options, plain, sweep
from denoiselab.study import axes_of, composed, study_of, written
from test_sweep import TINY, content

NAMES = [name for name in options()["study"] if name != "none"]

MEASURED = {
    "digits": {"fd_digits", "class_accuracy", "precision", "recall", "nearest_training_ratio", "held_out_loss"},
    "points": {"mmd2", "modes_covered", "held_out_loss"},
}
"""By the name of the metrics' option."""


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_study_says_what_it_asks_and_how_that_is_decided(name: str):
    chosen = composed(name, [], None)
    study = study_of(chosen)
    assert set(study) == {"question", "axes", "metrics", "budget", "claims"}
    assert study["question"].endswith("?")
    assert len(study["axes"]["seed"]) >= 3
    assert study["budget"] > 0
    assert chosen.config.name == name
    assert study["claims"]
    assert set(study["metrics"]) <= MEASURED[chosen.choices["metrics"]]
    for claim in study["claims"]:
        assert set(claim) == {"metric", "better", "than"}
        assert claim["metric"] in study["metrics"]
        assert set(claim["better"]) == set(claim["than"])
        for side in (claim["better"], claim["than"]):
            for key, value in side.items():
                assert value in study["axes"][key]


@pytest.mark.parametrize("name", NAMES)
def test_the_jobs_of_a_shipped_study_are_different_runs_or_evaluations(name: str):
    maker = Training(None, here=True)
    axes = [line for line in axes_of(study_of(composed(name, [], None)), name) if option(line) != "seed"]
    jobs = [maker.job([f"study={name}", *one]) for one in sweep(axes)]
    maker.check(jobs, axes)
    assert len({(job.path, job.evaluation_address) for job in jobs}) == len(jobs) > 1


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_study_runs_two_steps(name: str, train):
    folder = train(f"study={name}", "trainer.max_steps=2")
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert "question: " in (folder / "config.yaml").read_text()


MINE = """# @package _global_
name: mine
study:
  question: Does depth help?
  axes:
    model.depth: [1, 2]
    seed: range(2)
  metrics: [held_out_loss]
  budget: null
  claims: []
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "lab" / "study"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(MINE)
    return folder.parent


def test_a_study_makes_its_runs_and_its_report(mine: Path, called, tmp_path: Path, monkeypatch):
    """Of a folder of one's own, with an axis of the command in the place of the study's; and again, where nothing is
    left to do."""
    command = ("study", "--config-dir", str(mine), "mine", *(line for line in TINY if "depth" not in line), "seed=5")
    result = called(*command)
    assert result.returncode == 0, result.stderr
    found = sorted(tmp_path.glob("outputs/mine/*/identity.json"))
    assert sorted(json.loads(path.read_text())["model"]["depth"] for path in found) == [1, 2]
    assert {json.loads(path.read_text())["seed"] for path in found} == {5}
    assert "report: outputs/mine/report.html" in result.stderr
    assert "Does depth help?" in (tmp_path / "outputs/mine/report.html").read_text()
    before = {path.parent: content(path.parent) for path in found}
    assert called(*command).returncode == 0
    assert {path.parent: content(path.parent) for path in found} == before


def test_no_run_is_started_once_the_budget_is_spent(mine: Path, called, tmp_path: Path):
    (mine / "study" / "mine.yaml").write_text(MINE.replace("budget: null", "budget: 1e-9"))
    result = called("study", "--config-dir", str(mine), "mine", *(line for line in TINY if "depth" not in line))
    assert result.returncode == 1
    assert "not made: model.depth=1 seed=0" in result.stderr
    assert "the 1e-09 hours are spent" in result.stderr
    assert not [*tmp_path.glob("outputs/mine/*/identity.json")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["schedulse"], "schedulse: no such study; did you mean schedules?"),
        (["schedules", "seed"], "seed: not of the form option=value"),
        (["schedules", "schedule=nothing"], "schedule=nothing: schedule is one of"),
        (["schedules", "--quick"], "--quick: no such flag"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, called):
    result = called("study", *words)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_study_without_axes_says_so(mine: Path, called):
    (mine / "study" / "mine.yaml").write_text("# @package _global_\nstudy: {question: Why, axes: {}}\n")
    result = called("study", "--config-dir", str(mine), "mine")
    assert result.returncode == 2
    assert "study=mine: need study.axes, as in" in result.stderr


def test_an_option_file_that_is_no_yaml_is_named(mine: Path, called):
    (mine / "study" / "mine.yaml").write_text("# @package _global_\nstudy: {question: Why?, axes: {}}\n")
    result = called("study", "--config-dir", str(mine), "mine")
    assert result.returncode == 2
    assert "study/mine.yaml, line 2: not YAML (expected ',' or '}', but got '?')" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_studies_are_listed_with_their_questions(called):
    lines = called("study").stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(line.endswith("?") for line in lines)


@pytest.mark.parametrize(
    "value", ["plain", "a b", "true", "1", 1, 0.5, True, None, [1, "x y"], {"a": "b c"}, 'q"uote', "a=b,[c"]
)
def test_a_value_is_written_so_that_it_is_read_as_it_was(value):
    _, override = _parse([f"name={written(value)}"])[0]
    assert not override.is_sweep_override()
    assert override.value() == value
    assert type(override.value()) is type(value) or isinstance(value, str)


def test_a_run_that_belongs_to_no_study_says_so(train):
    from denoiselab.compose import compose

    assert plain(compose("train", []))["study"] is None


def test_runs_of_a_study_have_the_address_that_they_have_alone(tmp_path: Path):
    from denoiselab.compose import compose
    from denoiselab.training import Job

    alone = Job(compose("train", ["experiment=digits", "schedule=linear", "name=schedules"]))
    assert Job(compose("train", ["study=schedules", "schedule=linear"])).path == alone.path
