"""Verdicts on what studies claim: contexts, what is missing, what does not compare, and how often chance decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from denoiselab.report.claims import Answer
from denoiselab.report.runs import Run
from denoiselab.report.studies import studies
from studied import CLAIM, STUDY, answer, arms, measured, planned, run

NOISE = [0.00, 0.03, -0.02, 0.01, -0.03]
LOW, HIGH = [2.0 + e for e in NOISE], [3.0 + 2 * e for e in NOISE]


def only(found: Answer) -> Any:
    (claim,) = found.claims
    return claim


def verdicts(found: Answer) -> dict[str, str]:
    return {row.context: row.verdict for row in only(found).rows}


def targets(values: dict[tuple[str, str], list[float]], study: dict[str, Any]) -> list[Run]:
    return [run(s, v, w, t, study) for (w, t), column in values.items() for s, v in enumerate(column)]


def test_the_measurement_says_which_direction_is_better():
    assert only(answer(arms(HIGH, LOW))).verdict == "supported"
    assert only(answer(arms(LOW, HIGH))).verdict == "contradicted"
    higher = [run(s, [measured(v, better="higher")], "unit") for s, v in enumerate(LOW)]
    higher += [run(s, [measured(v, better="higher")], "min_snr") for s, v in enumerate(HIGH)]
    assert only(answer(higher)).verdict == "supported"
    for one in higher:
        one.evaluations[0].records[0].better = "none"
    assert only(answer(higher)).verdict == "not comparable"
    assert "no direction" in only(answer(higher)).rows[0].why


def test_a_claim_is_tested_in_every_context_and_supported_only_in_all():
    study = planned(0, 1, 2, 3, 4, target=["eps", "v"])
    both = {("unit", "eps"): HIGH, ("min_snr", "eps"): LOW, ("unit", "v"): HIGH, ("min_snr", "v"): LOW}
    found = answer(targets(both, study))
    assert verdicts(found) == {"target=eps": "supported", "target=v": "supported"}
    assert only(found).verdict == only(found).summary == "supported"
    one = answer(targets({**both, ("min_snr", "v"): [3.1, 2.7, 3.2, 2.9, 3.0]}, study))
    assert verdicts(one) == {"target=eps": "supported", "target=v": "undecided"}
    assert only(one).verdict == "undecided"
    assert only(one).summary == "undecided in 1, supported in 1 of 2 contexts"
    against = answer(targets({**both, ("unit", "v"): LOW, ("min_snr", "v"): HIGH}, study))
    assert only(against).verdict == "contradicted"


def test_arms_of_another_context_are_never_mixed_in():
    """Pooled over targets min-SNR looks worse, because it was run where everything is worse; in each it is better."""
    study = planned(0, 1, 2, 3, 4, target=["eps", "v"])
    values = {("unit", "eps"): HIGH, ("min_snr", "eps"): LOW}
    values |= {("unit", "v"): [v + 9 for v in HIGH], ("min_snr", "v"): [v + 9 for v in LOW]}
    found = answer(targets(values, study))
    assert [row.difference.mean for row in only(found).rows] == pytest.approx([-1.0 + 0.002, -1.0 + 0.002])
    assert only(found).verdict == "supported"


def test_p_values_are_adjusted_over_claims_and_contexts():
    values = [3.0, 3.3, 2.9], [2.2, 2.5, 2.3]
    alone = only(answer(arms(*values)))
    assert alone.rows[0].difference.p == alone.rows[0].difference.adjusted < 0.05
    assert alone.verdict == "supported"
    more = planned(0, 1, 2, claims=[CLAIM] * 9)
    nine = answer(arms(*values, study=more))
    assert nine.tests == 9
    assert nine.claims[0].rows[0].difference.adjusted == pytest.approx(min(1, 9 * alone.rows[0].difference.p))
    assert nine.claims[0].verdict == "undecided"
    assert "once the number of tests" in nine.claims[0].rows[0].why


def test_a_context_that_was_planned_and_not_measured_is_said_and_counted():
    study = planned(0, 1, 2, 3, 4, target=["eps", "v"])
    found = answer(targets({("unit", "eps"): HIGH, ("min_snr", "eps"): LOW}, study))
    assert verdicts(found) == {"target=eps": "supported", "target=v": "not measured yet"}
    assert only(found).verdict == "not measured yet"
    assert "weighting=min_snr lacks seeds 0, 1, 2, 3, 4" in only(found).rows[1].why
    assert only(found).rows[0].difference.adjusted == pytest.approx(2 * only(found).rows[0].difference.p)


def test_no_verdict_before_all_planned_seeds_are_there():
    """Looking after each seed and stopping at the first difference finds one far too often."""
    runs = arms(HIGH, LOW)
    runs[-1] = run(4, None, "min_snr", study=planned(0, 1, 2, 3, 4), state="failed")
    found = only(answer(runs))
    assert found.verdict == "not measured yet"
    assert found.rows[0].why == "weighting=min_snr lacks seed 4 (failed)"
    assert found.rows[0].difference.n == 4
    assert found.rows[0].difference.adjusted is None
    unplanned = {**STUDY, "axes": {"weighting": ["unit", "min_snr"]}}
    runs = [run(s, v, "unit", study=unplanned) for s, v in enumerate(HIGH)]
    runs += [run(s, v, "min_snr", study=unplanned) for s, v in enumerate(LOW[:3])]
    assert only(answer(runs)).rows[0].why == "weighting=min_snr lacks seeds 3, 4"


def test_a_missing_arm_is_said():
    found = only(answer([run(s, v, "unit") for s, v in enumerate(HIGH)]))
    assert found.verdict == "not measured yet"
    assert found.rows[0].why == "weighting=min_snr lacks seeds 0, 1, 2, 3, 4"
    nothing = only(answer([run(0, None, "unit", state="running")]))
    assert "weighting=unit lacks seeds 0 (running), 1, 2, 3, 4" in nothing.rows[0].why


def test_a_value_that_is_not_a_number_is_a_missing_one():
    found = only(answer(arms(HIGH, [*LOW[:4], None], planned(0, 1, 2, 3, 4))))
    assert found.verdict == "not measured yet"
    assert "lacks seed 4 (measured, but its value is missing or not a number)" in found.rows[0].why


def test_other_protocols_are_not_compared():
    runs = [run(s, [measured(v, n=1000)], "unit") for s, v in enumerate(HIGH)]
    runs += [run(s, [measured(v, n=200)], "min_snr") for s, v in enumerate(LOW)]
    found = only(answer(runs))
    assert (found.verdict, found.rows[0].why) == ("not comparable", "protocols differ in n")
    losses = [run(s, [measured(v, "held_out_loss")], "unit") for s, v in enumerate(HIGH)]
    losses += [run(s, [measured(v, "held_out_loss")], "min_snr") for s, v in enumerate(LOW)]
    for one in losses:
        one.record["weight"] = one.identity["weighting"]["_target_"]
        one.config = one.config.replace('"metric": "fd_digits"', '"metric": "held_out_loss"')
    assert only(answer(losses)).rows[0].why == "protocols differ in weighting"


@pytest.mark.parametrize("other", [{"sampler": "heun"}, {"scale": 3.0}, {"steps": 10}, {"step": 50}])
def test_arms_that_differ_in_more_than_the_claim_are_not_matched(other):
    """One arm was measured, or trained, in another way: what that does is not what the weighting does."""
    runs = [run(s, [measured(v)], "unit") for s, v in enumerate(HIGH)]
    runs += [run(s, [measured(v, **other)], "min_snr") for s, v in enumerate(LOW)]
    found = only(answer(runs))
    assert found.verdict == "not measured yet"
    assert len(found.rows) == 2


def test_options_that_a_command_changed_for_one_arm_are_no_match():
    runs = [run(s, v, "unit", lr=1e-3, said=("optimizer.lr=1e-3",)) for s, v in enumerate(HIGH)]
    runs += [run(s, v, "min_snr", lr=2e-4, said=("optimizer.lr=2e-4",)) for s, v in enumerate(LOW)]
    found = answer(runs)
    assert verdicts(found) == {f"optimizer.lr={lr}": "not measured yet" for lr in ("0.001", "0.0002")}


def test_a_setting_that_no_axis_names_is_a_context():
    runs = arms(HIGH, LOW, planned(0, 1, 2, 3, 4)) + arms(HIGH, LOW, planned(0, 1, 2, 3, 4), lr=2e-4)
    assert verdicts(answer(runs)) == {"optimizer.lr 0.001": "supported", "optimizer.lr 0.0002": "supported"}


def test_what_an_option_brings_along_is_said():
    runs = [run(s, v, "unit", "eps") for s, v in enumerate(HIGH)]
    runs += [run(s, v, "min_snr", "v") for s, v in enumerate(LOW)]
    for one in runs:
        one.record["overrides"] = [line for line in one.record["overrides"] if not line.startswith("target")]
    found = only(answer(runs))
    assert (found.verdict, found.rows[0].beside) == ("supported", "target (V against Eps)")


def test_weights_of_its_own_for_each_seed_are_no_setting():
    """Runs that start from other runs hold the sha256 of those; it differs from seed to seed in both arms."""
    runs = [run(s, v, "unit", init=f"ema:{s}") for s, v in enumerate(HIGH)]
    runs += [run(s, v, "min_snr", init=f"ema:{s}") for s, v in enumerate(LOW)]
    assert only(answer(runs)).summary == "supported"


def test_a_look_with_other_guidance_does_not_change_the_study():
    runs = arms(HIGH, LOW)
    for one in runs[:3]:
        one.evaluations.append(measured(99.0, scale=3.0))
    runs[-1].evaluations.append(measured(-99.0, n=50))
    assert only(answer(runs)).summary == "supported"


SAMPLERS = {"metric": "fd_digits", "better": {"sampler": "heun"}, "than": {"sampler": "ddim"}}


@pytest.mark.parametrize("chosen", [True, False])
def test_options_of_the_evaluation_are_those_it_was_made_with(chosen):
    """One run, measured with every sampler; older evaluations do not say their options, and are known by class."""
    study = {**planned(0, 1, 2, claims=[SAMPLERS]), "axes": {"sampler": ["ddim", "heun"], "sampler.steps": [10, 20]}}
    runs = []
    for seed in range(3):
        e = 0.1 * NOISE[seed]
        found = [measured(3 + e, sampler="ddim", steps=n, chosen=chosen) for n in (10, 20)]
        found += [measured(2 - e, sampler="heun", steps=n, chosen=chosen) for n in (10, 20)]
        runs.append(run(seed, found, study=study))
    assert verdicts(answer(runs)) == {"sampler.steps=10": "supported", "sampler.steps=20": "supported"}


def test_dotted_options_and_several_at_once():
    claim = {"metric": "fd_digits", "better": {"sampler": "heun", "sampler.steps": 5}}
    claim["than"] = {"sampler": "ddim", "sampler.steps": "10"}
    study = {**planned(0, 1, 2, claims=[claim]), "axes": {"seed": [0, 1, 2]}}
    found = [
        [measured(3 + NOISE[s], steps=10), measured(2 - NOISE[s], sampler="heun", steps=5), measured(0.0, steps=5)]
        for s in range(3)
    ]
    judged = only(answer([run(s, evaluations, study=study) for s, evaluations in enumerate(found)]))
    assert judged.verdict == "supported"
    assert judged.rows[0].difference.means == pytest.approx((2 - sum(NOISE[:3]) / 3, 3 + sum(NOISE[:3]) / 3))


def test_a_claim_that_two_arms_fit_says_so():
    claim = {"metric": "fd_digits", "better": {"weighting": "min_snr"}, "than": {"weighting": "unit", "target": "v"}}
    study = planned(0, 1, 2, 3, 4, claims=[claim])
    values = {("min_snr", "eps"): LOW, ("min_snr", "v"): LOW, ("unit", "v"): HIGH}
    found = only(answer(targets(values, study)))
    assert found.verdict == "not comparable"
    assert "several arms fit weighting=min_snr" in found.rows[0].why


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ("min_snr is better", "not of the form"),
        (None, "not of the form"),
        ([1], "not of the form"),
        ({"metric": "fd_digits", "better": {"weighting": "min_snr"}}, "it has no than"),
        ({**CLAIM, "metric": ["fd"]}, "its metric is not a name"),
        ({**CLAIM, "metric": "fid"}, "not measured; known: fd_digits"),
        ({**CLAIM, "better": "min_snr"}, "better is not of the form"),
        ({**CLAIM, "better": {}}, "better is not of the form"),
        ({**CLAIM, "than": CLAIM["better"]}, "compares an arm with itself"),
        ({**CLAIM, "better": {"wieghting": "min_snr"}}, "wieghting: no run of the study has an option"),
        ({**CLAIM, "better": {"seed": 0}, "than": {"seed": 1}}, "seed is what differences are taken over"),
    ],
)
def test_a_claim_that_cannot_be_tested_says_why_in_a_line(claim, words):
    found = only(answer(arms(HIGH, LOW, planned(0, 1, 2, 3, 4, claims=[claim]))))
    assert found.verdict == "cannot be tested"
    assert words in found.problem
    assert "\n" not in str(found)


def test_values_are_named_as_on_the_command_line():
    for better, than in (("1.0", 3), (1, "3.0"), (1.0, 3.0)):
        claim = {"metric": "fd_digits", "better": {"guidance.scale": better}, "than": {"guidance.scale": than}}
        study = {**planned(claims=[claim]), "axes": {"guidance.scale": [1, 3], "seed": [0, 1, 2]}}
        both = [[measured(2 + NOISE[s]), measured(3 - NOISE[s], scale=3.0)] for s in range(3)]
        assert only(answer([run(s, e, study=study) for s, e in enumerate(both)])).verdict == "supported"


def test_the_newest_definition_holds_and_that_is_said():
    old, new = planned(0, 1, 2, 3, 4), planned(0, 1, 2, 3, 4, claims=[CLAIM, CLAIM])
    runs = [run(s, v, "unit", study=old) for s, v in enumerate(HIGH)]
    runs += [run(s, v, "min_snr", study=new) for s, v in enumerate(LOW)]
    for one in runs[5:]:
        one.status["started"] = "2025-06-01"
    found = answer(runs)
    assert len(found.claims) == 2
    assert any("definition changed" in note for note in found.study.notes)
    more_seeds = arms(HIGH, LOW, planned(0, 1, 2))
    more_seeds += [run(5, 2.0, study=planned(0, 1, 2, 5))]
    assert not answer(more_seeds).study.notes


def test_losses_without_an_evaluation_are_compared_where_they_are_one_quantity():
    claim = {**CLAIM, "metric": "val/loss"}
    runs = arms(HIGH, LOW, planned(0, 1, 2, 3, 4, claims=[claim]))
    for one in runs:
        one.rows = [{"step": 100, "val/loss": one.evaluations[0].records[0].value}]
        one.evaluations = []
    assert only(answer(runs)).verdict == "supported"
    for one in runs:
        one.record["weight"] = one.identity["weighting"]["_target_"]
    assert only(answer(runs)).rows[0].why == "protocols differ in weighting"


def test_a_claim_that_leaves_too_much_open_is_not_tested_in_part():
    study = planned(
        0, 1, 2, 3, 4, **{"optimizer.lr": [1e-3 / (i + 1) for i in range(11)], "trainer.max_steps": [*range(10)]}
    )
    found = only(answer(arms(HIGH, LOW, study)))
    assert found.verdict == "cannot be tested"
    assert "more than 100 contexts" in found.problem


def test_runs_of_no_study_have_no_answer():
    runs = arms(HIGH, LOW, study=None)
    for one in runs:
        one.record["choices"]["study"] = "none"
        one.config = one.config.replace('"study": ', '"other": ')
    assert studies(runs) == []


@pytest.mark.parametrize("targets", [["v"], ["eps", "v"]])
def test_chance_decides_at_most_as_often_as_the_level_says(targets):
    """No arm differs. Of 1,000 studies, whose seeds differ more than arms, at most 6% may find something anywhere."""
    noise = np.random.default_rng(7)
    found, study = 0, planned(0, 1, 2, 3, target=targets)
    for _ in range(1000):
        runs = []
        for target in targets:
            seeds = noise.normal(0, 3, 4)
            for weighting in ("unit", "min_snr"):
                values = seeds + noise.normal(0, 1, 4)
                runs += [run(s, float(v), weighting, target, study) for s, v in enumerate(values)]
        found += any(row.verdict in ("supported", "contradicted") for one in answer(runs).claims for row in one.rows)
    assert 0.02 <= found / 1000 <= 0.06
