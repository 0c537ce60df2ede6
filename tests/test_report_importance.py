"""Importance of axes: closed forms on grids, order under noise, and when it is not asked."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import f_oneway

from denoiselab.report import write_report
from denoiselab.report.arms import tabulate
from denoiselab.report.importance import ENOUGH, deciding, importance, shares
from test_report import evaluation, load, make_run, write

OPTIONS = {"a": ["1e-05", "0.0001", "0.001", "0.1"], "b": ["x", "y", "z"], "c": ["0", "1"]}
"""Numbers over decades, options, and a switch."""


def grid(repeats: int, **effects: list[float]) -> tuple[dict[str, list[str]], list[float]]:
    """A full factorial, and an additive response of given effects per value."""
    places = [place for place in itertools.product(*(range(len(v)) for v in OPTIONS.values())) for _ in range(repeats)]
    columns = {name: [texts[place[k]] for place in places] for k, (name, texts) in enumerate(OPTIONS.items())}
    values = [sum(effects[name][i] for name, i in zip(OPTIONS, place, strict=True)) for place in places]
    return columns, [float(value) for value in values]


@pytest.mark.parametrize(
    "effects",
    [
        {"a": [0, 1, 2, 3], "b": [0, 1, 2], "c": [0, 0.5]},
        {"a": [0.3, -1, 0.2, 0.1], "b": [5, 0, 1], "c": [0, 0.4]},  # neither rises
        {"a": [0, 0, 0, 0], "b": [1, 2, 0], "c": [0, 0]},
    ],
)
def test_additive_responses_have_the_shares_of_their_analysis_of_variance(effects: dict[str, list[float]]):
    """Of an additive response on a full grid, axis k's share is Var(effect_k) / sum_j Var(effect_j)."""
    columns, values = grid(3, **effects)
    variances = {name: float(np.var(effects[name])) for name in OPTIONS}
    found = shares(columns, values)
    for name, variance in variances.items():
        assert found[name] == pytest.approx(variance / sum(variances.values()), abs=0.02), name
    assert list(found) == sorted(variances, key=lambda name: (-variances[name], name))


def test_an_interaction_belongs_to_no_axis_alone():
    """y = a b with a, b = +-1: the mean over either is 0, so all variance is left to both together."""
    places = [*itertools.product((-1, 1), (-1, 1))] * 8
    found = shares(
        {"a": [str(a) for a, _ in places], "b": [str(b) for _, b in places]}, [float(a * b) for a, b in places]
    )
    assert max(found.values()) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_three_a_is_more_than_b_is_more_than_nothing(seed: int):
    """y = 3 a + b + noise at 60 random places: a > b, and c, which does nothing, has about what noise leaves."""
    rng = np.random.default_rng(seed)
    places = rng.random((60, 3))
    values = 3 * places[:, 0] + places[:, 1] + 0.2 * rng.standard_normal(60)
    columns = {name: [f"{place:.4f}" for place in places[:, k]] for k, name in enumerate("abc")}
    found = shares(columns, values.tolist())
    assert list(found) == ["a", "b", "c"]
    assert found["a"] > 0.7
    assert found["c"] < 0.05
    assert shares(columns, values.tolist()) == found  # the forest is seeded


def test_places_are_of_equal_size_whatever_the_numbers():
    """What Optuna makes of the same values as numbers on their own scale is not the share over the values tried."""
    columns, values = grid(3, a=[0, 1, 2, 3], b=[0, 1, 2], c=[0, 0.5])
    again = {**columns, "a": [str(OPTIONS["a"].index(text)) for text in columns["a"]]}
    assert shares(again, values) == pytest.approx(shares(columns, values))


def study(folder: Path, seeds: int = 3, rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)) -> Path:
    """2 schedules x rates x seeds: the distance falls by 1 per decade of the rate, by 0.2 with the other schedule."""
    rng = np.random.default_rng(0)
    for i, (schedule, rate, seed) in enumerate(itertools.product(("Cosine", "Linear"), rates, range(seeds))):
        value = 5 - np.log10(rate / 1e-4) - 0.2 * (schedule == "Linear") + 0.02 * rng.standard_normal()
        run = make_run(folder / f"run{i:02d}", seed, schedule, {1.0: float(value)}, steps=0)
        identity = json.loads((run / "identity.json").read_text())
        write(run / "identity.json", {"optimizer": {"_target_": "o.AdamW", "lr": rate}, **identity})
    return folder


