"""How likely a denoiser makes data: the variational bound, discrete and continuous, and the density of its ODE.

All three are of the model that samplers here run: it starts from x_T = sigma_T noise. So the prior is
N(0, sigma_T^2 I) for every schedule, variance preserving or exploding, and costs
KL(q(x_T | x_0) || N(0, sigma_T^2 I)) = SNR_T |x_0|^2 / 2 nats; the bounds report it, the density holds it.

A bound of many samples is the bounds of its parts, as long as their noise is addressed by sample, so a large set
is evaluated in parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from denoiselab.denoiser import Outputs
from denoiselab.gaussian import discretised_gaussian_nll, gaussian_kl, gaussian_nll
from denoiselab.guidance import DenoiserLike, outputs_of
from denoiselab.sampler.base import Rung, on_cpu, rungs
from denoiselab.sampler.ddim import fresh, variances
from denoiselab.schedule import Schedule


def bits_per_dim(nats: Tensor, dims: int, bins: int | None = None) -> Tensor:
    """nats/(dims log 2): -log probability per value, in bits.

    Args:
        nats: -log probability, or -log density, any shape.
        dims: values per sample.
        bins: of a density of values that were levels, equally spaced from -1 to 1, before noise uniform over a level's
            width was added: how many levels. log2((bins - 1)/2) is added, the width being 2/(bins - 1).

    >>> bits_per_dim(torch.zeros(1), dims=3, bins=257)             # density 1 is worth log2(128) bits
    tensor([7.])
    """
    return nats / (dims * math.log(2)) + (0 if bins is None else math.log2((bins - 1) / 2))


class Bound(NamedTuple):
    """A variational bound on -log p(x_0) in bits/dim, term by term; a row per sample."""

    prior: Tensor
    """KL(q(x_T | x_0) || p(x_T)), (B,)."""
    steps: Tensor
    """The divergence of each reverse step, the cleanest first, (B, steps)."""
    decoder: Tensor
    """-log p(x_0 | x_1), (B,)."""
    mse: Tensor
    """The mean squared x_0 error behind each step, after that of the decoder, (B, 1 + steps)."""

    @property
    def total(self) -> Tensor:
        """The bound, (B,)."""
        return self.prior + self.steps.sum(1) + self.decoder


@torch.no_grad()
def vlb(
    denoiser: DenoiserLike,
    schedule: Schedule,
    x_0: Tensor,
    noise: Callable[[], Tensor],
    points: int | None = None,
    variance: str = "fixed_large",
    bins: int | None = 256,
    **cond: Any,
) -> Bound:
    """KL(q(x_T|x_0) || p(x_T)) + sum_{t=2..T} KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)) - log p(x_0|x_1)
    (Ho et al. 2020, arXiv:2006.11239, eq. 5).

    p(x_s | x_t) is the Gaussian that the DDPM samplers draw from: its mean is that of q at x_0_hat, and its variance
    beta_tilde, or beta, or in between (see ``denoiselab.sampler.ddim.variances``).
    p(x_0 | x_1) is a Gaussian around x_0_hat with variance sigma_1^2/alpha_1^2; a learned one lies between that and,
    beta_tilde being 0 there, that of the second point (Nichol and Dhariwal 2021, arXiv:2102.09672). Public code takes
    the latter for fixed variances too, but it vanishes as steps get short. Costs T calls.

    Args:
        denoiser: any; ``variance=learned`` needs one that says a variance.
        schedule: the path.
        x_0: data (B, ...).
        noise: every sample's next standard normal, (B, ...); one draw for each point, the cleanest first.
        points: T >= 2 points, even from schedule.earliest to 1; None for the schedule's own, or 1000.
        variance: fixed_small (beta_tilde), fixed_large (beta) or learned.
        bins: values are that many equally spaced levels from -1 to 1 (Ho et al., eq. 13), and the bound is on their
            probability; None for real values, and the bound is on their density.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance}: need one of {', '.join(VARIANCES)}")
    schedule = on_cpu(schedule)
    n = points or schedule.points or 1000
    if n < 2:
        raise ValueError(f"points={points}: need at least 2")
    levels = rungs(schedule(torch.linspace(schedule.earliest, 1, n, dtype=torch.float64)))
    log_variance = VARIANCES[variance]

    found = _look(denoiser, x_0, levels[0], noise(), cond)
    wide = 2 * math.log(levels[0].ratio)
    narrow = _log_variances(levels[1], levels[0])[1] - 2 * math.log(levels[0].alpha) if variance == "learned" else wide
    first = log_variance(found, wide, narrow)
    decoder, mse, steps = _decoder(x_0, found.x_0, first, bins), [_mean(x_0, found.x_0)], []
    for s, t in itertools.pairwise(levels):
        found = _look(denoiser, x_0, t, noise(), cond)
        log_beta, log_beta_tilde = _log_variances(t, s)
        gain = s.alpha * fresh(t, s)  # d mean / d x_0
        of_p = log_variance(found, log_beta, log_beta_tilde)
        kl = gaussian_kl(gain * x_0, torch.full_like(of_p, log_beta_tilde), gain * found.x_0, of_p)
        steps.append(kl.expand_as(x_0).flatten(1).sum(1))
        mse.append(_mean(x_0, found.x_0))
    return _bound(x_0, levels[-1], steps, decoder, mse)


