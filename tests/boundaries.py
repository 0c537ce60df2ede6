"""Every call by which a process changes files, and its death before one of them."""

from __future__ import annotations

import io
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = ("chmod", "fsync", "replace", "unlink", "open", "close")
"""Of ``os``, beside tempfile.mkstemp and what is written to the file that it makes."""


@dataclass(frozen=True)
class Boundary:
    """A process is killed before its n-th call on files that have some word in their paths. What lies on the disk after
    a call is what lies there before the next, so that all n are all instants that can be told apart.

    Args:
        word: a part of the paths.
        call: n, from 1; 0 for none.
        half: in a write, when half of it is written.
        listed: gets a line with each call.
    """

    word: str
    call: int = 0
    half: bool = False
    listed: Path | None = None

    def set(self) -> None:
        mine, calls, files = os.getpid(), 0, dict[int, str]()

        def reached(what: str, path: Any, last: Callable[[], Any] = lambda: None) -> None:
            nonlocal calls
            if os.getpid() != mine or self.word not in str(path):
                return
            calls += 1
            if self.listed is not None:
                with self.listed.open("a") as file:
                    file.write(f"{what} {str(path).rpartition(self.word)[2]}\n")
            if calls == self.call:
                if self.half:
                    last()
                kill(mine, signal.SIGKILL)

        kill, make, opened = os.kill, tempfile.mkstemp, os.fdopen

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                reached("write", files[self.fileno()], lambda: io.FileIO.write(self, data[: len(data) // 2]))
                return super().write(data)

            def close(self) -> None:
                if not self.closed:
                    files.pop(self.fileno())
                super().close()

        def mkstemp(*arguments: Any, **named: Any) -> tuple[int, str]:
            reached("create", f"{named.get('dir')}/{named.get('prefix')}")
            number, path = make(*arguments, **named)
            files[number] = path
            return number, path

        def fdopen(number: int, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if number in files and mode == "wb":
                return io.BufferedWriter(Raw(number, "wb"), 1 << 14)
            return opened(number, mode, *arguments, **named)

        def trapped(name: str) -> Callable[..., Any]:
            function = getattr(os, name)

            def call(first: Any, *arguments: Any, **named: Any) -> Any:
                known = name in ("fsync", "close")
                if not known or first in files:
                    reached(name, files[first] if known else first)
                result = function(first, *arguments, **named)
                if name == "open" and self.word in str(first):
                    files[result] = str(first)
                if name == "close":
                    files.pop(first, None)
                return result

            return call

        tempfile.mkstemp, os.fdopen = mkstemp, fdopen
        for name in CALLS:
            setattr(os, name, trapped(name))
