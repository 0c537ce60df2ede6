"""A run as far as it is known without its weights: for planning many evaluations before the first starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from denoiselab.archive import examine
from denoiselab.checkpoint import RECORD, REQUIRED
from denoiselab.checks import without_weights
from denoiselab.exchange import ours
from denoiselab.run import PREFIX, Run, folder_of, load, parts_of
from denoiselab.version import CHECKPOINT_VERSION


def outline(path: str | Path, weights: str = "ema", like: Run | None = None) -> Run:
    """A run's step, its schedule, and what it can be sampled and measured with. It cannot be sampled.

    Its network has shapes only; the weights stay in the file, which is not verified, so that this takes no longer for
    a large network than for a small one. What is not as it should be is left to ``load`` to say.

    Args:
        path, weights: as for ``load``.
        like: another run, whose codec and data set are taken where they are the same.
    """
    found = None if weights not in PREFIX or ours.is_export(Path(path)) else _newest(Path(path))
    if found is None:
        return load(path, weights)
    file, content = found
    parts = parts_of(content, file)
    if like is not None and like.record["interface"]["codec"] == content["denoiselab"]["interface"]["codec"]:
        parts.codec = like.parts.codec
    if like is not None and like.parts.config["data"] == parts.config["data"]:
        for name in {"data", "images"} & like.parts.__dict__.keys():
            setattr(parts, name, getattr(like.parts, name))
    parts.model = without_weights(parts)
    return Run.of(parts, content, weights, file, folder_of(file))


def _newest(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that ``find_checkpoint`` means, and its content with the tensors left in the file; None if a file
    is missing, or one of them cannot be read so."""
    best = path / "checkpoints" / "best.ckpt"
    files = [path] if not path.is_dir() else [best] if best.is_file() else sorted(path.glob("checkpoints/*.ckpt"))
    try:
        for file in files:
            examine(file)
        found = [(file, torch.load(file, map_location="cpu", weights_only=True, mmap=True)) for file in files]
        usable = all(map(_usable, (content for _, content in found)))
    except Exception:  # a damaged file makes torch raise nearly any type
        return None
    return max(found, key=lambda one: one[1]["global_step"], default=None) if usable else None


def _usable(content: dict[str, Any]) -> bool:
    """Whether it says of itself what a checkpoint of this version says."""
    says = content["denoiselab"]
    kinds = [*((content, *one) for one in REQUIRED.items()), *((says, *one) for one in RECORD.items())]
    return says["version"] <= CHECKPOINT_VERSION and all(isinstance(of.get(key), kind) for of, key, kind in kinds)
