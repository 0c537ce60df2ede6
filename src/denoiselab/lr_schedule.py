"""Learning-rate schedules: a factor on the learning rate as a function of the optimizer step."""

from __future__ import annotations

import math


class Constant:
    """1, after a linear rise over the first ``warmup`` steps.

    >>> [Constant(warmup=4)(step) for step in (0, 1, 3, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """

    def __init__(self, warmup: int = 0):
        if warmup < 0:
            raise ValueError(f"warmup={warmup}: need a number of steps >= 0")
        self.warmup = warmup

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


class Cosine(Constant):
    """(1 + cos(pi step/steps))/2, after the warm-up, down to ``final``. It depends on the length of the run.

    Args:
        steps: the whole run's, > warmup.
        warmup: steps of linear rise.
        final: the factor at the end, in [0, 1].
    """

    def __init__(self, steps: int, warmup: int = 0, final: float = 0.0):
        super().__init__(warmup)
        if steps <= warmup:
            raise ValueError(f"warmup={warmup}: need fewer steps than the run's {steps}")
        if not 0 <= final <= 1:
            raise ValueError(f"final={final}: need a factor in [0, 1]")
        self.steps, self.final = steps, final

    def __call__(self, step: int) -> float:
        done = min(1.0, max(0.0, (step - self.warmup) / (self.steps - self.warmup)))
        return super().__call__(step) * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


class InverseSqrt(Constant):
    """1/sqrt(max(1, step/reference)), after the warm-up (Karras et al. 2024, arXiv:2312.02696, eq. 67): the length
    of the run need not be known.

    Args:
        reference: steps before the decay begins, > 0.
        warmup: steps of linear rise.
    """

    def __init__(self, reference: int = 1000, warmup: int = 0):
        super().__init__(warmup)
        if reference <= 0:
            raise ValueError(f"reference={reference}: need a number of steps > 0")
        self.reference = reference

    def __call__(self, step: int) -> float:
        return super().__call__(step) / math.sqrt(max(1.0, step / self.reference))
