"""From a configuration to objects, wired to each other once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from denoiselab import speed, trust
from denoiselab.compose import Composed, compose, plain
from denoiselab.conditioning import Drop
from denoiselab.data.base import Data
from denoiselab.data.codec import Codec
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.guidance import DenoiserLike
from denoiselab.loss import Loss
from denoiselab.metrics.base import Metric
from denoiselab.models import Autoencoder, NoiseEmbedding
from denoiselab.sampler import Sampler, Spacing
from denoiselab.schedule import Schedule
from denoiselab.target import Target
from denoiselab.timesteps import Timesteps
from denoiselab.version import NUMERICS_VERSION
from denoiselab.weighting import Weighting


def build(*overrides: str) -> Parts:
    """The parts that option names stand for, made when first asked for.

    Args:
        overrides: as on the command line of ``denoiselab train``.

    >>> parts = build("schedule=linear", "target=eps", "model=unet_digits", "model.channels=32")
    >>> parts.weighting.formula
    'SNR'
    >>> sum(p.numel() for p in parts.model.parameters())
    756417
    """
    return Parts(resolve(compose("train", overrides)))


def resolve(composed: Composed) -> dict[str, Any]:
    """The configuration as plain containers, with ``trainer.epochs`` turned into steps."""
    config = plain(composed)
    trainer = config.get("trainer", {})
    epochs = trainer.get("epochs")
    if epochs is not None:
        if not epochs > 0:
            raise UserError(f"trainer.epochs={epochs}: need a number > 0")
        data = Parts(config).data
        composed.config.trainer.max_steps = math.ceil(epochs * len(data.train) / data.batch_size)
        config = plain(composed)
    return config


class Parts:
    """Instantiated objects by group name, each made once and handed to those that name it in their constructor.

    A group's file is a class (``_target_``) and its arguments. With ``_partial_: true`` the class also takes shared
    parts, by the names of its constructor's remaining arguments: ``Unit(target)`` gets the run's target.

    Args:
        config: plain containers, resolved.
        interface: shape, num_classes, vector, low_res and codec, where the data set itself is not needed (a loaded
            run).
        folder: the run directory, for callbacks and loggers.
        run_id: the run's identity hash, for loggers.
    """

    def __init__(
        self,
        config: dict[str, Any],
        interface: dict[str, Any] | None = None,
        folder: Path | None = None,
        run_id: str | None = None,
    ):
        self.config, self.folder, self.run_id = config, folder, run_id
        self._interface = interface

    def make(self, group: str, node: Any = None, open: tuple[str, ...] = (), **shared: Any) -> Any:
        """The object that a group's node describes.

        Args:
            group: for the node (if not given) and for errors.
            open: constructor arguments that may stay open; the object is then a partial that waits for them.
            shared: further values that the constructor may name.

        Raises:
            UserError: the constructor refused a value, or does not know an argument.
        """
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        node = self.config[group] if node is None else node
        try:
            made = instantiate(node, _convert_="all")
            if isinstance(made, partial):
                made = self._complete(made, group, open, shared)
            return made
        except InstantiationException as error:
            cause = error.__cause__ or error
            if isinstance(cause, UserError):
                raise cause from None
            raise UserError(f"{group}.{_one_line(cause)}") from cause
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{group}.{_one_line(error)}") from error

    def _complete(self, made: partial, group: str, open: tuple[str, ...], shared: dict[str, Any]) -> Any:
        """Call a partial with the shared parts it names; leave it partial while an ``open`` argument is missing."""
        arguments, waiting = dict(made.keywords), False
        for name, parameter in inspect.signature(made.func).parameters.items():
            if name in arguments or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if name in shared:
                arguments[name] = shared[name]
            elif name in open:
                waiting = True
            elif name in SHARED and name != group:
                arguments[name] = getattr(self, name)
            elif parameter.default is parameter.empty:
                raise ValueError(f"{name}=?: {made.func.__name__} needs this argument, and nothing provides it")
        return partial(made.func, **arguments) if waiting else made.func(**arguments)

    @cached_property
    def data(self) -> Data:
        return self.make("data")

    @cached_property
    def images(self) -> Data:
        """The data set as people see it: the one whose latents these are, or the data set itself."""
        source = self.data.source
        if source is None:
            return self.data
        trust.check(source, f"data: {self.config['data'].get('root')}")
        return self.make("data", source)

    @cached_property
    def codec(self) -> Codec:
        return self.make("codec", self._interface["codec"]) if self._interface else self.data.codec

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._interface["shape"]) if self._interface else self.data.shape

    @cached_property
    def num_classes(self) -> int:
        return self._interface["num_classes"] if self._interface else self.data.num_classes

    @cached_property
    def vector(self) -> int:
        return self._interface["vector"] if self._interface else self.data.vector

    @cached_property
    def low_res(self) -> int:
        return self._interface["low_res"] if self._interface else self.data.low_res

    @property
    def interface(self) -> dict[str, Any]:
        """What a checkpoint stores so that it can be sampled without the data set."""
        facts = {"num_classes": self.num_classes, "vector": self.vector, "low_res": self.low_res}
        return {"shape": list(self.shape), **facts, "codec": self.codec.config()}

    @cached_property
    def schedule(self) -> Schedule:
        return self.make("schedule")

    @cached_property
    def target(self) -> Target:
        return self.make("target")

    @cached_property
    def weighting(self) -> Weighting:
        return self.make("weighting")

    @cached_property
    def timesteps(self) -> Timesteps:
        return self.make("timesteps")

    @cached_property
    def loss(self) -> Loss:
        return self.make("loss")

    @cached_property
    def denoiser_class(self) -> type[Denoiser]:
        """What the loss trains, known without making the loss."""
        from hydra.utils import get_class

        return get_class(self.config["loss"]["_target_"]).denoiser  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def outputs(self) -> int:
        """How many tensors like x_0 the network returns."""
        return self.denoiser_class.net_outputs

    @property
    def bins(self) -> int | None:
        """The levels that the data's values have."""
        return self.data.bins

    @property
    def sigma_data(self) -> float:
        """The root mean square of x_0 that the network is built for."""
        chosen = self.config.get("sigma_data")
        if chosen is None:
            return self.codec.sigma_data
        if not chosen > 0:
            raise UserError(f"sigma_data={chosen}: need a number > 0, or null for the data's")
        return chosen

    @cached_property
    def embedding(self) -> NoiseEmbedding:
        return self.make("embedding")

    @cached_property
    def drop(self) -> Drop:
        try:
            return Drop(self.config["p_null"])
        except ValueError as error:
            raise UserError(str(error)) from None

    @cached_property
    def model(self) -> Any:
        return self._network()

    def _network(self) -> Any:
        from hydra.utils import get_class

        target = self.config["model"]["_target_"]
        if self.outputs != 1 and "outputs" not in inspect.signature(get_class(target)).parameters:
            loss = self.config["loss"]["_target_"].rpartition(".")[2]
            raise UserError(
                f"model: {target} has no argument outputs, and the loss {loss} needs a network that returns "
                f"{self.outputs} tensors like x_0"
            )
        net = self.make("model")
        if isinstance(net, Autoencoder) == self.denoiser_class.generates:
            raise UserError(_mismatch(type(net).__name__, self.config["loss"]["_target_"].rpartition(".")[2], net))
        return net

    @cached_property
    def denoiser(self) -> Denoiser:
        return self.denoiser_class(self.model, self.target, self.sigma_data)

    @cached_property
    def spacing(self) -> Spacing:
        return self.make("spacing")

    @cached_property
    def sampler(self) -> Sampler:
        return self.make("sampler")

    @cached_property
    def guidance(self) -> Callable[[DenoiserLike], DenoiserLike]:
        """Wraps a denoiser."""
        make = self.make("guidance", open=("denoiser",))
        try:
            needs_null = getattr(make(denoiser=_nothing), "needs_null", False)
        except ValueError as error:
            raise UserError(f"guidance.{_one_line(error)}") from None
        if needs_null:
            name = self.config["guidance"]["_target_"].rpartition(".")[2]
            if not (self.num_classes or self.vector):
                raise UserError(f"guidance={name}: the model is unconditional (no classes); use guidance=none")
            if self.config.get("p_null") == 0:
                raise UserError(
                    f"guidance={name}: with p_null=0 the null label is never trained; use p_null=0.1, or guidance=none"
                )
        return make

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """By name; each checked against the data."""
        made = {name: self.make("metrics", node) for name, node in self.config["metrics"].items() if node}
        for name, metric in made.items():
            if metric.paired and self.denoiser_class.generates and not (self.low_res or self.vector):
                raise UserError(
                    f"metrics.{name}: compares each sample with the held-out image that it was made of, and these are "
                    "made of noise alone; need data=super_resolution, or another metrics"
                )
            try:
                metric.check(self.images)
            except ValueError as error:
                raise UserError(str(error)) from None
            n = self.config["evaluation"]["n"]
            if n < metric.least:
                raise UserError(f"evaluation.n={n}: metrics.{name} needs at least {metric.least} samples")
        return made

    def check(self) -> None:
        """Make everything once, so that a configuration that cannot work is refused before anything is written.

        The network has shapes and no weights, so that the largest is answered for at once; it is not kept.
        """
        config, before = self.config, {"data", *self.__dict__}
        for name in ("max_steps", "accumulate", "log_every", "checkpoint_every"):
            if config["trainer"][name] < 1:
                raise UserError(f"trainer.{name}={config['trainer'][name]}: need at least 1")
        clip = config["trainer"]["gradient_clip"]
        if clip is not None and not clip > 0:
            raise UserError(f"trainer.gradient_clip={clip}: need a number > 0, or null for none")
        _one_of(config, "trainer.strategy", STRATEGIES)
        sharded = config["trainer"]["strategy"] == "fsdp"
        _one_of(config, "trainer.precision", SHARDED_PRECISIONS if sharded else PRECISIONS)
        _one_of(config, "trainer.matmul_precision", ("highest", "high", "medium"))
        _one_of(config, "init_weights", ("ema", "raw"))
        _one_of(config, "init_mismatch", ("refuse", "allow"))
        check_evaluation(config)
        if "model" not in before:
            self.model = self._without_weights()
        speed.check(self.model, config["trainer"])
        for name in ("drop", "denoiser", "loss", "timesteps", "metrics"):
            getattr(self, name)
        self._check_timesteps()
        if self.denoiser.generates:
            _ = self.guidance
            self.check_pure_noise()
            self.check_sampler(self.denoiser)
        self.make("optimizer", params=[torch.nn.Parameter(torch.zeros(2, 2))])
        self.make("lr_schedule")
        self.make("ema", model=self.denoiser)
        self.callbacks(self.folder or Path())
        for name in self.__dict__.keys() - before:
            del self.__dict__[name]

    def _without_weights(self) -> Any:
        """The network on PyTorch's meta device, or as it is where its constructor needs values."""
        from hydra.utils import get_object

        named = inspect.signature(get_object(self.config["model"]["_target_"])).parameters
        for name in SHARED & named.keys():
            getattr(self, name)  # these have values
        try:
            with torch.device("meta"):
                return self._network()
        except Exception:  # a mistake is one off this device too
            return self._network()

    def check_used(self, overrides: list[str]) -> None:
        """Refuse to be asked for a weighting or a target that the loss does not look at, or for an embedding that the
        model does not."""
        from hydra.utils import get_class

        loss, model = self.config["loss"]["_target_"], self.config["model"]["_target_"]
        used = {
            "embedding": "embedding" in inspect.signature(get_class(model)).parameters,
            "weighting": "weighting" in inspect.signature(get_class(loss)).parameters,
            "target": self.denoiser_class.has_target,
            **dict.fromkeys(("schedule", "timesteps", "sampler", "guidance"), self.denoiser_class.generates),
        }
        for line in overrides:
            group = line.lstrip("+~").partition("=")[0].partition(".")[0]
            if not used.get(group, True):
                if group == "embedding":
                    raise UserError(f"{line}: the model {model.rpartition('.')[2]} does not use it; leave it out")
                name = loss.rpartition(".")[2]
                raise UserError(f"{line}: the loss {name} does not use a {group}; leave it out, or take loss=simple")

    def check_pure_noise(self) -> None:
        """Where alpha = 0 at t = 1, the target must still say something of x_0."""
        alpha, sigma = self.schedule(torch.ones((), dtype=torch.float64, device=self.schedule.device))
        a, b = self.target.coefficients(alpha, sigma)
        if alpha * b - sigma * a == 0:
            names = (type(self.target).__name__, type(self.schedule).__name__)
            raise UserError(
                f"target: {names[0]} says nothing of x_0 at t = 1 of {names[1]}, where alpha = 0; use target=v"
            )

    def _check_timesteps(self) -> None:
        try:
            self.timesteps.check(self.schedule)
        except ValueError as error:
            raise UserError(_one_line(error)) from None

    def check_sampler(self, denoiser: Denoiser) -> None:
        """The sampler's levels exist on the schedule, and it can use the denoiser."""
        if not denoiser.generates:
            raise UserError(
                "ckpt: this run trained an autoencoder, which cannot be sampled; `denoiselab encode` makes latents"
            )
        sampler, schedule = self.sampler, self.schedule
        try:
            sampler.levels(schedule)
        except ValueError as error:
            raise UserError(f"sampler.{_one_line(error)}") from None
        try:
            sampler.check(denoiser)
        except ValueError as error:
            raise UserError(f"sampler: {_one_line(error)}") from None

    def callbacks(self, folder: Path) -> list[Any]:
        """The optional callbacks, in the order of their file."""
        nodes = {name: node for name, node in self.config["callbacks"].items() if node}
        made = {name: self.make(f"callbacks.{name}", node, folder=folder) for name, node in nodes.items()}
        for name, callback in made.items():
            if getattr(callback, "generates", None) not in (None, self.denoiser_class.generates):
                what = "samples, and this loss trains an autoencoder; need callbacks=autoencoder"
                other = "an autoencoder, and this loss trains none; need callbacks=default"
                raise UserError(f"callbacks.{name}: is about {what if callback.generates else other}")
        return [*made.values()]


