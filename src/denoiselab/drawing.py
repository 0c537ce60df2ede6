"""Samples from several devices at once: a thread and a copy of the network each, and the same bits as from one.

Threads, since a walk is a sequence of kernels that Python only launches: a process per device would read the run, the
data set and the metrics again. The batches are those of one device, and a sample's noise is addressed by its number, so
which device makes a batch, and how many there are, changes nothing.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from denoiselab.data.codec import Codec
from denoiselab.guidance import DenoiserLike
from denoiselab.rng import Noise
from denoiselab.sampler import Sampler
from denoiselab.sampler.base import on_cpu
from denoiselab.schedule import Schedule

if TYPE_CHECKING:
    from denoiselab.experiment import Parts
    from denoiselab.run import Run


POLL = 0.01
"""Seconds between looks at who has ended."""


class Abandoned(Exception):
    """Work was given up, because other work has failed or somebody asked to stop."""


class Place(NamedTuple):
    """What makes samples on one device; nothing of it is shared with another place's, not even what moves with x_t."""

    denoiser: DenoiserLike
    sampler: Sampler
    schedule: Schedule
    codec: Codec
    device: torch.device

    @torch.no_grad()  # which is each thread's own
    def draw(
        self, cond: dict[str, Tensor], ids: Sequence[int], seed: int, shape: Sequence[int], go_on: Callable[[], None]
    ) -> tuple[Tensor, int]:
        """Decoded samples with these ids on the CPU, in one walk, and its network calls.

        Args:
            cond: what they are asked for, a row each.
            shape: one x_0's.
            go_on: is called after each step, and raises to end it.
        """
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            noise = Noise(seed, ids, shape, self.device)
            asked = {key: value.to(self.device) for key, value in cond.items()}
            state = None
            for state in self.sampler.walk(self.denoiser, self.schedule, noise, **asked):  # noqa: B007
                go_on()
            assert state is not None
            return self.codec.decode(state.x_t).float().cpu(), state.calls


def drawn(
    run: Run,
    parts: Parts,
    cond: dict[str, Tensor],
    ids: Sequence[int],
    seed: int,
    size: int,
    progress: Callable[[int], object],
) -> tuple[Tensor, float]:
    """Decoded samples with these ids on the CPU, and the network calls of a sample's walk, made on all of the run's
    devices in batches of ``size``; the other arguments are those of ``Run.draw``."""
    batches = [range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)]

    def worker(place: Place) -> Worker:
        def draw(batch: range, go_on: Callable[[], None]) -> tuple[Tensor, int]:
            rows = slice(batch.start, batch.stop)
            asked = {key: value[rows] for key, value in cond.items()}
            return place.draw(asked, ids[rows], seed, run.parts.shape, go_on)

        return draw

    workers = [worker(place) for place in places(run, parts, len(batches))]
    made = spread(workers, batches, lambda batch: progress(len(batch)))
    calls = sum(len(batch) * count for batch, (_, count) in zip(batches, made, strict=True))
    return torch.cat([samples for samples, _ in made]), calls / len(ids)


def places(run: Run, parts: Parts, most: int) -> list[Place]:
    """The run's own device, then a copy on each other one.

    Args:
        run: that is sampled.
        parts: whose sampler, guidance and schedule to use.
        most: places that there is work for, >= 1.
    """
    first = Place(parts.guidance(run.denoiser), parts.sampler, parts.schedule, run.codec, run.device)
    shared = (run.denoiser, parts.guidance, parts.sampler, on_cpu(parts.schedule), run.codec)

    def place(device: torch.device) -> Place:
        denoiser, guidance, sampler, schedule, codec = copy.deepcopy(shared)  # a guidance's networks follow x_t
        return Place(guidance(denoiser.to(device)), sampler, schedule, codec.to(device), device)

    return [first, *map(place, run.others[: most - 1])]


Worker = Callable[[Any, Callable[[], None]], Any]
"""``worker(item, go_on) -> result``."""


def spread(workers: Sequence[Worker], items: Sequence[Any], told: Callable[[Any], object]) -> list[Any]:
    """``workers[k](item, go_on)`` of every item, in the order of the items; each worker takes the next item that nobody
    has taken, the first one in this thread, the others in threads of their own.

    The first error, or a signal that comes, ends the others at their next ``go_on()`` and is raised.

    Args:
        workers: at least one.
        items: what there is to do.
        told: is told each item that is done, by one thread at a time.
    """
    waiting, lock, stop = iter(enumerate(items)), threading.Lock(), threading.Event()
    results: dict[int, Any] = {}
    errors: list[BaseException] = []
    ended: list[Worker] = []

    def go_on() -> None:
        if stop.is_set():
            raise Abandoned

    def work(worker: Worker) -> None:
        try:
            while True:
                with lock:
                    number, item = next(waiting, (None, None))
                if number is None or stop.is_set():
                    return
                results[number] = worker(item, go_on)
                with lock:
                    told(item)
        except BaseException as error:
            errors.append(error)  # before the others stop, so that theirs come after it
            stop.set()
        finally:
            ended.append(worker)

    def wait() -> None:
        while len(ended) < len(workers):  # Thread.join, if a signal comes, takes the thread to have ended
            time.sleep(POLL)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers[1:]]
    for thread in threads:
        thread.start()
    try:
        work(workers[0])
        wait()
    finally:
        stop.set()  # a signal came while this thread waited
        wait()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]
