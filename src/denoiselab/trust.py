"""What a configuration read from a file may instantiate.

A configuration composed from conf/ and the user's own --config-dir is the user's own command and may name anything.
One read back from a run or a checkpoint may come from somebody else: it may name the classes that runs are made of,
an exact list of functions and of third-party classes, and what the user allowed. Names are matched whole or resolved
to an object defined where it is named, since prefixes such as ``torch.nn.`` can be walked out of
(``torch.nn.modules.module.torch.hub.load``).
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import os
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from denoiselab.errors import UserError

EXACT = frozenset(
    {
        "torch.optim.AdamW",
        "torch.optim.Adam",
        "torch.optim.SGD",
        "lightning.pytorch.loggers.WandbLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "denoiselab.loggers.Wandb",
        "denoiselab.loggers.TensorBoard",
    }
)
PACKAGES = frozenset(
    {
        *("data", "models", "schedule", "target", "weighting", "timesteps", "loss", "sampler", "guidance"),
        *("consistency", "ema", "lr_schedule", "callbacks", "metrics", "diagnostics"),
    }
)
"""Modules of ours whose classes are parts of a run; the others read, write and run things."""

BESIDE = frozenset({"denoiselab.run.frozen", "denoiselab.guidance.unguided", "denoiselab.exchange.schedules.Table"})
"""Functions, and what other modules add to those."""

KINDS = {
    "data": "denoiselab.data.base.Data",
    "model": "torch.nn.Module",
    "embedding": "denoiselab.models.NoiseEmbedding",
    "schedule": "denoiselab.schedule.Schedule",
    "target": "denoiselab.target.Target",
    "weighting": "denoiselab.weighting.Weighting",
    "timesteps": "denoiselab.timesteps.Timesteps",
    "loss": "denoiselab.loss.Loss",
    "codec": "denoiselab.data.codec.Codec",
}
"""What the class of a group is: each of the parts that a network and its loss are made of, by a run's word."""

VARIABLE = "DENOISELAB_ALLOW_TARGETS"
LOOK_UPS = "DENOISELAB_ALLOW_LOOK_UPS"
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\Z")
LOOK_UP = re.compile(r"\$\{oc\.env:(\w+)(,[\w./ -]*)?\}")
DEEPEST = 30
LARGEST = 10**8
"""Numbers of a sample, and classes."""

MOST = 10_000
"""Values of a configuration: a few bytes can name one another until there are 2**30."""


def check(config: Any, source: str) -> None:
    """Refuse a configuration that names what it may not.

    Args:
        config: plain dicts and lists.
        source: where it came from, for the error.

    Raises:
        UserError: naming the place and the refused target; nothing was imported but our own modules.
    """
    allowed = EXACT | set(os.environ.get(VARIABLE, "").replace(",", " ").split())
    allowed |= {point.value.replace(":", ".") for point in entry_points(group="denoiselab.targets")}
    for where, target in _targets(config, source):
        named = isinstance(target, str) and (target in allowed or _ours(target))
        if named and target not in allowed and where in KINDS and not _is(target, KINDS[where]):
            raise UserError(f"{source}: {where}._target_={target!r} is of another group; nothing was run")
        if not named:
            raise UserError(
                f"{source}: {where}._target_={str(target)[:80]!r} is not among the allowed classes; nothing was run. "
                f"If it is your own, allow it by its exact name: {VARIABLE}=package.module.Class"
            )


def check_look_ups(node: Any, where: str) -> None:
    """Refuse what would be filled in from the environment of this machine, but for variables that the user allowed. A
    configuration of the user's own command is filled in before it gets here.

    Args:
        node: a part of a configuration, as plain dicts and lists.
        where: it stands, for the error.
    """
    allowed = os.environ.get(LOOK_UPS, "").replace(",", " ").split()
    for place, _, value in _values(node, where, where):
        rest = (
            LOOK_UP.sub(lambda found: "" if found[1] in allowed else found[0], value) if isinstance(value, str) else ""
        )
        if "${" in rest:
            raise UserError(
                f"{place}={rest[:80]!r}: a file looks up what is on this machine; nothing was run. If that is meant, "
                f"allow the variable by its name: {LOOK_UPS}=NAME"
            )


