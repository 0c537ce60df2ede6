"""Everything between two network calls of a sampler, against diffusers: input scaling, conversion and step.

The network answers one fixed tensor at once, so that what is timed is the arithmetic around it: ours is the denoiser's
input scaling and noise conditioning, the conversion of eps to x_0 and the sampler's step; theirs is
``scale_model_input`` and ``step``. Levels and noise are made before, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from denoiselab.bench.record import Record, need, ratio, times
from denoiselab.bench.refusal import Disagreement, difference, diffusers
from denoiselab.bench.timing import Contender, alternate
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.experiment import build
from denoiselab.target import Eps

BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
"""diffusers' scheduler of each sampler, and what makes it ours."""

AGREEMENT = 1e-4
"""How far apart, over the largest value, two walks may end: theirs multiply up the betas in float32."""


class Answers(nn.Module):
    """A network that answers the same eps at once."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = nn.Parameter(y)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.y


class Ours:
    """One of our samplers along its own levels, with the noise given."""

    def __init__(self, name: str, steps: int, y: Tensor, x: Tensor, noise: Tensor):
        parts = build("schedule=linear", f"sampler={name}", "spacing=trailing", f"sampler.steps={steps}")
        self.sampler, self.schedule = parts.sampler, parts.schedule
        self.denoiser = Denoiser(Answers(y), Eps()).requires_grad_(False).to(y.device)
        self.x, self.noise = x, noise
        levels = self.sampler.levels(self.schedule)
        self.sampler.levels = lambda schedule: levels  # made once, as their scheduler's are

    def prepare(self) -> None:
        self.source = self._source()

    def _source(self) -> Callable[[], Tensor]:
        given = iter([self.x])
        return lambda: next(given, self.noise)

    @torch.no_grad()
    def run(self) -> None:
        self.x_0 = self.sampler(self.denoiser, self.schedule, self.source)  # pyright: ignore[reportArgumentType]


class Theirs:
    """A scheduler of diffusers."""

    def __init__(self, name: str, steps: int, y: Tensor, x: Tensor):
        kind, arguments = THEIRS[name]
        self.make = lambda: getattr(diffusers(), kind)(**BETAS, **arguments, timestep_spacing="trailing")
        self.steps, self.y, self.x = steps, y, x

    def prepare(self) -> None:
        self.scheduler = self.make()
        self.scheduler.set_timesteps(self.steps, device=self.x.device)
        self.start = self.scheduler.init_noise_sigma * self.x

    @torch.no_grad()
    def run(self) -> None:
        x = self.start
        for t in self.scheduler.timesteps:
            self.scheduler.scale_model_input(x, t)
            x = self.scheduler.step(self.y, t, x).prev_sample
        self.x_0 = x


def measure(options: dict[str, Any], device: torch.device) -> list[Record]:
    """The time of a walk, for each sampler.

    Args:
        options: rounds, batch, shape (of a sample), steps, samplers: name -> what ours may take of their time.
        device: where the samples are.

    Raises:
        Disagreement: a walk of ours and one of theirs end elsewhere.
        Unavailable: no diffusers.
    """
    diffusers()
    g = torch.Generator().manual_seed(0)
    shape = (options["batch"], *options["shape"])
    y, x, noise = (torch.randn(shape, generator=g).to(device) for _ in range(3))
    return [walks(name, options, y, x, noise, bound) for name, bound in options["samplers"].items()]


def walks(name: str, options: dict[str, Any], y: Tensor, x: Tensor, noise: Tensor, bound: float | None) -> Record:
    """Walks of one sampler, ours and theirs."""
    if name not in THEIRS:
        raise UserError(f"sampling.samplers.{name}: need one of {', '.join(THEIRS)}")
    ours, theirs = Ours(name, options["steps"], y, x, noise), Theirs(name, options["steps"], y, x)
    contenders = [
        Contender("ours", ours.run, ours.prepare),
        Contender("diffusers", theirs.run, theirs.prepare),
    ]
    # Its schedulers draw noise inside the step; ours is handed it.
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=noise):
        alternate(contenders, options["rounds"], f"sampling {name}")
    apart = difference(ours.x_0, theirs.x_0)
    if not apart <= AGREEMENT:
        raise Disagreement(f"sampling {name}: the walks end {apart:.1e} apart; nothing is reported")
    return Record(
        "sampling",
        f"{name}, {options['steps']} steps",
        "a walk",
        options["rounds"],
        times(contenders),
        ratio(*contenders),
        need({"at_most": bound}, "at_most"),
        {"shape": list(x.shape), "steps": options["steps"], "difference": apart},
    )