def test_a_study_on_the_page(tmp_path: Path):
    table = tabulate(load(study(tmp_path)))
    found = importance(table)
    assert (found.metric, found.runs, found.arms, found.combinations) == ("fd_digits", 18, 6, 6)
    assert [axis.name for axis in found.axes] == ["optimizer.lr", "schedule"]
    assert found.axes[0].values == ["0.0001", "0.001", "0.01"]
    rates, schedules = (np.var([0, 1, 2]), np.var([0, 0.2]))
    assert found.axes[0].share == pytest.approx(rates / (rates + schedules), abs=0.02)
    assert found.noise is not None
    assert found.noise < 0.01
    assert found.within == pytest.approx(0.02**2 / (0.02**2 + rates + schedules), abs=5e-4)
    assert found.rest < 0.05
    assert found.p is not None
    assert found.p < 1e-12
    page = write_report(tmp_path).read_text()
    assert "not told from chance (F test" not in page
    assert "Importance of the axes" in page
    assert "on 18 values of 6 of\n6 combinations" in page
    assert "0.0001, 0.001, 0.01" in page


def test_shares_of_nothing_but_noise_are_said_to_be_that(tmp_path: Path):
    """2 x 3 arms of 3 seeds without any effect: p is that of scipy's one-way analysis of variance."""
    rng = np.random.default_rng(1)
    for path in sorted(study(tmp_path).glob("run*")):
        evaluation(path / "evaluations" / "1", 1.0, 5 + float(rng.standard_normal()), 1000, "Cosine", "unet_digits")
    table = tabulate(load(tmp_path))
    found = importance(table)
    assert found.chance == pytest.approx(12 / 17)
    assert found.p == pytest.approx(f_oneway(*(arm.cells["fd_digits"].values for arm in table.arms)).pvalue)
    assert found.p > 0.05
    assert "The arms are not told from chance (F test, p" in write_report(tmp_path).read_text()


def test_axes_that_go_together_are_one(tmp_path: Path):
    """make_run's protocol names the schedule, and the directory's second axis follows the first."""
    for i, path in enumerate(sorted(study(tmp_path).glob("run*/identity.json"))):
        write(path, path.read_text().replace("target.V", "target.X0" if i >= 9 else "target.V"))
    found = importance(tabulate(load(tmp_path)))
    assert {axis.name for axis in found.axes} == {"optimizer.lr", "target + schedule"}


def test_the_measurement_that_the_study_names_decides(tmp_path: Path):
    study(tmp_path)
    for path in tmp_path.glob("run*/config.yaml"):
        write(path, "seed: 0\nstudy:\n  question: Which?\n  metrics: [not_measured, class_accuracy, fd_digits]\n")
    table = tabulate(load(tmp_path))
    assert deciding(table) == "class_accuracy"
    assert importance(table).metric == "class_accuracy"


def test_why_it_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = importance(tabulate(load(study(tmp_path / "few", seeds=1))))
    assert few.missing == f"6 runs have a value of fd_digits; need {ENOUGH} or more."
    alone = study(tmp_path / "alone", seeds=8, rates=(1e-3,))
    assert importance(tabulate(load(alone))) == importance(tabulate([]))  # one axis: the table says it all
    assert "Importance of the axes" not in write_report(alone).read_text()
    other = study(tmp_path / "other")
    evaluation(other / "run00" / "evaluations" / "1", 1.0, 2.0, 200, "Cosine", "unet_digits")
    assert importance(tabulate(load(other))).missing == "fd_digits is not one quantity: arms differ in n."
    monkeypatch.setitem(sys.modules, "optuna", None)
    page = write_report(study(tmp_path / "whole")).read_text()
    assert "Not computed: it needs Optuna: pip install &#39;denoiselab[optuna]&#39;." in page
