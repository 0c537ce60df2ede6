"""What a run uses fails: a loader process, wandb's server, wandb's own process; with the run killed on top."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb
from test_signals import the_run

from denoiselab.rows import rows
from ledger import Faults
from runs import POINTS, differences, last
from traps import At, Note, Signal
from wandb_files import newest
from warm import Warm

pytestmark = pytest.mark.faults

SECONDS = 10.0
"""From the death of a loader process to the end of the run."""

OPTIONS = ("train", *POINTS, "trainer.max_steps=12", "trainer.checkpoint_every=5", "trainer.log_every=1")
STEP = "denoiselab.module:Diffusion.training_step"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With nothing that could fail."""
    folder = tmp_path_factory.mktemp("whole")
    command = Warm(folder, *OPTIONS)
    assert command.wait() == 0, command.said
    return the_run(folder)


def steps(run: Path) -> list[int]:
    return [row["step"] for row in rows(run / "metrics.jsonl") if "train/loss" in row]


def same(whole: Path, run: Path, faults: Faults) -> None:
    """Beside the name of the logger."""
    contents = last(whole), last(run)
    for content in contents:
        content["denoiselab"]["choices"].pop("logger")
    faults.same(*contents)
    losses = [[row["train/loss"] for row in rows(one / "metrics.jsonl") if "train/loss" in row] for one in (whole, run)]
    assert losses[0] == losses[1]
    assert steps(run) == [*range(1, 13)]


@dataclass(frozen=True)
class KillLoader:
    """As the kernel does where memory runs out."""

    number: int = signal.SIGKILL

    def __call__(self) -> None:
        loader = multiprocessing.active_children()[0]
        assert loader.pid is not None
        os.kill(loader.pid, self.number)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 7, 12])
def test_a_loader_process_that_is_killed(call: int, whole: Path, tmp_path: Path, faults: Faults):
    folder, file = tmp_path / "run", tmp_path / "hit"
    options = (*OPTIONS, "data.workers=2", "trainer.max_steps=100000")
    first = Warm(folder, *options, traps=[At(STEP, call, (Note(file), KillLoader()))])
    assert first.wait() == 1
    assert time.time() - file.stat().st_mtime < SECONDS
    (line,) = (line for line in first.said.splitlines() if "loader process" in line)
    assert re.match(r"denoiselab train: data: loader process \d+, one of 2, was killed by SIGKILL; memory may", line)
    assert "Traceback" not in first.said
    faults.injected("process")
    again = Warm(folder, *OPTIONS, "data.workers=2")
    assert again.wait() == 0, again.said
    same(whole, the_run(folder), faults)


WANDB = (*OPTIONS, "logger=wandb", "logger.wandb.offline=false")


def nowhere(folder: Path) -> dict[str, str]:
    """A server that refuses, with a key for it."""
    return {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "NETRC": str(folder / "none")}


def services(parent: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-f", "-P", str(parent), "wandb-core"], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


@dataclass(frozen=True)
class KillService:
    """wandb's own process."""

    def __call__(self) -> None:
        (service,) = services(os.getpid())
        os.kill(service, signal.SIGKILL)
        time.sleep(0.2)


DEATHS = {
    "its server is away": (),
    "the run is killed as well": (Signal(signal.SIGKILL),),
    "its process is killed": (KillService(),),
    "its process and then the run are killed": (KillService(), Signal(signal.SIGKILL)),
    "its process is killed and the run is told to stop": (KillService(), Signal(signal.SIGTERM)),
}


@pytest.mark.parametrize(
    "death", [pytest.param(name, marks=[pytest.mark.slow] if k != 1 else []) for k, name in enumerate(DEATHS)]
)
def test_wandb_is_away_and_nothing_is_lost(death: str, whole: Path, tmp_path: Path, faults: Faults):
    """Rows are there once, results are those of a run without it."""
    folder, acts = tmp_path / "run", DEATHS[death]
    variables = nowhere(tmp_path)
    first = Warm(folder, *WANDB, traps=[At(STEP, 8, acts)] if acts else [], variables=variables)
    ends = {Signal(signal.SIGKILL): -9, Signal(signal.SIGTERM): 143}
    assert first.wait() == next((status for act, status in ends.items() if act in acts), 0), first.said
    assert "this run is kept offline" in first.said
    assert "Traceback" not in first.said
    run = the_run(folder)
    if first.process.exitcode:
        assert last(run)["global_step"] == (8 if first.process.exitcode == 143 else 5)
        assert differences(last(whole), last(run)) != []
        again = Warm(folder, *WANDB, variables=variables)
        assert again.wait() == 0, again.said
    faults.injected("process", len(acts) or 1)
    same(whole, run, faults)


@pytest.mark.parametrize("address", ["of another process", "3-1-unix-/nowhere", "of no kind"])
def test_a_service_that_another_process_started_is_left(address: str, tmp_path: Path, faults: Faults):
    """wandb hands its address on in the environment; it writes relative to its own folder and ends with its process."""
    wandb.teardown()
    other = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    inherited = os.environ["WANDB_SERVICE"] if address == "of another process" else address
    command = Warm(tmp_path / "run", *OPTIONS, "logger=wandb", variables={"WANDB_SERVICE": inherited})
    assert command.wait() == 0
    assert "warning" not in command.said
    other.finish()
    wandb.teardown()
    found = newest(the_run(tmp_path / "run"))
    assert found.steps("train/loss") == [*range(1, 13)]
    assert found.exit_code == 0
    faults.injected("call")
