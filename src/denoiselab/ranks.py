"""The processes of a run on several devices: started by rank 0, and ended together when one of them is lost.

Lightning's own launcher looks at its processes every five seconds and then kills rank 0 as well, before that can say
which one was lost and write it down; and where rank 0 is killed, or a rank hangs, processes are left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from denoiselab.errors import RankLost
from denoiselab.launcher.local import die_with_parent

GRACE = 5.0
"""Seconds in which a process that has lost a rank ends by itself, as its collectives fail; then it is ended."""

LAST = 15.0
"""Seconds in which a process that raised an error, and so left the collectives of others, has ended."""

POLL = 0.1
"""Seconds between looks at who has ended."""


class Ranks:
    """Those of one training, seen from one of them.

    Args:
        rank: this process's.
        failed: is told in rank 0 why the run ends, where this process is about to end without another word.
    """

    program: ClassVar[Sequence[str]] = (sys.executable, "-m", "denoiselab")

    def __init__(self, rank: int, failed: Callable[[str], None]):
        self.rank, self.failed = rank, failed
        self.lost: str | None = None
        """Which rank was lost, and how."""
        self.pids: set[int] = set()
        """Of other ranks on this machine that are started by somebody else; they are killed where one hangs."""
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.over = threading.Event()
        self.lock = threading.Lock()

    @contextmanager
    def training(self, trainer: pl.Trainer, arguments: Sequence[str]) -> Iterator[None]:
        """Start the others, unless somebody else does (torchrun, SLURM's tasks); none of them outlives this.

        Args:
            trainer: that will train.
            arguments: of ``denoiselab``, for the other ranks.

        Raises:
            RankLost: another rank ended, or hung.
        """
        environment = dict(os.environ)
        try:
            self._start(trainer, arguments)
            yield
        except SystemExit as error:
            if error.code:
                raise
            raise RuntimeError("sys.exit() was called in training, which is not done") from error
        except BaseException as error:
            if self._of_collectives(error) and (lost := self._who()):
                raise RankLost(lost) from None
            self._end(GRACE if hasattr(error, "signum") else 0)  # those that stop for a signal have saved with us
            raise
        else:
            self._end(60)
        finally:
            self.over.set()
            self._end(0)
            # What Lightning leaves there must not make the next job of this process wait for ranks that nobody starts.
            os.environ.clear()
            os.environ.update(environment)

    def _start(self, trainer: pl.Trainer, arguments: Sequence[str]) -> None:
        cluster = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size == 1 or not isinstance(cluster, LightningEnvironment):
            return
        if cluster.creates_processes_externally:
            return
        own = trainer.world_size // trainer.num_nodes
        os.environ |= {
            "MASTER_ADDR": cluster.main_address,
            "MASTER_PORT": str(cluster.main_port),
            "NODE_RANK": str(cluster.node_rank()),
            "WORLD_SIZE": str(trainer.world_size),
            "LOCAL_RANK": "0",
        }
        for local in range(1, own):
            there = {**os.environ, "LOCAL_RANK": str(local)}
            self.processes[cluster.node_rank() * own + local] = self._one(there, arguments)
        threading.Thread(target=self._look, daemon=True, name="ranks").start()

    def _one(self, environment: Mapping[str, str], arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        prepare = partial(die_with_parent, signal.SIGKILL) if sys.platform == "linux" else None
        return subprocess.Popen([*self.program, *arguments], env=environment, preexec_fn=prepare)

    def _look(self) -> None:
        """Until a process has ended before its time."""
        while not self.over.wait(POLL):
            if (lost := self._ended()) is not None:
                self.lose(lost)
                return

    def _ended(self, well: bool = False) -> str | None:
        """Which process ended with a status, if one has; or as if all were well, where that counts too."""
        for rank, process in self.processes.items():
            if (status := process.poll()) or (well and status == 0):
                return f"rank {rank} {how(status)}"
        return None

    def _who(self) -> str | None:
        """Why collectives failed: which rank was lost."""
        end = time.monotonic() + LAST
        while self.lost is None and time.monotonic() < end and self.processes:
            if (lost := self._ended(well=True)) is not None:
                self.lose(lost)
            time.sleep(POLL)
        return self.lost or f"rank {self.rank} has lost another rank"

    @staticmethod
    def _of_collectives(error: BaseException) -> bool:
        """Whether it is what a process is told whose collectives meet nobody."""
        text = str(error).lower()
        told = any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe"))
        return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and told)

    def lose(self, text: str) -> None:
        """A rank was lost: end the others, and this process too if its collectives do not fail by themselves."""
        with self.lock:
            if self.lost is not None or self.over.is_set():
                return
            self.lost = text
        threading.Thread(target=self._leave, daemon=True, name="ranks-end").start()

    def _leave(self) -> None:
        error = RankLost(str(self.lost))
        if self.rank != 0:  # which ends with rank 0, if that is the one to be killed
            print(f"denoiselab train: {error}", file=sys.stderr, flush=True)
        for pid in self.pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._end(0)
        if self.over.wait(GRACE):
            return
        if self.rank == 0:
            print(f"denoiselab train: {error}", file=sys.stderr, flush=True)
            with suppress(Exception):  # nothing may keep this process
                self.failed(str(error))
        os._exit(error.status)

    def _end(self, seconds: float) -> None:
        """Wait so long for those that were started, then kill them."""
        end = time.monotonic() + seconds
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def how(status: int) -> str:
    """A process ended, in words.

    >>> how(3), how(-9)
    ('ended with status 3', 'was killed by SIGKILL')
    """
    return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
