"""What differs between configurations."""

from __future__ import annotations

import json
from typing import Any

from denoiselab.report.statistics import plain


def key(value: Any) -> str:
    """Text that is equal exactly where plain data is equal, 1 and 1.0 being the same setting."""
    return json.dumps(json.loads(json.dumps(value), parse_int=float), sort_keys=True)


def axes(configs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The settings that vary, by name, each with its value in every configuration.

    A part of another class is one axis; of the same class with other arguments, one axis per argument.

    >>> linear, cosine = {"_target_": "a.Linear", "low": 1}, {"_target_": "a.Cosine"}
    >>> axes([{"schedule": linear, "lr": 1}, {"schedule": cosine, "lr": 1}])
    {'schedule': ['Linear', 'Cosine']}
    >>> axes([{"schedule": linear}, {"schedule": {**linear, "low": 2}}])
    {'schedule.low': ['1', '2']}
    """
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for config in configs for name in config):
        values: list[Any] = [config.get(name) for config in configs]
        if not _vary(values):
            continue
        if all(isinstance(value, dict) for value in values) and not _vary([kind(value) for value in values]):
            found |= {f"{name}.{inner}": texts for inner, texts in axes(values).items()}
        else:
            found[name] = _described(values)
    return found


def kind(part: Any) -> str | None:
    """The class of a part, without its module; None for plain values."""
    return str(part.get("_target_")).rpartition(".")[2] if isinstance(part, dict) else None


def _vary(values: list[Any]) -> bool:
    return len({key(value) for value in values}) > 1


def _described(values: list[Any]) -> list[str]:
    """Parts by class, with the arguments that tell two of a class apart."""
    texts = [plain(value) if kind(value) is None else str(kind(value)) for value in values]
    for name in {kind(value) for value in values} - {None}:
        members = [i for i, value in enumerate(values) if kind(value) == name]
        for argument, column in axes([values[i] for i in members]).items():
            for i, text in zip(members, column, strict=True):
                texts[i] += f" {argument}={text}"
    return texts


def scale_of(guidance: Any) -> Any:
    """A guidance's scale, or that of what it wraps; None where there is none."""
    if not isinstance(guidance, dict):
        return None
    return guidance["scale"] if "scale" in guidance else scale_of(guidance.get("guidance"))
