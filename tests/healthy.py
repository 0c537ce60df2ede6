"""Small healthy models, on which no detector may fire, and how to look at a run in a test."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

from denoiselab.compose import compose, plain
from denoiselab.diagnostics import Subject
from denoiselab.run import Run, load

SEEDS = range(5)

POINTS = (
    *("experiment=points", "model.width=64", "model.depth=2", "data.n=4000", "data.batch_size=256"),
    *("trainer.max_steps=600", "trainer.log_every=10", "trainer.threads=1", "ema.decay=0.99"),
    *("callbacks=none", "metrics=none", "evaluation.n=1", "sampler.steps=1"),
)
"""A run of three seconds on one core that covers all eight modes."""


def trained(folder: Path, *overrides: str) -> Path:
    """Train such a run, whatever else is asked of it; its directory."""
    from denoiselab.training import Job

    job = Job(compose("train", [*POINTS, f"output_dir={folder}", *overrides]))
    job.run()
    return job.folder.path


def all_trained(folder: Path) -> list[Path]:
    """One of each seed, trained by the first process that asks."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return [trained(folder, f"seed={seed}") for seed in SEEDS]  # a run that is there is not made again


def subject(run: Run | Path, *overrides: str, **changed: Any) -> Subject:
    """A run as ``denoiselab evaluate`` with these overrides hands it to diagnostics.

    Args:
        run: or its folder.
        changed: parts to replace, such as ``sampler``.
    """
    path = run if isinstance(run, Path) else None
    found = load(run) if isinstance(run, Path) else run
    config = plain(compose("evaluate", ["ckpt=none", *overrides]))
    parts = found.parts_for(config)
    for name, value in changed.items():
        setattr(parts, name, value)
    raw = None if path is None else lambda: load(path, "raw").denoiser
    return Subject(found, parts, raw)