@torch.no_grad()
def continuous_vlb(
    denoiser: DenoiserLike,
    schedule: Schedule,
    x_0: Tensor,
    noise: Callable[[], Tensor],
    points: int = 1000,
    bins: int | None = 256,
    **cond: Any,
) -> Bound:
    """prior + 1/2 int SNR_t |x_0 - x_0_hat|^2 d log_snr - log p(x_0 | x_1): infinitely many steps (Kingma et al.
    2021, arXiv:2107.00630, eq. 17 and 18).

    A schedule matters by its two ends alone. Evaluated at midpoints even in log-SNR, with one draw of noise at each;
    p(x_0 | x_1) is a Gaussian around x_0_hat of variance sigma_1^2/alpha_1^2.

    Args:
        points: N >= 1 midpoints; the quadrature's error falls as N^-2, and the call costs N + 1 network calls.
        denoiser, schedule, x_0, noise, bins: as for vlb.
    """
    if points < 1:
        raise ValueError(f"points={points}: need at least 1")
    schedule = on_cpu(schedule)
    low, high = rungs(schedule(torch.tensor([schedule.earliest, 1.0], dtype=torch.float64)))
    start, end = 2 * low.half_log_snr, 2 * high.half_log_snr
    width = (start - end) / points
    middles = start - width * (torch.arange(points, dtype=torch.float64) + 0.5)

    found = _look(denoiser, x_0, low, noise(), cond)
    decoder = _decoder(x_0, found.x_0, x_0.new_tensor(2 * math.log(low.ratio)), bins)
    mse, steps = [_mean(x_0, found.x_0)], []
    for t in rungs(schedule.at(middles)):
        mse.append(_mean(x_0, _look(denoiser, x_0, t, noise(), cond).x_0))
        steps.append(width / 2 * t.ratio**-2 * mse[-1] * x_0[0].numel())
    return _bound(x_0, high, steps, decoder, mse)


class Density(NamedTuple):
    """What the probability-flow ODE says of data; a row per sample."""

    nats: Tensor
    """-log p(x_0), (B,)."""
    latent: Tensor
    """x_T/sigma_T, that the ODE carries x_0 to: standard normal if all is well, (B, ...)."""
    calls: int
    """Network calls, the derivatives' not counted."""

    @property
    def bits(self) -> Tensor:
        """-log p(x_0) in bits/dim, (B,); bits_per_dim says what it is for levels made continuous."""
        return bits_per_dim(self.nats, self.latent[0].numel())


