"""Where a sampler's N noise levels lie between pure noise and the last noisy level.

A spacing is its one method ``times(schedule, steps)``: N strictly decreasing times in [0, 1]. The clean level
(1, 0) is not among them; samplers end with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.schedule import Schedule


class Spacing:
    """N times in [0, 1], strictly decreasing."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        raise NotImplementedError

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        """float64 times, shape (steps,), on the schedule's device.

        Raises:
            ValueError: steps < 1, or the schedule has fewer distinct points than steps.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: need at least 1")
        times = self.times(schedule, steps).to(schedule.device).clamp_min(schedule.earliest)
        if not bool((times.diff() < 0).all()):
            limit = f"; take at most {schedule.points} steps" if schedule.points else ""
            raise ValueError(
                f"steps={steps}: {type(self).__name__} finds no {steps} distinct levels on this schedule{limit}"
            )
        return times


class Grid(Spacing):
    """Evenly spaced times, rounded to the points of a discrete schedule (index 0..T-1)."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        if schedule.points is None:
            return self.even(steps, 1.0)
        return self.even(steps, schedule.points).round() / (schedule.points - 1)

    def even(self, steps: int, points: float) -> Tensor:
        """Positions in [0, points - 1] (or [0, 1] for points = 1.0, continuous time), decreasing."""
        raise NotImplementedError


class Trailing(Grid):
    """index T - i T/N, i = 0..N-1: starts at pure noise and leaves out the clean end (Lin et al. 2023,
    arXiv:2305.08891, table 2). The default, because the network is asked about the level it starts from.

    >>> from denoiselab.schedule import Linear
    >>> (Trailing()(Linear(), 4) * 999 + 1).round()
    tensor([1000.,  750.,  500.,  250.], dtype=torch.float64)
    """

    def even(self, steps: int, points: float) -> Tensor:
        index = points - torch.arange(steps, dtype=torch.float64) * points / steps
        return index if points == 1.0 else index.round() - 1  # rounded among 1..T, as published


class Leading(Grid):
    """index 1 + i floor(T/N): ends at the cleanest level and, for N < T, never visits t = 1, so that samples start
    from a level at which pure noise is not quite right (Ho et al. 2020's and DDIM's code; Lin et al. 2023, table 2)."""

    def even(self, steps: int, points: float) -> Tensor:
        stride = points / steps if points == 1.0 else points // steps
        return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * stride


class Linspace(Grid):
    """Both ends and evenly between (Nichol and Dhariwal 2021, arXiv:2102.09672, section 4)."""

    def even(self, steps: int, points: float) -> Tensor:
        last = points if points == 1.0 else points - 1
        return torch.linspace(last, 0, steps, dtype=torch.float64)


class LogSNR(Spacing):
    """Uniform in log-SNR from t = 1 to t = 0 (Lu et al. 2022, arXiv:2206.00927, section 3.4)."""

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        ends = torch.tensor([1.0, schedule.earliest], dtype=torch.float64, device=schedule.device)
        noisiest, cleanest = schedule.log_snr(ends).tolist()
        log_snr = torch.linspace(noisiest, cleanest, steps, dtype=torch.float64, device=schedule.device)
        times = schedule.inverse(log_snr)
        times[0] = 1.0
        return times


class Karras(Spacing):
    """sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho for sigma = sigma_t/alpha_t
    (Karras et al. 2022, arXiv:2206.00364, eq. 5), between the schedule's cleanest level and the noisier of its
    levels up to sigma_max. A cosine table reaches sigma = 20,291, whence a second-order step lands nowhere.

    Args:
        rho: > 0; larger puts more levels near the clean end.
        sigma_max: the noisiest level, in units of sigma_t/alpha_t, > 0.
    """

    def __init__(self, rho: float = 7.0, sigma_max: float = 80.0):
        if not rho > 0:
            raise ValueError(f"rho={rho}: need a number > 0, such as 7")
        if not sigma_max > 0:
            raise ValueError(f"sigma_max={sigma_max}: need a number > 0, such as 80")
        self.rho, self.sigma_max = rho, sigma_max

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        ends = torch.tensor([1.0, schedule.earliest], dtype=torch.float64, device=schedule.device)
        most, least = (schedule.log_snr(ends) / -2).exp().clamp_max(self.sigma_max).pow(1 / self.rho).tolist()
        sigma = torch.linspace(most, least, steps, dtype=torch.float64, device=schedule.device) ** self.rho
        return schedule.inverse(-2 * sigma.log())


class Quadratic(Spacing):
    """sqrt(t) even from sqrt(reach) to sqrt(earliest): more levels near the clean end (Song, Meng and Ermon 2020,
    arXiv:2010.02502, appendix D.2, tau_i = floor(c i^2)). Not rounded to points, or there would be fewer levels than
    steps: the first step of 50 is 0.4 of a point of 1,000.

    Args:
        reach: the noisiest time, in (0, 1]. DDIM's code has 0.8, which starts from a level at which pure noise is not
            quite right.
    """

    def __init__(self, reach: float = 1.0):
        if not 0 < reach <= 1:
            raise ValueError(f"reach={reach}: need a number in (0, 1], such as 1 or 0.8")
        self.reach = reach

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        ends = self.reach**0.5, schedule.earliest**0.5
        return torch.linspace(*ends, steps, dtype=torch.float64).square().clamp_max(self.reach)
