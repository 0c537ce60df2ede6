"""What happens to a process at an instant that is chosen to the call."""

from __future__ import annotations

import functools
import importlib
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Act(Protocol):
    """What happens."""

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Signal:
    """The process gets a signal; SIGKILL is its end."""

    number: int

    def __call__(self) -> None:
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class Fail:
    """An error of the system: errno.ENOSPC, errno.EIO, ..."""

    number: int

    def __call__(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@dataclass(frozen=True)
class Raise:
    """An error of some kind."""

    kind: type[BaseException]
    text: str = "injected"

    def __call__(self) -> None:
        raise self.kind(self.text)


@dataclass(frozen=True)
class Hang:
    """Nothing more, for a long time."""

    seconds: float = 600

    def __call__(self) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Note:
    """A file appears, by which the test knows where the process is."""

    file: Path

    def __call__(self) -> None:
        self.file.touch()


@dataclass(frozen=True)
class At:
    """Something happens at the n-th call of a function.

    Args:
        of: the function: "os:fsync", "denoiselab.module:Diffusion.training_step".
        call: which of its calls, from 1; with `always`, that one and all that follow.
        acts: what happens, in order.
        after: after the call, and not before it.
    """

    of: str
    call: int
    acts: tuple[Act, ...]
    after: bool = False
    always: bool = False

    def set(self) -> None:
        owner, name = _place(self.of)
        function, calls = getattr(owner, name), 0
        mine = os.getpid()

        @functools.wraps(function)
        def trapped(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += os.getpid() == mine  # not in loader processes, which are forked from this one
            now = os.getpid() == mine and (calls == self.call or (self.always and calls > self.call))
            if now and not self.after:
                self._happen()
            result = function(*arguments, **named)
            if now and self.after:
                self._happen()
            return result

        setattr(owner, name, trapped)

    def _happen(self) -> None:
        for act in self.acts:
            act()


@dataclass(frozen=True)
class Limit:
    """The process gets no more of a resource: "FSIZE" (bytes of a file), "NOFILE", "AS" (bytes of memory)."""

    resource: str
    amount: int

    def set(self) -> None:
        which = getattr(resource, f"RLIMIT_{self.resource}")
        resource.setrlimit(which, (self.amount, resource.getrlimit(which)[1]))


@dataclass(frozen=True)
class Changed:
    """Another function in the place of one.

    Args:
        of: the function, as of `At`.
        make: makes the new one of the old one; a function of a module, as it travels to the process by name.
    """

    of: str
    make: Callable[[Any], Any]

    def set(self) -> None:
        owner, name = _place(self.of)
        setattr(owner, name, self.make(getattr(owner, name)))


def _place(of: str) -> tuple[Any, str]:
    module, _, path = of.partition(":")
    owner: Any = importlib.import_module(module)
    *between, name = path.split(".")
    for part in between:
        owner = getattr(owner, part)
    return owner, name
