"""The studies that runs belong to: the question, the axes and what is claimed, as their configurations say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from denoiselab.report.options import UNSET, choices, option, parsed
from denoiselab.report.runs import Run

LONGEST, MOST = 400, 40
"""Characters of a question that are shown, and claims of a study that are tested."""


@dataclass
class Study:
    """Runs that were made to answer one question."""

    name: str
    runs: list[Run]
    question: str = ""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """The values planned for each option."""
    claims: list[Any] = field(default_factory=list)
    """As they were written; nothing of them is known to be right."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and what else a reader of the answer has to know."""


def studies(runs: list[Run]) -> list[Study]:
    """The studies of a folder, in order of their names; runs that belong to none have no part in them.

    Where runs of one name were made under different definitions, the newest run's holds.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        node = _node(run)
        name = choices(run).get("study")
        if name in (None, "none") and node is not None:
            name = parsed(run.config).get("name")
        if name not in (None, "none") or node is not None:
            found.setdefault(line(name if name is not None else "study"), []).append(run)
    return [_study(name, found[name]) for name in sorted(found)]


def line(value: Any, longest: int = LONGEST) -> str:
    """Anything as one line of text that is not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def known(runs: list[Run], name: str) -> bool:
    """Whether any of the runs has an option of this name."""
    return any(option(run, name) is not UNSET for run in runs)


def _node(run: Run) -> Any:
    return parsed(run.config).get("study") if "study" in run.config else None


def _study(name: str, runs: list[Run]) -> Study:
    study = Study(name, runs)
    defined = [run for run in runs if isinstance(_node(run), dict)]
    if not defined:
        study.notes.append("The study's definition could not be read from the config.yaml of any of its runs.")
        return study
    node = _node(max(defined, key=lambda run: str(run.status.get("started") or "")))
    if any(_definition(_node(run)) != _definition(node) for run in defined):
        study.notes.append("The study's definition changed between its runs; that of the newest run holds.")
    study.question = line(node["question"]) if node.get("question") is not None else ""
    axes, claims = node.get("axes"), node.get("claims")
    for axis, values in (axes if isinstance(axes, dict) else {}).items():
        if isinstance(axis, str) and isinstance(values, list) and (axis == "seed" or known(runs, axis)):
            study.axes[axis] = values
        elif isinstance(values, list):
            study.notes.append(f"{line(axis, 60)}: an axis of the study that is no option of its runs; left out.")
    if isinstance(claims, list):
        study.claims = claims[:MOST]
        study.notes += [f"{len(claims)} claims; the first {MOST} are tested."] * (len(claims) > MOST)
    elif claims is not None:
        study.notes.append("The study's claims are not a list; none is tested.")
    return study


def _definition(node: Any) -> Any:
    """What decides about verdicts: a study to which seeds were added is still the same."""
    axes = node.get("axes")
    others = {name: values for name, values in axes.items() if name != "seed"} if isinstance(axes, dict) else axes
    return [node.get("question"), others, node.get("claims")]
