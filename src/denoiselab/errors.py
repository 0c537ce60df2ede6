"""The errors people see, each with its exit status."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """A mistake in what was asked: one line that names the option, the value and what would work."""

    status = 2


class CheckpointError(UserError):
    """A file that cannot be used, and why."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient stopped being a number."""

    status = 3
    report: dict[str, Any] | None = None
    """The step and its batch, for crash.json; None where it was not a step's."""


class Diverged(RuntimeError):
    """The loss left where it was, and did not come back."""

    status = 3


class CannotSave(RuntimeError):
    """A checkpoint could not be written, or there is no space for one."""

    status = 74


class RunHeld(RuntimeError):
    """Another process works on the same run."""

    status = 75


class RankLost(RuntimeError):
    """One of the processes of a run on several devices ended or hung, so the others ended as well."""

    status = 1

    def __init__(self, what: str):
        super().__init__(f"{what}; the same command goes on from the last checkpoint")


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved. Not an Exception, so that nothing swallows it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}; issue the same command to continue")
        self.signum = signum
        self.status = 128 + signum


SYSTEM = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT),
    *(errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ESTALE, errno.EBUSY),
    *(errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT),
}
"""Errors of files and disks, which are told in a line; others are mistakes in the code."""


def foreseen(error: BaseException) -> int | None:
    """The exit status of an error that is told in one line; None for one whose traceback is needed."""
    if isinstance(status := getattr(error, "status", None), int):
        return status
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return CannotSave.status
    return 1 if _no_memory(error) else None


def disk_fails(error: BaseException) -> bool:
    """Whether an error of reading is one of the machine, which says nothing of what the file holds."""
    about_the_name = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    return isinstance(error, OSError) and error.errno in SYSTEM and error.errno not in about_the_name


def _no_memory(error: BaseException) -> bool:
    """Python's, a GPU's, or that of PyTorch's allocator on the CPU, which has no type of its own."""
    own = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return own or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: names and errors out of files can hold its control sequences."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return f"out of memory ({text}); a smaller batch needs less" if _no_memory(error) else text


def nearest(name: str, valid: Sequence[str], what: str = "known") -> str:
    """The end of an error: the nearest valid name and the choice."""
    valid = sorted(option for option in valid if not option.startswith("_"))
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}{what}: {', '.join(valid) or 'none'}"
