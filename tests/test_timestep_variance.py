"""Ways of drawing t against the variances that they have for a known L(t)."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoiselab.diagnostics import Finding, TimestepVariance
from denoiselab.diagnostics.timestep_variance import made
from denoiselab.errors import UserError
from denoiselab.schedule import Flow
from fakes import knowing
from healthy import subject

B = 64
WAYS = ("uniform", "stratified", "low_discrepancy", "antithetic", "importance", "mean_importance")


def curve(t: Tensor) -> Tensor:
    return (-10 * t).exp()


def expected() -> dict[str, float]:
    """Var of the mean of L at B times, by integration on a fine grid of the times' own cells."""
    fine = (torch.arange(B * 4000, dtype=torch.float64) + 0.5) / (B * 4000)
    values = curve(fine)
    strata = values.view(B, -1)  # a row per stratum
    pairs = (values + values.flip(0)) / 2
    return {
        "uniform": values.var().item() / B,
        "stratified": strata.var(1).sum().item() / B**2,
        "low_discrepancy": strata.mean(0).var().item(),  # of the offset that all share
        "antithetic": pairs.var().item() / (B / 2),
    }


@pytest.fixture(scope="module")
def known(healthy: list[Path]) -> Finding:
    """l = theta L(t) at theta = 1: its gradient is L(t) too."""
    seen = knowing(healthy[0], lambda theta, eps, t: theta * curve(t), torch.ones(1))
    return TimestepVariance(WAYS, B, gradients=256, losses=512).look(seen)


def of(found: Finding, column: str) -> dict[str, float]:
    return dict(zip(found.table["sampler"], found.table[column], strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_variance_is_the_known_one(known: Finding, what: str):
    variance, error = of(known, f"{what}_variance"), of(known, f"{what}_variance_se")
    for name, value in expected().items():
        assert abs(variance[name] - value) < 4 * error[name], name
        assert error[name] < 0.3 * value


def test_the_coefficients_of_variation_at_64(known: Finding):
    """2.0001/8 for uniform times; what is spread over the batch varies far less."""
    cv, mean = of(known, "loss_cv"), (1 - math.exp(-10)) / 10
    for name, value in expected().items():
        assert cv[name] == pytest.approx(math.sqrt(value) / mean, rel=0.1)
    assert cv["uniform"] == pytest.approx(0.25, rel=0.1)
    assert cv["stratified"] < cv["low_discrepancy"] < cv["antithetic"] < cv["uniform"]


def test_weights_that_follow_the_loss_leave_nearly_nothing(known: Finding):
    """w L is constant but for the change of L within a cell; and it has the mean of the others."""
    ratio, mean, error = of(known, "loss_ratio"), of(known, "mean_loss"), of(known, "mean_loss_se")
    assert ratio["importance"] < 0.02
    assert abs(mean["importance"] - (1 - math.exp(-10)) / 10) < 4 * error["importance"] + 1e-4


def test_another_objective_is_marked(known: Finding):
    other = of(known, "other_objective")
    assert other == {name: name.startswith("mean_importance") for name in WAYS}


def test_time_is_reported_beside_variance(known: Finding):
    assert all(value > 0 for value in known.table["draw_ms"])
    update = of(known, "update_ms")
    assert {name for name, value in update.items() if value > 0} == {*WAYS[4:]}


def test_stratified_times_are_never_worse_than_uniform_ones(healthy: list[Path]):
    """Of a trained model: what they take away is the part between times, no more."""
    found = TimestepVariance(("uniform", "stratified"), B, gradients=16, losses=256).look(subject(healthy[0]))
    (record,) = found.records
    assert record.name == "gradient_variance_stratified"
    assert record.controls == {"uniform": 1.0}
    assert of(found, "loss_ratio_low")["stratified"] < 1
    assert of(found, "gradient_ratio_low")["stratified"] < 1
    floor = found.facts["floor"]
    assert of(found, "loss_variance")["stratified"] > 0.5 * floor
    assert floor < of(found, "loss_variance")["uniform"] * 1.3
    assert of(found, "gradient_ratio")["uniform"] == 1


def test_numbers_but_for_the_clock_are_the_same_again(healthy: list[Path]):
    small = TimestepVariance(("uniform", "importance history=1"), 8, gradients=8, losses=16)
    seen = subject(healthy[1])
    before = torch.get_rng_state()
    first, second = (small.look(seen).table for _ in range(2))
    clock = {"draw_ms", "update_ms"}
    assert {k: v for k, v in first.items() if k not in clock} == {k: v for k, v in second.items() if k not in clock}
    assert torch.equal(before, torch.get_rng_state())


def test_a_way_is_an_option_with_its_own_options(healthy: list[Path]):
    run = subject(healthy[0]).run
    assert made("importance history=7", run.parts, run.schedule).losses.shape[1] == 7
    with pytest.raises(UserError, match="timesteps=unheard_of: "):
        TimestepVariance(["uniform", "unheard_of"]).check(run.parts)
    with pytest.raises(UserError, match="timesteps=discrete: Flow has no points of its own"):
        made("discrete", run.parts, Flow())


@pytest.mark.parametrize(
    "wrong", [{"samplers": []}, {"samplers": ["uniform"] * 2}, {"batch_size": 1}, {"gradients": 9}, {"losses": 3}]
)
def test_wrong_options_are_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        TimestepVariance(**wrong)
