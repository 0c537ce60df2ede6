"""Writing files so that a crash cannot tear one. Free of torch, for the parts that must start fast."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


def write_atomic(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that ``path`` holds the old content or the new one, whatever happens.

    Args:
        path: the final name; its folder is made.
        fill: writes the content to the binary file it is given.

    Raises:
        OSError: it could not be written, with its name; there is no other file in its place.
    """
    try:
        _write_atomic(path, fill)
    except Exception as error:
        if (system := _of_system(error)) is None:
            raise
        raise OSError(system.errno, system.strerror or str(system), str(path)) from error


def _of_system(error: BaseException | None) -> OSError | None:
    """The system's own error behind one: PyTorch hides a full disk behind "unexpected pos 512 vs 401"."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _write_atomic(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o640)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; for whoever alone writes there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
