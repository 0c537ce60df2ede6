"""Which values the options of a command take: of their default's kind, under names that exist."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from denoiselab.arguments import kind_of, need
from denoiselab.errors import UserError, nearest

KINDS: dict[str, Any] = {
    **dict.fromkeys(("sigma_data", "trainer.epochs", "trainer.gradient_clip", "study.budget"), float | None),
    **dict.fromkeys(("p_null", "attention"), float),
    **dict.fromkeys(("early_stopping.patience", "trainer.threads", "label", "num_classes", "vector"), int | None),
    **dict.fromkeys(("outputs", "threads", "rounds"), int | None),
    **dict.fromkeys(("init_from", "format", "output", "a", "b", "real"), str | None),
    **dict.fromkeys(("ckpt", "encoder", "source"), str),
    "low_res": int | str | None,
    "trainer.devices": int | Literal["auto"] | list[int],
    "shape": list[int] | None,
    "part": str | list[str],
    "answers": str | list[str] | None,
    **dict.fromkeys(("lint.allow", "study.metrics"), list[str]),
    "study.claims": list[dict[str, Any]],
}
"""Of options outside classes whose default does not say it."""

NAMED = ("metrics", "callbacks", "diagnostics", "logger")
"""Groups of which several options can be chosen; each is a part under a name."""

ENTRIES = (*NAMED, "study.axes", "networks.models", "gpu.models", "sampling.samplers")
"""Mappings whose entries can be left out, or added."""


def check_value(line: str, override: Any, base: Any, groups: Sequence[str]) -> None:
    """An override names an option that exists, and gives it a value of its kind.

    Args:
        line: as it was typed.
        override: as Hydra reads it.
        base: the configuration without it.
        groups: names that are no option's.

    Raises:
        UserError: in one line.
    """
    key = override.key_or_group
    node: Any = base
    parent, within = None, ""
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            adds = override.is_add() or override.is_force_add()
            last = adds and key == f"{within}{part}"
            if last and isinstance(node, dict) and ("_target_" in node or within[:-1] in ENTRIES):
                return  # one more argument, of which the class says whether it knows it; or one more entry
            names: list[str] = [*node] if isinstance(node, dict) else []
            names += [one for one in groups if node is base and one not in names]
            raise UserError(f"{line}: no option {part!r} here; {nearest(part, names)}")
        node, parent, within = node[part], node, f"{within}{part}."
    classed = isinstance(parent, dict) and "_target_" in parent
    entry = key.rpartition(".")[0] in ENTRIES
    if override.is_delete():
        if (not classed and not entry) or key.rpartition(".")[2].startswith("_"):
            raise UserError(f"{line}: cannot be left out; need a value, as in {key}={_written(node)}")
        return
    if line.endswith("="):
        raise UserError(f"{line}: no value; need one, as in {key}={_written(node)}")
    if override.is_add():
        raise UserError(f"{line}: there is one already; leave out the +, as in {line.lstrip('+')}")
    value = override.value()
    if value is None and (classed or entry):  # the class says whether it takes it; an entry is switched off
        return
    if classed and isinstance(node, float) and value in (math.inf, -math.inf):
        return  # the class says whether it takes it
    if wanted := _mismatch(key, node, value, classed):
        raise UserError(f"{line}: {wanted}")


def check_nodes(config: Any, base: Any, within: str = "") -> None:
    """What option files say outside classes is of options that exist, and of their kind.

    Args:
        config: composed.
        base: the configuration that a command starts from.

    Raises:
        UserError: in one line.
    """
    for key, value in config.items():
        name = f"{within}{key}"
        if key not in base:
            raise UserError(f"{name}: an option file sets it, and there is no such option; {nearest(key, [*base])}")
        if isinstance(value, dict) and name in (*ENTRIES, "study"):
            continue
        if isinstance(value, dict) and isinstance(base[key], dict):
            if "_target_" not in value and "_target_" not in base[key]:
                check_nodes(value, base[key], f"{name}.")
        elif wanted := _mismatch(name, base[key], value):
            raise UserError(f"{name}={value}: {wanted}")


def _mismatch(key: str, default: Any, value: Any, classed: bool = False) -> str | None:
    """What kind of value is needed, if the given one is of another kind than the default."""
    if isinstance(value, str) and "${" in value:
        return None
    if isinstance(value, dict) and isinstance(default, dict) and not classed and key not in ENTRIES:
        for name, one in value.items():
            if "_target_" in default or "_target_" in value:
                return None
            if name not in default:
                return f"no option {str(name)!r} here; {nearest(str(name), [*default])}"
            if wanted := _mismatch(f"{key}.{name}", default[name], one):
                return f"{key}.{name}: {wanted}"
        return None
    unknown = isinstance(default, str) and ("${" in default or default == "???")
    kind = KINDS.get(key) if not classed else None
    wanted = need(kind or (Any if unknown else _wider(kind_of(default)) if classed else kind_of(default)), value)
    return wanted and f"need {wanted}, as in {key}={_written(default)}"


def _wider(kind: Any) -> Any:
    """A class may take any number where its file writes a whole one; which it does is declared with it."""
    return {int: float, list[int]: list[float]}.get(kind, kind)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
