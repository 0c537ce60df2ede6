"""Arms: runs that differ in nothing but the seed, measured in one way; their means, and which may be ranked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from denoiselab.report.axes import axes, key, kind, scale_of
from denoiselab.report.paired import Difference
from denoiselab.report.ranking import LOSSES, basis, disagreements, unrankable
from denoiselab.report.runs import Evaluation, Record, Run, finite
from denoiselab.report.statistics import mean_ci, number, plain

QUANTILE = 1.645
"""Standard deviations below which 95% of a normal distribution lie."""


@dataclass
class Group:
    """Runs trained alike but for the seed."""

    runs: list[Run]
    axes: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        return trained(self.runs[0])

    @property
    def label(self) -> str:
        return _label(self.axes) or ("all runs" if len(self.runs) > 1 else self.runs[0].name)

    @property
    def counted(self) -> list[Run]:
        """One run per seed: those that are done, or all while none is."""
        return _by_seed([run for run in self.runs if run.state == "done"] or self.runs)


@dataclass
class Cell:
    """A measurement of an arm, over its seeds."""

    name: str
    values: list[float]
    """One per seed, each the mean over its evaluation seeds; of a single seed, one per evaluation seed."""
    better: str
    controls: dict[str, float]
    basis: list[dict[str, str]]
    """Per seed, what the number depends on beside the arm's axes, as text: numbers compare if these agree."""
    best: bool = False
    unrankable: str | None = None
    """Why it has no place in an order, if it has none."""
    draws: dict[str, dict[str, float]] = field(default_factory=dict)
    """Every value, by seed and by seed of the evaluation."""
    difference: Difference | None = None
    """From the table's reference arm, if there is a common seed and the two compare."""

    @property
    def mixed(self) -> list[str]:
        """Parts of the basis that the arm's own seeds disagree on; there is no mean then."""
        return disagreements(self.basis)

    @property
    def mean(self) -> float | None:
        return None if self.mixed or not self.values else mean_ci(self.values)[0]

    def over(self, seeds: set[str]) -> float:
        """The mean over those of the seeds that have a value, or over all where none has."""
        own = [sum(draws.values()) / len(draws) for seed, draws in self.draws.items() if seed in seeds]
        return mean_ci(own or self.values)[0]

    @property
    def half(self) -> float | None:
        """Half the width of the 95% interval of the mean; None for one seed."""
        return None if self.mean is None else mean_ci(self.values)[1]

    @property
    def like_data(self) -> bool:
        """Whether the mean lies in the null: below 95% of what the same measurement gives on real data."""
        limit = null_limit(self.controls)
        return self.better == "lower" and limit is not None and self.mean is not None and self.mean <= limit

    @property
    def text(self) -> str:
        if self.mixed:
            return f"not averaged: seeds differ in {', '.join(self.mixed)}"
        return number(self.mean) + (f" ± {number(self.half, 2)}" if self.half is not None else "")

    @property
    def control(self) -> str:
        """What real data gives."""
        shown = {name: value for name, value in self.controls.items() if not name.endswith("_std")}
        spread = {name: self.controls.get(f"{name}_std") for name in shown}
        return ", ".join(
            f"{name} {number(value)}" + (f" ± {number(spread[name], 2)}" if spread[name] is not None else "")
            for name, value in shown.items()
        )


@dataclass
class Arm:
    """A group measured in one way, or not measured by samples at all (``protocol`` None)."""

    group: Group
    protocol: dict[str, Any] | None
    step: int
    members: list[tuple[Run, list[Evaluation]]]
    """One per seed, with its evaluations, which differ in the evaluation's seed alone."""
    axes: dict[str, str] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return _label(self.axes) or self.group.label

    @property
    def seeds(self) -> int:
        return len(self.members)

    @property
    def draws(self) -> int:
        """Evaluation seeds per run."""
        return max(len(evaluations) for _, evaluations in self.members)

    @property
    def seeds_text(self) -> str:
        return f"{self.seeds} × {self.draws} evaluations" if self.draws > 1 else str(self.seeds)

    @property
    def first(self) -> Evaluation | None:
        """The first seed's first evaluation."""
        return next(iter(self.members[0][1]), None)

    @property
    def calls(self) -> Any:
        """Network calls of one sample."""
        return (self.protocol or {}).get("nfe")

    @property
    def protocol_text(self) -> str:
        """How the samples were made, in a line."""
        if self.protocol is None:
            return f"no samples, EMA weights, step {self.step}"
        return ", ".join(text for text in protocol_facts(self.protocol).values() if text)


