"""Studies: option files with a question, and what their axes are on a command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from denoiselab.compose import Composed, compose, plain
from denoiselab.errors import UserError

KEYWORDS = ("true", "false", "null", "inf", "nan")
"""Words that are no text in the grammar of overrides."""


def composed(name: str, own: list[str], config_dir: Path | None) -> Composed:
    """A run of a study, with options of one's own; nothing is swept."""
    return compose("train", [f"study={name}", *own], config_dir)


def study_of(chosen: Composed) -> dict[str, Any]:
    """The study that a run belongs to."""
    return plain(chosen)["study"]


def axes_of(study: dict[str, Any], name: str) -> list[str]:
    """A study's axes as overrides.

    >>> axes_of({"axes": {"schedule": ["linear", "cosine"], "seed": "range(3)", "ema": [None, "a b"]}}, "mine")
    ['schedule=linear,cosine', 'seed=range(3)', 'ema=null,"a b"']
    """
    axes = study.get("axes")
    if not isinstance(axes, dict) or not axes:
        raise UserError(f"study={name}: need study.axes, as in axes: {{schedule: [linear, cosine], seed: [0, 1, 2]}}")
    return [
        f"{key}={','.join(map(written, value)) if isinstance(value, list) else value}" for key, value in axes.items()
    ]


def written(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, str):
        bare = re.fullmatch(r"[A-Za-z_][\w-]*", value) and value.lower() not in KEYWORDS
        return value if bare else json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)
