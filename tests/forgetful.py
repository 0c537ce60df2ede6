"""A process that goes on from a checkpoint and forgets something: what a comparison of runs must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from traps import Changed


def _position(make: Callable[..., None]) -> Callable[..., None]:
    def from_the_start(self: Any, *arguments: Any) -> None:
        n, batch_size, seed, rank, world, accumulation, start, block = arguments
        make(self, n, batch_size, seed, rank, world, accumulation, 0 * start, block)

    return from_the_start


def _reseeding(reseed: Any) -> Callable[..., None]:
    return lambda self, seed: None


def _loaded(change: Callable[[dict[str, Any]], None]) -> Callable[[Any], Any]:
    def make(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def changed(*arguments: Any) -> dict[str, Any]:
            change(content := load(*arguments))
            return content

        return changed

    return make


def _without_averages(load: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        state.update({k: state[k.replace("ema.model.", "denoiser.")] for k in state if k.startswith("ema.model.")})

    return _loaded(change)(load)


def _without_learned(load: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        for key, value in content["state_dict"].items():
            if key.startswith("timesteps."):
                value.copy_(torch.full_like(value, 1 / len(value)) if key == "timesteps.p" else torch.zeros_like(value))

    return _loaded(change)(load)


def _without_moments(load: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        for moments in content["optimizer_states"][0]["state"].values():
            moments["exp_avg"].zero_()

    return _loaded(change)(load)


POSITION = Changed("denoiselab.data.stream:Stream.__init__", _position)
SEEDS = Changed("denoiselab.module:Diffusion._reseed", _reseeding)
AVERAGES = Changed("denoiselab.checkpoint:load", _without_averages)
LEARNED = Changed("denoiselab.checkpoint:load", _without_learned)
MOMENTS = Changed("denoiselab.checkpoint:load", _without_moments)
