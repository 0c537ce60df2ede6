"""A study that goes through a SLURM cluster, hit in every way while it does; what was seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 180
"""Seconds, for anything that is waited for."""

TINY = (
    *("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1"),
    *("metrics=none", "callbacks=none", "evaluation.n=2", "sampler.steps=1"),
    *("trainer.threads=1", "trainer.accelerator=cpu", "trainer.max_steps=1000", "trainer.checkpoint_every=50"),
)
ON_CLUSTER = ("launcher=slurm", "launcher.cpus_per_task=1", "launcher.memory=0.1")


def until(found: Callable[[], Any], what: str) -> Any:
    """What is found in the end."""
    end = time.monotonic() + PATIENCE
    while not (answer := found()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return answer


def view(job: str) -> dict[str, str]:
    """What SLURM's controller knows of a job."""
    said = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True)
    return dict(word.partition("=")[::2] for word in said.stdout.split())


@dataclass
class Hit:
    """A job that was told to stop."""

    seconds: float
    """From the signal to the checkpoint that it saved."""
    step: int
    """Of that checkpoint."""


@dataclass
class Command:
    """``denoiselab ...`` as a process, with what it has written."""

    arguments: Sequence[str]
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        count = len([*self.folder.glob("command*.err")])
        self.out, self.err = (self.folder / f"command{count}.{end}" for end in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "denoiselab", *self.arguments],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
                stdout=out,
                stderr=err,
            )

    @property
    def said(self) -> str:
        return self.err.read_text()

    def until(self, text: str, times: int = 1) -> None:
        """Wait until it has said something."""

        def said() -> bool:
            found = self.said.count(text) >= times
            assert found or self.process.poll() is None, self.said
            return found

        until(said, text)

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE)


@dataclass
class Sweep:
    """A sweep on the cluster."""

    root: Path
    axes: Sequence[str]

    def command(self, *more: str) -> Command:
        self.root.mkdir(parents=True, exist_ok=True)
        return Command(("train", "-m", *TINY, *ON_CLUSTER, *self.axes, *more), self.root)

    @property
    def jobs(self) -> Path:
        return self.root / "outputs" / "runs" / ".jobs"

    def submissions(self) -> list[dict[str, Any]]:
        """As they are kept, in the order of the array."""
        return sorted((json.loads(file.read_text()) for file in self.jobs.glob("*.slurm")), key=lambda s: s["index"])

    def run(self, submission: dict[str, Any]) -> Path:
        return self.root / "outputs" / "runs" / submission["run"]

    def log(self, job: str) -> str:
        return (self.jobs / "slurm" / f"{job}_0_log.out").read_text()


def status(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return {}


def under_way(run: Path) -> bool:
    assert status(run).get("state") != "done", f"{run.name} was over before it could be hit"
    return status(run).get("state") == "running" and (run / "checkpoints" / "last.ckpt").exists()


def hit(run: Path, *command: str) -> Hit:
    """Wait for a run's first checkpoint, give a command that makes SLURM stop its job, and wait until it has saved."""
    until(lambda: under_way(run), f"a checkpoint of {run.name}")
    began = time.time()
    subprocess.run(command, check=True)
    until(lambda: status(run).get("state") == "preempted", f"{run.name} to stop")
    return Hit((run / "checkpoints" / "last.ckpt").stat().st_mtime - began, status(run)["step"])


def kill(run: Path) -> None:
    """As the kernel does where memory ends."""
    until(lambda: under_way(run), f"a checkpoint of {run.name}")
    os.kill(status(run)["pid"], signal.SIGKILL)
