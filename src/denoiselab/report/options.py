"""The value that an option of the command line had in a run, or in an evaluation of it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import yaml

from denoiselab.report.axes import key, kind
from denoiselab.report.runs import Evaluation, Run

SAMPLING = ("sampler", "spacing", "guidance")
"""Groups that say how samples are made: an evaluation has its own."""

LARGEST = 1_000_000
"""Characters of a configuration; a larger one is none of ours."""

UNSET = object()
"""There is no such option."""


class _Plain(yaml.SafeLoader):
    """Without anchors, which can make a small file a huge value; configurations are written without."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors are not read")
        return super().compose_node(parent, index)


@lru_cache(maxsize=512)
def parsed(text: str) -> dict[str, Any]:
    """A run's config.yaml as plain containers; empty if it is torn, or is anything else."""
    if len(text) > LARGEST:
        return {}
    try:
        found = _Plain(text).get_single_data()
        key(found)  # what JSON cannot hold, such as a date, is no setting
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def choices(run: Run) -> dict[str, Any]:
    """The option of each group that the run was composed of."""
    found = run.record.get("choices")
    return found if isinstance(found, dict) else {}


def overrides(run: Run) -> list[str]:
    """The options that its command set."""
    found = run.record.get("overrides")
    return [line for line in found if isinstance(line, str)] if isinstance(found, list) else []


def named(run: Run, evaluation: Evaluation | None, group: str) -> Any:
    """The option of a sampling group that an evaluation was made with; the class of its part where no name was kept."""
    if evaluation is None:
        return choices(run).get(group, UNSET)
    node = evaluation.protocol.get(group)
    if group in evaluation.choices:
        return evaluation.choices[group]
    if node is None:
        return UNSET
    own = parsed(run.config).get(group)
    return choices(run)[group] if group in choices(run) and kind(own) == kind(node) else kind(node) or UNSET


def option(run: Run, name: str, evaluation: Evaluation | None = None) -> Any:
    """The value of an option, named as on the command line; UNSET if there is no such option.

    Args:
        run: that was trained.
        name: a group (``weighting``) or a dotted name (``optimizer.lr``).
        evaluation: whose sampler, spacing, guidance, n, seed and weights are meant, instead of those that the run
            was asked to be evaluated with.
    """
    group, *path = name.split(".")
    if group in SAMPLING and not path:
        return named(run, evaluation, group)
    if evaluation is not None and group in SAMPLING:
        return _at(evaluation.protocol.get(group), path)
    if evaluation is not None and group == "evaluation":
        return _at(evaluation.protocol, path)
    if name in choices(run):
        return choices(run)[name]
    found = _at(parsed(run.config), [group, *path])
    return kind(found) if isinstance(found, dict) and kind(found) else found


def _at(node: Any, path: list[str]) -> Any:
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return UNSET
        node = node[part]
    return node


def comparable(value: Any) -> str:
    """Text that is equal where two spellings are of one value: 1, 1.0 and "1e0"; true and "true"; dpmpp_2m and the
    class DPMPP2M.

    >>> comparable(1) == comparable("1.0"), comparable("dpmpp_2m") == comparable("DPMPP2M")
    (True, True)
    """
    if value is UNSET:
        return "unset"
    if isinstance(value, str):
        try:
            return key(float(value))
        except ValueError:
            return re.sub(r"[\s_]", "", value).lower()
    if isinstance(value, bool) or value is None:
        return key(value)
    return key(value)