SHARED = {
    *("data", "codec", "shape", "num_classes", "vector", "low_res", "bins", "sigma_data", "outputs", "embedding"),
    *("schedule", "target", "weighting", "timesteps", "spacing", "sampler", "guidance", "denoiser"),
}
"""The parts that a constructor may ask for by name."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")


def check_evaluation(config: dict[str, Any]) -> None:
    """The evaluation's own numbers."""
    evaluation = config["evaluation"]
    if evaluation["n"] < 1:
        raise UserError(f"evaluation.n={evaluation['n']}: need at least 1")
    _one_of(config, "evaluation.weights", ("ema", "raw"))


def identity(config: dict[str, Any], init: str | None) -> dict[str, Any]:
    """What determines a run's result, and nothing else: not devices, paths, cadences, sampler, callbacks, logger.

    Args:
        config: resolved.
        init: "WEIGHTS:SHA256" of the checkpoint that weights start from.
    """
    found = {
        group: config[group]
        for group in (
            *("data", "model", "embedding", "schedule", "target", "weighting", "timesteps", "loss"),
            *("optimizer", "lr_schedule", "ema", "seed", "p_null", "sigma_data"),
        )
    }
    found["data"] = {key: value for key, value in config["data"].items() if key != "workers"}
    found["precision"] = config["trainer"]["precision"]
    found["gradient_clip"] = config["trainer"]["gradient_clip"]
    return {**found, "init": init, "numerics": NUMERICS_VERSION}


def _mismatch(model: str, loss: str, net: Any) -> str:
    """What is wrong where an autoencoder meets the loss of a denoiser, or the other way round."""
    if isinstance(net, Autoencoder):
        return f"model: {model} is an autoencoder, and the loss {loss} trains a denoiser; take loss=autoencoder"
    return f"model: the loss {loss} trains an autoencoder, and {model} is none; need model=kl_digits or vq_digits"


def _nothing(x_t: torch.Tensor, *level: torch.Tensor, **cond: Any) -> torch.Tensor:
    """A denoiser to try guidance with."""
    return x_t


def _one_of(config: dict[str, Any], option: str, valid: tuple[str, ...]) -> None:
    value: Any = config
    for key in option.split("."):
        value = value[key]
    if value not in valid:
        raise UserError(f"{option}={value}: need one of {', '.join(valid)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
