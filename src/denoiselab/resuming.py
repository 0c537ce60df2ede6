"""Whether the state of training in a file is of this run's kind: Lightning hands it on as it is, and PyTorch's fused
optimizers read memory by shapes that they take on trust."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from denoiselab.errors import CheckpointError
from denoiselab.module import Diffusion


def check_training_state(content: Mapping[str, Any], trainer: pl.Trainer, module: Diffusion) -> None:
    """Compare it with the state of a training that has not begun.

    Raises:
        CheckpointError: it does not fit, and where.
    """
    fresh = module.configure_optimizers()
    optimizer, schedule = fresh["optimizer"], fresh["lr_scheduler"]["scheduler"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    own = {
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        "lr_schedulers": [schedule.state_dict()],
        "optimizer_states": [{"state": {}, "param_groups": groups}],
    }
    found = unlike(own, content) or _of_parameters(content["optimizer_states"][0]["state"], parameters, module)
    if found:
        raise CheckpointError(f"{trainer.ckpt_path}: its state of training does not fit this run ({found})")


def unlike(own: Any, given: Any, where: str = "") -> str | None:
    """Where a nested value lacks what another has, or has something of another kind there.

    >>> unlike({"a": [1, 2.0]}, {"a": [3, 4], "b": None}), unlike({"a": [1]}, {"a": ["x"]})
    (None, '.a.0 is str')
    """
    if isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            return f"{where} is {type(given).__name__}"
        lacking = [f"{where} has no {key!r}" for key in own if key not in given]
        inner = (unlike(value, given[key], f"{where}.{key}") for key, value in own.items() if key in given)
        return next(iter(lacking), None) or next(filter(None, inner), None)
    if isinstance(own, list | tuple):
        if not isinstance(given, list | tuple) or len(own) != len(given):
            return f"{where} is no list of {len(own)}"
        inner = (unlike(value, given[k], f"{where}.{k}") for k, value in enumerate(own))
        return next(filter(None, inner), None)
    if isinstance(own, Tensor):
        same = isinstance(given, Tensor) and (given.shape, given.dtype) == (own.shape, own.dtype)
        return None if same else f"{where} is another tensor"
    kinds = (int, float) if isinstance(own, int | float) and not isinstance(own, bool) else (type(own), type(None))
    fine = own is None or (isinstance(given, kinds) and isinstance(given, bool) == isinstance(own, bool))
    return None if fine else f"{where} is {type(given).__name__}"


def _of_parameters(state: Mapping[Any, Any], parameters: list[nn.Parameter], module: Diffusion) -> str | None:
    """Of what the optimizer keeps of each parameter."""
    kept: dict[int, dict[str, Any]] = {}
    for number, entry in state.items():
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            return f".optimizer_states.0.state has {str(number)[:40]!r}, of {len(parameters)} parameters"
        shape = parameters[number].shape
        if len(shape) not in kept:
            kept[len(shape)] = _after_a_step(module, len(shape))
        where, expected = f".optimizer_states.0.state.{number}", kept[len(shape)]
        if found := unlike(dict.fromkeys(expected), entry, where):
            return found
        for name, value in expected.items():
            if isinstance(value, Tensor):
                given = entry[name]
                if not isinstance(given, Tensor) or given.is_floating_point() != value.is_floating_point():
                    return f"{where}.{name} is no such tensor"
                if value.shape in (_shape(len(shape)), ()) and given.shape != (shape if value.ndim else ()):
                    return f"{where}.{name} has shape {tuple(given.shape)}, need {tuple(shape if value.ndim else ())}"
    return None


def _shape(dimensions: int) -> tuple[int, ...]:
    return tuple(range(2, 2 + dimensions))


def _after_a_step(module: Diffusion, dimensions: int) -> dict[str, Any]:
    """What the optimizer keeps of one parameter with so many dimensions, once it has made a step."""
    parameter = nn.Parameter(torch.zeros(_shape(dimensions)))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = module.make_optimizer([{"params": [parameter]}])
    optimizer.step()
    return dict(optimizer.state[parameter])
