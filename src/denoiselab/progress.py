"""Lines that say how far long work is."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

began: float | None = None
"""When this command's process began, by time.time; None where denoiselab is used as a library."""


def note_begin() -> None:
    """Find out when this process began: what Linux says, or now."""
    global began
    began = time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, since boot
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    began -= uptime - ticks / os.sysconf("SC_CLK_TCK")


def say(line: str) -> None:
    """A line for the person at the terminal; nothing ends for want of it, where stderr is a file on a full disk."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Says how much is done and how long the rest will take, at most every 15 seconds; call it with what was added.

    Args:
        what: is done, as in "sampling".
        n: how much of it there is.
    """

    EVERY = 15.0

    def __init__(self, what: str, n: int):
        self.what, self.n, self.done, self.started = what, n, 0, time.perf_counter()
        self.next_line = self.started + self.EVERY

    def __call__(self, added: int) -> None:
        self.done += added
        now = time.perf_counter()
        if now > self.next_line and self.done < self.n:
            left = (now - self.started) / self.done * (self.n - self.done)
            print(f"{self.what}: {self.done} of {self.n}, about {left:.0f} s left", file=sys.stderr, flush=True)
            self.next_line = now + self.EVERY
