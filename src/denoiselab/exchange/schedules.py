"""Schedules as tables of T betas, in which other libraries keep them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from denoiselab.errors import UserError
from denoiselab.schedule import Cosine, Discrete, Linear, ScaledLinear, Schedule, SigmoidBeta, ZeroTerminal

Refuse = Callable[[str, str], UserError]

POINTS = 1000
"""T of the table that stands for a schedule in continuous time."""

MOST = 100_000
"""T beyond which a table is not read."""

KEPT = 0.05
"""sqrt(abar_T/abar_1) of the table of which ZeroTerminal makes one that ends in pure noise; any in (0, 1) will do."""

NAMED: dict[str, type[Schedule]] = {
    "linear": Linear,
    "scaled_linear": ScaledLinear,
    "sigmoid": SigmoidBeta,
    "squaredcos_cap_v2": Cosine,
}
"""The schedules that diffusers names, and ours."""

TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""What diffusers' schedulers take a network's answer for, and our options."""

SCHEDULERS = frozenset(
    {
        *("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
        *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        *("DPMSolverSinglestepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"),
        *("DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    }
)
"""Those of diffusers whose networks are given x_t with alpha^2 + sigma^2 = 1 and an index."""


class Table(Discrete):
    """A table of betas as it is given (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    Args:
        betas: T >= 2 numbers in (0, 1).
    """

    def __init__(self, betas: Sequence[float]):
        super().__init__(torch.tensor(list(betas), dtype=torch.float64))


def times(schedule: Schedule) -> Tensor:
    """The times of a schedule that an index 0..T-1 stands for, float64 (T,), rising.

    A table has its own. In continuous time they are t = 1/T, 2/T, ... 1 (Song et al. 2021, arXiv:2011.13456, appendix
    B): no clean level is among them, and N evenly trailing levels of the path are N of them where N divides T.
    """
    if schedule.points is None:
        return torch.arange(1, POINTS + 1, dtype=torch.float64) / POINTS
    return torch.linspace(0, 1, schedule.points, dtype=torch.float64).clamp_min(schedule.earliest)


def levels(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(betas, c_noise) at those times, float64 (T,) each: abar_t = SNR/(SNR + 1), beta_t = 1 - abar_t/abar_(t-1).

    abar depends on the log-SNR alone. A network that is given c_in x_t, with sigma_data = 1, is given that path's x_t
    whatever the scale of its own, so that any schedule has such a table. beta_T = 1 where alpha_1 = 0.
    """
    t = times(schedule).to(schedule.device)
    alpha_t, sigma_t = schedule(t)
    whole = alpha_t**2 + sigma_t**2
    abar = alpha_t**2 / whole
    first = (sigma_t**2 / whole)[:1]
    return torch.cat([first, (abar[:-1] - abar[1:]) / abar[:-1]]).cpu(), (schedule.log_snr(t) / -8).cpu()


def to_scheduler(betas: list[float], prediction_type: str, spacing: str, learned: bool) -> dict[str, Any]:
    """The configuration of diffusers' DDIMScheduler, or of DDPMScheduler for a network that says its variance.

    Args:
        betas: from ``levels``.
        prediction_type: epsilon, sample or v_prediction.
        spacing: trailing, leading or linspace.
        learned: whether the network says the variance of a step.
    """
    return {
        "_class_name": "DDPMScheduler" if learned else "DDIMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "steps_offset": 0,
        "clip_sample": False,
        # Changes nothing of such a table here, and keeps diffusers' other schedulers from dividing by alpha_T = 0.
        "rescale_betas_zero_snr": betas[-1] == 1,
        **({"variance_type": "learned_range"} if learned else {"set_alpha_to_one": True}),
    }


def from_scheduler(config: dict[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """(schedule node, target option) of a scheduler's configuration.

    Args:
        config: the content of scheduler_config.json; what old files leave out has DDPMScheduler's defaults.
        source: the file, for errors.

    Raises:
        UserError: a kind of scheduler, a schedule or a prediction type that has no counterpart.
    """

    def refuse(key: str, need: str) -> UserError:
        return UserError(f"{source}: {key}={str(config.get(key))[:60]!r}: need {need}")

    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise refuse(
            "_class_name",
            "a scheduler whose networks are given an index and x_t with alpha^2 + sigma^2 = 1, such as DDIMScheduler; "
            "denoiselab.exchange.Foreign wraps other networks",
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in TARGETS:
        raise refuse("prediction_type", f"one of {', '.join(TARGETS)}")
    return _schedule(config, refuse), TARGETS[prediction]


def made(node: dict[str, Any]) -> Schedule:
    """The schedule of a node that from_scheduler gave."""
    arguments: dict[str, Any] = {key: made(value) if isinstance(value, dict) else value for key, value in node.items()}
    name = arguments.pop("_target_").rpartition(".")[2]
    return {kind.__name__: kind for kind in (*NAMED.values(), Table, ZeroTerminal)}[name](**arguments)


def _schedule(config: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    """A node of the schedule group."""
    betas, zero = config.get("trained_betas"), config.get("rescale_betas_zero_snr") or False
    if betas is None:
        node = _named(config, refuse)
    else:
        need = "a list of at least two numbers in (0, 1), the last of which may be 1"
        if not isinstance(betas, list) or not 2 <= len(betas) <= MOST:
            raise refuse("trained_betas", need)
        if not all(_number(beta) and 0 < beta < 1 for beta in betas[:-1]) or not (_number(betas[-1]) and betas[-1] > 0):
            raise refuse("trained_betas", need)
        if betas[-1] == 1:
            betas, zero = _before_rescaling(betas), True
        elif not betas[-1] < 1:
            raise refuse("trained_betas", need)
        node = {"_target_": "denoiselab.exchange.schedules.Table", "betas": betas}
    return {"_target_": "denoiselab.schedule.ZeroTerminal", "schedule": node} if zero else node


def _named(config: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    """Of the schedules that have a name, ours scale their betas by 1000/T."""
    name, points = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if name not in NAMED:
        raise refuse("beta_schedule", f"one of {', '.join(NAMED)}, or trained_betas")
    if not isinstance(points, int) or not 2 <= points <= MOST:
        raise refuse("num_train_timesteps", f"a whole number from 2 to {MOST}")
    node: dict[str, Any] = {"_target_": f"denoiselab.schedule.{NAMED[name].__name__}", "points": points}
    if name == "squaredcos_cap_v2":
        return node
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if not (_number(start) and _number(end) and 0 < start < end < 1):
        raise refuse("beta_start", f"0 < beta_start < beta_end < 1, and beta_end is {str(end)[:20]}")
    return {**node, "beta_min": start * (points / 1000), "beta_max": end * (points / 1000)}


def _before_rescaling(betas: list[float]) -> list[float]:
    """A table in (0, 1) of which ZeroTerminal makes the given one, which ends in 1: sqrt(abar) raised to end at c, and
    shrunk so that its first value is kept."""
    a = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0).sqrt()
    raised = a * (1 - KEPT) + KEPT * a[0]
    share = torch.cat([raised[:1], raised[1:] / raised[:-1]]) ** 2
    return (1 - share).tolist()


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
