"""How much of the differences between runs each axis explains, by Optuna's fANOVA."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import fdtrc

from denoiselab.report.arms import Arm, Table
from denoiselab.report.options import parsed
from denoiselab.report.ranking import disagreements

ENOUGH = 8
"""Runs with a value, at least: a forest of fewer says little."""

TREES, SEED = 64, 0
"""Of the forest."""

NOISE = "seed"
"""Stands beside the axes as what a name without meaning gets."""


@dataclass
class Axis:
    """An axis, or several that go together, and its share of the variance."""

    name: str
    values: list[str]
    share: float


@dataclass
class Importance:
    """What fANOVA says of a study; only ``missing`` is there where it was not asked.

    Attributes:
        axes: the largest share first.
        noise: the share that ``seed`` gets as one more axis; None where no arm has two runs of different seeds.
        within: the share of the variance that lies within arms, between their seeds; None as above.
        runs, arms: how many took part.
        combinations: how many arms there would be with every combination of values.
        missing: why it was not asked, in a sentence; "" where it was, or where the question makes no sense.
    """

    metric: str = ""
    axes: list[Axis] = field(default_factory=list)
    noise: float | None = None
    within: float | None = None
    runs: int = 0
    arms: int = 0
    combinations: int = 0
    missing: str = ""

    @property
    def rest(self) -> float:
        """What no axis explains alone: what they do together, and noise that the forest has followed."""
        return max(0.0, 1.0 - sum(axis.share for axis in self.axes))

    @property
    def chance(self) -> float:
        """``within`` as it would be on average if no axis did anything."""
        return (self.runs - self.arms) / (self.runs - 1)

    @property
    def p(self) -> float | None:
        """Of the F test that all arms have one mean; a forest explains noise as readily as anything else."""
        if self.within is None or self.runs == self.arms:
            return None
        between, inside = self.arms - 1, self.runs - self.arms
        return float(fdtrc(between, inside, (1 - self.within) / between / max(self.within / inside, 1e-300)))


def importance(table: Table) -> Importance:
    """fANOVA's main effects over the values that were tried, of the measurement that decides.

    A forest of random trees is fitted to the runs; an axis' share is the variance of the forest's mean over all other
    axes, over the forest's variance (Hutter, Hoos and Leyton-Brown 2014, ICML, "An efficient approach for assessing
    hyperparameter importance"). Every value that was tried counts alike: values are handed to Optuna as places
    0 ... k-1 in cells of equal size, numbers in order. So numbers over decades need no logarithm, which Optuna's
    evaluator would leave out, and options are not spread over k columns, which loses some of their share. On a full
    grid the shares of an additive response are then those of its analysis of variance.

    Axes that always change together are one. Seeds are repeats and no axis.
    """
    names = _merged(table)
    if len(names) < 2:
        return Importance()
    metric = deciding(table)
    arms = [arm for arm in table.arms if metric in arm.cells and arm.cells[metric].mean is not None]
    names = {name: texts for name, texts in names.items() if len({_text(texts, arm) for arm in arms}) > 1}
    repeats = [(arm, seed, value) for arm in arms for seed, value in _repeats(arm, metric)]
    if reason := _reason(table, metric, arms, len(names), len(repeats)):
        return Importance(metric, missing=reason)
    columns = {name: [_text(texts, arm) for arm, *_ in repeats] for name, texts in names.items()}
    values = [value for *_, value in repeats]
    found = shares(columns, values)
    noise = within = None
    if max(len({seed for one, seed, _ in repeats if one is arm}) for arm in arms) > 1:
        noise = shares({**columns, NOISE: [seed for _, seed, _ in repeats]}, values)[NOISE]
        within = _within([[value for one, _, value in repeats if one is arm] for arm in arms])
    axes = [Axis(name, _sorted(columns[name]), share) for name, share in found.items()]
    combinations = int(np.prod([len(axis.values) for axis in axes]))
    return Importance(metric, axes, noise, within, len(repeats), len(arms), combinations)


def shares(columns: dict[str, list[str]], values: list[float]) -> dict[str, float]:
    """fANOVA's share of each column, the largest first; the same every time.

    Args:
        columns: by axis, the value of each run as text.
        values: what each run reached.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    import optuna

    kept = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
        orders = {name: {text: float(i) for i, text in enumerate(_sorted(column))} for name, column in columns.items()}
        cells: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.FloatDistribution(-0.5, len(order) - 0.5) for name, order in orders.items()
        }
        for i, value in enumerate(values):
            places = {name: order[columns[name][i]] for name, order in orders.items()}
            study.add_trial(optuna.create_trial(params=places, distributions=cells, value=value))
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=SEED)
        found = evaluator.evaluate(study)
    finally:
        optuna.logging.set_verbosity(kept)
    return {name: float(found[name]) for name in sorted(columns, key=lambda name: (-found[name], name))}


