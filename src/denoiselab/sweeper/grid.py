"""Every combination of values."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from denoiselab.compose import sweep
from denoiselab.launcher import Task
from denoiselab.sweeper.base import Sweeper


class Grid(Sweeper):
    """Every combination of comma-separated values, the last option varying fastest; all are composed and checked
    before the first starts."""

    def begin(self, overrides: Sequence[str]) -> None:
        planned = [self.maker.job(one) for one in sweep(overrides)]
        self.maker.check(planned, overrides)
        labels = [f"{number + 1}/{len(planned)}" for number in range(len(planned))]
        admitted = [self.admit(job, label) for job, label in zip(planned, labels, strict=True)]
        self.waiting = [task for task in admitted if task is not None]
        if self.waiting:
            print(f"{len(self.waiting)} of {len(planned)} {self.maker.what} to make", file=sys.stderr, flush=True)

    def take(self, held: int) -> list[Task]:
        """All at once; the launcher knows how many there is room for."""
        given, self.waiting = self.waiting, []
        return given
