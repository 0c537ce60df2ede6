"""Dormand and Prince's method with adaptive steps."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from denoiselab.sampler.base import Rung, Sampler, Walk
from denoiselab.sampler.spacing import Spacing


class RK45(Sampler):
    """dz/dtau = eps_hat - x_0_hat in flow time tau = sigma/(alpha + sigma), z = x/(alpha + sigma), solved by
    Dormand and Prince's fifth-order Runge-Kutta method with steps as long as the tolerances allow (torchdiffeq's
    dopri5; Song et al. 2021, arXiv:2011.13456, appendix D.4, sample so).

    The network is asked at levels of the solver's choice, as often as it takes, and the step onto the clean level is
    DDIM's. Walks stop at every level of their spacing, so two of them, the ends, cost the fewest calls. Steps have the
    length that the worst sample of the batch needs: a sample depends on its batch, but by no more than the tolerances.

    Args:
        spacing, steps, clip: as for Sampler.
        rtol, atol: the error of a step, relative to |z| and absolute, both > 0.
    """

    order = None

    def __init__(
        self,
        spacing: Spacing,
        steps: int = 2,
        clip: float | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ):
        super().__init__(spacing, steps, clip)
        if not rtol > 0:
            raise ValueError(f"rtol={rtol}: need a number > 0, such as 1e-5")
        if not atol > 0:
            raise ValueError(f"atol={atol}: need a number > 0, such as 1e-5")
        self.rtol, self.atol = rtol, atol

    @property
    def nfe(self) -> None:
        return None

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        from torchdiffeq import odeint

        if s.sigma == 0:
            return s.alpha * walk.denoise(x_t, t)

        def velocity(u: Tensor, z: Tensor) -> Tensor:  # u = 1 - tau rises, and is exact where alpha all but vanishes
            level = Rung(float(u), 1 - float(u))
            return (walk.denoise(z, level) - z) / level.sigma

        ends = torch.tensor([1 - t.flow_time, 1 - s.flow_time], dtype=torch.float64, device=x_t.device)
        options = {"norm": worst, "step_t": ends[1:]}
        start = x_t / (t.alpha + t.sigma)
        path = odeint(velocity, start, ends, method="dopri5", rtol=self.rtol, atol=self.atol, options=options)
        return (s.alpha + s.sigma) * cast(Tensor, path)[-1]


def worst(error: Tensor) -> Tensor:
    """The root mean square of the sample that has the largest."""
    return error.flatten(1).square().mean(1).max().sqrt()
