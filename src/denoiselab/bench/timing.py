"""The one timer of all benchmarks: contenders have turns, alternating in one run, so that all meet the same machine."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

LEAST = 6
"""Rounds below which no 95% interval of a median exists."""


WARMUP = 2
"""Rounds before those that count."""


class Contender:
    """Something that is timed. A turn is ``prepare()``, which does not count, and ``run()``.

    Args:
        name: in tables and records.
        run: does the work of a turn.
        prepare: what a turn needs beforehand.
        clock: seconds; wall-clock time that waits for the GPU, if there is one.
        per: pieces of work in a turn; times are of one piece.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[], object],
        prepare: Callable[[], object] = lambda: None,
        clock: Callable[[], float] | None = None,
        per: int = 1,
    ):
        self.name, self.run, self.prepare, self.per = name, run, prepare, per
        self.clock = clock or finished
        self.seconds: list[float] = []
        """Of one piece of work, one entry per round."""


def finished() -> float:
    """The time when everything that was started is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def turns(contenders: Sequence[Contender], rounds: int, title: str, live: bool = True) -> Iterator[Contender]:
    """Whose turn it is; what passes until the next one is asked for is the time of that turn.

    In each round every contender has one turn, in an order that is reversed from round to round, so that a machine
    that gets slower or faster favours none. Says on stderr how long it will take.

    Args:
        contenders: who competes; their ``seconds`` are filled.
        rounds: that count, >= 6.
        title: for the person who waits.
        live: whether a terminal is kept up to date, which training does itself.
    """
    for contender in contenders:
        contender.seconds.clear()
    begun = time.perf_counter()
    for done in range(WARMUP + rounds):
        for contender in list(contenders)[:: 1 if done % 2 else -1]:
            contender.prepare()
            begin = contender.clock()
            yield contender
            seconds = contender.clock() - begin
            if done >= WARMUP:
                contender.seconds.append(seconds / contender.per)
        _say(title, done + 1, WARMUP + rounds, time.perf_counter() - begun, live)


def alternate(contenders: Sequence[Contender], rounds: int, title: str) -> None:
    """Give every contender its turns."""
    for contender in turns(contenders, rounds, title):
        contender.run()


def _say(title: str, done: int, total: int, spent: float, live: bool) -> None:
    """Progress and an estimate: a line that is kept up to date on a terminal, else one line at first."""
    left = spent / done * (total - done)
    if live and sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{title}: round {done} of {total}, {left:.0f} s left", end=end, file=sys.stderr, flush=True)
    elif done == 1:
        print(f"{title}: {total} rounds, about {left:.0f} s", file=sys.stderr, flush=True)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval [x_(k), x_(n+1-k)] of a median: order statistics, exact for any distribution.

    It covers the median with probability 1 - 2 P(Binomial(n, 1/2) < k), and k is the largest for which that is at least
    0.95; it is what bootstrapping the median tends to. The median and not the mean, for a machine that is disturbed
    now and then; an outlier does not move either end.

    >>> median_interval([1, 2, 3, 4, 5, 6])
    (1, 6)
    >>> median_interval(range(1, 31))
    (10, 21)
    """
    n, below, k = len(values), 0, 0
    if n < LEAST:
        raise ValueError(f"rounds={n}: need at least {LEAST}, for a 95% interval of a median")
    while 2 * (below + math.comb(n, k)) <= 0.05 * 2**n:  # in whole numbers: P(Binomial < k + 1)
        below, k = below + math.comb(n, k), k + 1
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
