"""UniPC: a predictor and a corrector that share their network calls (Zhao et al. 2023, arXiv:2302.04867)."""

from __future__ import annotations

from torch import Tensor

from denoiselab.arguments import Unbounded
from denoiselab.sampler.base import Rung, Walk
from denoiselab.sampler.exponential import Estimate, Multistep, Rule, constant, exact, midpoint, quadratic
from denoiselab.sampler.spacing import Spacing


def cubic(h: float) -> list[float]:
    return exact(h, 4)


def euler(h: float) -> list[float]:
    """B_1(h) = h: half of h taken for the first moment."""
    return [*constant(h), h / 2]


class UniPC(Multistep):
    """x_s = (sigma_s/sigma_t) x_t + alpha_s sum_i w_i x_0_hat_i through the latest p estimates (UniP), and, when the
    next step has asked the network at s, once more through these p and the new one (UniC), which replaces x_s
    (arXiv:2302.04867, algorithms 1 and 2, with data prediction). The estimate at s stays that at the predicted x_s.
    N calls.

    The weights solve the paper's system R_p(h) a_p B(h) = phi_p(h), that is, they have exact moments, whatever B(h) is.
    Only where there are two estimates did the authors set a_1 = 1/2, so that B(h) matters: in UniP-2 and UniC-1.

    A walk's order is p + 1, but at most 3: first and last steps have fewer estimates.

    Args:
        spacing, steps, clip, reach: as for Multistep.
        p: estimates of the predictor, 1 to 3; 2 suits guided walks, 3 unguided ones.
    """

    rules: tuple[Rule, ...] = (constant, midpoint, quadratic, cubic)
    few = float("inf")

    def __init__(
        self, spacing: Spacing, steps: int = 20, clip: float | None = None, p: int = 2, reach: Unbounded = 2.0
    ):
        super().__init__(spacing, steps, clip, reach)
        if p not in (1, 2, 3):
            raise ValueError(f"p={p}: need 1, 2 or 3")
        self.p = p

    @property
    def order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return min(self.p + 1, 3)

    @property
    def most(self) -> int:
        return self.p

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        estimates = self.latest(walk, t, s, self.finish(walk, x_t, t))
        told = walk.denoise(self.advance(x_t, t, s, estimates), s)
        walk.memory["told"] = told
        return self.advance(x_t, t, s, [*estimates, Estimate(s.half_log_snr, told)])

    def finish(self, walk: Walk, x_t: Tensor, t: Rung) -> Tensor:
        """The estimate at t that the corrector had asked for."""
        return walk.memory["told"] if "told" in walk.memory else walk.denoise(x_t, t)


class UniPCB1(UniPC):
    """UniPC with B(h) = h in place of B(h) = e^h - 1."""

    rules = (constant, euler, quadratic, cubic)
