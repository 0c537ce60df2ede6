"""Checkpoint files: written so that a crash cannot tear one, read so that one cannot run code.

A file holds tensors and primitives only. Writing goes to a temporary file in the same folder, is flushed to the
disk, renamed over the name and followed by a sha256 beside it; Lightning's own "atomic" save is a copy across file
systems where TMPDIR is elsewhere (Lightning-AI/pytorch-lightning#21253). Reading never falls back to pickle.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from denoiselab.errors import CheckpointError
from denoiselab.files import write_atomic, write_text
from denoiselab.version import CHECKPOINT_VERSION

REQUIRED = {"state_dict": dict, "global_step": int, "denoiselab": dict}
RECORD = {"config": str, "identity": dict, "interface": dict, "choices": dict, "fingerprint": str}
"""What a run says of itself under "denoiselab", beside the version of the layout."""


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its sha256 beside it."""
    write_atomic(path, lambda file: torch.save(checkpoint, file))
    write_text(_sidecar(path), sha256(path) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: it is missing, truncated, changed since it was written, holds anything but tensors and
            primitives, is not one of ours, is newer than this version, or holds a weight that is not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    sidecar = _sidecar(path)
    # A checkpoint newer than its sha256 was written by a process that died in between: unverified, not bad.
    verified = sidecar.is_file() and sidecar.stat().st_mtime_ns >= path.stat().st_mtime_ns
    if verified and sidecar.read_text(errors="replace").strip() != sha256(path):
        raise CheckpointError(f"{path}: the content does not match its .sha256; the file was damaged")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}" if named else "not a PyTorch file"
        raise CheckpointError(f"{path}: not tensors and primitives only ({what}); nothing was executed") from None
    except Exception as error:  # a damaged file makes torch raise nearly any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason[:120]})") from None
    _check(checkpoint, path)
    return checkpoint


def _check(checkpoint: Any, path: Path) -> None:
    for key, kind in REQUIRED.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise CheckpointError(f"{path}: not a denoiselab checkpoint (no {key!r})")
    version = checkpoint["denoiselab"].get("version")
    if not isinstance(version, int) or version > CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path}: has layout {version!r}; this denoiselab reads up to {CHECKPOINT_VERSION}: upgrade it"
        )
    for key, kind in RECORD.items():
        if not isinstance(checkpoint["denoiselab"].get(key), kind):
            raise CheckpointError(f"{path}: says nothing usable of its {key}; it is damaged or was not made by a run")
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: {name!r} is not a tensor")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name!r} holds values that are not finite")


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The valid checkpoint with the highest step in a folder, and its content; bad ones are warned about."""
    best = None
    for path in sorted(folder.glob("*.ckpt")):
        try:
            found = (path, load(path))
        except CheckpointError as error:
            warn(f"passing over a bad checkpoint: {error}")
            continue
        if best is None or found[1]["global_step"] > best[1]["global_step"]:
            best = found
    return best


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