@dataclass
class Table:
    """All arms, with the names of the settings that vary and of what was measured."""

    arms: list[Arm]
    groups: list[Group]
    axes: list[str]
    metrics: list[str]
    notes: list[str]
    reference: Arm | None = None
    """The arm that differences are taken from."""


def trained(run: Run) -> dict[str, Any]:
    """What determines a run's result, but for its seed."""
    return {name: value for name, value in run.identity.items() if name != "seed"}


def protocol_facts(protocol: dict[str, Any]) -> dict[str, str]:
    """The parts of a protocol that every number is quoted with."""
    sampler, guidance = protocol.get("sampler"), protocol.get("guidance")
    scale, name = scale_of(guidance), kind(guidance)
    named = "guidance scale" if name == "CFG" else f"{name} guidance, scale"
    steps = sampler.get("steps") if isinstance(sampler, dict) else None
    weights = str(protocol.get("weights", "unknown"))
    sampled = f"{kind(sampler) or 'unknown sampler'}, {plain(steps)} steps"
    guided = f"{named} {plain(scale)}" if scale is not None else "no guidance"
    made_of = protocol.get("made_of")
    if sampler is None and isinstance(made_of, list):
        sampled, guided = f"reconstructions of {', '.join(map(plain, made_of))}", ""
    return {
        "n": f"n = {plain(protocol.get('n'))}",
        "guidance": guided,
        "sampler": sampled,
        "weights": f"{'EMA' if weights == 'ema' else plain(weights)} weights",
        "labels": f"labels {plain(protocol['label_policy'])}" if protocol.get("label_policy") else "",
        "step": f"trained {plain(protocol.get('step'))} steps",
    }


def tabulate(runs: list[Run]) -> Table:
    """The arms of runs; those that failed or go on and were not evaluated have no part in it."""
    groups = _groups([run for run in runs if run.identity])
    arms = [arm for group in groups for arm in _arms(group)]
    names = _name_axes(groups, arms)
    arms.sort(key=lambda arm: [_natural(arm.axes[name]) for name in names])
    metrics = list(dict.fromkeys(name for arm in arms for name in arm.cells))
    notes = [note for name in metrics if (note := rank([arm.cells[name] for arm in arms if name in arm.cells]))]
    repeats = sum(len(group.runs) for group in groups) - sum(len(_by_seed(group.runs)) for group in groups)
    if repeats:
        notes.append(f"{repeats} of the runs repeat a seed of the same arm; each seed is counted once.")
    return Table(arms, groups, names, metrics, notes)


def rank(cells: list[Cell]) -> str | None:
    """Mark the best of a column where its numbers are comparable; otherwise the sentence that says why not.

    Where arms have different seeds, those that all have decide: an arm whose worst run failed is not better for it.
    """
    cells = [cell for cell in cells if cell.mean is not None]
    directions = {cell.better for cell in cells}
    common = set.intersection(*(set(cell.draws) for cell in cells)) if cells else set()
    means = [cell.over(common) for cell in cells]
    if len({number(mean) for mean in means}) < 2 or directions == {"none"}:
        return None
    differing = disagreements([cell.basis[0] for cell in cells])
    if len(directions) > 1:
        differing.append("which direction is better")
    if differing:
        return f"{cells[0].name} is not ranked: arms differ in {', '.join(differing)}."
    if reason := next((cell.unrankable for cell in cells if cell.unrankable), None):
        return f"{cells[0].name} is not ranked: {reason}."
    best = min(means) if directions == {"lower"} else max(means)
    winners = [cell for cell, mean in zip(cells, means, strict=True) if mean == best]
    if any(cell.like_data for cell in winners) and sum(cell.like_data for cell in cells) > 1:
        return None  # what cannot be told from data is not better than what cannot be told from data
    for cell in winners:
        cell.best = True
    return None


def null_limit(controls: dict[str, float]) -> float | None:
    """Below what real data is measured to be 19 times of 20: the null's own quantile, or of a normal distribution with
    its mean and standard deviation; None where nothing says so."""
    if "null_95" in controls:
        return controls["null_95"]
    name = next((name for name in ("null_mean", "floor") if name in controls), None)
    if name is None:
        return None
    return controls[name] + QUANTILE * controls.get(f"{name.removesuffix('_mean')}_std", 0.0)


def _groups(runs: list[Run]) -> list[Group]:
    found: dict[str, Group] = {}
    for run in runs:
        found.setdefault(key(trained(run)), Group([])).runs.append(run)
    groups = list(found.values())
    columns = axes([group.identity for group in groups])
    for i, group in enumerate(groups):
        group.axes = {name: column[i] for name, column in columns.items()}
    return sorted(groups, key=lambda group: [_natural(text) for text in group.axes.values()])


