"""A pretrained network as it is, behind our call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.models.embedding import ADM
from denoiselab.models.layers import require
from denoiselab.schedule import Level, Schedule

TIMES: dict[str, Callable[[Tensor, Level], Tensor]] = {
    "t": lambda t, level: t,
    "sigma": lambda t, level: level.sigma,
    "log_snr": lambda t, level: level.log_snr,
}
"""What a network may be told of a level, beside its index: its t, its sigma_t, or its log-SNR."""


class Foreign(nn.Module):
    """y = network(n_t c_in x_t, time), n_t = sqrt(alpha_t^2 + sigma_t^2) at the level of its own path that has the
    log-SNR asked for.

    With sigma_data = 1 a network of ours is given c_in x_t = x_t/sqrt(alpha_t^2 + sigma_t^2), the same on every path
    with that log-SNR, and c_noise = log(sigma_t/alpha_t)/4. n_t brings x_t to the scale of the path that this network
    was trained along, and the log-SNR says the time there. So ``Denoiser(Foreign(...), target)`` can be sampled along
    any schedule, and no weights are converted. A UNet2DModel of diffusers, and SiT (arXiv:2401.08740), y = eps - x_0:

        Denoiser(Foreign(unet, schedule.Linear(), "index", lambda net, x, n: net(x, n).sample), target.Eps())
        Denoiser(Foreign(sit, schedule.Flow(), "t", lambda net, x, t, label: net(x, t, label)), target.Flow())

    Args:
        net: the network.
        schedule: the path x_t = alpha_t x_0 + sigma_t eps that it was trained along, of any scale.
        time: what it is told of a level: index, 0..T-1 in the schedule's table; t, sigma or log_snr; or a function of
            (t, level), both (B,).
        call: how it is called, ``call(net, x, time, **cond) -> y``; None for ``net(x, time, **cond)``.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        time: str | Callable[[Tensor, Level], Tensor] = "index",
        call: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        if isinstance(time, str):
            known = ("index", *TIMES)
            require("time", time, time in known, f"one of {', '.join(known)}, or a function of (t, level)")
            has_table = time != "index" or schedule.points is not None
            require("time", time, has_table, f"another, such as t; {type(schedule).__name__} has no table")
        self.net, self.schedule = net, schedule
        self.table = ADM(schedule) if time == "index" else None  # whose index of a level is wanted
        self.time = time if callable(time) else TIMES.get(time)
        self.call = call or (lambda net, x, time, **cond: net(x, time, **cond))

    def forward(self, x: Tensor, c_noise: Tensor, **cond: Any) -> Tensor:
        t = self.schedule.inverse(-8 * c_noise.double())  # (B,)
        level = self.schedule(t)
        scale = torch.hypot(level.alpha, level.sigma).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        time = self.time(t, level) if self.time else self.table.index(c_noise)  # pyright: ignore[reportOptionalMemberAccess]
        return self.call(self.net, scale * x, time.to(c_noise.dtype), **cond)
