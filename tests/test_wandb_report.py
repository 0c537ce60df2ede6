"""Reports for wandb's server, and sweeps whose agents call our command."""

from __future__ import annotations

import ast
import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml

from denoiselab.cli import run as cli
from denoiselab.compose import compose, plain
from denoiselab.compose import sweep as combinations
from denoiselab.dashboard import report as module
from denoiselab.dashboard.sweep_file import commands
from denoiselab.errors import UserError
from denoiselab.training import Job
from wandb_files import newest

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of pydantic's, in wandb-workspaces
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # wandb leaves files to the collector
]

MODEL = ("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1")
QUICK = ("metrics=none", "trainer.threads=1", "evaluation.n=2", "sampler.steps=1", "trainer.max_steps=4")
TINY = (*MODEL, *QUICK, "callbacks=none")
PICTURES = (*MODEL, *QUICK, "callbacks=points", "callbacks.sample_grid.n=8", "callbacks.guidance_sweep.n=4")
QUESTION = "Which schedule is better?"


@pytest.fixture(autouse=True, scope="module")
def _no_service_is_left():
    yield
    wandb.teardown()
    gc.collect()


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No key, and no server."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of two seeds of a study."""
    root = tmp_path_factory.mktemp("study")
    (root / "own" / "study").mkdir(parents=True)
    text = f"# @package _global_\nname: mine\nstudy:\n  question: {QUESTION}\n  axes: {{}}\n"
    (root / "own" / "study" / "mine.yaml").write_text(text)
    before = [*sys.path]
    for options in combinations([*PICTURES, "study=mine", "schedule=linear,cosine", "seed=0,1", f"output_dir={root}"]):
        Job(compose("train", options, root / "own")).run()
    sys.path[:] = before
    return root / "mine"


