"""Times drawn where the loss is large, from losses that training has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.schedule import Schedule
from denoiselab.timesteps.base import cell, histogram_icdf
from denoiselab.timesteps.uniform import Stratified


class Importance(Stratified):
    """p_t proportional to sqrt(E[L_t^2]) over the last losses at each t, and weight 1/(T p_t), which leaves the
    objective alone (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 18, whose resampler this follows).

    [0, 1] is cut into T cells; p_t = (1 - floor) sqrt(mean L^2) / sum + floor/T, and uniform until every cell has
    ``history`` losses. The weights are not normalised over the batch, which would bias them (see MeanImportance).
    Stratified draws of u make this systematic sampling, unbiased too. Losses are taken in without a host
    synchronisation, in the order of the batch also where a cell occurs in it more than once.

    Args:
        schedule: T is the number of its points.
        points: T where it has none, >= 2.
        history: losses kept per cell, >= 1.
        floor: share of uniform draws, in (0, 1]; without it, a cell whose losses are 0 would never be drawn again.
        steps: None or T.
    """

    learns = True
    losses: Tensor
    """(T, history), of each cell from the oldest to the latest."""
    count: Tensor
    """(T,), of all losses that a cell ever had."""
    p: Tensor
    cells: Tensor
    edges: Tensor

    def __init__(
        self,
        schedule: Schedule,
        points: int = 1000,
        history: int = 10,
        floor: float = 0.001,
        steps: int | None = None,
    ):
        super().__init__(steps)
        cells = schedule.points or points
        if points < 2:
            raise ValueError(f"points={points}: need at least 2, such as 1000")
        if history < 1:
            raise ValueError(f"history={history}: need at least 1, such as 10")
        if not 0 < floor <= 1:
            raise ValueError(f"floor={floor}: need a number in (0, 1], such as 0.001, or p_t = 0 is never left again")
        if steps not in (None, cells):
            raise ValueError(f"steps={steps}: need {cells}, as many as this schedule's points, or null")
        self.floor = floor
        self.register_buffer("losses", torch.zeros(cells, history, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(cells, dtype=torch.int64))
        self.register_buffer("p", torch.full((cells,), 1 / cells, dtype=torch.float64))
        self.register_buffer("cells", torch.arange(cells + 1), persistent=False)
        self.register_buffer("edges", torch.linspace(0, 1, cells + 1, dtype=torch.float64), persistent=False)

    def icdf(self, u: Tensor, schedule: Schedule) -> Tensor:
        return histogram_icdf(u, self.edges, self.p)

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        return 1 / (len(self.p) * self.p[cell(t, len(self.p))])

    def size(self, losses: Tensor) -> Tensor:
        """What p_t is proportional to, (T,): here sqrt(sum L^2), of losses (T, history)."""
        return torch.linalg.vector_norm(losses, dim=1)

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Append each loss to its cell's, in the order of the batch, and let go of the cell's oldest."""
        cells, history = self.losses.shape
        index, order = cell(t, cells).sort(stable=True)
        ends = torch.searchsorted(index, self.cells)
        first, number = ends[:-1, None], ends.diff()[:, None]  # of each cell's new losses, (T, 1)
        # The last `history` of a cell's old losses followed by its new ones: those from position `number` on.
        position = torch.arange(history, device=index.device) + number
        old, new = history * self.cells[:-1, None], self.losses.numel() - history + first
        every = torch.cat([self.losses.flatten(), losses.double()[order]])
        self.losses.copy_(every[position + torch.where(position < history, old, new)])
        self.count += number[:, 0]
        size = self.size(self.losses)
        p = (1 - self.floor) * size / size.sum() + self.floor / cells
        self.p.copy_(torch.where((self.count >= history).all(), p, 1 / cells))


class MeanImportance(Importance):
    """Importance sampling as it is commonly taught, and biased: p_t proportional to the mean loss, and weights 1/p_t
    divided by their mean over the batch. Here to show that bias; use Importance.

    A batch's estimate is then the harmonic mean of its losses, of times drawn in proportion to them: sum L^2/sum L at
    B = 1, and the mean of L only as B grows. For L = exp(-10 t) it is too large by
    +400% at B = 1, +309% at 2, +233% at 4, +173% at 8, +127% at 16, +66% at 64 and +29% at 256 (measured).
    What is normalised over is one rank's micro-batch.

    Args:
        schedule, points, history, floor, steps: as for Importance; a negative mean counts as 0.
    """

    def size(self, losses: Tensor) -> Tensor:
        return losses.mean(1).clamp_min(0)

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        w = super().weights(t, schedule)
        return w / w.mean()
