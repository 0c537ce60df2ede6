"""DDIM and DDPM: the x_0 estimate put back on the level s, with or without fresh noise."""

from __future__ import annotations

import math

from torch import Tensor

from denoiselab.denoiser import Denoiser
from denoiselab.sampler.base import Rung, Sampler, Walk
from denoiselab.sampler.spacing import Spacing


def ddim(x_t: Tensor, x_0_hat: Tensor, t: Rung, s: Rung, kept: float | None = None) -> Tensor:
    """alpha_s x_0_hat + kept sigma_t eps_hat: the step from t to s but for fresh noise; deterministic, of all of s's
    noise, where kept is not given. s may be noisier than t, or clean."""
    kept = s.sigma / t.sigma if kept is None else kept
    return (kept * x_t).add_(x_0_hat, alpha=s.alpha - kept * t.alpha)


def ancestral(t: Rung, s: Rung, eta: float) -> tuple[float, float]:
    """sqrt(sigma_s^2 - d^2)/sigma_t, which DDIM's step keeps of the noise at t, and d, that of its fresh noise."""
    ratio = s.ratio / t.ratio
    kept = s.sigma / t.sigma * math.sqrt(1 - eta**2 + (eta * ratio) ** 2)  # so that nothing is rounded below zero
    return kept, eta * s.sigma * math.sqrt(1 - ratio**2)


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

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        if self.eta == 0:
            return ddim(x_t, x_0_hat, t, s)
        kept, d = ancestral(t, s, self.eta)
        return ddim(x_t, x_0_hat, t, s, kept).add_(walk.noise(), alpha=d)


class DDPM(Sampler):
    """x_s = mean of q(x_s | x_t, x_0_hat) + sqrt(variance) z (Ho et al. 2020, arXiv:2006.11239, eq. 6-7), with
    mean = (alpha_t sigma_s^2)/(alpha_s sigma_t^2) x_t + alpha_s (1 - r_s^2/r_t^2) x_0_hat, r = sigma/alpha.

    The last step returns the mean. Both variances are those of the paper on a table, see ``variances``.

    Args:
        spacing, clip: as for Sampler.
        steps: N; the table's T with trailing spacing is the published ancestral sampler.
        variance: fixed_small, beta tilde (right for a single data point), or fixed_large, beta (right for white
            Gaussian data of unit variance).
    """

    def __init__(self, spacing: Spacing, steps: int = 1000, clip: float | None = None, variance: str = "fixed_small"):
        super().__init__(spacing, steps, clip)
        if variance not in ("fixed_small", "fixed_large"):
            raise ValueError(f"variance={variance}: need fixed_small or fixed_large")
        self.variance = variance

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat = walk.denoise(x_t, t)
        small, large = variances(t, s)
        variance = small if self.variance == "fixed_small" else large
        return posterior_mean(x_t, x_0_hat, t, s).add_(walk.noise(), alpha=math.sqrt(variance))


NO_VARIANCE = (
    "LearnedDDPM needs a variance, and this denoiser says none; train with loss=learned_hybrid, or use sampler=ddpm"
)


class LearnedDDPM(Sampler):
    """x_s = mean of q(x_s | x_t, x_0_hat) + exp((v log beta + (1 - v) log beta_tilde)/2) z: DDPM with the variance that
    the network chose between the small and the large one, v in [0, 1] for every value of x_t (Nichol and Dhariwal
    2021, arXiv:2102.09672, eq. 15, for any two levels). The last step returns the mean.

    Args:
        spacing, clip: as for Sampler.
        steps: N; the learned variance pays where N is far below the table's T.
    """

    def __init__(self, spacing: Spacing, steps: int = 100, clip: float | None = None):
        super().__init__(spacing, steps, clip)

    def check(self, denoiser: Denoiser) -> None:
        if not getattr(type(denoiser), "has_variance", False):
            raise ValueError(NO_VARIANCE)

    def step(self, walk: Walk, x_t: Tensor, t: Rung, s: Rung) -> Tensor:
        x_0_hat, v, _ = walk.outputs(x_t, t)
        if v is None:
            raise ValueError(NO_VARIANCE)
        small, large = variances(t, s)
        std = (v * (math.log(large / small) / 2) + math.log(small) / 2).exp()
        return posterior_mean(x_t, x_0_hat, t, s).addcmul_(std, walk.noise())


def fresh(t: Rung, s: Rung) -> float:
    """1 - r_s^2/r_t^2: the share of x_s's noise that x_t and x_0 do not tell, and of x_0_hat in its mean."""
    return -math.expm1(2 * (t.half_log_snr - s.half_log_snr))


def variances(t: Rung, s: Rung) -> tuple[float, float]:
    """beta_tilde = sigma_s^2 (1 - r_s^2/r_t^2), the variance of q(x_s | x_t, x_0), and
    beta = beta_tilde (sigma_t/n_t)^2/(sigma_s/n_s)^2, n = sqrt(alpha^2 + sigma^2).

    On neighbouring points of a table n = 1 and beta = 1 - alpha_t^2/alpha_s^2, the paper's. With n, both follow the
    scale of x_s, so that a walk does not depend on how its levels are scaled.
    """
    small = s.sigma**2 * fresh(t, s)
    share = (math.hypot(s.alpha, s.sigma) / s.sigma) * (t.sigma / math.hypot(t.alpha, t.sigma))
    return small, small * share**2


def posterior_mean(x_t: Tensor, x_0_hat: Tensor, t: Rung, s: Rung) -> Tensor:
    """The mean of q(x_s | x_t, x_0_hat)."""
    kept = t.alpha / s.alpha * (s.sigma / t.sigma) ** 2
    return (kept * x_t).add_(x_0_hat, alpha=s.alpha * fresh(t, s))
