"""The range of t cut into slots, and training on some of them (the idea: arXiv:2502.01990).

A slot's boundaries are given, or cut so that each slot holds an equal share of a loss: c_k = min{t : cumulative loss
at t >= k/n of the whole}. They then depend on which loss that is: where the loss of eps puts most slots near the clean
end, that of x_0 puts few there. They are kept in the checkpoint. Within a slot, t is uniform, and stratified over the
global batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from denoiselab.curve import PANELS, Curve
from denoiselab.schedule import Schedule
from denoiselab.timesteps.base import histogram_icdf
from denoiselab.timesteps.uniform import Stratified


class Cut(Stratified):
    """[0, 1] cut into slots; what is drawn from them is up to subclasses.

    Args:
        boundaries: between the slots, strictly rising in (0, 1); or None, with a curve.
        curve: cuts slots of equal loss instead: a file, or a run (see ``Curve.load``); or a Curve.
        slots: how many the curve is cut into, >= 2.
        panel: of a run, which loss: eps, x_0 or v.
        correct: weight losses by 1/p(t) relative to uniform t.
    """

    edges: Tensor

    def __init__(
        self,
        boundaries: Sequence[float] | None = None,
        curve: Curve | str | None = None,
        slots: int = 10,
        panel: str = "eps",
        correct: bool = False,
        steps: int | None = None,
    ):
        super().__init__(steps)
        if panel not in PANELS:
            raise ValueError(f"panel={panel}: need one of {', '.join(PANELS)}")
        if boundaries is None and curve is None:
            raise ValueError(
                "boundaries=null: slots have no boundaries of their own; give them boundaries=[...] or curve=PATH"
            )
        if boundaries is not None and curve is not None:
            raise ValueError(f"boundaries={[*boundaries]}: given beside a curve; curve=null leaves the boundaries")
        if boundaries is not None:
            inner = torch.tensor([float(c) for c in boundaries], dtype=torch.float64)
            named = f"boundaries={[*boundaries]}"
        else:
            if slots < 2:
                raise ValueError(f"slots={slots}: need at least 2")
            found = curve if isinstance(curve, Curve) else Curve.load(curve, panel)  # pyright: ignore[reportArgumentType]
            inner = found.inverse(torch.arange(1, slots, dtype=torch.float64) / slots)
            named = f"slots={slots}"
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
        if len(edges) < 3 or not bool((edges.diff() > 0).all()):
            raise ValueError(f"{named}: need at least one boundary, strictly rising in (0, 1)")
        self.correct = correct
        self.register_buffer("edges", edges)

    @property
    def count(self) -> int:
        return len(self.edges) - 1


class Slots(Cut):
    """A mixture: slot k with its probability, and t uniform in it.

    Args:
        probabilities: one per slot, up to a common factor, >= 0; None for equal ones.
        boundaries, curve, slots, panel, correct: see Cut. Corrected, the weight is the slot's width over its
            probability (all must be > 0), and the objective that of uniform t.
    """

    p: Tensor

    def __init__(
        self,
        boundaries: Sequence[float] | None = None,
        curve: Curve | str | None = None,
        slots: int = 10,
        panel: str = "eps",
        probabilities: Sequence[float] | None = None,
        correct: bool = True,
        steps: int | None = None,
    ):
        super().__init__(boundaries, curve, slots, panel, correct, steps)
        given = [1.0] * self.count if probabilities is None else [float(p) for p in probabilities]
        p = torch.tensor(given, dtype=torch.float64)
        fine = len(p) == self.count and bool((p >= 0).all()) and bool(p.isfinite().all()) and p.sum() > 0
        if not fine or (correct and not bool((p > 0).all())):
            raise ValueError(
                f"probabilities={given}: need {self.count} numbers {'> 0, or correct=false' if correct else '>= 0'}"
            )
        self.register_buffer("p", p / p.sum(), persistent=False)

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return histogram_icdf(u, self.edges, self.p)

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        if not self.correct:
            return super().weights(t, schedule)
        return (self.edges.diff() / self.p)[torch.bucketize(t, self.edges[1:-1], right=True)]


class Slot(Cut):
    """One slot only, t uniform in it.

    Args:
        slot: which, counted from 0 at the clean end.
        boundaries, curve, slots, panel, correct: see Cut. Corrected, the weight is the slot's width, and the
            objective what the slot contributes to that of uniform t.
    """

    share = 1.0
    """Of all samples that are drawn from this slot."""

    def __init__(
        self,
        slot: int = 0,
        boundaries: Sequence[float] | None = None,
        curve: Curve | str | None = None,
        slots: int = 10,
        panel: str = "eps",
        correct: bool = False,
        steps: int | None = None,
    ):
        super().__init__(boundaries, curve, slots, panel, correct, steps)
        if not 0 <= slot < self.count:
            raise ValueError(f"slot={slot}: need a number from 0 to {self.count - 1}")
        self.slot = slot

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return torch.lerp(self.edges[self.slot], self.edges[self.slot + 1], u)

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        if not self.correct:
            return super().weights(t, schedule)
        return ((self.edges[self.slot + 1] - self.edges[self.slot]) / self.share).expand_as(t)


class Curriculum(Slot):
    """One slot after the other, each for a number of samples; after the last, the first again.

    Args:
        order: slots in the order of training, counted from 0 at the clean end; more than once gives more samples.
        budget: samples of each before the next, >= 1; a slot changes between optimizer steps.
        boundaries, curve, slots, panel, correct: see Cut. Corrected, the weight is the slot's width over its share of
            a whole round, in which every slot must occur, and over a round the objective is that of uniform t.
    """

    def __init__(
        self,
        order: Sequence[int],
        budget: int,
        boundaries: Sequence[float] | None = None,
        curve: Curve | str | None = None,
        slots: int = 10,
        panel: str = "eps",
        correct: bool = False,
        steps: int | None = None,
    ):
        super().__init__(0, boundaries, curve, slots, panel, correct, steps)
        if budget < 1:
            raise ValueError(f"budget={budget}: need at least 1 sample")
        if not order or not set(order) <= {*range(self.count)} or (correct and len({*order}) < self.count):
            every = ", every one of them, or correct=false" if correct else ""
            raise ValueError(f"order={[*order]}: need slots from 0 to {self.count - 1}{every}")
        self.order, self.budget = [*order], budget
        self.advance(0)

    def advance(self, samples_seen: int) -> None:
        self.slot = self.order[samples_seen // self.budget % len(self.order)]
        self.share = self.order.count(self.slot) / len(self.order)
