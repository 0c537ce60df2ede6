"""Reading other people's files, and writing a folder whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.archive import check_tensors, examine
from denoiselab.errors import CheckpointError, UserError

MARK = "export.json"
"""Lies in every folder that was exported: what it was made of, and the names of its files."""

LARGEST = 10_000_000
"""Bytes beyond which a file is not a configuration."""

Content = dict[str, Any]
"""By relative path: tensors by name for .safetensors, a JSON object for .json, text for anything else."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is missing, too large, or anything else.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are no configuration")
        found = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return found


def read_tensors(path: Path) -> dict[str, Any]:
    """What a .safetensors or a PyTorch file holds: tensors by name; in the latter also dicts of them and primitives.

    PyTorch's files are pickles. They are read with weights_only, which builds tensors and primitives and, here, the
    plain record that training scripts keep their command's options in; no code of the file is run.

    Raises:
        CheckpointError: missing, truncated, damaged, or with anything else inside.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix != ".safetensors":
        examine(path, frozenset({"argparse.Namespace"}))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}" if named else "not a PyTorch file"
        raise CheckpointError(f"{path}: not tensors and primitives only ({what}); nothing was executed") from None
    except Exception as error:  # a damaged file makes torch and safetensors raise nearly any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: truncated, or not a file of weights ({reason[:120]})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not weights by name")
    check_tensors(found, path)
    return found


def weights(found: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """Tensors by name, with half precision widened to float32.

    Raises:
        CheckpointError: something is no tensor, or not finite.
    """
    state = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: {str(name)[:80]!r} is not a tensor")
        if value.is_floating_point():
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"{source}: {name!r} holds values that are not finite")
        state[name] = value
    return state


def write_folder(folder: Path, content: Content, made_of: dict[str, Any]) -> None:
    """Write a folder of files at once: under another name first, which then takes the place of an earlier export.

    Args:
        folder: must be free, empty, or an earlier export with nothing added to it.
        content: of the files.
        made_of: for export.json.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    refuse_strangers(folder)
    content = {**content, MARK: {**made_of, "files": sorted([*content, MARK])}}
    new: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        for name, what in content.items():
            _write(new / name, what)
        new.chmod(0o750)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    except OSError as error:
        raise UserError(f"output={folder}: cannot be written ({error.strerror or error})") from None
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def refuse_strangers(folder: Path) -> None:
    """Raise UserError unless a folder is free, empty, or an earlier export and nothing more."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder}: a file of this name exists")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    listed = read_object(folder / MARK).get("files") if MARK in there else None
    ours = set(map(str, listed)) if isinstance(listed, list) else set()
    if stranger := min(there - ours, default=None):
        raise UserError(f"output={folder}: holds {stranger}, which no export wrote; name a new folder")


def _write(path: Path, what: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in what.items()}, path, {"format": "pt"})
    else:
        path.write_text(what if isinstance(what, str) else json.dumps(what, indent=2) + "\n")
    with path.open("rb") as file:
        os.fsync(file.fileno())
