"""Another schedule, re-timed by what training measures."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.schedule.base import Schedule, crossing


class Adaptive(Schedule):
    """levels(t) = schedule.levels(u(t)), du/dt inversely proportional to what level u carries: equal steps of t carry
    equal shares of the variational bound, or of the loss.

    The bound in continuous time is the integral of SNR mse / 2 over the log-SNR, whose value does not depend on
    the timing but whose estimate by uniform t has least variance where its density is even (Kingma et al. 2021,
    arXiv:2107.00630, sections 5.1 and I). u(t) is piecewise linear, its inverse the cumulated carried density of the
    measured averages. With a weighting that knows no rate, re-timing also changes which levels are trained.

    t = 0 is the other schedule's earliest time, so that earliest is 0 whatever is learned.

    Args:
        schedule: the other one; until something is learned, the two are the same.
        carries: "vlb" (from the squared x_0 errors) or "loss" (from the losses, for weightings without the rate).
        bins: > 1, even in the mean of the other schedule's time and its log-SNR, as the bound's density per time
            rises like 1/t towards data.
        decay: of the averages per update, in [0, 1): they look back over 1/(1 - decay) updates.
        floor: share of t that is spread as it was before, in (0, 1], so that no level is starved.
        warm_up: updates before the first change, >= 0.
        every: updates between changes, > 0.
    """

    learns = True
    edges: Tensor
    reach: Tensor
    knots: Tensor
    sums: Tensor
    weights: Tensor
    updates: Tensor

    def __init__(
        self,
        schedule: Schedule,
        carries: str = "vlb",
        bins: int = 128,
        decay: float = 0.999,
        floor: float = 0.05,
        warm_up: int = 500,
        every: int = 100,
    ):
        super().__init__()
        if carries not in ("vlb", "loss"):
            raise ValueError(f"carries={carries}: need vlb or loss")
        if not bins > 1:
            raise ValueError(f"bins={bins}: need at least 2")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: need a number in [0, 1), such as 0.999")
        if not 0 < floor <= 1:
            raise ValueError(f"floor={floor}: need a number in (0, 1], such as 0.05")
        if not warm_up >= 0:
            raise ValueError(f"warm_up={warm_up}: need a number >= 0")
        if not every > 0:
            raise ValueError(f"every={every}: need a number > 0")
        self.schedule, self.carries = schedule, carries
        self.decay, self.floor, self.warm_up, self.every = decay, floor, warm_up, every
        edges = even_edges(schedule, bins)
        reach = -schedule.log_snr(edges).diff() if carries == "vlb" else edges.diff()
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("knots", (edges - edges[0]) / (1 - edges[0]))
        self.register_buffer("sums", torch.zeros_like(reach))
        self.register_buffer("weights", torch.zeros_like(reach))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=edges.device))

    @property
    def earliest(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """0: a clean level is left to the other schedule."""
        return 0.0

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.levels(self.retimed(t))

    def retimed(self, t: Tensor) -> Tensor:
        """u(t), the other schedule's time."""
        return along(self.knots, self.edges, t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        u = self.schedule.inverse(log_snr)
        return along(self.edges, self.knots, u.clamp_min(self.schedule.earliest)).clamp(0, 1)

    def rate(self, t: Tensor) -> Tensor:
        """The other schedule's rate times du/dt."""
        t64 = t.double()
        index = segment(self.knots, t64)
        slope = (self.edges.diff() / self.knots.diff())[index]
        return (self.schedule.rate(self.retimed(t64)) * slope).to(torch.promote_types(t.dtype, torch.float32))

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor, mse: Tensor) -> None:
        """Average what was carried, and every ``every`` updates after ``warm_up`` follow it."""
        u = self.retimed(t.double())
        if self.carries == "vlb":
            carried, weight = (self.schedule.log_snr(u).exp() / 2 * mse), self.schedule.rate(u)
        else:
            carried, weight = losses.double(), torch.ones_like(u)
        index = segment(self.edges, u)
        inside = index[:, None] == torch.arange(len(self.sums), device=index.device)  # (B, bins)
        # Plain sums, not scattered ones, so that every rank gets the same bits.
        self.sums.mul_(self.decay).add_((inside * (carried * weight)[:, None]).sum(0))
        self.weights.mul_(self.decay).add_((inside * weight[:, None]).sum(0))
        self.updates.add_(1)
        due = (self.updates >= self.warm_up) & (self.updates % self.every == 0)
        self.knots.copy_(torch.where(due, self._learned(), self.knots))

    def _learned(self) -> Tensor:
        """The knots that the averages ask for; a bin that was never met is taken for the nearest one that was."""
        i = torch.arange(len(self.sums), device=self.sums.device)
        away = (i[:, None] - i).abs() + len(i) * (self.weights == 0)
        average = (self.sums / self.weights)[away.argmin(1)]
        share = (average * self.reach).clamp_min(0)
        width = self.edges.diff()
        share = (1 - self.floor) * share / share.sum().clamp_min(1e-300) + self.floor * width / width.sum()
        upto = torch.ones(len(share), len(share), dtype=share.dtype, device=share.device).tril()
        knots = (upto * share).sum(1)  # a cumulative sum that is the same on every rank
        return torch.cat([torch.zeros_like(knots[:1]), knots / knots[-1]])


def even_edges(schedule: Schedule, bins: int) -> Tensor:
    """bins + 1 times from the schedule's earliest to 1, even in the mean of time and log-SNR, each scaled to [0, 1]."""
    ends = torch.tensor([schedule.earliest, 1.0], dtype=torch.float64, device=schedule.device)
    cleanest, noisiest = schedule.log_snr(ends)

    def place(t: Tensor) -> Tensor:
        """Rises from 0 to 2."""
        return (t - ends[0]) / (1 - ends[0]) + (cleanest - schedule.log_snr(t)) / (cleanest - noisiest)

    inner = torch.linspace(0, 2, bins + 1, dtype=torch.float64, device=schedule.device)[1:-1]
    return torch.cat([ends[:1], crossing(place, inner), ends[1:]])


def segment(knots: Tensor, value: Tensor) -> Tensor:
    """The index of the knot at or before each value; the last segment has both its ends."""
    return (torch.searchsorted(knots, value.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)


def along(knots: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """The piecewise linear function through (knots, values) at x, exact at the knots."""
    i = segment(knots, x)
    return torch.lerp(values[i], values[i + 1], (x - knots[i]) / (knots[i + 1] - knots[i]))
