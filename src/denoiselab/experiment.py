"""From a configuration to objects, wired to each other once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from denoiselab import checks, trust
from denoiselab.arguments import LARGEST, spelled
from denoiselab.compose import Composed, compose, plain
from denoiselab.conditioning import Drop
from denoiselab.data.base import Data
from denoiselab.data.codec import Codec
from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics.base import Diagnostic
from denoiselab.errors import UserError, one_line
from denoiselab.guidance import DenoiserLike
from denoiselab.loss import Loss
from denoiselab.metrics.base import Metric
from denoiselab.models import NoiseEmbedding
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
        steps = epochs * len(data.train) / data.batch_size
        if steps > LARGEST:
            raise UserError(f"trainer.epochs={epochs}: more steps than can be counted")
        composed.config.trainer.max_steps = math.ceil(steps)
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
        trust.check_look_ups(node, group)
        if not isinstance(node, dict) or "_target_" not in node:
            raise UserError(f"{group}={spelled(node)}: need a mapping with _target_")
        checks.check_arguments(group, node)
        try:
            made = instantiate(node, _convert_="all")
            if isinstance(made, partial):
                made = self._complete(made, group, open, shared)
            return made
        except InstantiationException as error:
            cause = error.__cause__ or error
            if isinstance(cause, UserError):
                raise cause from None
            raise UserError(f"{group}.{one_line(cause)}") from cause
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{group}.{one_line(error)}") from error

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
        where = f"data.root={self.config['data'].get('root')}"
        trust.check(source, where)
        made = self.make("data", source)
        if not isinstance(made, Data):
            raise UserError(f"{where}: what these are latents of is no data set")
        return made

    @cached_property
    def codec(self) -> Codec:
        if self._interface is None:
            return self.data.codec
        made = self.make("codec", self._interface["codec"])
        if not isinstance(made, Codec):
            raise UserError(f"codec: {type(made).__name__} is no codec")
        return made

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
        return self.network()

    def network(self) -> Any:
        """A new network."""
        checks.check_outputs(self)
        net = self.make("model")
        checks.check_network(self, net)
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
        checks.check_guidance(self, make)
        return make

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """By name; each checked against the data."""
        made = {name: self.make(f"metrics.{name}", node) for name, node in self.config["metrics"].items() if node}
        checks.check_metrics(self, made)
        return made

    def callbacks(self, folder: Path) -> dict[str, Any]:
        """The optional callbacks, and diagnostics among them that have something to look at, in the order of their
        file."""
        nodes = {name: node for name, node in self.config["callbacks"].items() if node}
        made = {name: self.make(f"callbacks.{name}", node, folder=folder) for name, node in nodes.items()}
        made = {name: one for name, one in made.items() if not (isinstance(one, Diagnostic) and one.idle(self))}
        checks.check_callbacks(self, made)
        return made

    @cached_property
    def diagnostics(self) -> dict[str, Diagnostic]:
        """By name; each checked against the parts."""
        nodes = {name: node for name, node in self.config["diagnostics"].items() if node}
        made = {name: self.make(f"diagnostics.{name}", node) for name, node in nodes.items()}
        checks.check_callbacks(self, made, "diagnostics")
        return made


SHARED = {
    *("data", "codec", "shape", "num_classes", "vector", "low_res", "bins", "sigma_data", "outputs", "embedding"),
    *("schedule", "target", "weighting", "timesteps", "spacing", "sampler", "guidance", "denoiser"),
}
"""The parts that a constructor may ask for by name."""


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
    if config["early_stopping"]["patience"] is not None:
        found["early_stopping"] = config["early_stopping"]
    return {**found, "init": init, "numerics": NUMERICS_VERSION}