def check_record(record: dict[str, Any], config: dict[str, Any], source: str) -> None:
    """A file says what its network takes and is made of, in the form that a run writes.

    Args:
        record: what it says of itself, with interface and choices.
        config: its configuration.
        source: where it came from, for the error.

    Raises:
        UserError: naming what is of another form.
    """
    interface = record["interface"]
    for group in KINDS.keys() - {"codec"}:
        if not (isinstance(config.get(group), dict) and "_target_" in config[group]):
            raise UserError(f"{source}: its configuration says nothing usable of its {group}")
    shape, counts = interface.get("shape"), [interface.get(name) for name in ("num_classes", "vector", "low_res")]
    sigma_data, p_null = config.get("sigma_data"), config.get("p_null")
    if not (sigma_data is None or _number(sigma_data)) or not _number(p_null):
        raise UserError(f"{source}: its configuration says nothing usable of sigma_data or p_null")
    fine = isinstance(shape, list) and 1 <= len(shape) <= 3 and all(_count(n, 1) for n in shape)
    if not fine or math.prod(shape) > LARGEST or not all(_count(n, 0) for n in counts):
        raise UserError(
            f"{source}: says nothing usable of what its network takes (shape, num_classes, vector, low_res)"
        )
    if not (isinstance(interface.get("codec"), dict) and "_target_" in interface["codec"]):
        raise UserError(f"{source}: says nothing usable of its codec")
    if not all(isinstance(word, str) for pair in record["choices"].items() for word in pair):
        raise UserError(f"{source}: says nothing usable of its choices")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def _targets(config: Any, source: str) -> Iterator[tuple[str, Any]]:
    return ((where or "the root", value) for where, key, value in _values(config, source) if key == "_target_")


def _values(node: Any, source: str, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where each value of each mapping stands, its key and itself, and so the items of lists with no key."""
    waiting = [(where, None, node, 0)]
    for count in itertools.count():
        if not waiting:
            return
        where, key, node, depth = waiting.pop()
        if depth > DEEPEST:
            raise UserError(f"{source}: the configuration is nested deeper than {DEEPEST} levels")
        if count > MOST:
            raise UserError(f"{source}: the configuration has more than {MOST} values")
        yield where, key, node
        if isinstance(node, dict):
            inside = [(where if k == "_target_" else f"{where}.{k}".lstrip("."), k, v) for k, v in node.items()]
        elif isinstance(node, list):
            inside = [(f"{where}[{index}]", None, value) for index, value in enumerate(node)]
        else:
            continue
        waiting += [(*one, depth + 1) for one in reversed(inside)]


def _is(target: str, kind: str) -> bool:
    """Whether a class, which is one of ours or was allowed, is one of a kind."""
    base, found = (_found(name) for name in (kind, target))
    return inspect.isclass(found) and inspect.isclass(base) and issubclass(found, base)


def _found(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last, None)


def _ours(target: str) -> bool:
    """Whether target is a part of a run: a class defined in the module of ours that it names, or a listed function."""
    if not NAME.match(target) or not target.startswith("denoiselab."):
        return False
    if any(part.startswith("_") for part in target.split(".")):
        return False
    if target in BESIDE:
        return True
    if target.split(".")[1] not in PACKAGES:
        return False
    module_name = target.rpartition(".")[0]
    try:
        found = _found(target)
    except ImportError:
        return False
    if not inspect.isclass(found):
        return False
    # A package's own re-export (denoiselab.models.UNet) is fine; anything from elsewhere is not.
    return found.__module__ == module_name or found.__module__.startswith(module_name + ".")
