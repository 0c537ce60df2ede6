"""Calls to the operating system that fail, one by one: each call on a file below a folder is counted, and the k-th made
to fail."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WRITING = ("open", "write", "fsync", "replace", "rename", "mkdir")
READING = ("open to read", "read")


@dataclass
class Calls:
    """What a process does to the files below a folder.

    Args:
        base: the folder.
        kinds: of calls that count.
        at: which fails, from 0; None for none.
        number: with which error of the system.
        always: every one after it fails, too, as on a disk that stays full.
    """

    base: Path
    kinds: tuple[str, ...] = WRITING
    at: int | None = None
    number: int = 0
    always: bool = False
    done: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    _paths: dict[int, str] = field(default_factory=dict)

    def meet(self, kind: str, path: Any) -> None:
        """Count a call, or raise what it fails with."""
        if isinstance(path, int):
            path = self._paths.get(path, "")
        name = str(Path(os.fsdecode(path)).absolute()) if path else ""
        if kind not in self.kinds or not name.startswith(f"{self.base}{os.sep}"):
            return
        if kind == "mkdir" and Path(name).is_dir():
            return  # which fails in any case
        now = len(self.done)
        self.done.append((kind, name.removeprefix(f"{self.base}{os.sep}")))
        if self.at is not None and (now == self.at or (self.always and now > self.at)):
            self.failed.append(self.done[-1])
            raise OSError(self.number, os.strerror(self.number), None if kind == "write" else name)

    @contextmanager
    def counted(self) -> Iterator[Calls]:
        """Meanwhile calls are met."""
        with pytest.MonkeyPatch.context() as patch:
            for name, which in (("fsync", 0), ("replace", 1), ("rename", 1), ("mkdir", 0)):
                patch.setattr(os, name, self._met(getattr(os, name), name, which))
            patch.setattr(os, "open", self._opened(os.open))
            opened = self._file(io.open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            yield self

    def _met(self, call: Callable[..., Any], kind: str, which: int) -> Callable[..., Any]:
        def met(*arguments: Any, **named: Any) -> Any:
            self.meet(kind, arguments[which])
            return call(*arguments, **named)

        return met

    def _opened(self, call: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self.meet("open" if writes else "open to read", path)
            descriptor = call(path, flags, *more, **named)
            self._paths[descriptor] = os.fsdecode(path)
            return descriptor

        return opened

    def _file(self, call: Callable[..., Any]) -> Callable[..., Any]:
        calls = self

        class Raw(io.FileIO):
            def write(self, content: Any) -> int:
                calls.meet("write", calls._paths.get(self.fileno()))
                return super().write(content)

            def readinto(self, buffer: Any) -> int:
                calls.meet("read", calls._paths.get(self.fileno()))
                return super().readinto(buffer)

            def readall(self) -> bytes:
                calls.meet("read", calls._paths.get(self.fileno()))
                return super().readall()

        def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
            path = calls._paths.get(file, "") if isinstance(file, int) else os.fsdecode(file)
            if not str(Path(path).absolute()).startswith(f"{calls.base}{os.sep}") or "+" in mode:
                return call(file, mode, buffering, *more, **named)
            reads = not set(mode) & set("wax")
            if not isinstance(file, int):
                calls.meet("open to read" if reads else "open", path)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            calls._paths[raw.fileno()] = path
            if buffering == 0:
                return raw
            buffered = io.BufferedReader(raw) if reads else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **named)

        return opened
