"""What is refused before anything is written: configurations that cannot work, each in one line."""

from __future__ import annotations

import inspect
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from denoiselab import speed
from denoiselab.arguments import kinds, need, spelled
from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics.base import Diagnostic
from denoiselab.errors import UserError, nearest, one_line
from denoiselab.metrics.base import Metric
from denoiselab.models import Autoencoder

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")


def check(parts: Parts) -> None:
    """Make every part once, so that what it refuses is refused now.

    The network has shapes and no weights, so that the largest is answered for at once; it is not kept.
    """
    config, before = parts.config, {"data", *parts.__dict__}
    check_trainer(config)
    for group in ("model", "loss"):  # are asked about before they are made
        check_arguments(group, config[group])
    _one_of(config, "init_weights", ("ema", "raw"))
    _one_of(config, "init_mismatch", ("refuse", "allow"))
    check_evaluation(config)
    if "model" not in before:
        parts.model = without_weights(parts)
    speed.check(parts.model, config["trainer"])
    for name in ("drop", "denoiser", "loss", "timesteps", "metrics", "diagnostics"):
        getattr(parts, name)
    check_copies(parts)
    check_timesteps(parts)
    if parts.data.source is not None and not parts.denoiser.generates:
        raise UserError("data: an autoencoder is trained on images, and these are latents already")
    if parts.denoiser.generates:
        _ = parts.guidance
        check_pure_noise(parts)
        check_sampler(parts, parts.denoiser)
    check_arguments("optimizer", config["optimizer"])
    check_optimizer(config["optimizer"])
    parts.make("optimizer", params=[torch.nn.Parameter(torch.zeros(2, 2))])
    parts.make("lr_schedule")
    parts.make("ema", model=parts.denoiser)
    parts.callbacks(parts.folder or Path())
    for name in parts.__dict__.keys() - before:
        del parts.__dict__[name]


def without_weights(parts: Parts) -> Any:
    """The network on PyTorch's meta device, or as it is where its constructor needs values."""
    from hydra.utils import get_object

    from denoiselab.experiment import SHARED

    named = inspect.signature(get_object(parts.config["model"]["_target_"])).parameters
    for name in SHARED & named.keys():
        getattr(parts, name)  # these have values
    try:
        with torch.device("meta"):
            return parts.network()
    except (UserError, RuntimeError):  # a mistake is one off this device too
        return parts.network()


def check_arguments(where: str, node: Any) -> None:
    """A node's ``_target_`` exists, and it and the nodes in it give what their constructors take.

    Raises:
        UserError: naming the option, with the nearest name or the kind of value that is needed.
    """
    from hydra.utils import get_object

    from denoiselab.experiment import SHARED

    if isinstance(node, list):
        for i, one in enumerate(node):
            check_arguments(f"{where}[{i}]", one)
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = node["_target_"]
        quiet = logging.getLogger("hydra.utils")
        quiet.disabled = True  # it would say the same, in lines of its own
        try:
            made = get_object(target)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"{where}._target_={target}: {one_line(error)}") from error
        finally:
            quiet.disabled = False
        known, more = kinds(made) if callable(made) else ({}, True)
        for key, value in node.items():
            if key.startswith("_") or (key not in known and more):
                continue
            said = f"{where}.{key}={spelled(value)}"
            if key not in known:
                raise UserError(f"{said}: no option {key!r} here; {nearest(key, [*known.keys() - SHARED])}")
            if wanted := need(known[key], value):
                raise UserError(f"{said}: need {wanted}")
    for key, value in node.items():
        check_arguments(f"{where}.{key}", value)


def check_optimizer(node: dict[str, Any]) -> None:
    """The numbers that every optimizer of PyTorch's calls by these names."""
    for name, most in (("lr", math.inf), ("eps", math.inf), ("weight_decay", math.inf), ("momentum", 1.0)):
        value = node.get(name, 0.0)
        if isinstance(value, int | float) and not 0 <= value < most:
            raise UserError(f"optimizer.{name}={value}: need a number {'>= 0' if most > 1 else 'in [0, 1)'}")
    betas = node.get("betas", ())
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={betas}: need numbers in [0, 1), such as [0.9, 0.99]")


