"""Quality against compute: what arms reach, over what their samples and their training cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from denoiselab.report.arms import Arm, Cell, Table
from denoiselab.report.axes import axes, key, kind, scale_of
from denoiselab.report.ranking import LOSSES, disagreements
from denoiselab.report.runs import finite
from denoiselab.report.statistics import number, plain

COST = ("steps", "rtol", "atol")
"""Arguments of a sampler that buy quality with network calls."""

BACKWARD = 3
"""Multiply-adds of a training step over those of its forward pass: the backward pass takes twice as many, one product
for the gradient of the inputs and one for that of the weights (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""

ALIKE, MOODS = 1.2, 1 / 3
"""Seconds of training that differ by less than this factor between arms are no axis; nor are they where seeds of an arm
differ by more than this share of what arms do, both as logarithms: a machine that did other work too was timed."""


@dataclass
class Point:
    """An arm's mean, at what it costs; ``half`` is half its 95% interval, None of a single value."""

    x: float
    mean: float
    half: float | None


@dataclass
class Line:
    """Arms that are alike but for what they cost."""

    label: str
    points: list[Point]


@dataclass
class Chart:
    """One measurement over one cost, of arms whose numbers compare.

    Attributes:
        only: what its numbers depend on, where other numbers of the same name depend on something else.
        band: between what a control lies, with the control's name; both ends the same where its spread is not known.
    """

    metric: str
    better: str
    x: str
    only: str
    lines: list[Line]
    band: tuple[float, float, str] | None


@dataclass
class Compute:
    """The charts over one kind of cost, whose lines are the same ones, and sentences about what is not there."""

    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Of all lines, each once, in the order of the arms."""
        return list(dict.fromkeys(line.label for chart in self.charts for line in chart.lines))


def of_sampling(table: Table) -> Compute:
    """Measurements on samples over network calls of one sample, a line per training, sampler and guidance.

    Nothing where all samples cost the same.
    """
    arms = [arm for arm in table.arms if finite(arm.calls) is not None]
    alike = [{**_training(arm), **_sampling(arm), "trained steps": arm.step} for arm in arms]
    names = [name for name in table.metrics if name not in LOSSES]
    found = _compute(arms, alike, names, {"network calls per sample": lambda arm: finite(arm.calls)})
    if found.charts and any(scale_of((arm.protocol or {}).get("guidance")) not in (None, 0, 1) for arm in arms):
        found.notes.append("A guided call computes two rows of the network, and is counted once.")
    return found


def of_training(table: Table) -> Compute:
    """All measurements over what training took, a line per everything else.

    Over training FLOPs, if records say ``multiply_adds`` of the network (of a forward pass of one sample), else samples
    seen (optimizer steps x batch size); over parameters; and over seconds of training, where all runs had the same
    hardware. Each is drawn where it varies.
    """
    arms = table.arms
    alike = [{**_training(arm, free=True), **_sampling(arm, free=False)} for arm in arms]
    costs = {"training FLOPs": flops} if _all(arms, flops) else {"training samples seen": seen}
    costs |= {"parameters": parameters}
    moods = _moods(arms)
    if moods is not None and moods <= MOODS:
        costs |= {"seconds of training": seconds}
    found = _compute(arms, alike, table.metrics, costs)
    if found.charts and moods is not None and moods > MOODS:
        found.notes.append(
            "There is no axis of seconds of training: seeds of one arm differ too much in it for differences between "
            "arms to be read, as on a machine that did other work at the time."
        )
    if found.charts and flops not in costs.values() and len(set(_values(arms, parameters))) > 1:
        found.notes.append(
            "Networks differ in size, so that a sample costs more in one arm than in another. Their multiply-adds are "
            "not recorded, so there is no axis of training FLOPs; denoiselab summary counts them."
        )
    return found


def flops(arm: Arm) -> float | None:
    """2 x 3 x multiply-adds of the network x samples seen: what training has computed by its arithmetic."""
    each, samples = finite(_record(arm).get("multiply_adds")), seen(arm)
    return None if not each or not samples else 2.0 * BACKWARD * each * samples


def seen(arm: Arm) -> float | None:
    """Optimizer steps x global batch size."""
    data = arm.group.identity.get("data")
    batch = finite(data.get("batch_size")) if isinstance(data, dict) else None
    return arm.step * batch if batch and arm.step else None


def parameters(arm: Arm) -> float | None:
    return finite(_record(arm).get("parameters"))


def seconds(arm: Arm) -> float | None:
    """Steps over the median of the logged steps per second, evaluations left out; the mean over seeds."""
    found = _seconds(arm)
    return float(np.mean(found)) if found else None


def _seconds(arm: Arm) -> list[float]:
    rates = [float(np.median(found)) for run, _ in arm.members if (found := run.series("speed/steps_per_second")[1])]
    return [arm.step / rate for rate in rates if rate > 0 and arm.step]


def _moods(arms: list[Arm]) -> float | None:
    """Largest factor between seeds of an arm over that between arms, as logarithms; None where seconds are no axis
    anyway, since they hardly differ or are of several machines."""
    hardware = {plain(run.record.get("hardware")) for arm in arms for run, _ in arm.members}
    times = [found for arm in arms if (found := _seconds(arm))]
    means = [float(np.mean(found)) for found in times]
    if len(hardware) != 1 or not means or max(means) < ALIKE * min(means):
        return None
    return max(math.log(max(found) / min(found)) for found in times) / math.log(max(means) / min(means))


def band_of(cells: list[Cell]) -> tuple[float, float, str] | None:
    """Between what real data lie: a null's middle 95%, a floor with two standard deviations, or a control alone.

    Arms measured alike have one control, drawn again with every evaluation: the widest of them is taken.
    """
    found = [band for cell in cells if (band := _band(cell.controls))]
    if not found or len({name for *_, name in found}) > 1:
        return None
    return min(low for low, *_ in found), max(high for _, high, _ in found), found[0][2]


def _band(controls: dict[str, float]) -> tuple[float, float, str] | None:
    if {"null_mean", "null_95"} <= controls.keys():
        middle, reach, name = controls["null_mean"], controls["null_95"] - controls["null_mean"], "null"
    elif {"null_mean", "null_std"} <= controls.keys():
        middle, reach, name = controls["null_mean"], 2 * controls["null_std"], "null"
    elif "floor" in controls:
        middle, reach, name = controls["floor"], 2 * controls.get("floor_std", 0.0), "floor"
    elif controls:
        name, middle = next(iter(controls.items()))
        reach = 0.0
    else:
        return None
    return middle - reach, middle + reach, name.replace("_", " ")


def _training(arm: Arm, free: bool = False) -> dict[str, Any]:
    """What an arm was trained with; ``free`` leaves out what training costs by: the batch size, the network's size, and
    the length that a learning rate follows."""
    identity = dict(arm.group.identity)
    if free:
        identity["data"] = _without(identity.get("data"), "batch_size")
        identity["lr_schedule"] = _without(identity.get("lr_schedule"), "steps")
        identity["model"] = kind(identity.get("model"))
    return identity


def _sampling(arm: Arm, free: bool = True) -> dict[str, Any]:
    """How an arm's samples were made; ``free`` leaves out what a sampler buys quality with."""
    hidden = {"nfe", "step", "schedule", "trained_along"}
    found = {name: value for name, value in (arm.protocol or {}).items() if name not in hidden}
    if free:
        found["sampler"] = _without(found.get("sampler"), *COST)
    schedule = (arm.protocol or {}).get("schedule")
    if schedule != (arm.protocol or {}).get("trained_along", schedule):
        found["sampling schedule"] = schedule
    return found


def _compute(
    arms: list[Arm],
    alike: list[dict[str, Any]],
    metrics: list[str],
    costs: dict[str, Callable[[Arm], float | None]],
) -> Compute:
    """Charts of arms, those with equal ``alike`` in one line; a cost that does not vary has none."""
    found, labels = Compute(), dict(zip(map(id, arms), _labels(alike), strict=True))
    varying = {name: cost for name, cost in costs.items() if len(set(_values(arms, cost))) > 1}
    for metric in metrics if varying else ():
        cells = [(arm, arm.cells[metric]) for arm in arms if metric in arm.cells]
        cells = [(arm, cell) for arm, cell in cells if cell.mean is not None and cell.better != "none"]
        good = [(arm, cell) for arm, cell in cells if not cell.unrankable]
        if len(good) < len(cells):
            reason = next(cell.unrankable for _, cell in cells if cell.unrankable)
            found.notes.append(f"{metric}: {len(cells) - len(good)} of {len(cells)} arms are not drawn: {reason}.")
        if len(good) > 1 and len({number(cell.mean) for _, cell in good}) == 1:
            found.notes.append(f"{metric}: {number(good[0][1].mean)} in all arms, and not drawn.")
            continue
        for name, cost in varying.items():
            found.charts += _charts(metric, name, cost, good, labels)
    return found


def _charts(
    metric: str,
    x: str,
    cost: Callable[[Arm], float | None],
    cells: list[tuple[Arm, Cell]],
    labels: dict[int, str],
) -> list[Chart]:
    """One chart for all numbers that compare, if it has two costs."""
    apart = disagreements([cell.basis[0] for _, cell in cells])
    comparable: dict[str, list[tuple[Arm, Cell]]] = {}
    for arm, cell in cells:
        comparable.setdefault(key([cell.better, cell.basis[0]]), []).append((arm, cell))
    found = []
    for part in comparable.values():
        lines: dict[str, list[Point]] = {}
        for arm, cell in part:
            if (at := cost(arm)) is not None and cell.mean is not None:
                lines.setdefault(labels[id(arm)], []).append(Point(at, cell.mean, cell.half))
        if len({point.x for points in lines.values() for point in points}) < 2:
            continue
        first = part[0][1]
        only = ", ".join(f"{name} {plain(json.loads(first.basis[0].get(name, 'null')))}" for name in apart)
        drawn = [Line(label, sorted(points, key=lambda point: point.x)) for label, points in lines.items()]
        found.append(Chart(metric, first.better, x, only, drawn, band_of([cell for _, cell in part])))
    return found


def _labels(alike: list[dict[str, Any]]) -> list[str]:
    """What tells each line from the others, in words."""
    columns = axes(alike)
    texts = [
        ", ".join(_words(name, column[i]) for name, column in columns.items()) or "all arms" for i in range(len(alike))
    ]
    found: dict[str, str] = {}
    for one, text in zip(map(key, alike), texts, strict=True):
        if one not in found:  # two labels alike: what differs is too long to be written in full
            found[one] = text if text not in found.values() else f"{text} ({len(found) + 1})"
    return [found[one] for one in map(key, alike)]


def _without(part: Any, *names: str) -> Any:
    return {name: value for name, value in part.items() if name not in names} if isinstance(part, dict) else part


def _words(name: str, text: str) -> str:
    return text if name == "sampler" else f"{name} {text}"


def _record(arm: Arm) -> dict[str, Any]:
    return arm.group.runs[0].record


def _values(arms: list[Arm], cost: Callable[[Arm], float | None]) -> list[float]:
    return [value for arm in arms if (value := cost(arm)) is not None]


def _all(arms: list[Arm], cost: Callable[[Arm], float | None]) -> bool:
    return bool(arms) and all(cost(arm) is not None for arm in arms)
