"""What a diagnostic looks at: a run with its weights as they are now, and how it is to be sampled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denoiselab.compose import compose, plain
from denoiselab.data.base import Batch, Data
from denoiselab.denoiser import Denoiser
from denoiselab.guidance import CFG
from denoiselab.metrics.base import Metric
from denoiselab.progress import Progress
from denoiselab.sampler import Sampler, State
from denoiselab.schedule import Schedule

if TYPE_CHECKING:
    from denoiselab.experiment import Parts
    from denoiselab.run import Run

Told = Callable[[int], object]
"""Is told how much was done; may raise if time is up."""


class Subject:
    """What a diagnostic looks at.

    Args:
        run: the model, with the weights to look at (EMA unless asked otherwise), in evaluation mode.
        parts: of the evaluation: its sampler, guidance, metrics and data.
        raw: gives the model with raw weights, in evaluation mode; None where there is none.
        config_dir: the user's own folder of options.
        progress: ``progress(what, n)`` gives what is told of each part of n that is done.
    """

    def __init__(
        self,
        run: Run,
        parts: Parts,
        raw: Callable[[], Denoiser] | None = None,
        config_dir: Path | None = None,
        progress: Callable[[str, int], Told] = Progress,
    ):
        self.run, self.parts, self.config_dir, self.progress = run, parts, config_dir, progress
        self._raw = raw

    @property
    def denoiser(self) -> Denoiser:
        """In evaluation mode; whoever needs gradients of its weights takes a copy."""
        return self.run.denoiser

    @cached_property
    def raw(self) -> Denoiser | None:
        """The same with raw weights."""
        return None if self._raw is None else self._raw()

    @property
    def schedule(self) -> Schedule:
        """That samples are made along."""
        return self.parts.schedule

    @property
    def device(self) -> torch.device:
        return self.run.device

    @property
    def data(self) -> Data:
        """What is diffused: ``train`` and ``held_out`` encoded, with their codec."""
        return self.parts.data

    @property
    def images(self) -> Data:
        """The data set as people see it; the same unless the run is on latents."""
        return self.parts.images

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the evaluation, by name."""
        return self.parts.metrics

    @property
    def seed(self) -> int:
        """Of the evaluation's noise."""
        return self.parts.config["evaluation"]["seed"]

    def decode(self, x_0: Tensor) -> Tensor:
        """As people see it, float32 on the CPU: images in [-1, 1], points in their own units."""
        return self.run.codec.decode(x_0.to(self.device)).float().cpu()

    def real(self, n: int, train: bool = False) -> Batch:
        """The first n held-out (or training) samples, or all where there are fewer, encoded, always the same; their
        cond is what the model knows."""
        if not train:
            return self.run.held_out(n, self.data)
        batch = self.data.train.draw(n)
        known = [*self.run.made_of, *(["label"] if self.run.parts.num_classes else [])]
        return {**batch, "cond": {name: value for name, value in batch["cond"].items() if name in known}}

    def cond(self, n: int) -> dict[str, Tensor]:
        """What n samples are asked for: every class in turn, or the conditions of the first n held-out samples."""
        if not self.run.made_of:
            return self.run.cond(n)
        return {name: value[:n] for name, value in self.run.held_out(n, self.data)["cond"].items()}

    def sampling(
        self,
        *overrides: str,
        sampler: Sampler | None = None,
        scale: float | None = None,
    ) -> Parts:
        """The evaluation's parts with another way of sampling, for ``draw``.

        Args:
            overrides: of the sampler and its spacing, as of ``denoiselab sample``: "sampler=heun", "sampler.steps=10",
                "spacing=karras".
            sampler: instead of the evaluation's.
            scale: of classifier-free guidance instead of the evaluation's guidance.
        """
        parts = copy.copy(self.parts)
        if overrides:
            config = plain(compose("sample", ["ckpt=none", *overrides], self.config_dir))
            chosen = {key: config[key] for key in ("sampler", "spacing")}
            parts.sampler = self.run.parts_for({**chosen, "guidance": self.parts.config["guidance"]}).sampler
            parts.config = {**parts.config, **chosen}
        if sampler is not None:
            parts.sampler = sampler
        if scale is not None:
            parts.guidance = lambda denoiser: CFG(denoiser, scale)
        return parts

    def draw(
        self,
        n: int,
        parts: Parts | None = None,
        cond: dict[str, Tensor] | None = None,
        seed: int | None = None,
        what: str = "sampling",
    ) -> tuple[Tensor, float]:
        """n decoded samples on the CPU, and the network calls of a sample's walk; sample i of a seed has the same noise
        whatever n and the way of sampling.

        Args:
            parts: from ``sampling``; None for the evaluation's own.
            cond: what they are asked for, n rows; None for ``cond(n)``.
            seed: of the noise; None for the evaluation's.
            what: for the line that says how far it is.
        """
        cond = self.cond(n) if cond is None else cond
        seed = self.seed if seed is None else seed
        return self.run.draw(parts or self.parts, cond, range(n), seed, self.progress(what, n))

    def walk(
        self,
        noise: Callable[[], Tensor],
        parts: Parts | None = None,
        cond: dict[str, Tensor] | None = None,
        tell: Told = lambda done: None,
    ) -> Iterator[State]:
        """The states of one batch's walk from a source of noise of one's own, as ``Sampler.walk`` gives them.

        Args:
            noise: gives every sample's next standard normal (B, ...); the first is where the walk starts.
            parts: from ``sampling``; None for the evaluation's own.
            cond: what the samples are asked for, B rows.
            tell: of ``progress``, is told 1 for each state.
        """
        parts = parts or self.parts
        asked = {name: value.to(self.device) for name, value in (cond or {}).items()}
        for state in parts.sampler.walk(parts.guidance(self.denoiser), parts.schedule, noise, **asked):
            yield state
            tell(1)

    def protocol(self, n: int, sampled: bool = True, **more: Any) -> dict[str, Any]:
        """What a finding depends on.

        Args:
            n: samples, generated or held out.
            sampled: whether samples were made, which sampler and guidance then decide.
            more: the diagnostic's own options, and others.
        """
        config = self.parts.config
        groups = {group: config[group] for group in ("sampler", "spacing", "guidance")} if sampled else {}
        common = {"n": n, "seed": self.seed, "weights": self.run.weights, "step": self.run.step}
        return {**groups, **common, "schedule": self.schedule.fingerprint, **more}