@torch.no_grad()
def ode(
    denoiser: DenoiserLike,
    schedule: Schedule,
    x_0: Tensor,
    probes: Tensor | None = None,
    sigma_data: float = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **cond: Any,
) -> Density:
    """log p(x_0) = log p(x_T) + int div dt along the probability-flow ODE (Song et al. 2021, arXiv:2011.13456,
    eq. 39), by dopri5.

    Solved in z = x_t / sqrt(alpha_t^2 sigma_data^2 + sigma_t^2) against log r, r = sigma_t/alpha_t, where
    dz/dlog r = z s^2/c^2 - x_0_hat/c with s = sigma_data and c = sqrt(s^2 + r^2): nothing grows, and for Gaussian data
    nothing moves. The schedule matters by its two ends alone. x_0 is taken as data at the earliest level, whose
    noise blurs the density: an error of the order of its r^2 over the square of the data's finest scale.

    The divergence needs the trace of d x_0_hat/dx, one derivative of the network for each value of x_0. Probes v with
    E[v v^T] = I estimate it as the mean of v^T (d x_0_hat/dx) v without bias (Hutchinson): normals, or their signs,
    which vary less. Noise added to dequantise the data is the caller's.

    Args:
        denoiser: any that is differentiable in x_t.
        schedule: whose ends are the ends of the ODE.
        x_0: data (B, ...).
        probes: (P, B, ...), such as ``noise().sign()[None]``; None for the exact trace.
        sigma_data: the data's standard deviation, for conditioning.
        rtol, atol: tolerances of the solver.
    """
    schedule = on_cpu(schedule)
    ends = rungs(schedule(torch.tensor([schedule.earliest, 1.0], dtype=torch.float64)))
    low, high = (math.log(rung.ratio) for rung in ends)
    dims, calls = x_0[0].numel(), 0
    axes = (-1,) + (1,) * (x_0.ndim - 1)

    def slope(log_r: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        z, _ = state
        r = log_r.exp().to(z.dtype)
        c = (sigma_data**2 + r**2).sqrt()
        alpha = (1 + r**2).rsqrt()
        alpha_t, sigma_t = (level.expand(len(z)).view(axes) for level in (alpha, r * alpha))
        with torch.enable_grad():
            x_t = (alpha * c * z).requires_grad_()
            x_0_hat = denoiser(x_t, alpha_t, sigma_t, **cond)
            trace = alpha * (_trace(x_0_hat, x_t) if probes is None else _estimate(x_0_hat, x_t, probes))
        still = (sigma_data / c) ** 2
        return still * z - x_0_hat.detach() / c, dims * still - trace

    start = x_0 / math.hypot(sigma_data, ends[0].ratio), x_0.new_zeros(len(x_0))
    times = torch.tensor([low, high], dtype=torch.promote_types(x_0.dtype, torch.float32), device=x_0.device)
    z, gained = (path[-1] for path in odeint(slope, start, times, rtol=rtol, atol=atol, method="dopri5"))
    c_0, c_1 = (math.hypot(sigma_data, rung.ratio) for rung in ends)
    latent = z * (c_1 / ends[1].ratio)
    log_p = -latent.square().flatten(1).sum(1) / 2 - dims * (math.log(2 * math.pi) / 2 + high)  # of x_T/alpha_T
    return Density(-(log_p + dims * math.log(c_1 / c_0) + gained), latent, calls)


def _learned(found: Outputs, log_beta: float, log_beta_tilde: float) -> Tensor:
    if found.variance is None:
        raise ValueError("variance=learned: this denoiser says no variance")
    return log_beta_tilde + found.variance * (log_beta - log_beta_tilde)


VARIANCES: dict[str, Callable[[Outputs, float, float], Tensor]] = {
    "fixed_small": lambda found, log_beta, log_beta_tilde: found.x_0.new_tensor(log_beta_tilde),
    "fixed_large": lambda found, log_beta, log_beta_tilde: found.x_0.new_tensor(log_beta),
    "learned": _learned,
}
"""log variance of p(x_s | x_t) from what the denoiser says, log beta and log beta_tilde."""


def _log_variances(t: Rung, s: Rung) -> tuple[float, float]:
    """log beta and log beta_tilde of the step from t to s."""
    small, large = variances(t, s)
    return math.log(large), math.log(small)


def _decoder(x_0: Tensor, mean: Tensor, log_variance: Tensor, bins: int | None) -> Tensor:
    """-log p(x_0 | x_1) in nats, (B,)."""
    nll = (
        gaussian_nll(x_0, mean, log_variance)
        if bins is None
        else discretised_gaussian_nll(x_0, mean, log_variance, bins)
    )
    return nll.flatten(1).sum(1)


def _bound(x_0: Tensor, last: Rung, steps: list[Tensor], decoder: Tensor, mse: list[Tensor]) -> Bound:
    """From nats per sample."""
    prior = x_0.square().flatten(1).sum(1) / (2 * last.ratio**2)
    nats = prior, torch.stack(steps, 1), decoder
    prior, each, decoder = (bits_per_dim(value, x_0[0].numel()) for value in nats)
    return Bound(prior, each, decoder, torch.stack(mse, 1))


def _look(denoiser: DenoiserLike, x_0: Tensor, t: Rung, eps: Tensor, cond: dict[str, Any]) -> Outputs:
    return outputs_of(denoiser, t.alpha * x_0 + t.sigma * eps, *t.like(x_0), **cond)


def _mean(x_0: Tensor, x_0_hat: Tensor) -> Tensor:
    return (x_0_hat - x_0).square().flatten(1).mean(1)


def _trace(y: Tensor, x: Tensor) -> Tensor:
    """The trace of each sample's dy/dx, (B,), exactly."""
    flat = y.flatten(1)
    rows = (
        torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1)[:, i] for i in range(flat.shape[1])
    )
    return torch.stack(list(rows)).sum(0)


def _estimate(y: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """The mean of v^T (dy/dx) v over the probes v, (B,)."""
    found = [v * torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in probes]
    return torch.stack(found).flatten(2).sum(2).mean(0)
