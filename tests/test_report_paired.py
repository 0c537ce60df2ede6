"""Paired differences over seeds: closed forms, traps for unpaired analysis, and what cannot be tested."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from denoiselab.report.arms import tabulate
from denoiselab.report.paired import difference, holm
from denoiselab.report.reference import against, compare
from denoiselab.report.studies import studies
from studied import answer, arms, measured, planned, run


def draws(values: list[float], seed: int = 0) -> dict[str, dict[str, float]]:
    return {str(i): {"0": value} for i, value in enumerate(values, seed)}


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_it_is_the_paired_t_test(n):
    noise = np.random.default_rng(n)
    a, b = noise.normal(1, 2, n), noise.normal(0.5, 1, n)
    found = difference(draws(list(a)), draws(list(b)))
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found is not None
    assert found.half is not None
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert [found.mean - found.half, found.mean + found.half] == pytest.approx([interval.low, interval.high], rel=1e-9)
    assert found.means == pytest.approx((a.mean(), b.mean()))


def test_by_hand():
    """Differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3) = 3.4641 at 2 degrees of freedom, p = 0.0742."""
    found = difference(draws([2.0, 4.0, 6.0]), draws([1.0, 2.0, 3.0]))
    assert found is not None
    assert (found.mean, found.values) == (2.0, [1.0, 2.0, 3.0])
    assert found.p == pytest.approx(0.07418, rel=1e-3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


EASY_AND_HARD = [1.0, 5.0, 9.0, 13.0, 17.0]
"""Seeds that differ far more from each other than arms do."""


def test_pairing_sees_what_two_means_hide():
    better = [value - 0.5 + 0.02 * (-1) ** i for i, value in enumerate(EASY_AND_HARD)]
    assert stats.ttest_ind(better, EASY_AND_HARD).pvalue > 0.8
    (claim,) = answer(arms(EASY_AND_HARD, better)).claims
    assert claim.verdict == "supported"
    assert claim.rows[0].difference.mean == pytest.approx(-0.496)
    assert claim.rows[0].difference.adjusted < 1e-4


def test_pairing_is_not_fooled_by_two_means_that_differ():
    """Where one arm is worse on a seed the other is better: over seeds the difference is anything."""
    unit, min_snr = [2.0, 2.2, 2.4, 2.6, 2.8], [2.3, 2.1, 1.9, 1.7, 1.5]
    assert stats.ttest_ind(min_snr, unit).pvalue < 0.05
    paired = stats.ttest_rel(min_snr, unit)
    assert paired.pvalue > 0.05
    (claim,) = answer(arms(unit, min_snr)).claims
    assert claim.verdict == "undecided"
    assert claim.rows[0].why == "the interval includes 0"
    assert claim.rows[0].difference.p == pytest.approx(paired.pvalue, rel=1e-9)


def test_only_common_seeds_count():
    found = difference(draws([1.0, 2.0, 4.0]), draws([9.0, 1.0, 1.0, 50.0], seed=-1))
    assert found is not None
    assert found.seeds == ["0", "1", "2"]
    assert found.values == [0.0, 1.0, -46.0]
    assert difference(draws([1.0]), draws([1.0], seed=5)) is None


def test_evaluations_from_the_same_noise_are_compared():
    """Seed 0 of the noise is common; what else was drawn would move the mean by the luck of other noise."""
    found = difference({"3": {"0": 1.0, "1": 9.0}}, {"3": {"0": 2.0}})
    assert found is not None
    assert found.values == [-1.0]
    found = difference({"3": {"0": 1.0, "1": 9.0}}, {"3": {"2": 2.0}})
    assert found is not None
    assert found.values == [3.0]


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ([1.0], [2.0], "one common seed"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "the values are the same"),
        ([0.0, 0.0], [0.0, 0.0], "the values are the same"),
        ([1.1, 2.1, 3.1], [1.0, 2.0, 3.0], "the differences do not vary"),
        ([0.3, 0.6], [0.1 + 0.1, 0.5], "the differences do not vary"),
    ],
)
def test_what_says_nothing_of_its_spread_is_not_tested(a, b, why):
    found = difference(draws(a), draws(b))
    assert found is not None
    assert (found.untested, found.p, found.half) == (why, None, None)


def test_holm():
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None, 0.01, None]) == [None, pytest.approx(0.03), None]
    noise = np.random.default_rng(0)
    for _ in range(50):  # the definition: the smallest level at which stepping down rejects
        ps = noise.uniform(0, 0.2, 5).tolist()
        adjusted = holm(ps)
        for level in (0.01, 0.05, 0.2, 0.4):
            order = np.argsort(ps)
            passes = [ps[i] * (5 - k) <= level for k, i in enumerate(order)]
            rejected = {int(i) for i, _ in itertools.takewhile(lambda pair: pair[1], zip(order, passes, strict=True))}
            assert rejected == {i for i, p in enumerate(adjusted) if p <= level}


def test_arms_are_compared_with_one_that_was_not_chosen_by_its_values():
    """The claim's second arm; without a claim the first of the study's axes; without a study the first of the table."""
    unit, min_snr = [3.0, 3.1, 3.3], [1.0, 1.2, 1.1]
    claim = {"metric": "fd_digits", "better": {"weighting": "unit"}, "than": {"weighting": "min_snr"}}
    for study, label in {
        "claim": (planned(0, 1, 2, claims=[claim]), "weighting MinSNR"),
        "axes": (planned(0, 1, 2, claims=[]), "weighting Unit"),
        "none": (None, "weighting MinSNR"),
    }.values():
        runs = [run(s, v, "unit", study=study) for s, v in enumerate(unit)]
        runs += [run(s, v, "min_snr", study=study) for s, v in enumerate(min_snr)]
        if study is None:
            for one in runs:
                del one.record["choices"]["study"]
        compare(table := tabulate(runs), studies(runs))
        assert table.reference is not None
        assert table.reference.label == label
        (cell,) = [arm.cells["fd_digits"] for arm in table.arms if arm is not table.reference]
        assert table.reference.cells["fd_digits"].difference is None
        assert abs(cell.difference.mean) == pytest.approx(6.1 / 3)


def test_p_values_of_a_column_are_adjusted_over_its_arms():
    study = {**planned(0, 1, 2, claims=[]), "axes": {"weighting": ["unit", "min_snr", "snr"], "seed": [0, 1, 2]}}
    values = {"unit": [3.0, 3.5, 3.2], "min_snr": [2.0, 2.4, 2.3], "snr": [2.9, 3.1, 3.4]}
    runs = [run(s, v, name, study=study) for name, column in values.items() for s, v in enumerate(column)]
    compare(table := tabulate(runs), studies(runs))
    found = {arm.label: arm.cells["fd_digits"].difference for arm in table.arms}
    ps = {name: stats.ttest_rel(values[name], values["unit"]).pvalue for name in ("min_snr", "snr")}
    assert found["weighting MinSNR"].adjusted == pytest.approx(2 * ps["min_snr"])
    assert found["weighting SNR"].adjusted == pytest.approx(ps["snr"])
    assert found["weighting Unit"] is None


def test_arms_of_other_protocols_have_no_difference():
    runs = [run(s, [measured(2.0 + s, n=1000)], "unit") for s in range(3)]
    runs += [run(s, [measured(1.0 + s**2, n=200)], "min_snr") for s in range(3)]
    compare(table := tabulate(runs), studies(runs))
    assert [against(arm.cells["fd_digits"]) for arm in table.arms] == ["", ""]


def test_one_common_seed_says_no_test():
    runs = arms([2.0], [1.5], planned(0))
    compare(table := tabulate(runs), studies(runs))
    texts = [against(arm.cells["fd_digits"]).replace("\N{NO-BREAK SPACE}", " ") for arm in table.arms]
    assert sorted(texts) == ["", "Δ -0.500, no test"]
    (claim,) = answer(runs).claims
    assert (claim.verdict, claim.rows[0].why) == ("undecided", "no test: one common seed")
