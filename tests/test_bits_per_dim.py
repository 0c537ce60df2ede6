"""diagnostics=likelihood: against the data's own density, by models that are exact, and where values are levels."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from denoiselab.diagnostics import Likelihood
from denoiselab.diagnostics.likelihood import interval
from denoiselab.diagnostics.optimal import Optimum
from denoiselab.likelihood import bits_per_dim, ode
from denoiselab.rng import Noise, generator
from denoiselab.run import load
from exact import ExactNet
from healthy import subject


def records(found):
    return {record.name.removeprefix("bits_per_dim_"): record for record in found.records}


@pytest.fixture(scope="module")
def exact_points(healthy):
    """A healthy run whose network is the data's own denoiser."""
    seen = subject(healthy[0])
    denoiser = seen.run.denoiser
    exact = Optimum(seen.data)
    denoiser.net = ExactNet(lambda x, a, s, **cond: exact(x, a, s), denoiser.target, denoiser.sigma_data)
    return subject(seen.run)


def test_the_data_s_own_denoiser_has_the_data_s_own_density(exact_points):
    found = Likelihood(n=24, points=100, classes="none").look(exact_points)
    by = records(found)
    error = max(abs(a - b) for a, b in zip(found.table["ode (bits/dim)"], found.table["exact (bits/dim)"], strict=True))
    assert error < 0.02  # sample by sample
    assert abs(by["ode"].details["above_exact"]) < 0.005
    assert by["continuous_vlb"].details["above_exact"] == pytest.approx(
        0, abs=4 * by["continuous_vlb"].details["above_exact_standard_error"]
    )
    assert by["vlb"].details["above_exact"] > -4 * by["vlb"].details["above_exact_standard_error"]


def test_the_exact_density_is_that_of_the_mixture(healthy):
    seen = subject(healthy[0])
    batch, data = seen.real(30), seen.data
    points = data.codec.decode(batch["x_0"]).double()
    mine = Likelihood(classes="own")._exact(seen, batch["x_0"], batch["cond"]["label"])
    all_classes = Likelihood(classes="none")._exact(seen, batch["x_0"], batch["cond"]["label"])
    centre = data.means[batch["cond"]["label"]]
    variance = data.covariances[0, 0, 0].item()
    log_p = -(points - centre).square().sum(1) / (2 * variance) - math.log(2 * math.pi * variance)
    expected = -(log_p + 2 * math.log(data.codec.std)) / (2 * math.log(2))
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    far = -(points[:, None] - data.means).square().sum(-1) / (2 * variance) - math.log(2 * math.pi * variance)
    mixed = -(far.logsumexp(1) - math.log(8) + 2 * math.log(data.codec.std)) / (2 * math.log(2))
    torch.testing.assert_close(all_classes, mixed, rtol=0, atol=1e-6)
    assert Likelihood()._exact(subject(healthy[0]), batch["x_0"], None) is not None


def test_trained_runs_are_near_the_data_s_density_and_a_broken_one_is_not(healthy):
    for run in healthy[:2]:
        found = records(Likelihood(n=48, points=30, tolerance=1e-3).look(subject(run)))
        assert -0.05 < found["ode"].details["above_exact"] < 0.3
        assert found["ode"].controls["exact"] == pytest.approx(
            found["ode"].value - found["ode"].details["above_exact"], abs=1e-9
        )
    seen = subject(healthy[0])
    last = [part for part in seen.run.denoiser.net.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.5)
    broken = records(Likelihood(n=48, points=30, tolerance=1e-3).look(seen))
    assert broken["ode"].details["above_exact_low"] > 0.3
    assert broken["continuous_vlb"].value > found["continuous_vlb"].value


def test_levels_are_made_continuous_by_noise_of_their_width(example_run: Path):
    """The record's number is that of the ODE at x_0 plus noise in half a level, in bits of a level's probability."""
    seen = subject(example_run)
    found = Likelihood(n=2, points=4, probes=2, tolerance=0.05).look(seen)
    assert found.protocol["bins"] == 17
    assert found.protocol["of"] == "x_0, probabilities of levels"
    batch = seen.real(2)
    ids = batch["id"].tolist()
    u = torch.stack([torch.rand(1, 8, 8, generator=generator(0, "dequantise", i)) for i in ids])
    x = batch["x_0"] + (u - 0.5) / 8
    assert torch.equal(((x + 1) * 8).round(), ((batch["x_0"] + 1) * 8).round())
    noise = Noise(1, ids, (1, 8, 8))
    probes = torch.stack([noise().sign(), noise().sign()])
    density = ode(seen.denoiser, seen.schedule, x, probes, seen.denoiser.sigma_data, 0.05, 0.05, **batch["cond"])
    expected = bits_per_dim(density.nats, 64, 17).mean().item()
    assert records(found)["ode"].value == pytest.approx(expected, rel=1e-5)
    assert records(found)["ode"].controls == {}


def test_a_second_look_is_the_same_and_parts_make_no_difference(healthy, monkeypatch):
    look = Likelihood(n=4, points=5)
    first = look.look(subject(healthy[1]))
    assert look.look(subject(healthy[1])) == first
    monkeypatch.setattr("denoiselab.diagnostics.likelihood.BATCH", 2)
    parts = look.look(subject(healthy[1]))
    assert parts.table["vlb (bits/dim)"] == pytest.approx(first.table["vlb (bits/dim)"], rel=1e-4)
    assert parts.table["ode (bits/dim)"] == pytest.approx(
        first.table["ode (bits/dim)"], abs=0.02
    )  # other steps of the solver
    by = records(first)
    terms = by["vlb"].details
    assert by["vlb"].value == pytest.approx(terms["prior"] + terms["steps"] + terms["decoder"], rel=1e-6)
    assert by["vlb"].details["calls"] == 5


def test_the_interval_is_that_of_the_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0]).double()
    error = values.std().item() / 2
    assert interval(values) == pytest.approx(
        {"low": 3 - 1.96 * error, "high": 3 + 1.96 * error, "standard_error": error}
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n": 1}, "n=1: need at least 2"),
        ({"points": 1}, "points=1: need at least 2"),
        ({"variance": "big"}, "variance=big: need one of fixed_small, fixed_large, learned"),
        ({"probes": 0}, "probes=0: need at least 1"),
        ({"tolerance": 0}, "tolerance=0: need a number between 0 and 1"),
        ({"classes": "all"}, "classes=all: need one of none, own"),
    ],
)
def test_mistakes_are_refused(option, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Likelihood(**option)


def test_a_variance_that_no_network_says_is_refused(healthy):
    with pytest.raises(ValueError, match=r"^variance=learned: this network says no variance; need loss=learned_hybrid"):
        Likelihood(variance="learned").check(load(healthy[0]).parts)
