"""Weights of a file, put into the modules that they are of."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from denoiselab.checks import without_weights
from denoiselab.denoiser import Denoiser
from denoiselab.errors import CheckpointError
from denoiselab.experiment import Parts

PREFIX = {"ema": "ema.model.", "raw": "denoiser."}
"""What names of a denoiser's weights begin with."""


def check_size(parts: Parts, state: dict[str, Tensor], source: Path) -> None:
    """Refuse a network that has more weights than the file, before memory is asked for: its width is the file's word.

    Raises:
        CheckpointError: it has.
    """
    need = sum(value.numel() for value in without_weights(parts).state_dict().values())
    there = sum(value.numel() for value in state.values())
    if need > there:
        raise CheckpointError(
            f"{source}: weights do not fit: its configuration is of {need:,} numbers, and there are {there:,}"
        )


def load_weights(denoiser: Denoiser, state: dict[str, Tensor], weights: str, source: Path) -> None:
    """Load a denoiser's EMA or raw weights out of a checkpoint's state, strictly."""
    if not under(PREFIX[weights], state):
        other = {"ema": "raw", "raw": "ema"}[weights]
        raise CheckpointError(
            f"{source}: holds no {weights} weights; weights={other} takes its {other} ones (evaluation.weights={other} "
            "where it is measured)"
        )
    fit(denoiser, PREFIX[weights], state, source)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What has names that begin so, by the rest of its names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def fit(module: nn.Module, prefix: str, state: dict[str, Tensor], source: Path) -> None:
    """Load what is under a prefix into a module; names, shapes and dtypes are its own.

    Raises:
        CheckpointError: they are not.
    """
    own, given = module.state_dict(), under(prefix, state)
    for name in own.keys() & given.keys():
        if own[name].dtype != given[name].dtype:  # PyTorch would round without a word
            kinds = f"{given[name].dtype}, need {own[name].dtype}"
            raise CheckpointError(f"{source}: weights do not fit ({prefix}*): {name} is {kinds}")
    shapes_only = any(parameter.is_meta for parameter in module.parameters())
    try:
        module.load_state_dict(given, assign=shapes_only)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: weights do not fit ({prefix}*): {reason}") from None
