"""What dashboards are told of a run, without secrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from denoiselab.confidential import ACCOUNT, SECRET

HIDDEN = "(kept back)"
LONGEST = 64
"""Letters of a tag on wandb's server."""


@dataclass
class Facts:
    """What a run is.

    Args:
        config: the configuration as config.yaml has it, look-ups of the environment unresolved.
        choices: option names by group.
        overrides: as they were given.
        looked_up: values that the environment gave, which appear nowhere.
        group: the study's or the sweep's name.
        git: the revision of the folder that the command was given in.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: Sequence[str]
    looked_up: Sequence[str] = ()
    group: str = ""
    git: str | None = None

    def shown(self, run: str) -> dict[str, Any]:
        """The configuration with choices, options and git revision, secrets kept back.

        Args:
            run: the run's hash.
        """
        own = {"hash": run, "choices": self.choices, "overrides": self._overrides(), "git": self.git}
        config = {key: value for key, value in self.config.items() if key != "logger"}
        return self._clean({**config, **own})

    @property
    def options(self) -> dict[str, Any]:
        """Chosen options by group, the seed and what was given beside them: one value each."""
        parts = [line.lstrip("+~").partition("=") for line in self._overrides()]
        given = {key: value for key, _, value in parts}
        return self._clean({**self.choices, "seed": self.config["seed"], **given})

    @property
    def tags(self) -> list[str]:
        """What runs are filtered by: study, experiment, data, model and loss."""
        named = [f"{group}:{self.choices.get(group)}" for group in ("study", "experiment", "data", "model", "loss")]
        return [tag[:LONGEST] for tag in named if not tag.endswith((":none", ":None"))]

    def _overrides(self) -> list[str]:
        parts = [line.partition("=") for line in self.overrides]
        return [f"{key}={HIDDEN}" if SECRET.search(key) else f"{key}{sign}{value}" for key, sign, value in parts]

    def _clean(self, node: Any, name: str = "") -> Any:
        if isinstance(node, dict):
            return {key: self._clean(value, str(key)) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [self._clean(value, name) for value in node]
        if isinstance(node, str):
            if SECRET.search(name) and "${oc.env" not in node:
                return HIDDEN
            for value in self.looked_up:
                node = node.replace(value, HIDDEN)
            return ACCOUNT.sub("", node)
        return node


def looked_up(text: Any, resolved: Any) -> list[str]:
    """The values that look-ups of the environment gave, the longest first.

    Args:
        text: a configuration with look-ups unresolved.
        resolved: the same, resolved.
    """
    if isinstance(text, dict):
        found = [value for key in text for value in looked_up(text[key], resolved.get(key))]
    elif isinstance(text, list) and isinstance(resolved, list):
        found = [value for pair in zip(text, resolved, strict=False) for value in looked_up(*pair)]
    else:
        looked = isinstance(text, str) and "${oc.env" in text and isinstance(resolved, str)
        found = [resolved] if looked and len(resolved) > 3 else []
    return sorted(set(found), key=len, reverse=True)
