"""Mistakes in the options of a command: made from every option file, each of a stated kind."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from denoiselab.compose import conf_dir, options

GLOBAL = ("experiment", "study", "debug")
"""Groups whose files set other groups' options."""


class Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as OmegaConf does."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


@dataclass(frozen=True)
class Leaf:
    """An option, and what its file says of it."""

    file: str
    """GROUP/OPTION, or the name of a command's own file."""
    key: str
    default: Any
    target: str | None
    """The class that takes it."""
    comment: str


@dataclass(frozen=True)
class Mutation:
    leaf: Leaf
    kind: str
    line: str
    """What is typed, or what is wrong of it."""


def load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), Loader) or {}


@cache
def leaves(path: Path) -> tuple[Leaf, ...]:
    """Every option that a file sets itself."""
    text = path.read_text()
    group = path.parent.name if path.parent != conf_dir() else ""
    prefix = "" if not group or "@package _global_" in text else f"{group}."
    comments = dict(re.findall(r"^\s*([\w.]+):[^\n#]*#\s*([^\n]*)", text, re.MULTILINE))
    name = f"{group}/{path.stem}".lstrip("/")

    def walk(node: dict[str, Any], within: str) -> Iterator[Leaf]:
        for key, value in node.items():
            if key == "defaults" or key.startswith("_"):
                continue
            if isinstance(value, dict) and value:
                yield from walk(value, f"{within}{key}.")
            else:
                yield Leaf(name, f"{within}{key}", value, node.get("_target_"), comments.get(key, ""))

    return tuple(walk(load(path), prefix))


def files() -> list[Path]:
    return sorted(conf_dir().rglob("*.yaml"))


def typos(word: str, draw: random.Random) -> list[str]:
    """A letter dropped, two swapped, one doubled; of the last part of a dotted name."""
    *front, last = word.split(".")
    found = []
    i = draw.randrange(len(last))
    found.append(last[:i] + last[i] + last[i:])
    if len(last) > 2:
        i = draw.randrange(len(last))
        found.append(last[:i] + last[i + 1 :])
        pairs = [j for j in range(len(last) - 1) if last[j] != last[j + 1]]
        if pairs:
            j = draw.choice(pairs)
            found.append(last[:j] + last[j + 1] + last[j] + last[j + 2 :])
    return [".".join([*front, one]) for one in dict.fromkeys(found)]


def written(value: Any) -> str:
    """In the grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return repr(value)


TYPES: dict[str, tuple[Any, ...]] = {
    "a whole number": ("fast", 1.5, 1e9, True, [1], {"a": 1}, math.nan, 10**30),
    "a number": ("fast", True, [1.0], {"a": 1}, math.nan, 10**30),
    "true or false": ("maybe", 1, 0.5, [True], {"a": 1}),
    "a text": (5, 0.5, True, ["a"], {"a": 1}),
    "a list": (5, "fast", True, {"a": 1}),
    "a mapping": (5, "fast", True, [1]),
}
"""Values of other types, by the type of the default."""


def kind_of(default: Any) -> str | None:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    return {**kinds, dict: "a mapping"}.get(type(default))


def mutations(path: Path, draw: random.Random) -> Iterator[Mutation]:
    """Mistakes that need no more than the option's file, and its group's others, to be known as such."""
    own = leaves(path)
    group = path.parent.name if path.parent != conf_dir() else ""
    for leaf in own:
        kind, value = kind_of(leaf.default), written(leaf.default)
        if leaf.key.startswith("study.axes"):  # may have any option's name
            continue
        open_ = isinstance(leaf.default, str) and ("${" in leaf.default or leaf.default == "???")
        for typo in typos(leaf.key, draw):
            if not any(other.key.startswith(typo) for other in own):
                yield Mutation(leaf, "typo", f"{typo}={'1' if open_ or leaf.default is None else value}")
        yield Mutation(leaf, "no value", f"{leaf.key}=")
        yield Mutation(leaf, "unknown key", f"+{leaf.key}.new=1")
        yield Mutation(leaf, "unknown key", f"+{leaf.key.rpartition('.')[0] or 'new'}.new.key=1")
        if leaf.target is None and group in ("", "trainer") and not leaf.key.startswith("sampling.samplers"):
            yield Mutation(leaf, "left out", f"~{leaf.key}")
        if not open_ and kind:
            for wrong in TYPES["a number" if leaf.key in NUMBERS else kind]:
                if not (leaf.key in WIDER and isinstance(wrong, WIDER[leaf.key])):
                    yield Mutation(leaf, "wrong type", f"{leaf.key}={written(wrong)}")
    if group and group not in GLOBAL and own:
        keys = {leaf.key for leaf in own}
        for other in sorted(path.parent.glob("*.yaml")):
            for leaf in leaves(other):
                if leaf.key not in keys and not inherited(path, leaf.key):
                    yield Mutation(own[0], "left over", f"{leaf.key}={written(leaf.default or 1)}")


NUMBERS = ("p_null", "sigma_data", "study.budget")
"""Written as whole numbers in some files, and no less numbers."""

WIDER: dict[str, tuple[type, ...]] = {"part": (list,), "trainer.devices": (int, list), "trainer.hang_seconds": (float,)}
"""Options that take what their default is not, and of which type."""


def inherited(path: Path, key: str) -> bool:
    """Whether a file's options come from others too, so that they cannot be read off it."""
    return "defaults:" in path.read_text() or key.startswith("study.axes")


SIGNED = {
    *("seed", "scale", "loc", "p_mean", "s", "b", "start", "end", "label"),
    *("scales", "means", "covariances", "edges", "order"),
}
"""Arguments that may be negative."""

ZERO = {
    *(
        "warmup",
        "workers",
        "block",
        "memorising",
        "requeues",
        "warm_up",
        "final",
        "decay",
        "eta",
        "phi",
        "low",
        "dropout",
    ),
    *(
        "s_churn",
        "s_min",
        "weight",
        "commitment",
        "lr",
        "eps",
        "weight_decay",
        "gamma",
        "slot",
        "sigma_min",
        "c",
        "noise",
    ),
    *("num_classes", "n"),
}
"""Arguments that may be 0, here or there."""

INFINITE = {"reach", "high", "s_max"}


def out_of_range(leaf: Leaf) -> list[Any]:
    """Values that an argument of a class cannot have, by what its docstring says of its range."""
    name = leaf.key.rpartition(".")[2]
    if isinstance(leaf.default, bool) or not isinstance(leaf.default, int | float):
        return []
    number = type(leaf.default)
    found: list[Any] = [] if name in SIGNED else [number(-1)]
    found += [] if name in SIGNED | ZERO else [number(0)]
    if number is float:
        found += [math.nan, -math.inf, *([] if name in INFINITE else [math.inf])]
    return found


def choices(draw: random.Random) -> Iterator[str]:
    """Mistakes in the choice of a group's option."""
    for group, names in options().items():
        for typo in typos(group, draw):
            yield f"{typo}={names[0]}"
        for name in names:
            for typo in typos(name, draw):
                if typo not in names:
                    yield f"{group}={typo}"
        yield f"{group}="
        yield f"{group}=null"
        yield f"{group}=5.5"
        yield f"{group}={{a:1}}"
        yield f"+{group}={names[0]}"
        yield f"~{group}"
        if group not in ("metrics", "callbacks", "diagnostics", "logger"):
            yield f"{group}=[{names[0]},{names[-1]}]"