@pytest.fixture
def view(folder: Path, capsys) -> dict[str, Any]:
    assert cli(["wandb-report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder / 'wandb_report.json'}\n"
    assert "not published: no key for" in err
    assert f"denoiselab wandb-report {folder}" in err
    assert "4 of 4 runs were not logged with logger=wandb" in err
    return json.loads((folder / "wandb_report.json").read_text())


def test_the_description_is_one_that_the_library_reads(folder: Path, view: dict[str, Any]):
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.reports.v2.internal import ReportViewspec

    model = ReportViewspec.model_validate(view["view"])
    again = Report._from_model(model)
    assert again.title == "mine"
    assert again.description == QUESTION
    assert module.as_json(again)["spec"]["blocks"] == view["view"]["spec"]["blocks"]
    assert sorted(view["runs"]) == sorted(path.name.rpartition("-")[2] for path in folder.glob("*/"))


def blocks(folder: Path) -> dict[str, Any]:
    """Grids by the heading above them, and the text."""
    found, name = {}, ""
    for block in module.specification(folder, "denoiselab").blocks:
        kind = type(block).__name__
        if kind == "H2":
            name = block.text
        else:
            found[name if kind == "PanelGrid" else "text"] = block
    return found


def test_it_shows_the_runs_of_the_folder_in_arms(folder: Path, view: dict[str, Any]):
    found = blocks(folder)
    assert f"**{QUESTION}**" in found["text"].text
    assert "4 runs (4 done), grouped by `choices.schedule`" in found["text"].text
    grids = [block for name, block in found.items() if name != "text"]
    for grid in grids:
        (runset,) = grid.runsets
        assert runset.groupby == ["config.choices.schedule"]
        assert runset.filters.startswith("Metric(")
        assert set(ast.literal_eval(runset.filters.partition(" in ")[2])) == {*view["runs"]}
    (runset,) = found["Runs"].runsets
    assert runset.pinned_columns[:3] == ["run:displayName", "config:choices.value.schedule", "config:seed.value"]
    assert "summary:evaluation/held_out_loss" in runset.pinned_columns
    assert [grid.hide_run_sets for grid in grids] == [False, *[True] * (len(grids) - 1)]


def test_curves_are_over_optimizer_steps_with_seeds_as_bands(folder: Path):
    found = blocks(folder)
    curves = {panel.title: panel for panel in found["Training"].panels}
    assert {"train/loss", "val/loss", "val/loss_raw", "train/lr"} <= curves.keys()
    for name, panel in curves.items():
        assert [getattr(one, "name", one) for one in panel.y] == [name]
        assert getattr(panel.x, "name", panel.x) == "trainer/global_step"
        assert (panel.groupby_aggfunc, panel.groupby_rangefunc) == ("mean", "stddev")
    (bar,) = found["What was measured"].panels
    assert [getattr(one, "name", one) for one in bar.metrics] == ["evaluation/held_out_loss"]
    *lines, picture = found["Errors by t"].panels
    assert [line.metric_regex for line in lines] == [f"^buckets/val/{unit}/[0-9]+$" for unit in ("x_0", "eps", "v")]
    assert picture.media_keys == ["pictures/buckets"]
    media = [panel.media_keys for panel in found["Samples and what diagnostics saw"].panels]
    assert media == [["pictures/sample_grid"], ["pictures/guidance_sweep"]]
    places = [(panel.layout.x, panel.layout.y) for panel in found["Training"].panels]
    assert len({*places}) == len(places)


class Api:
    """wandb's, as far as publishing goes; keeps what it is sent."""

    default_entity = "someone"

    def __init__(self, fails: bool = False):
        self.fails, self.sent = fails, []
        self._service_api = SimpleNamespace(app_url="https://wandb.example", execute_graphql=self.answer)

    def projects(self, entity: str) -> list[Any]:
        return [SimpleNamespace(name="denoiselab")]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.sent.append(variables)
        if self.fails:
            raise OSError("the line is dead")
        if "spec" not in variables:
            return {"project": {"internalId": "UHJvamVjdA=="}}
        project = {"name": variables["projectName"], "entityName": variables["entityName"]}
        return {
            "upsertView": {
                "view": {
                    "id": "Vmlldzox",
                    "name": variables["name"],
                    "displayName": variables["displayName"],
                    "description": variables["description"],
                    "project": project,
                    "spec": variables["spec"],
                    "type": "runs",
                }
            }
        }


@pytest.fixture
def online(monkeypatch):
    def use(api: Api) -> Api:
        monkeypatch.setattr("denoiselab.loggers.reach.unreachable", lambda settings: None)
        monkeypatch.setattr(wandb, "Api", lambda *args, **kwargs: api)
        return api

    return use


def test_with_a_server_it_is_saved_there(folder: Path, online, capsys):
    api = online(Api())
    assert cli(["wandb-report", str(folder), "output=spec.json"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["spec.json", "https://wandb.example/someone/denoiselab/reports/mine--Vmlldzox"]
    assert "not published" not in err
    sent = [variables for variables in api.sent if "spec" in variables]
    assert [(one["entityName"], one["projectName"], one["displayName"]) for one in sent] == [
        ("someone", "denoiselab", "mine")
    ]
    kept = json.loads(Path("spec.json").read_text())["view"]["spec"]["blocks"]
    saved = json.loads(sent[0]["spec"])["blocks"]
    assert [block["type"] for block in saved] == [block["type"] for block in kept]
    runset = next(block for block in saved if block["type"] == "panel-grid")["metadata"]["runSets"][0]
    assert runset["project"]["entityName"] == "someone"


def test_what_was_not_saved_is_not_said_to_be(folder: Path, online, capsys):
    online(Api(fails=True))
    assert cli(["wandb-report", str(folder), "entity=me"]) == 2
    out, err = capsys.readouterr()
    assert out == f"{folder / 'wandb_report.json'}\n"
    assert err == "denoiselab wandb-report: not published: the line is dead\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing named: need one run directory or folder"),
        (["nowhere"], "nowhere: no runs here"),
        (["nowhere", "projekt=x"], "projekt=x: no such option; did you mean project?"),
    ],
)
def test_a_mistake_in_asking_for_a_report(arguments, said, capsys):
    assert cli(["wandb-report", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_the_library(folder: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert cli(["wandb-report", str(folder)]) == 2
    assert capsys.readouterr().err.endswith("needs wandb-workspaces: pip install 'denoiselab[workspaces]'\n")


def expanded(file: Path) -> list[list[str]]:
    """Every command of a grid, as wandb's agent makes it of what a server hands out."""
    import itertools

    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    content = load_sweep_config(str(file))
    assert content
    names = [*content["parameters"]]
    found = []
    for values in itertools.product(*(content["parameters"][name]["values"] for name in names)):
        handed = json.loads(json.dumps({name: {"value": value} for name, value in zip(names, values, strict=True)}))
        made = create_sweep_command_args({"args": handed})["args_no_hyphens"]
        command = create_sweep_command(list(content["command"]))
        assert command[:3] == ["${env}", "denoiselab", "train"]
        assert command[-1] == "${args_no_hyphens}"
        found.append([*command[3:-1], *made])
    return found


AXES = ('name="a, [b]=c","d e"', "optimizer.betas=[0.9,0.99],[0.9,0.95]", "optimizer.lr=1e-3,2.5e-5", "seed=0,7")


def test_an_agent_composes_what_was_asked(capsys):
    own = ("p_null=0.25",)
    assert cli(["wandb-sweep", *TINY, *own, *AXES, "output=sweep.yaml"]) == 0
    out, err = capsys.readouterr()
    assert out == "sweep.yaml\n"
    assert err.endswith("16 combinations checked; next: wandb sweep sweep.yaml\n")
    content = yaml.safe_load(Path("sweep.yaml").read_text())
    assert (content["method"], content["metric"]) == ("grid", {"name": "evaluation/held_out_loss", "goal": "minimize"})
    assert content["parameters"]["optimizer.lr"] == {"values": [1e-3, 2.5e-5]}
    meant = combinations([*TINY, *own, "logger=wandb", "logger.wandb.offline=false", *AXES])
    handed = expanded(Path("sweep.yaml"))
    assert handed == [*commands(content)]
    for given, asked in [(handed[0], meant[0]), (handed[-1], meant[-1]), (handed[5], meant[5])]:
        assert plain(compose("train", given)) == plain(compose("train", asked))
    names = {plain(compose("train", [line for line in one if line.startswith("name=")]))["name"] for one in handed}
    assert names == {"a, [b]=c", "d e"}


def test_words_that_yaml_or_python_would_change(capsys):
    assert cli(["wandb-sweep", *TINY, "sampler.clip=null,1", "trainer.deterministic=true,false", "output=s.yaml"]) == 2
    assert "this axis has no effect" in capsys.readouterr().err
    assert not Path("s.yaml").exists()
    assert cli(["wandb-sweep", *TINY, "sampler.clip=null,1", "seed=0,1", "output=s.yaml"]) == 0
    clips = [plain(compose("train", one))["sampler"]["clip"] for one in expanded(Path("s.yaml"))]
    assert clips == [None, None, 1, 1]


def test_intervals_are_distributions(capsys):
    axes = ("optimizer.lr=tag(log,interval(1e-4,1e-2))", "p_null=interval(0,0.5)", "model.depth=int(interval(1,3))")
    own = ("method=bayes", "metric=val/loss.min", "goal=minimize", "run_cap=20", "sweep_name=mine", "entity=me")
    assert cli(["wandb-sweep", *TINY[:-1], *axes, *own, "callbacks=none", "logger=[wandb,tensorboard]"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "p_null": {"distribution": "uniform", "min": 0.0, "max": 0.5},
        "model.depth": {"distribution": "int_uniform", "min": 1, "max": 3},
    }
    assert (content["name"], content["entity"], content["run_cap"], content["method"]) == ("mine", "me", 20, "bayes")
    assert content["metric"] == {"name": "val/loss.min", "goal": "minimize"}
    assert "logger=[wandb,tensorboard]" in content["command"]
    assert "logger=wandb" not in content["command"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["seed=0"], "nothing is swept: give an option several values"),
        (["optimizer.lr=interval(1e-4,1e-2)"], "method=grid takes lists of values"),
        (["optimizer.lr=interval(1e-2,1e-4)", "method=random"], "need a smaller end and a larger one"),
        (["seed=0,1", "schedule=cosine,cosin"], "schedule=cosin: did you mean cosine?"),
        (["seed=0,1", "method=gird"], "method=gird: need grid or random or bayes"),
        (["seed=0,1", "metric=val/loss"], "metric=val/loss: say which way is better too"),
        (["seed=0,1", "run_cap=many"], "run_cap=many: need a whole number"),
        (["seed=0,1", "data.batch_size=16,0"], "data.batch_size=0"),
    ],
)
def test_a_mistake_in_asking_for_a_sweep(options, said, capsys):
    tiny = [line for line in TINY if line.partition("=")[0] not in [one.partition("=")[0] for one in options]]
    assert cli(["wandb-sweep", *tiny, *options, "output=sweep.yaml"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not Path("sweep.yaml").exists()


def test_an_agent_of_wandbs_runs_a_job(tmp_path: Path, monkeypatch):
    """The agent's own code, from a command of the server to a process; there is no server, so the run stays here."""
    from wandb.wandb_agent import Agent

    assert cli(["wandb-sweep", *TINY, 'name="a, [b]=c",other', "seed=0,1", "output=sweep.yaml"]) == 0
    content = yaml.safe_load(Path("sweep.yaml").read_text())
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"SWEEP_ID": "sweep123", "BASE_URL": "http://127.0.0.1:9", "API_KEY": "a" * 40}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_RUN_ID", "")  # and what else the agent sets is taken back after the test
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    agent = object.__new__(Agent)
    agent.__dict__ |= {"_in_jupyter": False, "_function": None, "_forward_signals": False, "_run_processes": {}}
    agent.__dict__ |= {"_sweep_command": content["command"]}
    values = {name: parameter["values"][0] for name, parameter in content["parameters"].items()}
    handed = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"type": "run", "run_id": "agent456", "program": "denoiselab", "args": handed})
    assert agent._run_processes["agent456"].wait(120) == 0
    (run,) = tmp_path.glob("outputs/a, [[]b[]]=c/*/")
    found = newest(run)
    assert (found.run.run_id, found.run.sweep_id, found.exit_code) == ("agent456", "sweep123", 0)
    assert found.config["hash"] == run.name.rpartition("-")[2]
    assert found.steps("evaluation/held_out_loss") == [4]


def test_a_study_brings_its_axes(folder: Path, capsys):
    study = folder.parent / "own" / "study" / "axes.yaml"
    study.write_text(
        "# @package _global_\nname: axes\nstudy:\n  question: Why?\n  axes: {seed: [3, 4], p_null: [0.1]}\n"
    )
    asked = ["wandb-sweep", "--config-dir", str(study.parents[1]), *TINY, "study=axes"]
    assert cli(asked) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["parameters"] == {"seed": {"values": [3, 4]}}
    assert content["command"][3:5] == ["--config-dir", str(study.parents[1].resolve())]
    assert "p_null=0.1" in content["command"]
    assert cli([*asked, "seed=5,6"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["parameters"] == {"seed": {"values": [5, 6]}}


def test_one_error_is_a_user_error():
    with pytest.raises(UserError, match="no runs here"):
        module.specification(Path("nowhere"), "p")
