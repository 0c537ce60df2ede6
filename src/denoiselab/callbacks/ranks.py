"""What a rank that hangs is found by: several ranks that see how far each of them has come."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from denoiselab.module import Clock
from denoiselab.ranks import GRACE, Ranks

LOOKS, MOST = 10, 2.5
"""At what others wrote, within the time in which they must get further; and most seconds between two."""

SILENT = 15.0
"""Seconds without a sign of life from a process of this machine, after which it is frozen: a thread gives one every
``MOST``, whatever is computed. What another machine wrote may come late."""

WITHOUT_END = timedelta(days=365)
"""Of collectives: while rank 0 evaluates, the others wait in one, however long that takes."""


@dataclass
class Seen:
    """What a rank writes of itself.

    Args:
        host, pid: its process.
        beat: how often it has written this.
        marks: how often it got further: a batch begun, its loss computed, a step done.
        busy: whether it does something that may take long, an evaluation or saving.
        at: what its main thread does.
    """

    host: str
    pid: int
    beat: int = 0
    marks: int = 0
    busy: bool = False
    at: str = ""


class RankWatch(pl.Callback):
    """Ends a run of several ranks when none of them gets further because one hangs: it stopped, sleeps, or waits for
    what never comes.

    Each rank writes RUN/.ranks/RANK.json on a thread, and reads those of the others: a file, since every rank has the
    run's directory, while a store or a socket would hang with the rank that keeps it. The first step may take as long
    as it wants, since networks are compiled in it; and nobody counts the time in which a rank evaluates or saves. A
    process of the same machine that is frozen, and so does not even write, is not waited for so long.

    Args:
        folder: the run directory.
        ranks: are ended.
        seconds: without any rank getting further, > 0; ten times what that took before, where that is more.
    """

    def __init__(self, folder: Path, ranks: Ranks, seconds: float):
        self.folder, self.ranks, self.seconds = folder / ".ranks", ranks, seconds
        self.period = min(seconds / LOOKS, MOST)
        self.me = Seen(_host(), os.getpid())
        self.others: dict[int, Seen] = {}
        self.heard: dict[int, float] = {}
        """When another rank's file last changed."""
        self.took: deque[float] = deque(maxlen=100)
        """Seconds of the last batches."""
        self.began, self.step, self.main = 0.0, 0, threading.get_ident()
        self.over = threading.Event()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.world_size == 1:
            return
        torch.distributed.distributed_c10d._set_pg_timeout(WITHOUT_END)
        self.folder.mkdir(exist_ok=True)
        self._write()
        trainer.strategy.barrier()  # so that what each reads first is of this start
        self.heard = {rank: time.monotonic() for rank in range(trainer.world_size) if rank != trainer.global_rank}
        self._read(time.monotonic())
        threading.Thread(target=self._watch, args=(pl_module.clock,), daemon=True, name="rank-watch").start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.over.set()
        if self.heard:
            self.me.busy = True  # with what follows; nothing is heard of it any more
            self._write()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.over.set()  # nobody gets further from here, and who ends by itself takes its time

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.began = time.monotonic()
        self.me.marks += 1

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        self.me.marks += 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.took.append(time.monotonic() - self.began)
        self.step = trainer.global_step
        self.me.marks += 1

    def _watch(self, clock: Clock) -> None:
        looked = since = time.monotonic()
        marks = 0
        while not self.over.wait(self.period):
            now = time.monotonic()
            if now - looked > 3 * self.period:  # this process stood still itself, perhaps all did
                since, self.heard = now, dict.fromkeys(self.heard, now)
            looked = now
            self.me.busy, self.me.at = clock.busy, self._at()
            further = self.me.busy or self.me.marks != marks
            marks = self.me.marks
            self._write()
            further |= self._read(now)
            if further or not self.took:
                since = now
            if self.took and (now - since > self.limit or self._frozen(now)):
                self._end(now - since)
                return

    def _write(self) -> None:
        self.me.beat += 1
        with suppress(OSError):
            self._file(self.ranks.rank).write_text(json.dumps(asdict(self.me)))

    @property
    def limit(self) -> float:
        return max(self.seconds, 10 * statistics.median(self.took))

    def _read(self, now: float) -> bool:
        """Whether another rank got further, or is known to be busy."""
        further = False
        for rank in self.heard:
            with suppress(OSError, ValueError, TypeError):  # none yet, or being written
                seen = Seen(**json.loads(self._file(rank).read_text()))
                before = self.others.get(rank, Seen("", 0))
                if seen.beat != before.beat:
                    self.heard[rank] = now
                further |= seen.marks != before.marks or (seen.busy and now - self.heard[rank] < self.seconds / 2)
                self.others[rank] = seen
        return further

    def _frozen(self, now: float) -> bool:
        """Whether a process of this machine stopped in the middle of training."""
        silent = (self.others.get(rank) for rank in self._silent(now, SILENT))
        frozen = (seen is not None and seen.host == self.me.host and not seen.busy for seen in silent)
        return self.seconds < math.inf and any(frozen)

    def _silent(self, now: float, seconds: float) -> list[int]:
        """Which ranks have given no sign of life for so long."""
        return [rank for rank, heard in self.heard.items() if now - heard > seconds]

    def _end(self, seconds: float) -> None:
        now, me = time.monotonic(), self.ranks.rank
        silent = self._silent(now, min(self.seconds / 2, SILENT))
        seconds = max([seconds, *(now - self.heard[rank] for rank in silent)])
        found = silent or self._behind()
        places = {**self.others, me: self.me}
        names = f"rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
        last = ", ".join(dict.fromkeys(places[rank].at for rank in found if rank in places)) or "setup"
        text = f"{names} hung after step {self.step}, for {seconds:.0f} s{' without a sign of life' if silent else ''}"
        if me in found:
            print(f"rank {me} hangs here:\n{''.join(self._stack())}", file=sys.stderr, flush=True)
        self.ranks.pids = {seen.pid for seen in self.others.values() if seen.host == self.me.host}
        if me != 0 and 0 not in silent:  # rank 0 says it, writes it down and ends the others, if it still can
            self.over.wait(self.period + 2 * GRACE)
        self.ranks.lose(f"{text}; last seen in {last}")

    def _behind(self) -> list[int]:
        """Which ranks have come least far; of several, those that do not wait for others."""
        all_of_them = {**self.others, self.ranks.rank: self.me}
        least = min(seen.marks for seen in all_of_them.values())
        found = [rank for rank, seen in sorted(all_of_them.items()) if seen.marks == least]
        return [rank for rank in found if not all_of_them[rank].at.startswith("torch")] or found

    def _at(self) -> str:
        """Where the main thread is, from the frame that called into C."""
        frame = sys._current_frames().get(self.main)
        if frame is None:
            return "nothing"
        name = frame.f_globals.get("__name__", "?")
        return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"

    def _stack(self) -> list[str]:
        frame = sys._current_frames().get(self.main)
        return [] if frame is None else traceback.format_stack(frame)

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"


def _host() -> str:
    """This machine; of containers each is one, as their processes have numbers of their own."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
