"""Progressive distillation: a student takes in one step what its teacher takes in two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.buffers import ExactBuffers
from denoiselab.denoiser import Denoiser
from denoiselab.loss.base import Loss
from denoiselab.sampler.spacing import Spacing
from denoiselab.schedule import Level, Schedule
from denoiselab.weighting import Weighting


class Frozen(nn.Module):
    """A denoiser that is asked and never trained: it follows the device, and has no part in parameters or state."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self._held = (denoiser.requires_grad_(False).eval(),)

    @torch.no_grad()
    def forward(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Tensor:
        """x_0_hat."""
        return self._held[0](x_t, alpha_t, sigma_t, **cond)

    def _apply(self, fn, recurse=True):
        self._held[0].to(fn(torch.zeros(())).device)
        return super()._apply(fn, recurse)


class Progressive(ExactBuffers, Loss):
    """w_t mean((x_0_hat(x_t) - x_0_tilde)^2), x_0_tilde = (x_s - (sigma_s/sigma_t) x_t)/(alpha_s - (sigma_s/sigma_t)
    alpha_t): the answer with which one DDIM step from t to s lands where two of the teacher land (Salimans and Ho
    2022, arXiv:2202.00512, algorithm 2).

    The teacher's levels are 2 steps of the run's spacing, the student's every other one of them, and the clean level
    ends both. A time stands for the first of the student's levels at or above it. Halve ``steps`` from run to run,
    each with the run before it as teacher and as ``init_from``.

    Args:
        teacher: a denoiser.
        schedule, spacing: the run's. With trailing spacing the student's levels are those that a sampler has.
        weighting: w_t; the paper's is max(SNR, 1).
        steps: the student's, at least 1.
    """

    times: Tensor

    def __init__(self, teacher: Denoiser, schedule: Schedule, spacing: Spacing, weighting: Weighting, steps: int = 8):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps={steps}: need at least 1")
        self.teacher, self.weighting, self.steps = Frozen(teacher), weighting, steps
        self.register_buffer("times", spacing(schedule, 2 * steps).flip(0), persistent=False)  # rising
        self.formula = f"({weighting.formula}) * mean |x_0_hat - x_0 of two teacher steps|^2{weighting.added}"

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = torch.promote_types(x_0.dtype, t.dtype)
        i = torch.searchsorted(self.times[1::2].contiguous(), t.double()).clamp_max(self.steps - 1)
        t = self.times[2 * i + 1]
        start, middle, end = (self.level(schedule, index, dtype) for index in (2 * i + 1, 2 * i, 2 * i - 1))
        x_t = start.alpha * x_0 + start.sigma * eps
        x_u = ddim(x_t, self.teacher(x_t, *start, **cond), start, middle)
        x_s = ddim(x_u, self.teacher(x_u, *middle, **cond), middle, end)
        kept = end.sigma / start.sigma
        aim = (x_s - kept * x_t) / (end.alpha - kept * start.alpha)
        found = denoiser(x_t, *start, **cond)
        error = (found - aim).square().flatten(1).mean(1)
        loss = self.weighting.apply(error, *(value.flatten() for value in (*start, schedule.rate(t).to(dtype))))
        mse = (found.detach() - x_0).square().flatten(1).mean(1)
        return loss, {"mse": mse, "t": t.flatten().to(mse.dtype)}

    def level(self, schedule: Schedule, index: Tensor, dtype: torch.dtype) -> Level:
        """The level of an index among the times, the clean one at -1."""
        alpha, sigma = schedule(self.times[index.clamp_min(0)])
        return Level(torch.where(index < 0, 1.0, alpha).to(dtype), torch.where(index < 0, 0.0, sigma).to(dtype))


def ddim(x_t: Tensor, x_0_hat: Tensor, t: Level, s: Level) -> Tensor:
    """DDIM's step, with levels per sample."""
    kept = s.sigma / t.sigma
    return kept * x_t + (s.alpha - kept * t.alpha) * x_0_hat