def _arms(group: Group) -> list[Arm]:
    found: dict[str, Arm] = {}
    for run in sorted(group.runs, key=lambda run: run.state != "done"):
        measured: list[Evaluation | None] = [*run.evaluations] or ([None] if run.state == "done" else [])
        for evaluation in measured:
            protocol = None if evaluation is None else _address(evaluation.protocol)
            step = run.step if protocol is None else int(finite(protocol.get("step")) or 0)
            arm = found.setdefault(key([protocol, step]), Arm(group, protocol, step, []))
            own = next((pair for pair in arm.members if pair[0].seed == run.seed), None)
            if own is None:
                arm.members.append(own := (run, []))
            if own[0] is run and evaluation is not None:
                own[1].append(evaluation)
    for arm in found.values():
        arm.members.sort(key=lambda pair: _natural(plain(pair[0].seed)))
        for _, evaluations in arm.members:
            evaluations.sort(key=lambda evaluation: _natural(plain(evaluation.protocol.get("seed"))))
        arm.cells = _cells(arm)
    return list(found.values())


def _address(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol without what is not part of it: runs measured by other versions, or with another seed of the
    noise, are one arm."""
    return {name: value for name, value in protocol.items() if name not in ("versions", "seed")}


def _cells(arm: Arm) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for run, evaluations in arm.members:
        found: dict[str, list[float]] = {}
        measured = [(plain(e.protocol.get("seed")), r) for e in evaluations for r in e.records]
        for drawn, record in measured if arm.protocol else [("", last_loss(run))]:
            if record.value is None:
                continue
            found.setdefault(record.name, []).append(record.value)
            cell = cells.setdefault(record.name, Cell(record.name, [], record.better, record.controls, []))
            cell.basis.append(basis(run, arm.protocol or {"weights": "ema"}, record))
            cell.draws.setdefault(plain(run.seed), {})[drawn] = record.value
            cell.unrankable = cell.unrankable or unrankable(arm.protocol or {}, record)
        for name, values in found.items():
            # Samples of one run vary less than runs do: they count apart only where there is one run.
            varies = arm.seeds == 1 and name not in LOSSES
            cells[name].values += values if varies else [sum(values) / len(values)]
    return cells


def last_loss(run: Run) -> Record:
    """The held-out loss that a run logged last, as a measurement: all that is known of one without an evaluation."""
    return Record("val/loss", finite(run.last("val/loss")), "lower", {}, {"loss": run.record.get("loss")}, {})


def _name_axes(groups: list[Group], arms: list[Arm]) -> list[str]:
    """Give arms their axes: those of training, and what varies in how they were measured."""
    protocols = [_shown(arm.protocol, groups, arms) for arm in arms if arm.protocol is not None]
    columns = axes(protocols)
    if len({arm.step for arm in arms}) > 1:
        columns["trained steps"] = []
    measured = iter(range(len(protocols)))
    for arm in arms:
        i = next(measured) if arm.protocol is not None else None
        arm.axes = dict(arm.group.axes)
        arm.axes |= {name: column[i] if i is not None and column else "–" for name, column in columns.items()}
        if "trained steps" in columns:
            arm.axes["trained steps"] = str(arm.step)
    return [*(groups[0].axes if groups else ()), *columns]


def _shown(protocol: dict[str, Any], groups: list[Group], arms: list[Arm]) -> dict[str, Any]:
    """The parts of a protocol that may be axes; a schedule that only follows the run's is not one."""
    hidden = {"nfe", "step", "schedule", "trained_along"}
    for group in groups:
        schedules = {key(arm.protocol.get("schedule")) for arm in arms if arm.group is group and arm.protocol}
        if len(schedules) > 1:
            hidden.discard("schedule")
    names = {"seed": "evaluation seed", "schedule": "sampling schedule"}
    return {names.get(name, name): value for name, value in protocol.items() if name not in hidden}


def _by_seed(runs: list[Run]) -> list[Run]:
    """The first run of each seed, in order of the seeds."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(plain(run.seed), run)
    return [first[seed] for seed in sorted(first, key=_natural)]


def _label(settings: dict[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in settings.items())


def _natural(text: str) -> list[Any]:
    """A key that sorts numbers inside text as numbers."""
    return [
        (1, 0.0, part) if i % 2 == 0 else (0, float(part), "") for i, part in enumerate(re.split(r"(\d+\.?\d*)", text))
    ]