def check_trainer(config: dict[str, Any]) -> None:
    """The trainer's own values."""
    for name in ("max_steps", "accumulate", "log_every", "checkpoint_every", "nodes", "threads"):
        value = config["trainer"][name]
        if value is not None and value < 1:
            raise UserError(f"trainer.{name}={value}: need at least 1{', or null' if name == 'threads' else ''}")
    devices = config["trainer"]["devices"]
    numbers = devices if isinstance(devices, list) and devices else [devices]
    least = 0 if isinstance(devices, list) else 1
    if devices != "auto" and not all(isinstance(number, int) and number >= least for number in numbers):
        raise UserError(f"trainer.devices={devices}: need a number >= 1, a list of the GPUs' numbers, or auto")
    clip = config["trainer"]["gradient_clip"]
    if clip is not None and not clip > 0:
        raise UserError(f"trainer.gradient_clip={clip}: need a number > 0, or null for none")
    hang = config["trainer"]["hang_seconds"]
    if not hang > 0:
        raise UserError(f"trainer.hang_seconds={hang}: need a number > 0, or .inf for never")
    stopping = config["early_stopping"]
    for name in ("patience", "every"):
        if stopping[name] is not None and not (isinstance(stopping[name], int) and stopping[name] >= 1):
            raise UserError(f"early_stopping.{name}={stopping[name]}: need a whole number of at least 1")
    _one_of(config, "trainer.strategy", STRATEGIES)
    sharded = config["trainer"]["strategy"] == "fsdp"
    _one_of(config, "trainer.precision", SHARDED_PRECISIONS if sharded else PRECISIONS)
    _one_of(config, "trainer.matmul_precision", ("highest", "high", "medium"))


def check_copies(parts: Parts) -> None:
    """Weights that are divided over devices cannot be copied."""
    for name, diagnostic in parts.diagnostics.items():
        if diagnostic.copies and parts.config["trainer"]["strategy"] == "fsdp":
            raise UserError(
                f"diagnostics.{name}: takes gradients of a copy of the weights, which trainer.strategy=fsdp divides "
                f"over devices; look at a checkpoint afterwards: denoiselab evaluate ckpt=RUN diagnostics={name}"
            )


def check_evaluation(config: dict[str, Any]) -> None:
    """The evaluation's own numbers."""
    evaluation = config["evaluation"]
    if evaluation["n"] < 1:
        raise UserError(f"evaluation.n={evaluation['n']}: need at least 1")
    _one_of(config, "evaluation.weights", ("ema", "raw"))


def check_used(parts: Parts, overrides: list[str]) -> None:
    """Refuse to be asked for a weighting or a target that the loss does not look at, or for an embedding that the model
    does not."""
    from hydra.utils import get_class

    loss, model = parts.config["loss"]["_target_"], parts.config["model"]["_target_"]
    used = {
        "embedding": "embedding" in inspect.signature(get_class(model)).parameters,
        "weighting": "weighting" in inspect.signature(get_class(loss)).parameters,
        "target": parts.denoiser_class.has_target,
        **dict.fromkeys(("schedule", "timesteps", "sampler", "guidance"), parts.denoiser_class.generates),
    }
    for line in overrides:
        group = line.lstrip("+~").partition("=")[0].partition(".")[0]
        if not used.get(group, True):
            if group == "embedding":
                raise UserError(f"{line}: the model {_name(model)} does not use it; leave it out")
            raise UserError(f"{line}: the loss {_name(loss)} does not use a {group}; leave it out, or take loss=simple")


def check_outputs(parts: Parts) -> None:
    """A network that must return more than one tensor can be told so."""
    from hydra.utils import get_class

    target = parts.config["model"]["_target_"]
    if parts.outputs != 1 and "outputs" not in inspect.signature(get_class(target)).parameters:
        raise UserError(
            f"model: {target} has no argument outputs, and the loss {_name(parts.config['loss']['_target_'])} needs a "
            f"network that returns {parts.outputs} tensors like x_0"
        )


def check_network(parts: Parts, net: Any) -> None:
    """The loss of an autoencoder has one, and no other loss has."""
    if isinstance(net, Autoencoder) != parts.denoiser_class.generates:
        return
    model, loss = type(net).__name__, _name(parts.config["loss"]["_target_"])
    if isinstance(net, Autoencoder):
        raise UserError(
            f"model: {model} is an autoencoder, and the loss {loss} trains a denoiser; take loss=autoencoder"
        )
    raise UserError(
        f"model: the loss {loss} trains an autoencoder, and {model} is none; need model=kl_digits or vq_digits"
    )


