"""PyTorch's loader, made to say in one line that one of its processes died."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

PATIENCE = 2.0
"""Seconds that a process may take to be seen dead after its pipe broke."""


OUTLIVED = 30
"""Seconds for which a process that is told to stop still serves the one that started it, which saves meanwhile."""


def begin(number: int) -> None:
    """What a loader process does first. A scheduler tells every process of a job to stop, and so does Ctrl-C in a
    terminal: the training process is to finish its step and save, for which it needs the others."""
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLIVED))


class LoaderDied(RuntimeError):
    """A loader process ended without being asked to."""

    status = 1


class Ending:
    """The event by which processes are told to end, as the one that tells them sees it: asking needs no lock, which a
    process that was killed may hold for ever. PyTorch asks when it has found one dead.

    Args:
        event: that the others see.
    """

    def __init__(self, event: Any):
        self.event, self.told = event, False

    def is_set(self) -> bool:
        return self.told

    def set(self) -> None:
        self.told = True
        self.event.set()


class Loader(DataLoader):
    """A ``DataLoader`` that ends with ``LoaderDied`` when one of its processes is killed.

    PyTorch notices within seconds: as a RuntimeError out of a signal handler, wherever the main thread is, or as a
    broken connection, whichever comes first. What a process raises itself arrives as it is.
    """

    batches: Any = None
    """PyTorch's iterator."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.batches = super().__iter__()
        if self.num_workers:
            self.batches._workers_done_event = Ending(self.batches._workers_done_event)
        while True:
            try:
                batch = next(self.batches)
            except StopIteration:
                return
            except Exception as error:
                line = None
                if isinstance(error, RuntimeError | OSError | EOFError):
                    line = _death(getattr(self.batches, "_workers", []))
                self.end()
                if line is None:
                    raise
                raise LoaderDied(line) from None
            yield batch

    def met_elsewhere(self, error: BaseException) -> LoaderDied | None:
        """What an error means that the signal handler raised while something else was done than loading."""
        ours = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
        line = _death(getattr(self.batches, "_workers", [])) if ours else None
        return LoaderDied(line) if line else None

    def end(self) -> None:
        """End the processes now: left to the collector of garbage, each takes five seconds. PyTorch's own way waits for
        ever where one was killed that held the lock of the event by which they are told to end."""
        batches, self.batches = self.batches, None
        if self.num_workers and batches is not None:
            batches._shutdown = True
            if batches._worker_pids_set:
                signal_handling._remove_worker_pids(id(batches))  # whose deaths are no errors from here
                batches._worker_pids_set = False
            if hasattr(batches, "_pin_memory_thread"):
                batches._pin_memory_thread_done_event.set()
            for worker in batches._workers:
                worker.kill()
                worker.join()
            self._iterator = None


def _death(workers: list[Any]) -> str | None:
    """How a process ended, if one did."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(RuntimeError):  # the signal handler's, where the broken connection came first
            for worker in workers:
                if worker.exitcode:
                    code = worker.exitcode
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                    reason = "; memory may have run out: try fewer data.workers" if -code == signal.SIGKILL else ""
                    return f"data: loader process {worker.pid}, one of {len(workers)}, {how}{reason}"
            if not workers:
                return None
            time.sleep(0.02)
    return None
