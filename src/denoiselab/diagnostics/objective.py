"""The training loss of a checkpoint and its gradient, of batches drawn as in training but by addresses of their own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from denoiselab.conditioning import Drop
from denoiselab.rng import mix
from denoiselab.timesteps import Importance, Timesteps

if TYPE_CHECKING:
    from denoiselab.diagnostics.subject import Subject

AT_ONCE = 256
"""Samples of a network call without gradients."""


class Objective:
    """l(theta; x_0, eps, t) on copies of the denoiser and the loss, in training mode: dropout and label drop are on.

    Samples are drawn with replacement from a part of the training set. What a batch draws is decided by the
    evaluation's seed and the address that it is asked for at, and no generator outside is moved.

    Args:
        subject: whose weights to take.
        pool: training samples that are drawn from, at most.
    """

    def __init__(self, subject: Subject, pool: int = 4096):
        run = subject.run
        self.denoiser = copy.deepcopy(subject.denoiser).requires_grad_(True).train()
        self.loss = copy.deepcopy(run.loss).train()
        self.schedule, self.device, self.seed = run.schedule, subject.device, subject.seed
        self.drop = Drop(run.parts.config["p_null"])
        self.pool = subject.real(pool, train=True)
        self.parameters = list(self.denoiser.parameters())

    def losses(self, t: Tensor, *address: int | str) -> Tensor:
        """The losses (n,) of n fresh samples at times t (n,), with their graph."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            seed = mix(self.seed, "objective", *address)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed asks after every kind of device there is
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            index = torch.randint(len(self.pool["x_0"]), (len(t),))
            x_0 = self.pool["x_0"][index]
            eps = torch.randn(x_0.shape, dtype=x_0.dtype)
            cond = self.drop({key: value[index] for key, value in self.pool["cond"].items()})
            x_0, eps, cond = self._moved(x_0), self._moved(eps), {key: self._moved(v) for key, v in cond.items()}
            t = self._moved(t.to(torch.promote_types(x_0.dtype, torch.float32)).clamp_min(self.schedule.earliest))
            shaped = t.view(-1, *[1] * (x_0.ndim - 1))
            return self.loss(self.denoiser, self.schedule, x_0, eps, shaped, **cond)[0]

    @torch.no_grad()
    def values(self, t: Tensor, *address: int | str) -> Tensor:
        """The same without a graph, for any n, in float64 on the CPU."""
        parts = t.split(AT_ONCE)
        return torch.cat([self.losses(part, *address, k).double().cpu() for k, part in enumerate(parts)])

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d theta as one vector, float64."""
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(found, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for g, p in pairs])

    def _moved(self, value: Tensor) -> Tensor:
        return value.to(self.device)


def taught(timesteps: Timesteps, objective: Objective) -> None:
    """Let a way that learns see losses until each of its cells has as many as it keeps."""
    if not isinstance(timesteps, Importance):
        return
    cells, rounds = timesteps.losses.shape
    for k in range(rounds):
        t = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        losses = objective.values(t, "taught", k).to(objective.device, torch.float32)
        timesteps.update(t.to(objective.device), losses)
