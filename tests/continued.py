"""Runs that are killed and issued again, and all that must then be as in one that was left alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from denoiselab import checkpoint
from ledger import Faults
from runs import POINTS
from traps import At, Signal
from warm import Trap, Warm

KILL = (Signal(signal.SIGKILL),)

STEPS = 60
EPOCH = 10
"""Optimizer steps."""
EVERY = 7
"""Optimizer steps between checkpoints."""

FULL = (
    *(*POINTS[:-1], "data.n=160", f"trainer.max_steps={STEPS}", f"trainer.checkpoint_every={EVERY}"),
    *("timesteps=importance", "timesteps.points=8", "timesteps.history=2", "ema.decay=0.99"),
    *("lr_schedule=cosine", "lr_schedule.warmup=10", "trainer.log_every=3", "lint.level=none"),
    *("callbacks=default", "~callbacks.sample_grid", "~callbacks.guidance_sweep"),
    *("callbacks.buckets.every=10", "early_stopping.patience=50", "early_stopping.every=9"),
)
"""A run that has every kind of state: moments, averages, a schedule, what timesteps have learned, sums of callbacks,
and the best weights so far, which are kept apart."""


def at(of: str, call: int, after: bool = False) -> At:
    """A kill at the n-th call of a function."""
    return At(of, call, KILL, after)


def run_in(folder: Path) -> Path:
    """The one run that was made in a folder."""
    (run,) = (path.parent for path in folder.glob("outputs/*/*/checkpoints"))
    return run


def killed(
    faults: Faults, folder: Path, *options: str, traps: Sequence[Trap], variables: Mapping[str, str] | None = None
) -> None:
    """Issue a command that is killed on the way."""
    process = Warm(folder, "train", *options, traps=traps, variables=variables)
    assert process.wait() == -signal.SIGKILL, process.said
    faults.injected("process")


def done(folder: Path, *options: str, traps: Sequence[Trap] = ()) -> Path:
    """Issue a command that is left alone; the run."""
    process = Warm(folder, "train", *options, traps=traps)
    assert process.wait() == 0, process.said
    return run_in(folder)


def newest(run: Path) -> dict[str, Any]:
    """The content of the newest checkpoint; a bad one is none that a kill may leave."""
    warnings: list[str] = []
    found = checkpoint.newest(run / "checkpoints", warnings.append)
    assert warnings == []
    assert found is not None
    return found[1]


def numbers(run: Path) -> dict[tuple[int, str], Any]:
    """What metrics.jsonl says at each step, each thing once; how fast it was is left out."""
    found: dict[tuple[int, str], Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            assert (step, name) not in found
            found[step, name] = value
    return {key: value for key, value in found.items() if not ("speed/" in key[1] or key[1].endswith("/seconds"))}


def measured(run: Path) -> list[Any]:
    """Every evaluation, but for the seconds that it took."""
    files = sorted(run.glob("evaluations/*/evaluation.json"))
    return [{**json.loads(file.read_text()), "seconds": None} for file in files]


def pictures(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.png")}


def same(faults: Faults, whole: Path, run: Path) -> None:
    """All that two runs have come to is the same, and nothing was left behind."""
    assert run.name == whole.name
    folder = run / "checkpoints"
    kept = {path.name for path in folder.iterdir()} - {"previous.ckpt", "previous.ckpt.sha256"}
    assert kept == {path.name for path in (whole / "checkpoints").iterdir()} - {"previous.ckpt", "previous.ckpt.sha256"}
    for name in sorted(name for name in kept if name.endswith(".ckpt")):
        faults.same(checkpoint.load(whole / "checkpoints" / name), checkpoint.load(folder / name))
    assert newest(run)["global_step"] == newest(whole)["global_step"]
    assert numbers(run) == numbers(whole)
    assert measured(run) == measured(whole) != []
    assert pictures(run) == pictures(whole)
    assert [*run.glob(".*.tmp"), *folder.glob(".*.tmp"), *run.glob("run.lock")] == []
    assert json.loads((run / "status.json").read_text())["state"] == "done"
