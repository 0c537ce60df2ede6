"""Consistency training and distillation: one estimate for all points of a path of the probability-flow ODE."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.buffers import ExactBuffers
from denoiselab.consistency import Consistency
from denoiselab.denoiser import Denoiser
from denoiselab.loss.base import Loss
from denoiselab.loss.distillation import Frozen
from denoiselab.schedule import Schedule
from denoiselab.target import Target


class Levels:
    """N, the number of levels of the grid, after so many training samples."""

    start: float
    """s_0, to which the decay of an averaged target network refers."""

    def __call__(self, samples_seen: int) -> int:
        raise NotImplementedError


class Fixed(Levels):
    """N = n: for distillation (Song et al. 2023, arXiv:2303.01469, appendix C, n = 18).

    Args:
        n: at least 2.
    """

    def __init__(self, n: int = 18):
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        self.n, self.start = n, n

    def __call__(self, samples_seen: int) -> int:
        return self.n


class Doubling(Levels):
    """N = min(s_0 2^floor(samples/every), s_1) + 1 (Song and Dhariwal 2023, arXiv:2310.14189, section 3.4 and
    table 1; every = 1/8 of the run there).

    Args:
        start: s_0, at least 1.
        end: s_1, at least s_0.
        every: training samples between doublings, at least 1.

    >>> levels = Doubling(every=1000)
    >>> [levels(samples) for samples in (0, 999, 1000, 7000, 9000)]
    [11, 11, 21, 1281, 1281]
    """

    def __init__(self, start: int = 10, end: int = 1280, every: int = 100_000):
        _check_range(start, end)
        if every < 1:
            raise ValueError(f"every={every}: need at least 1 sample")
        self.start, self.end, self.every = start, end, every

    def __call__(self, samples_seen: int) -> int:
        doublings = min(samples_seen // self.every, 64)
        return min(self.start * 2**doublings, self.end) + 1


class SquareRoot(Levels):
    """N = ceil(sqrt(samples/over ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1 (Song et al. 2023, arXiv:2303.01469,
    appendix C): the first recipe.

    Args:
        start: s_0, at least 1.
        end: s_1, at least s_0.
        over: training samples of the whole run, at least 1; N stays at s_1 + 1 from there.

    >>> levels = SquareRoot(over=1000)
    >>> levels(0), levels(250), levels(1000), levels(2000)
    (2, 76, 151, 151)
    """

    def __init__(self, start: int = 2, end: int = 150, over: int = 1_000_000):
        _check_range(start, end)
        if over < 1:
            raise ValueError(f"over={over}: need at least 1 sample")
        self.start, self.end, self.over = start, end, over

    def __call__(self, samples_seen: int) -> int:
        share = min(samples_seen / self.over, 1.0)
        root = math.sqrt(share * ((self.end + 1) ** 2 - self.start**2) + self.start**2)
        return max(math.ceil(root - 1) + 1, 2)


def _check_range(start: int, end: int) -> None:
    if not 1 <= start <= end:
        raise ValueError(f"start={start}, end={end}: need 1 <= start <= end")


class PseudoHuber:
    """d(a, b) = sqrt(|a - b|^2 + c^2 D) - c sqrt(D), |.|^2 summed over the D values of a sample (Song and Dhariwal
    2023, arXiv:2310.14189, section 3.3).

    Args:
        c: > 0.
    """

    def __init__(self, c: float = 0.00054):
        if not c > 0:
            raise ValueError(f"c={c}: need a number > 0, such as 0.00054")
        self.c = c

    def __call__(self, difference: Tensor) -> Tensor:
        square, c = difference.flatten(1).square().sum(1), self.c * math.sqrt(difference[0].numel())
        return square / ((square + c**2).sqrt() + c)  # without the cancellation


class SquaredError:
    """d(a, b) = mean((a - b)^2)."""

    def __call__(self, difference: Tensor) -> Tensor:
        return difference.flatten(1).square().mean(1)


class Online(nn.Module):
    """f^- = f: the target network is the one in training, without its gradient, mu = 0 (Song and Dhariwal 2023,
    arXiv:2310.14189, section 3.2).

    Args:
        denoiser: the one in training.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()

    def of(self, denoiser: Denoiser) -> Denoiser:
        """f^-, where f is the denoiser."""
        return denoiser

    def follow(self, denoiser: Denoiser, power: float) -> None:
        """One step of mu_0^power towards the weights of the denoiser."""


class Averaged(ExactBuffers, Online):
    """f^- with an average of the weights, w^- <- mu w^- + (1 - mu) w, mu = mu_0^(s_0/N) (Song et al. 2023,
    arXiv:2303.01469, appendix C). A float32 copy, part of the loss's state, and no part of what is optimised.

    Args:
        denoiser: the one in training; copied.
        mu_0: in [0, 1).
    """

    def __init__(self, denoiser: Denoiser, mu_0: float = 0.9):
        super().__init__(denoiser)
        if not 0 <= mu_0 < 1:
            raise ValueError(f"mu_0={mu_0}: need a number in [0, 1), such as 0.9")
        self.mu_0 = mu_0
        self.model = copy.deepcopy(denoiser).float().requires_grad_(False)

    def of(self, denoiser: Denoiser) -> Denoiser:
        return self.model.train(denoiser.training)

    @torch.no_grad()
    def follow(self, denoiser: Denoiser, power: float) -> None:
        averages: list[Tensor] = [*self.model.parameters()]
        live = [p.detach().to(a.dtype) for p, a in zip(denoiser.parameters(), averages, strict=True)]
        torch._foreach_lerp_(averages, live, 1 - self.mu_0**power)
        for mine, theirs in zip(self.model.buffers(), denoiser.buffers(), strict=True):
            mine.copy_(theirs)


class ConsistencyTraining(Loss):
    """d(f(x_0 + r_{n+1} eps), f^-(x_0 + r_n eps)) / (r_{n+1} - r_n), without the gradient of the second (Song et al.
    2023, arXiv:2303.01469, algorithm 3; weight and defaults of Song and Dhariwal 2023, arXiv:2310.14189).

    r = sigma/alpha runs over N levels r_n = (r_1^(1/rho) + (n - 1)/(N - 1) (r_N^(1/rho) - r_1^(1/rho)))^rho, from the
    target's sigma_min, where f is the identity, to the schedule's noisiest level, at most sigma_max. A time t stands
    for the pair whose lower level is the last one at or below r(t). So the run's timesteps give each pair the
    probability of r_n <= r < r_{n+1} (section 3.5 there, for a log-normal r), and the outermost pairs also that of what
    lies beyond the grid. Both evaluations draw the same dropout.

    Args:
        target: the run's; a Consistency.
        denoiser: the run's, for a target network to copy.
        levels: N after so many samples.
        distance: d of the difference, (B, ...) -> (B,).
        target_network: makes f^- of the denoiser.
        sigma_max: > sigma_min.
        rho: > 0.
    """

    samples_seen: Tensor

    def __init__(
        self,
        target: Target,
        denoiser: Denoiser,
        levels: Levels,
        distance: Callable[[Tensor], Tensor],
        target_network: Callable[[Denoiser], Online] = Online,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ):
        super().__init__()
        if not isinstance(target, Consistency):
            raise ValueError(f"target={type(target).__name__}: need target=consistency, the identity at sigma_min")
        if not sigma_max > target.sigma_min:
            raise ValueError(f"sigma_max={sigma_max}: need a number > sigma_min = {target.sigma_min}")
        if not rho > 0:
            raise ValueError(f"rho={rho}: need a number > 0, such as 7")
        self.levels, self.distance, self.target_network = levels, distance, target_network(denoiser)
        self.sigma_min, self.sigma_max, self.rho = target.sigma_min, sigma_max, rho
        self.formula = f"{type(distance).__name__}(f(x_r') - f(x_r)) / (r' - r)"
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(lambda module, _: module.advance(int(module.samples_seen)))
        self.advance(0)

    def advance(self, samples_seen: int) -> None:
        self.n = self.levels(samples_seen)
        self.samples_seen.fill_(samples_seen)
        self.fresh = samples_seen == 0

    def after_step(self, denoiser: Denoiser) -> None:
        self.target_network.follow(denoiser, self.levels.start / self.n)

    def pairs(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        """(r_n, r_{n+1}) of each time, float64, shaped like t."""
        noisiest = (schedule.log_snr(torch.ones(1, dtype=torch.float64, device=t.device)) / -2).exp()
        first, last = self.sigma_min ** (1 / self.rho), noisiest.clamp_max(self.sigma_max) ** (1 / self.rho)
        even = torch.linspace(0, 1, self.n, dtype=torch.float64, device=t.device)
        grid = (first + even * (last - first)) ** self.rho  # (N,)
        r = (schedule.log_snr(t.double()) / -2).exp()
        n = (torch.searchsorted(grid, r, right=True) - 1).clamp(0, self.n - 2)
        return grid[n], grid[n + 1]

    def cleaner(self, x_0: Tensor, eps: Tensor, noisier: Tensor, r: Tensor, r_noisier: Tensor, **cond: Any) -> Tensor:
        """x_r on the path of ``noisier``, x at r_noisier: here with the same noise."""
        return x_0 + r * eps

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.fresh:  # whatever weights the run starts from
            self.target_network.follow(denoiser, math.inf)
            self.fresh = False
        low, high = self.pairs(schedule, t)
        dtype = torch.promote_types(x_0.dtype, t.dtype)  # in bfloat16 neighbours would be the same
        r, r_noisier, gap = low.to(dtype), high.to(dtype), (high - low).flatten().to(dtype)
        one = torch.ones_like(r)
        x = x_0 + r_noisier * eps
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            found = denoiser(x, one, r_noisier, **cond)
        with torch.no_grad():
            aim = self.cleaner(x_0, eps, x, r, r_noisier, **cond)
            aim = self.target_network.of(denoiser)(aim, one, r, **cond)
        error = (found.detach() - x_0).square().flatten(1).mean(1)
        at = schedule.inverse(-2 * high.log()).flatten().to(t.dtype)
        return self.distance(found - aim) / gap, {"mse": error, "t": at}


class ConsistencyDistillation(ConsistencyTraining):
    """As ConsistencyTraining, with x_{r_n} one Heun step of a frozen teacher from x_{r_{n+1}} (Song et al. 2023,
    arXiv:2303.01469, algorithm 2). ``init_from`` the teacher's run starts the student from its weights.

    Args:
        teacher: a denoiser.
        target, denoiser, levels, distance, target_network, sigma_max, rho: as there.
    """

    def __init__(
        self,
        teacher: Denoiser,
        target: Target,
        denoiser: Denoiser,
        levels: Levels,
        distance: Callable[[Tensor], Tensor],
        target_network: Callable[[Denoiser], Online] = Online,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ):
        super().__init__(target, denoiser, levels, distance, target_network, sigma_max, rho)
        self.teacher = Frozen(teacher)

    def cleaner(self, x_0: Tensor, eps: Tensor, noisier: Tensor, r: Tensor, r_noisier: Tensor, **cond: Any) -> Tensor:
        one, h = torch.ones_like(r), r - r_noisier
        slope = (noisier - self.teacher(noisier, one, r_noisier, **cond)) / r_noisier
        euler = noisier + h * slope
        return noisier + h / 2 * (slope + (euler - self.teacher(euler, one, r, **cond)) / r)
