"""DDIM and DDPM: the x_0 estimate put back on the level s, with or without fresh noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from denoiselab.sampler.base import Denoise, Rung, Sampler
from denoiselab.sampler.spacing import Spacing
from denoiselab.schedule import Schedule


def ddim(x_t: Tensor, x_0_hat: Tensor, t: Rung, s: Rung) -> Tensor:
    """alpha_s x_0_hat + sigma_s eps_hat: the deterministic step from t to s; s may be noisier than t, or clean."""
    kept = s.sigma / t.sigma
    return (kept * x_t).add_(x_0_hat, alpha=s.alpha - kept * t.alpha)


class DDIM(Sampler):
    """x_s = alpha_s x_0_hat + sqrt(sigma_s^2 - d^2) eps_hat + d z,
    d = eta (sigma_s/sigma_t) sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2) (Song et al. 2021, arXiv:2010.02502,
    eq. 12 and 16, for any alpha_t). eta = 0 is deterministic and first order; eta = 1 is DDPM with small variance.

    Args:
        spacing, steps, clip: as for Sampler.
        eta: noise put back, in [0, 1].
    """

    def __init__(self, spacing: Spacing, steps: int = 20, clip: float | None = None, eta: float = 0.0):
        super().__init__(spacing, steps, clip)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: need a number in [0, 1]; 0 is deterministic")
        self.eta = eta

    def step(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Rung,
        s: Rung,
        schedule: Schedule,
        noise: Callable[[], Tensor],
        memory: dict[str, Any],
    ) -> Tensor:
        x_0_hat = denoise(x_t, t)
        if s.sigma == 0:
            return s.alpha * x_0_hat
        if self.eta == 0:
            return ddim(x_t, x_0_hat, t, s)
        ratio = s.ratio / t.ratio
        d = self.eta * s.sigma * math.sqrt(1 - ratio**2)
        # sqrt(sigma_s^2 - d^2)/sigma_t, written so that nothing is rounded below zero
        kept = s.sigma / t.sigma * math.sqrt(1 - self.eta**2 + (self.eta * ratio) ** 2)
        return (kept * x_t).add_(x_0_hat, alpha=s.alpha - kept * t.alpha).add_(noise(), alpha=d)


class DDPM(Sampler):
    """x_s = mean of q(x_s | x_t, x_0_hat) + sqrt(variance) z (Ho et al. 2020, arXiv:2006.11239, eq. 6-7).

    With a = alpha_t/alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2: mean = (a sigma_s^2 x_t + alpha_s b^2 x_0_hat) /
    sigma_t^2. On neighbouring points of a table b^2 is beta_t. The last step returns the mean.

    Args:
        spacing, clip: as for Sampler.
        steps: N; the table's T with trailing spacing is the published ancestral sampler.
        variance: fixed_small, b^2 sigma_s^2/sigma_t^2 (beta tilde: right for a single data point), or
            fixed_large, b^2 (beta: right for white Gaussian data).
    """

    def __init__(self, spacing: Spacing, steps: int = 1000, clip: float | None = None, variance: str = "fixed_small"):
        super().__init__(spacing, steps, clip)
        if variance not in ("fixed_small", "fixed_large"):
            raise ValueError(f"variance={variance}: need fixed_small or fixed_large")
        self.variance = variance

    def step(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Rung,
        s: Rung,
        schedule: Schedule,
        noise: Callable[[], Tensor],
        memory: dict[str, Any],
    ) -> Tensor:
        x_0_hat = denoise(x_t, t)
        if s.sigma == 0:
            return s.alpha * x_0_hat
        _, b2, posterior = reverse(t, s)
        variance = b2 * posterior if self.variance == "fixed_small" else b2
        return posterior_mean(x_t, x_0_hat, t, s).add_(noise(), alpha=math.sqrt(variance))


def reverse(t: Rung, s: Rung) -> tuple[float, float, float]:
    """a = alpha_t/alpha_s, b^2 = sigma_t^2 - a^2 sigma_s^2, and sigma_s^2/sigma_t^2, of the step from t to s."""
    a = t.alpha / s.alpha
    return a, t.sigma**2 - (a * s.sigma) ** 2, (s.sigma / t.sigma) ** 2


def posterior_mean(x_t: Tensor, x_0_hat: Tensor, t: Rung, s: Rung) -> Tensor:
    """The mean of q(x_s | x_t, x_0_hat)."""
    a, b2, posterior = reverse(t, s)
    return (a * posterior * x_t).add_(x_0_hat, alpha=s.alpha * b2 / t.sigma**2)
