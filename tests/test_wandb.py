"""Runs logged to wandb offline, read back from its files."""

from __future__ import annotations

import csv
import gc
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from denoiselab import rows as rows_module
from denoiselab.callbacks import TrainingMetrics
from denoiselab.compose import compose
from denoiselab.errors import Interrupted, NonFiniteLoss
from denoiselab.loggers import Wandb
from denoiselab.loggers import wandb as module
from denoiselab.loggers.curves import curves
from denoiselab.loggers.facts import Facts
from denoiselab.training import Job
from runs import differences, last
from wandb_files import Logged, newest, runs

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""wandb leaves open files and its service to the garbage collector."""

STEP = "trainer/global_step"
MODEL = ("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1")
QUICK = ("metrics=none", "trainer.threads=1", "evaluation.n=2", "sampler.steps=1", "trainer.checkpoint_every=4")
TINY = (*MODEL, *QUICK, "trainer.max_steps=10", "trainer.log_every=1")
PICTURES = ("callbacks=points", "callbacks.sample_grid.n=8", "callbacks.guidance_sweep.n=4")
OFTEN = (*PICTURES, "callbacks.buckets.every=5", "callbacks.sample_grid.every=5", "callbacks.guidance_sweep.every=10")
WANDB = ("logger=wandb", "callbacks=none")


def trained(root: Path, *overrides: str, config_dir: Path | None = None) -> Path:
    job = Job(compose("train", [*TINY, f"output_dir={root}", *overrides], config_dir))
    job.run()
    return job.folder.path


def rows(folder: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows_module.rows(folder / "metrics.jsonl") if name in row}


def one(folder: Path) -> Logged:
    (found,) = runs(folder)
    return found


@pytest.fixture(autouse=True, scope="module")
def _no_service_is_left():
    yield
    wandb.teardown()
    gc.collect()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("one"), "logger=wandb", "name=mine", *OFTEN)


@pytest.fixture(scope="module")
def found(run: Path) -> Logged:
    return one(run)


def test_a_job_is_one_run_with_its_own_id(run: Path, found: Logged):
    assert (
        found.run.run_id
        == run.name.rpartition("-")[2]
        == json.loads((run / "status.json").read_text()).get("hash", run.name.rpartition("-")[2])
    )
    assert (found.run.display_name, found.run.run_group, found.run.job_type) == (run.name, "mine", "train")
    assert {"data:8gaussians", "model:mlp", "loss:v"} <= {*found.run.tags}
    assert found.exit_code == 0


def test_the_configuration_is_there_and_says_what_was_chosen(run: Path, found: Logged):
    assert found.config["hash"] == found.run.run_id
    assert found.config["choices"]["schedule"] == "cosine"
    assert found.config["seed"] == 0
    assert found.config["optimizer"]["lr"] == 1e-3
    assert "model.width=8" in found.config["overrides"]
    assert "logger" not in found.config


def test_scalars_are_those_of_the_run_on_the_axis_of_optimizer_steps(run: Path, found: Logged):
    names = ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/loss_raw", "speed/steps_per_second")
    for name in names:
        expected = rows(run, name)
        assert expected
        assert {row[STEP]: row[name] for row in found.rows(name)} == pytest.approx(expected, nan_ok=True)
        assert len(found.rows(name)) == len(expected)
    assert all(STEP in row for row in found.history)
    steps = [row[STEP] for row in found.history]
    assert steps == sorted(steps)
    assert found.metrics["*"].step_metric == STEP
    assert found.metrics["train/loss"].step_metric == STEP


def test_lines_of_tables_say_the_best_and_the_last(run: Path, found: Logged):
    losses = [value for _, value in sorted(rows(run, "train/loss").items())]
    assert found.summary["train/loss"] == pytest.approx({"min": min(losses), "last": losses[-1]})
    speeds = rows(run, "speed/steps_per_second").values()
    assert found.summary["speed/steps_per_second"]["mean"] == pytest.approx(np.mean([*speeds]))
    assert found.summary["train/lr"] == 1e-3


def test_errors_by_t_are_a_table_a_picture_and_hidden_scalars(run: Path, found: Logged):
    kept = [row for row in rows_module.rows(run / "metrics.jsonl") if "buckets/val/x_0" in row]
    assert found.steps("tables/buckets") == [row["step"] for row in kept] == [5, 10]
    for file, row in zip(found.files("tables/buckets"), kept, strict=True):
        table = json.loads(file.read_text())
        assert table["columns"] == ["source", "unit", "t", "error", "standard_error", "count"]
        lines = [line for line in table["data"] if line[:2] == ["val", "eps"]]
        assert [line[2] for line in lines] == pytest.approx([0.05 + 0.1 * k for k in range(10)])
        assert [line[3] for line in lines] == pytest.approx(row["buckets/val/eps"])
        assert [line[4] for line in lines] == row["buckets/val/eps_se"]
    name = "buckets/val/x_0/03"
    assert [row[name] for row in found.rows(name)] == pytest.approx([row["buckets/val/x_0"][3] for row in kept])
    assert found.metrics[name].options.hidden
    assert not [key for row in found.history for key in row if "_se/" in key or "count" in key]
    (_, second) = found.files("pictures/buckets")
    assert len(np.unique(np.asarray(Image.open(second).convert("L")))) > 50


def test_pictures_are_those_of_the_run(run: Path, found: Logged):
    assert found.steps("pictures/sample_grid") == [5, 10]
    for step, file in zip((5, 10), found.files("pictures/sample_grid"), strict=True):
        mine = np.asarray(Image.open(run / "pictures" / f"sample_grid_{step:08d}.png").convert("RGB"))
        np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), mine)
    (look,) = run.glob("diagnostics/guidance_sweep/00000010-*/picture.png")
    (file,) = found.files("pictures/guidance_sweep")
    np.testing.assert_array_equal(
        np.asarray(Image.open(file).convert("RGB")), np.asarray(Image.open(look).convert("RGB"))
    )
    (table,) = found.files("tables/guidance_sweep")
    assert json.loads(table.read_text())["columns"] == next(
        csv.reader(look.with_name("table.csv").read_text().splitlines())
    )


def test_what_was_measured_is_there_with_its_protocol(run: Path, found: Logged):
    (file,) = run.glob("evaluations/*/evaluation.json")
    content = json.loads(file.read_text())
    (record,) = content["records"]
    assert found.summary["evaluation/held_out_loss"] == pytest.approx(record["value"])
    assert found.steps("evaluation/held_out_loss") == [10]
    (table,) = found.files("evaluation/results")
    kept = json.loads(table.read_text())
    (line,) = [dict(zip(kept["columns"], row, strict=True)) for row in kept["data"]]
    assert (line["evaluation"], line["measurement"], line["better"]) == (file.parent.name, "held_out_loss", "lower")
    assert (line["sampler"], line["steps"], line["n"], line["weights"]) == ("DDIM", 1, 2, "ema")
    assert json.loads(line["protocol"])["schedule"] == content["protocol"]["schedule"]


def test_it_changes_nothing(run: Path, tmp_path: Path):
    other = trained(tmp_path, "logger=csv", *OFTEN)
    assert differences(last(run), last(other)) == [".denoiselab.choices.logger"]
    assert rows(run, "val/loss") == rows(other, "val/loss")


@pytest.mark.parametrize("error", ["a mistake", NonFiniteLoss("nan"), signal.SIGTERM], ids=["error", "nan", "signal"])
@pytest.mark.faults
def test_how_it_ended_is_what_the_process_says(error, tmp_path: Path, monkeypatch, faults):
    log = TrainingMetrics.run

    def fails(self, trainer, pl_module):
        log(self, trainer, pl_module)
        if trainer.global_step == 6:
            if isinstance(error, signal.Signals):
                os.kill(os.getpid(), error)
            else:
                raise RuntimeError(error) if isinstance(error, str) else error

    monkeypatch.setattr(TrainingMetrics, "run", fails)
    with pytest.raises((RuntimeError, Interrupted)) as caught:
        trained(tmp_path, *WANDB)
    (folder,) = tmp_path.glob("runs/*/")
    assert one(folder).exit_code == getattr(caught.value, "status", 1) in (1, 3, 143)
    state = json.loads((folder / "status.json").read_text())["state"]
    assert state == ("preempted" if error is signal.SIGTERM else "failed")
    assert max(one(folder).steps("train/loss")) == 6
    faults.injected("call")


@pytest.mark.faults
def test_a_run_that_goes_on_has_every_step_once(tmp_path: Path, monkeypatch, capsys, faults):
    log = TrainingMetrics.run

    def dies(self, trainer, pl_module):
        log(self, trainer, pl_module)
        if trainer.global_step == 7:  # rows 5, 6 and 7 are newer than the checkpoint
            raise RuntimeError("dead")

    options = ("logger=wandb", *PICTURES, "callbacks.buckets.every=2", "callbacks.sample_grid.every=2")
    monkeypatch.setattr(TrainingMetrics, "run", dies)
    with pytest.raises(RuntimeError, match="dead"):
        trained(tmp_path, *options)
    monkeypatch.setattr(TrainingMetrics, "run", log)
    folder = trained(tmp_path, *options)
    first, second = runs(folder)
    assert first.run.run_id == second.run.run_id == folder.name.rpartition("-")[2]
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.steps("train/loss") == [*range(1, 8)]
    assert second.steps("train/loss") == [*range(1, 11)]
    assert {row[STEP]: row["train/loss"] for row in second.rows("train/loss")} == rows(folder, "train/loss")
    for name in ("tables/buckets", "pictures/sample_grid"):
        assert second.steps(name) == [2, 4, 6, 8, 10]
    assert second.steps("pictures/buckets") == [4, 6, 8, 10]  # of what was before, the newest is drawn
    steps = [row[STEP] for row in second.history]
    assert steps == sorted(steps)
    assert "warning" not in capsys.readouterr().err.lower()
    faults.injected("call")


def test_a_finished_run_is_shown_once_asked(tmp_path: Path):
    folder = trained(tmp_path, "logger=csv", "callbacks=none")
    assert trained(tmp_path, *WANDB) == folder
    found = one(folder)
    assert {row[STEP]: row["train/loss"] for row in found.rows("train/loss")} == rows(folder, "train/loss")
    assert "evaluation/held_out_loss" in found.summary
    trained(tmp_path, *WANDB)
    assert len(runs(folder)) == 1  # there is nothing new


def test_runs_of_a_sweep_are_runs_of_one_group(tmp_path: Path, command):
    done = command("train", "-m", *TINY, "callbacks=none", "logger=wandb", "name=several", "seed=0,1")
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / line for line in done.stdout.split()]
    found = [one(folder) for folder in folders]
    assert len({logged.run.run_id for logged in found}) == 2
    assert [logged.run.run_id for logged in found] == [folder.name.rpartition("-")[2] for folder in folders]
    assert {logged.run.run_group for logged in found} == {"several"}
    assert sorted(logged.config["seed"] for logged in found) == [0, 1]
    assert [logged.exit_code for logged in found] == [0, 0]
    assert "wandb: warning" not in done.stderr.lower()


def listening() -> socket.socket:
    """A server that takes connections and never says a word."""
    made = socket.create_server(("127.0.0.1", 0))
    made.listen(50)
    return made


@pytest.mark.parametrize("server", ["none", "silent", "no key"])
@pytest.mark.faults
def test_without_a_server_a_run_is_kept_offline(server: str, tmp_path: Path, monkeypatch, capsys, faults):
    silent = listening()
    port = silent.getsockname()[1] if server == "silent" else 9
    wandb.teardown()  # which reads the environment once
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if server == "no key":
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    else:
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(module, "INIT_SECONDS", 2.0)
    began = time.perf_counter()
    folder = trained(tmp_path, *WANDB, "logger.wandb.offline=false")
    assert time.perf_counter() - began < 15
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert lines[0].endswith("this run is kept offline")
    assert {"none": "Connection refused", "silent": "giving up", "no key": "no key for 127.0.0.1"}[server] in lines[0]
    found = newest(folder)
    assert found.steps("train/loss") == [*range(1, 11)]
    assert found.exit_code == 0
    assert not silent.close()
    monkeypatch.undo()
    wandb.teardown()
    faults.injected("call")


def services() -> list[int]:
    """wandb's processes that this one has started."""
    listed = subprocess.run(["pgrep", "-f", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.faults
def test_a_service_that_dies_does_not_stop_training(tmp_path: Path, monkeypatch, capsys, run: Path, faults):
    log = TrainingMetrics.run

    def kills(self, trainer, pl_module):
        if trainer.global_step == 6:
            (service,) = services()
            os.kill(service, signal.SIGKILL)
            time.sleep(0.2)
        log(self, trainer, pl_module)

    monkeypatch.setattr(TrainingMetrics, "run", kills)
    folder = trained(tmp_path, *WANDB)
    assert differences(last(run)["state_dict"], last(folder)["state_dict"]) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert "it goes on in another folder, offline" in lines[0]
    found = newest(folder)
    assert found.steps("train/loss") == [*range(1, 11)]
    assert (found.exit_code, found.run.run_id) == (0, folder.name.rpartition("-")[2])
    faults.injected("call")


CANARIES = {"WANDB_API_KEY": "w" * 33 + "canary1", "HF_TOKEN": "canary2-hf", "AWS_SECRET_ACCESS_KEY": "canary3-aws"}
CANARIES |= {"MY_SECRET": "canary4-mine", "MY_URL": "canary5-url", "MY_TOKEN": "canary6-plain"}
CANARIES |= {"MY_PASSWORD": "canary7-given"}


def test_no_secret_is_logged(tmp_path: Path, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "own" / "callbacks").mkdir(parents=True)
    (tmp_path / "own" / "private.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Private(pl.Callback):\n"
        "    def __init__(self, place, where, token, password): assert place == 'canary4-mine' in where\n"
    )
    (tmp_path / "own" / "callbacks" / "private.yaml").write_text(
        "private:\n  _target_: private.Private\n  place: ${oc.env:MY_SECRET}\n"
        "  where: https://me:${oc.env:MY_URL}@host/${callbacks.private.place}\n"
        "  token: ${oc.env:MY_TOKEN}\n  password: ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "own")
    options = ("callbacks=private", "logger=[wandb,tensorboard]", "callbacks.private.password='${oc.env:MY_PASSWORD}'")
    folder = trained(tmp_path, *options, config_dir=tmp_path / "own")
    own = one(folder).config["callbacks"]["private"]
    assert own["place"] == "${oc.env:MY_SECRET}"
    assert own["where"] == "https://host/${callbacks.private.place}"
    assert own["token"] == "${oc.env:MY_TOKEN}"
    assert "callbacks.private.password=(kept back)" in one(folder).config["overrides"]
    files = [path for place in ("wandb", "tensorboard") for path in (folder / place).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"canary" in path.read_bytes()]


def test_under_an_agent_the_run_is_the_agents(tmp_path: Path, monkeypatch, capsys):
    folder = trained(tmp_path, *WANDB)
    wandb.teardown()
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text("wandb_version: 1\nseed:\n  value: 0\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "agent456")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    assert trained(tmp_path, *WANDB) == folder  # done before: the agent is shown it all the same
    found = newest(folder)
    assert (found.run.run_id, found.run.sweep_id) == ("agent456", "sweep123")
    assert found.config["hash"] == folder.name.rpartition("-")[2]
    assert found.config["seed"] == 0
    assert "evaluation/held_out_loss" in found.summary
    assert found.steps("train/loss") == [*range(1, 11)]
    assert f"run agent456 of sweep sweep123; its own address is {found.config['hash']}" in capsys.readouterr().err
    monkeypatch.undo()
    wandb.teardown()


class Server:
    """What wandb's run is when the server knew it already."""

    resumed, offline, dir, id = True, False, "/nowhere/files", "id"

    def __init__(self, step: int | None):
        self.summary, self.rows = ({} if step is None else {STEP: step}), []

    def define_metric(self, *args, **kwargs): ...

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.rows.append(exit_code)


@pytest.mark.parametrize(("arrived", "sent"), [(7, [8, 9]), (2, [3, 4, 5, 6, 7, 8, 9]), (None, [*range(1, 10)])])
def test_the_server_gets_what_it_lacks(arrived, sent, tmp_path: Path, monkeypatch):
    """A run that stopped at 7 goes on from its checkpoint at 4; rows up to ``arrived`` were sent before."""
    lines = [json.dumps({"step": step, "train/loss": float(step)}) for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    server = Server(arrived)
    monkeypatch.setattr(Wandb, "_mode", lambda self: "online")
    monkeypatch.setattr(Wandb, "_start", lambda self, mode: server)
    facts = Facts({"seed": 0}, {}, [])
    logger = Wandb(tmp_path, "id", "name", facts, step=4, offline=False)
    for step in range(5, 10):
        logger.row({"train/loss": float(step)}, step)
    logger.close(0)
    assert [row[STEP] for row in server.rows[:-1]] == sent
    assert server.rows[-1] == 0


def test_curves_of_a_row_without_any():
    assert curves({"train/loss": 1.0}) == {}