def deciding(table: Table) -> str:
    """The measurement that decides: the first that the runs' study names and that was measured, else the first one."""
    for run in [run for group in table.groups for run in group.runs[:1]]:
        study = parsed(run.config).get("study") if "study" in run.config else None
        metrics = study.get("metrics") if isinstance(study, dict) else None
        for name in metrics if isinstance(metrics, list) else ():
            if name in table.metrics:
                return name
    return table.metrics[0] if table.metrics else ""


def _reason(table: Table, metric: str, arms: list[Arm], axes: int, runs: int) -> str:
    """Why fANOVA is not asked; "" where it may be."""
    cells = [arm.cells[metric] for arm in arms]
    differing = disagreements([cell.basis[0] for cell in cells])
    if differing:
        return f"{metric} is not one quantity: arms differ in {', '.join(differing)}."
    if why := next((cell.unrankable for cell in cells if cell.unrankable), None):
        return f"{metric}: {why}."
    if axes < 2:
        return f"fewer than two axes vary where {metric or 'anything'} was measured."
    if runs < ENOUGH:
        return f"{runs} runs have a value of {metric}; need {ENOUGH} or more."
    if len({value for cell in cells for value in cell.values}) < 2:
        return f"all runs have the same {metric}."
    if importlib.util.find_spec("optuna") is None:
        return "it needs Optuna: pip install 'denoiselab[optuna]'."
    return ""


def _repeats(arm: Arm, metric: str) -> list[tuple[str, float]]:
    """Seed and value of each of an arm's runs, the mean over its evaluations."""
    found = []
    for run, evaluations in arm.members:
        values = [r.value for e in evaluations for r in e.records if r.name == metric and r.value is not None]
        if values:
            found.append((str(run.seed), sum(values) / len(values)))
    if not found:  # measured in training, and not on samples
        found = [(str(run.seed), value) for (run, _), value in zip(arm.members, arm.cells[metric].values, strict=False)]
    return found


def _merged(table: Table) -> dict[str, list[str]]:
    """Names of axes, those that always change together joined to one: no number of runs could tell them apart."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name in table.axes:
        texts = [arm.axes[name] for arm in table.arms]
        if len(set(texts)) > 1:
            found.setdefault(tuple(texts.index(text) for text in texts), []).append(name)
    return {" + ".join(names): names for names in found.values()}


def _text(names: list[str], arm: Arm) -> str:
    return " + ".join(arm.axes[name] for name in names)


def _within(groups: list[list[float]]) -> float:
    """Sum of squares within groups over the whole sum of squares."""
    every = np.concatenate(groups)
    whole = float(((every - every.mean()) ** 2).sum())
    return float(sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in groups)) / whole


def _sorted(texts: list[str]) -> list[str]:
    """Each value once: numbers by size, all else by name."""

    def place(text: str) -> tuple[Any, ...]:
        try:
            return (0, float(text), text)
        except ValueError:
            return (1, 0.0, text)

    return sorted(set(texts), key=place)
