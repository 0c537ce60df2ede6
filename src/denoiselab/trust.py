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

VARIABLE = "DENOISELAB_ALLOW_TARGETS"
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\Z")
DEEPEST = 30


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
    for where, target in _targets(config, source, ""):
        if not (isinstance(target, str) and (target in allowed or _ours(target))):
            raise UserError(
                f"{source}: {where}._target_={str(target)[:80]!r} is not among the allowed classes; nothing was run. "
                f"If it is your own, allow it by its exact name: {VARIABLE}=package.module.Class"
            )


def _targets(node: Any, source: str, where: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        raise UserError(f"{source}: the configuration is nested deeper than {DEEPEST} levels")
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield where or "the root", value
            yield from _targets(value, source, f"{where}.{key}".lstrip("."), depth + 1)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, source, f"{where}[{index}]", depth + 1)


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
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError:
        return False
    if not inspect.isclass(found):
        return False
    # A package's own re-export (denoiselab.models.UNet) is fine; anything from elsewhere is not.
    return found.__module__ == module_name or found.__module__.startswith(module_name + ".")
