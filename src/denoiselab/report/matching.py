"""Which arms of a study are alike in everything but what a claim is about."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from denoiselab.report.arms import Arm, Table, last_loss
from denoiselab.report.axes import key
from denoiselab.report.options import SAMPLING, UNSET, comparable, option, overrides, parsed
from denoiselab.report.runs import Evaluation, Record, Run
from denoiselab.report.statistics import plain
from denoiselab.report.studies import Study, line

SEEDS = ("seed", "evaluation.seed")
"""Options that differences are taken over, or means; never a context."""

MOST = 100
"""Contexts of a claim, at most."""


@dataclass
class Point:
    """A run measured in one way."""

    arm: Arm
    run: Run
    evaluations: list[Evaluation]
    open: dict[str, Any]
    """The options that tell points of the study apart, with their values."""

    @property
    def seed(self) -> str:
        return plain(self.run.seed)

    @property
    def first(self) -> Evaluation | None:
        return self.evaluations[0] if self.evaluations else None

    def value(self, name: str) -> Any:
        """Of an option."""
        return option(self.run, name, self.first)

    def records(self, metric: str) -> list[tuple[Run, dict[str, Any], Record]]:
        """The measurements of a name that have a value, as ranking takes them."""
        found = [
            (self.run, evaluation.protocol, record) for evaluation in self.evaluations for record in evaluation.records
        ]
        found = found or [(self.run, {"weights": "ema"}, last_loss(self.run))]
        return [entry for entry in found if entry[2].name == metric and entry[2].value is not None]


@dataclass
class Side:
    """One side of a claim in a context: what it names, and the points that fit."""

    values: dict[str, Any]
    points: list[Point]

    @property
    def ambiguous(self) -> str:
        """The arms of a seed that has several; empty if none has."""
        for seed in dict.fromkeys(point.seed for point in self.points):
            arms = {id(point.arm): point.arm for point in self.points if point.seed == seed}
            if len(arms) > 1:
                return " and ".join(line(arm.label, 80) for arm in [*arms.values()][:3])
        return ""

    def measured(self, metric: str) -> dict[str, dict[str, float]]:
        """Values of a measurement by seed and by seed of the evaluation."""
        found = {}
        for point in self.points:
            cell = point.arm.cells.get(metric)
            if cell is not None and point.seed in cell.draws:
                found[point.seed] = cell.draws[point.seed]
        return found


@dataclass
class Context:
    """One value of everything that a claim leaves open."""

    values: dict[str, str]
    """By option, as ``comparable`` writes them."""
    columns: dict[str, str]
    """By setting that varies although no axis says so, as the table of arms writes them."""
    text: str

    def holds(self, point: Point) -> bool:
        """Whether a point belongs to it."""
        settings = all(comparable(point.value(name)) == text for name, text in self.values.items())
        return settings and all(point.arm.axes.get(name) == text for name, text in self.columns.items())


def settings(values: dict[str, Any]) -> str:
    """Options as they are written on the command line."""
    return " ".join(f"{line(name, 60)}={line(plain(value), 60)}" for name, value in values.items())


def side(found: list[Point], values: dict[str, Any]) -> list[Point]:
    """The points that have the values of a side."""
    return [p for p in found if all(comparable(p.value(name)) == comparable(v) for name, v in values.items())]


def points(study: Study, table: Table, named: list[str]) -> list[Point]:
    """The runs of a study, each measured as the study asked for.

    Of evaluations that differ in nothing that the study or the claim names, that which is most like the run's own
    configuration counts, and of several steps the last: somebody who looked at a run with other guidance did not change
    the study.
    """
    names = [name for name in dict.fromkeys([*study.axes, *_varied(study), *named]) if name not in SEEDS]
    found: dict[tuple[Any, ...], list[Point]] = {}
    for arm in table.arms:
        for run, evaluations in arm.members:
            point = Point(arm, run, evaluations, {})
            point.open = {name: point.value(name) for name in names}
            address = (id(arm.group), point.seed, *(comparable(value) for value in point.open.values()))
            found.setdefault(address, []).append(point)
    return [point for rivals in found.values() for point in _preferred(rivals)]


def contexts(study: Study, table: Table, found: list[Point], named: list[str]) -> list[Context]:
    """Every context of a claim that is planned or measured, in the order of the study's axes; none if there are more
    than MOST.

    Args:
        study: whose axes are the plan.
        table: of its arms.
        found: its points.
        named: options that the claim names.
    """
    names = [name for name in dict.fromkeys([*study.axes, *_varied(study)]) if name not in [*SEEDS, *named]]
    columns = _unexplained(study, table, found, named)
    seen: dict[tuple[str, ...], Context] = {}
    shown = {(name, comparable(point.value(name))): point.value(name) for point in found for name in names}
    planned = [name for name in names if name in study.axes]
    orders = {name: [*dict.fromkeys(map(comparable, study.axes[name]))] for name in planned}
    if math.prod(map(len, orders.values())) > MOST:
        return []
    shown |= {(name, comparable(value)): value for name in planned for value in study.axes[name]}
    measured = {tuple(comparable(point.value(name)) for name in planned) for point in found}
    for texts in itertools.product(*orders.values()):
        if texts not in measured:
            values = dict(zip(planned, texts, strict=True))
            seen[texts] = Context(values, {}, _text(values, {}, shown))
    for point in found:
        values = {name: comparable(point.value(name)) for name in names}
        others = {name: point.arm.axes[name] for name in columns}
        seen.setdefault((*values.values(), *others.values(), ""), Context(values, others, _text(values, others, shown)))

    def place(context: Context) -> list[Any]:
        return [
            (orders[name].index(text) if text in orders.get(name, []) else len(orders.get(name, [])), text)
            for name, text in context.values.items()
        ]

    return sorted(seen.values(), key=place) if len(seen) <= MOST else []


def state(study: Study, context: Context, one: Side, seed: str) -> str:
    """What became of the run that a side lacks; empty if there is none."""
    if any(point.seed == seed for point in one.points):
        return "measured, but its value is missing or not a number"
    wanted = {**context.values, **{name: comparable(value) for name, value in one.values.items()}}
    trained = {name: text for name, text in wanted.items() if name.partition(".")[0] not in (*SAMPLING, "evaluation")}
    for run in study.runs:
        if plain(run.seed) == seed and all(comparable(option(run, name)) == text for name, text in trained.items()):
            return "done, not measured so" if run.state == "done" else line(run.state, 20)
    return ""


def _text(values: dict[str, str], columns: dict[str, str], shown: dict[tuple[str, str], Any]) -> str:
    varying = {name: shown[name, text] for name, text in values.items() if shown[name, text] is not UNSET}
    words = [settings({name: value}) for name, value in varying.items()]
    return ", ".join([*words, *(f"{name} {text}" for name, text in columns.items())])


def _varied(study: Study) -> list[str]:
    """Options that commands set, that are no axis, that determine results, and that were not the same in all runs: two
    arms that differ in one of them do not show what an axis does."""
    keys = {name for run in study.runs for name in run.identity} - {"seed"}
    lines = dict.fromkeys(line for run in study.runs for line in overrides(run))
    names = dict.fromkeys(line.lstrip("+~").partition("=")[0].partition("@")[0] for line in lines)
    names = [name for name in names if name not in study.axes and (set(name.split(".")) & keys or name == "experiment")]
    return [name for name in names if len({comparable(option(run, name)) for run in study.runs}) > 1]


def _preferred(rivals: list[Point]) -> list[Point]:
    scores = [(_likeness(point), point.arm.step) for point in rivals] if len(rivals) > 1 else [(0, 0)]
    return [point for point, score in zip(rivals, scores, strict=True) if score == max(scores)]


def _likeness(point: Point) -> int:
    """In how many ways a run was measured as its own configuration says."""
    config, protocol = parsed(point.run.config), point.first.protocol if point.first else {}
    asked = config.get("evaluation")
    same = [key(config.get(name)) == key(protocol.get(name)) for name in SAMPLING]
    same += [isinstance(asked, dict) and asked.get(name) == protocol.get(name) for name in ("n", "weights")]
    return sum(same)


def _unexplained(study: Study, table: Table, found: list[Point], named: list[str]) -> list[str]:
    """Settings that vary although everything the study names is the same, and those that none of its options brings
    along: what they do is not what the claim says."""
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in found:
        groups.setdefault(tuple(comparable(value) for value in point.open.values()), []).append(point)
    stops = [parsed(point.run.config).get("early_stopping") for point in found]
    early = any(isinstance(stop, dict) and stop.get("patience") is not None for stop in stops)
    columns = []
    for name in table.axes:
        if any(name == option or name.startswith(f"{option}.") for option in named):
            continue
        if name == "trained steps" and early:
            continue  # every run ends when it has learned enough
        apart = _apart(name, [*study.axes, *named]) and len({point.arm.axes.get(name) for point in found}) > 1
        if apart or any(_varies(name, group) for group in groups.values()):
            columns.append(name)
    return columns


def _apart(name: str, stated: list[str]) -> bool:
    """Whether a setting is of sampling, or the length of training, and comes with none of the options that a study
    names: a sampler brings its spacing, an experiment anything, a weighting neither."""
    groups = {option.partition(".")[0] for option in stated}
    if groups & {"experiment", "debug"}:
        return False
    if name == "trained steps":
        return "trainer" not in groups
    group = name.partition(".")[0]
    return group in SAMPLING and group not in groups and not (group == "spacing" and "sampler" in groups)


def _varies(name: str, group: list[Point]) -> bool:
    """Whether a setting varies among points, other than by having a value of its own for each seed, such as the sha256
    of the weights that it started from."""
    values = {point.arm.axes.get(name) for point in group}
    own = len(values) == len(group) == len({point.seed for point in group})
    return len(values) > 1 and not own
