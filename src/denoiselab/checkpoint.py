"""Checkpoint files: written so that a crash cannot tear one, read so that one cannot run code.

A file holds tensors and primitives only. Writing goes to a temporary file in the same folder, is flushed to the
disk, renamed over the name and followed by a sha256 beside it; Lightning's own "atomic" save is a copy across file
systems where TMPDIR is elsewhere (Lightning-AI/pytorch-lightning#21253). Reading never falls back to pickle.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from denoiselab.archive import check_tensors, examine, refuse_what_is_no_file
from denoiselab.errors import CheckpointError, disk_fails
from denoiselab.files import write_atomic, write_text
from denoiselab.version import CHECKPOINT_VERSION, OLDEST_NUMERICS, __version__

REQUIRED = {"state_dict": dict, "global_step": int, "denoiselab": dict}
RECORD = {"config": str, "identity": dict, "interface": dict, "choices": dict, "fingerprint": str}
"""What a run says of itself under "denoiselab", beside the version of the layout."""

WHERE_THERE = {"callbacks": dict, "pytorch-lightning_version": str}
RECORD_WHERE_THERE = {"owed": list}
"""What a file may lack, but has in no other kind."""


IMPORTING = ("hyper_parameters", "hparams_", "datamodule_hyper_parameters", "datamodule_hparams_")
"""What no run of ours writes, and CVE-2026-58659 gets in by."""

NEW = "new.ckpt"
"""What is written, before it becomes last.ckpt."""


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its sha256 beside it."""
    write_atomic(path, lambda file: torch.save(checkpoint, file))
    write_text(_sidecar(path), sha256(path) + "\n")


def rotate(folder: Path) -> None:
    """Make new.ckpt the last one, and the last one the previous; what a kill left half done is finished by the next."""
    if (folder / NEW).exists() and not _sidecar(folder / NEW).exists():  # the disk was full, or the process killed
        write_text(_sidecar(folder / NEW), sha256(folder / NEW) + "\n")
    for old, name in (("last.ckpt", "previous.ckpt"), (NEW, "last.ckpt")):
        for path in (folder / old, _sidecar(folder / old)):
            if path.exists():
                path.replace(path.with_name(path.name.replace(old, name)))


def settle(folder: Path) -> None:
    """Finish what a kill left half done of the last save, where no other will follow."""
    if (folder / NEW).exists():
        rotate(folder)
    _sidecar(folder / NEW).unlink(missing_ok=True)
    for path in folder.glob("*.ckpt"):
        if not _verified(path):
            write_text(_sidecar(path), sha256(path) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        OSError: the disk fails.
        CheckpointError: it is missing, truncated, changed since it was written, holds anything but tensors and
            primitives, is not one of ours, is newer than this version, or holds a weight that is not finite.
    """
    refuse_what_is_no_file(path)
    if _verified(path) and _sidecar(path).read_text(errors="replace").strip() != sha256(path):
        raise CheckpointError(f"{path}: the content does not match its .sha256; the file was damaged")
    examine(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}" if named else "not a PyTorch file"
        raise CheckpointError(f"{path}: not tensors and primitives only ({what}); nothing was executed") from None
    except Exception as error:  # a damaged file makes torch raise nearly any type
        if disk_fails(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason[:120]})") from None
    check_tensors(checkpoint, path)
    _check(checkpoint, path)
    return checkpoint


def _check(checkpoint: Any, path: Path) -> None:
    for key, kind in REQUIRED.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise CheckpointError(f"{path}: not a denoiselab checkpoint (no {key!r})")
    if checkpoint["global_step"] < 0 or isinstance(checkpoint["global_step"], bool):
        raise CheckpointError(f"{path}: has global_step={checkpoint['global_step']}; need a number of steps")
    if named := [str(key) for key in checkpoint if str(key).startswith(IMPORTING)]:
        raise CheckpointError(f"{path}: holds {named[0][:80]!r}, by which Lightning imports what a file names")
    version = checkpoint["denoiselab"].get("version")
    if not isinstance(version, int) or version > CHECKPOINT_VERSION:
        release = str(checkpoint["denoiselab"].get("release"))[:20]
        raise CheckpointError(
            f"{path}: has layout {version!r} of denoiselab {release}; this one, {__version__}, "
            f"reads up to layout {CHECKPOINT_VERSION}: upgrade it"
        )
    identity = checkpoint["denoiselab"].get("identity")
    numerics = identity.get("numerics") if isinstance(identity, dict) else None
    if isinstance(numerics, int) and numerics < OLDEST_NUMERICS:
        raise CheckpointError(
            f"{path}: was made by a denoiselab with numerics {numerics}; this one, {__version__}, reads from "
            f"{OLDEST_NUMERICS} on: use the git revision that record.json beside it names"
        )
    for key, kind in RECORD.items():
        if not isinstance(checkpoint["denoiselab"].get(key), kind):
            raise CheckpointError(f"{path}: says nothing usable of its {key}; it is damaged or was not made by a run")
    for found, kinds in ((checkpoint, WHERE_THERE), (checkpoint["denoiselab"], RECORD_WHERE_THERE)):
        for key, kind in kinds.items():
            if not isinstance(found.get(key, kind()), kind):
                raise CheckpointError(f"{path}: its {key} is no {kind.__name__}; it is damaged")
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: {str(name)[:80]!r} is not a tensor")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name!r} holds values that are not finite")


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The valid checkpoint with the highest step in a folder, and its content; bad ones are warned about."""
    best = None
    for path in sorted(folder.glob("*.ckpt")):
        try:
            found = (path, load(path))
        except CheckpointError as error:
            if not os.path.lexists(path):  # by another rank, whose run it is, renamed meanwhile
                return newest(folder, warn)
            warn(f"passing over a bad checkpoint: {error}")
            continue
        if best is None or found[1]["global_step"] > best[1]["global_step"]:
            best = found
    return best


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _verified(path: Path) -> bool:
    """Whether its sha256 is of this file: one older than it is of another, and the writer died in between."""
    sidecar = _sidecar(path)
    return sidecar.is_file() and sidecar.stat().st_mtime_ns >= path.stat().st_mtime_ns
