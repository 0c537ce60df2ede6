"""What tests of training share: small runs, and their checkpoints compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from denoiselab import checkpoint

SMALL = (
    *("metrics=none", "callbacks=none", "trainer.threads=1"),
    *("model.channels=8", "model.head_channels=8", "data.batch_size=16"),
)
STEPS = (
    "trainer.max_steps=12",
    "trainer.checkpoint_every=4",
    "trainer.log_every=3",
    "sampler.steps=1",
    "evaluation.n=1",
)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ, with no tolerance; paths in the stored configuration do not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return [d for k in keys if k != "config" for d in differences(a.get(k), b.get(k), f"{where}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{where}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [where]


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "checkpoints" / "last.ckpt")


POINTS = (
    *("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1"),
    *("metrics=none", "callbacks=none", "trainer.threads=1", "trainer.max_steps=4", "evaluation.n=2"),
    *("sampler.steps=1", "lint.level=none"),
)
"""The smallest run that knows classes."""


def trained(folder: Path, *overrides: str) -> Path:
    """Such a run, made in this process."""
    from denoiselab.compose import compose
    from denoiselab.training import Job

    job = Job(compose("train", [*POINTS, f"output_dir={folder}", *overrides]))
    job.run()
    return job.path
