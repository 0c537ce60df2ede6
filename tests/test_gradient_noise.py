"""The noise of losses and gradients against closed forms, and the alternation of losses."""

import math
from pathlib import Path

import pytest
import torch

from denoiselab.diagnostics import GradientNoise
from denoiselab.diagnostics.gradient_noise import lag_1, noise_scale, split, variation
from denoiselab.timesteps import Curriculum, Stratified
from exact import normals
from fakes import knowing
from healthy import subject

SMALL = {"batch_sizes": (4, 8, 16), "n": 2048, "repeats": 8}


def value(found, name: str) -> float:
    (record,) = [record for record in found.records if record.name == name]
    return record.value


def test_the_noise_scale_of_a_linear_loss_is_known(healthy: list[Path]):
    """l = theta . (mu + s eps): the gradient is mu + s eps, so tr(Sigma) = 2 s^2 and |G|^2 = |mu|^2."""
    mu, s = torch.tensor([0.6, -0.8]), 2.0
    seen = knowing(healthy[0], lambda theta, eps, t: ((mu + s * eps) * theta).sum(1), torch.ones(2))
    found = GradientNoise((8, 16, 64), n=2048, repeats=100).look(seen)
    assert found.facts["trace"] == pytest.approx(2 * s**2, rel=0.05)
    assert found.facts["signal"] == pytest.approx(1, rel=0.15)
    assert found.facts["b_simple"] == pytest.approx(8, rel=0.15)
    assert found.facts["low"] < 8 < found.facts["high"]
    for size, square in zip(found.table["batch_size"], found.table["gradient_squared"], strict=True):
        assert square == pytest.approx(1 + 2 * s**2 / size, rel=0.1)


def test_two_batch_sizes_are_enough_without_bias():
    """Against E|g_B|^2 = |G|^2 + tr(Sigma)/B exactly; and a signal that is lost is not made up."""
    squares = torch.tensor([[3 + 20 / 4, 99.0, 3 + 20 / 64]] * 5, dtype=torch.float64)
    found = noise_scale(squares, (4, 8, 64), 0)
    assert found["signal"] == pytest.approx(3)
    assert found["trace"] == pytest.approx(20)
    assert found["b_simple"] == pytest.approx(20 / 3)
    lost = noise_scale(torch.tensor([[5.0, 5 / 16 - 0.1]] * 5, dtype=torch.float64), (4, 64), 0)
    assert lost["b_simple"] is lost["high"] is None


def test_a_loss_of_t_alone_is_all_between_times(healthy: list[Path]):
    """L = exp(-10 t): a coefficient of variation of 2.0001/sqrt(B) for independent uniform t, though the run trains
    with stratified times; and t explains all of log L."""
    seen = knowing(healthy[0], lambda theta, eps, t: theta * (-10 * t).exp(), torch.ones(1))
    assert isinstance(seen.run.parts.timesteps, Stratified)
    found = GradientNoise(n=262144, repeats=4).look(seen)
    mean, square = (1 - math.exp(-10)) / 10, (1 - math.exp(-20)) / 20
    cv = math.sqrt(square / mean**2 - 1)
    assert cv == pytest.approx(2.0001, abs=1e-4)
    for measured in found.table["loss_cv_sqrt_b"]:
        assert measured == pytest.approx(cv, rel=0.05)
    assert found.facts["between_share"] == pytest.approx(1, abs=1e-9)
    assert value(found, "log_loss_explained_by_t") > 0.9
    assert max(found.table["loss_cv_without_t"]) < 1e-6
    # what the run's own stratified times make of it: a spread of about 2 e^-2 sqrt(...)/B^1.5, far below 2/sqrt(64)
    steps = torch.tensor(found.facts["successive"])
    assert steps.std() / steps.mean() < 0.5 * cv / math.sqrt(64)


def test_the_variance_between_times_and_at_equal_times():
    """l = t + a z: 1/12 and a^2; log l of independent values is not explained."""
    n = 200_000
    t, z = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64), normals(2, n, seed=1)
    found = split(t + 0.3 * z)
    assert found["between"] == pytest.approx(1 / 12, rel=0.02)
    assert found["within"] == pytest.approx(0.09, rel=0.02)
    assert found["log_share"] is None  # some are negative
    assert split(z.exp())["log_share"] == pytest.approx(0, abs=0.01)
    assert split((10 * t + z).exp())["log_share"] == pytest.approx(100 / 112, abs=0.01)
    for size in (1, 4, 50):
        cv, error = variation(t + 0.3 * z + 1, size)
        assert cv == pytest.approx(math.sqrt(1 / 12 + 0.09) / 1.5, abs=4 * error)
        assert error < 0.02 * cv
    # two rows whose losses t explains say no more than one
    both, one = variation(torch.stack([t, t]), 4)[1], variation(torch.stack([t, t.roll(4000)]), 4)[1]
    assert both == pytest.approx(2**0.5 * one, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_healthy_runs_do_not_alternate(healthy: list[Path], seed: int):
    found = GradientNoise(**SMALL).look(subject(healthy[seed]))
    assert not found.alarms
    assert abs(found.facts["lag_1"]) < 0.5
    table = found.table
    pooled = value(found, "loss_cv_sqrt_b")
    for measured, error in zip(table["loss_cv_sqrt_b"], table["loss_cv_sqrt_b_se"], strict=True):
        assert abs(measured - pooled) < 4 * error
    assert table["gradient_squared_line"][0] == pytest.approx(table["gradient_squared"][0])
    assert 0 < found.facts["between_share"] < 1


def test_times_that_alternate_make_losses_that_do(healthy: list[Path]):
    seen = subject(healthy[0])
    batch = seen.run.parts.config["data"]["batch_size"]
    seen.run.parts.timesteps = Curriculum([0, 2], batch, boundaries=[0.2, 0.8])
    found = GradientNoise((16, 64), n=2048, repeats=4).look(seen)
    assert len(found.alarms) == 1
    assert "alternate: lag-1 autocorrelation -0." in found.alarms[0]
    assert "Curriculum" in found.alarms[0]
    assert found.facts["lag_1"] < -0.8


def test_autocorrelation():
    assert lag_1(torch.tensor([1.0, -1.0] * 50)) == pytest.approx(-0.99)
    assert lag_1(torch.ones(9)) == 0
    assert abs(lag_1(normals(10_000))) < 0.04


def test_a_second_look_is_the_same_and_touches_neither_weights_nor_the_generator(healthy: list[Path]):
    seen = subject(healthy[1])
    before, weights = torch.get_rng_state(), [p.clone() for p in seen.denoiser.parameters()]
    first, second = (GradientNoise(**SMALL).look(seen) for _ in range(2))
    assert first.table == second.table
    assert first.facts == second.facts
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, seen.denoiser.parameters(), strict=True))
    assert all(p.grad is None for p in seen.denoiser.parameters())
    assert not seen.denoiser.training


@pytest.mark.parametrize(
    "wrong", [{"batch_sizes": [4]}, {"batch_sizes": [4, 6]}, {"batch_sizes": [8, 4]}, {"n": 100}, {"repeats": 1}]
)
def test_wrong_options_are_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        GradientNoise(**wrong)