def check_pure_noise(parts: Parts) -> None:
    """Where alpha = 0 at t = 1, the target must still say something of x_0."""
    alpha, sigma = parts.schedule(torch.ones((), dtype=torch.float64, device=parts.schedule.device))
    a, b = parts.target.coefficients(alpha, sigma)
    if alpha * b - sigma * a == 0:
        names = (type(parts.target).__name__, type(parts.schedule).__name__)
        raise UserError(f"target: {names[0]} says nothing of x_0 at t = 1 of {names[1]}, where alpha = 0; use target=v")


def check_timesteps(parts: Parts) -> None:
    """The times exist on the schedule."""
    try:
        parts.timesteps.check(parts.schedule)
    except ValueError as error:
        raise UserError(one_line(error)) from None


def check_sampler(parts: Parts, denoiser: Denoiser) -> None:
    """The sampler's levels exist on the schedule, and it can use the denoiser."""
    if not denoiser.generates:
        raise UserError(
            "ckpt: this run trained an autoencoder, which cannot be sampled; `denoiselab encode` makes latents"
        )
    sampler, schedule = parts.sampler, parts.schedule
    try:
        sampler.levels(schedule)
    except ValueError as error:
        raise UserError(f"sampler.{one_line(error)}") from None
    try:
        sampler.check(denoiser)
    except ValueError as error:
        raise UserError(f"sampler: {one_line(error)}") from None


def check_evaluates(denoiser: torch.nn.Module) -> None:
    """Raise RuntimeError if any part of a network is in training mode, where dropout and normalisation differ from what
    is to be measured."""
    training = [name or "the denoiser" for name, part in denoiser.named_modules() if part.training]
    if training:
        raise RuntimeError(f"{training[0]} is in training mode; nothing was made or measured. Call eval() on it")


def check_guidance(parts: Parts, make: Any) -> None:
    """A guidance that asks without a condition has a model that knows what that is.

    Args:
        make: ``make(denoiser=...)``.
    """
    try:
        needs_null = getattr(make(denoiser=_nothing), "needs_null", False)
    except ValueError as error:
        raise UserError(f"guidance.{one_line(error)}") from None
    if needs_null:
        name = _name(parts.config["guidance"]["_target_"])
        if not (parts.num_classes or parts.vector):
            raise UserError(f"guidance={name}: the model is unconditional (no classes); use guidance=none")
        if parts.config.get("p_null") == 0:
            raise UserError(
                f"guidance={name}: with p_null=0 the null label is never trained; use p_null=0.1, or guidance=none"
            )


def check_metrics(parts: Parts, metrics: dict[str, Metric]) -> None:
    """Each can measure the data, and what is made of them."""
    for name, metric in metrics.items():
        if metric.paired and parts.denoiser_class.generates and not (parts.low_res or parts.vector):
            raise UserError(
                f"metrics.{name}: compares each sample with the held-out image that it was made of, and these are "
                "made of noise alone; need data=super_resolution, or another metrics"
            )
        try:
            metric.check(parts.images)
        except ValueError as error:
            raise UserError(str(error)) from None
        n = parts.config["evaluation"]["n"]
        if n < metric.least:
            raise UserError(f"evaluation.n={n}: metrics.{name} needs at least {metric.least} samples")


def check_callbacks(parts: Parts, callbacks: dict[str, Any], group: str = "callbacks") -> None:
    """Each callback, and each diagnostic, is about what is trained."""
    for name, callback in callbacks.items():
        if getattr(callback, "generates", None) not in (None, parts.denoiser_class.generates):
            need = ("autoencoder", "default") if group == "callbacks" else ("none", "none")
            what = f"samples, and this loss trains an autoencoder; need {group}={need[0]}"
            other = f"an autoencoder, and this loss trains none; need {group}={need[1]}"
            raise UserError(f"{group}.{name}: is about {what if callback.generates else other}")
        if isinstance(callback, Diagnostic):
            try:
                callback.check(parts)
            except ValueError as error:
                raise UserError(f"{group}.{name}: {one_line(error)}") from None


def _nothing(x_t: torch.Tensor, *level: torch.Tensor, **cond: Any) -> torch.Tensor:
    """A denoiser to try guidance with."""
    return x_t


def _one_of(config: dict[str, Any], option: str, valid: tuple[str, ...]) -> None:
    value: Any = config
    for key in option.split("."):
        value = value[key]
    if value not in valid:
        raise UserError(f"{option}={value}: need one of {', '.join(valid)}")


def _name(target: str) -> str:
    """The class of a ``_target_``."""
    return target.rpartition(".")[2]
