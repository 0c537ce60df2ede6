"""`denoiselab` as real processes that start in a moment: forked from one that has imported everything.

A process of its own session, with its own working directory, environment and output; it is killed, told and starved as
any other, and can be given traps (traps.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        *("denoiselab", "denoiselab.training", "denoiselab.cli.train", "denoiselab.cli.sample"),
        "denoiselab.lr_schedule",
        *("hydra", "hydra.utils", "hydra._internal.hydra", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin"),
        *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin"),
    ]
)


class Trap(Protocol):
    """Something that is set in a process before its command runs."""

    def set(self) -> None: ...


class Warm:
    """A command that is running.

    Args:
        folder: that it works in; what it says is in FOLDER.out and FOLDER.err, beside it, appended to.
        arguments: of `denoiselab`.
        traps: set before it begins.
        variables: of its environment, beside those of this process.
    """

    def __init__(
        self, folder: Path, *arguments: str, traps: Sequence[Trap] = (), variables: Mapping[str, str] | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.arguments = folder, arguments
        self.process = _forks.Process(target=_begin, args=(folder, arguments, tuple(traps), dict(variables or {})))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def wait(self, seconds: float = 120) -> int:
        """Its exit status; -9 if it was killed. Ends it, and fails, if it takes longer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.end()
            raise AssertionError(f"{' '.join(self.arguments)} still runs after {seconds} s\n{self.said}")
        return self.process.exitcode

    def when(self, happened: Callable[[], object], seconds: float = 60) -> None:
        """Wait until something is true of what it does, or until it has ended."""
        end = time.monotonic() + seconds
        while not happened() and self.process.is_alive():
            assert time.monotonic() < end, f"not seen within {seconds} s\n{self.said}"
            time.sleep(0.002)

    def tell(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            self.tell(signal.SIGKILL)
        self.process.join()

    def end(self) -> None:
        """It and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()

    @property
    def said(self) -> str:
        """All that was said on stderr by commands in this folder."""
        file = said(self.folder)
        return file.read_text() if file.is_file() else ""


def said(folder: Path) -> Path:
    return folder.with_name(folder.name + ".err")


def _begin(folder: Path, arguments: Sequence[str], traps: Sequence[Trap], variables: Mapping[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # as elsewhere; else another server would start
    os.environ.update(variables)
    for number, file in ((1, folder.with_name(folder.name + ".out")), (2, said(folder))):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.argv = ["denoiselab", *arguments]
    for trap in traps:
        trap.set()
    from denoiselab.cli import main

    main([*arguments])
