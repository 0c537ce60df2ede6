"""The loss by t: what it measures, on data of any rank, and what its detectors see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoiselab.diagnostics import LossByT
from denoiselab.diagnostics.detectors import spike
from denoiselab.diagnostics.loss_by_t import nan, per_bucket
from denoiselab.diagnostics.optimal import in_panels
from denoiselab.metrics.loss_by_t import errors_by_t
from denoiselab.run import load
from denoiselab.schedule import Cosine, Linear, Schedule
from exact import eight_gaussians, normals
from healthy import subject

K = (10, 100)


def batch(n: int, *shape: int) -> dict:
    return {"x_0": normals(n, *shape).float(), "id": torch.arange(n), "cond": {}}


def nothing_removed(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **_: Tensor) -> Tensor:
    """eps_hat = 0."""
    return x_t / alpha_t


def buckets(t: Tensor, mse: Tensor, schedule: Schedule, k: int, panel: str = "eps") -> tuple[Tensor, Tensor]:
    """Means and standard errors."""
    _, mean, error = per_bucket(t, in_panels(mse, schedule, t)[panel], k)
    return torch.tensor(nan(mean)), torch.tensor(nan(error))


class TestWhatIsMeasured:
    @pytest.mark.parametrize("k", K)
    @pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (4, 4, 4)])
    def test_of_no_estimate_it_is_1_in_units_of_eps(self, k, shape):
        schedule = Cosine()
        t, mse = errors_by_t(nothing_removed, schedule, batch(500, *shape), repeats=20)
        mean, error = buckets(t[:, :-1], mse[:, :-1], schedule, k)  # at t = 1 nothing is left of x_0 in float32
        here = ~mean.isnan()
        assert int(here.sum()) >= 0.9 * k
        assert bool(((mean - 1).abs() < 4 * error)[here].all())
        assert ((mean - 1).abs() < 3 * error)[here].double().mean() > 0.97

    @pytest.mark.parametrize("k", K)
    def test_of_the_oracle_it_is_the_exact_optimum(self, k):
        """E Var(x_0 | x_t) over the exact posterior, along the table of DDPM."""
        mixture, schedule = eight_gaussians(), Linear()
        x_0, _ = mixture.draw(4000, seed=3)
        t, mse = errors_by_t(mixture, schedule, {"x_0": x_0, "id": torch.arange(4000), "cond": {}}, at_once=4000)
        fresh, _ = mixture.draw(t.numel(), seed=4)
        times = t.flatten()
        alpha, sigma = (v[:, None] for v in schedule(times.double()))
        variance = mixture.posterior(alpha * fresh + sigma * normals(len(fresh), 2, seed=5), alpha, sigma)[1] / 2
        mean, error = buckets(t, mse, schedule, k)
        expected, own = buckets(times[:, None], variance[:, None], schedule, k)
        z = (mean - expected) / (error**2 + own**2).sqrt()
        assert z.abs().max() < (3 if k == 10 else 4)

    def test_an_empty_bucket_is_nothing_and_not_0(self):
        t = torch.tensor([[0.05], [0.05], [0.95]])
        count, mean, error = per_bucket(t, torch.ones(3, 1), 4)
        assert count == [2, 0, 0, 1]
        assert mean == [1, None, None, 1]
        assert error == [0, None, None, None]

    def test_errors_count_samples_and_not_their_times(self):
        """Ten times of one sample in a bucket that all say the same are one observation."""
        values = normals(200, 1).expand(-1, 10)
        t = torch.rand(200, 10, generator=torch.Generator().manual_seed(0))
        _, _, error = per_bucket(t, values, 1)
        assert error[0] == pytest.approx(values[:, 0].std().item() / 200**0.5, rel=1e-6)

    def test_it_depends_on_the_seed_alone(self):
        exact, schedule = eight_gaussians(), Cosine()
        first = errors_by_t(exact, schedule, batch(100, 2), seed=1)
        again = errors_by_t(exact, schedule, batch(100, 2), seed=1)
        apart = errors_by_t(exact, schedule, batch(100, 2), seed=1, at_once=7)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.allclose(first[1], apart[1], rtol=1e-6)
        assert not torch.equal(first[1], errors_by_t(exact, schedule, batch(100, 2), seed=2)[1])

    def test_every_tenth_of_time_has_each_sample_once(self):
        t, _ = errors_by_t(eight_gaussians(), Cosine(), batch(50, 2))
        assert torch.equal((t * 10).long(), torch.arange(10).expand(50, -1))


def broken_scaling(denoiser, whole, x_t, alpha_t, sigma_t, cond):
    """Below a level, the network's input is not scaled as in training."""
    low = sigma_t < 0.2
    return whole(torch.where(low, 1.5 * x_t, x_t), alpha_t, sigma_t, **cond)


def corrupt(denoiser, whole, x_t, alpha_t, sigma_t, cond):
    """At t in [0.4, 0.5), the level is of a damaged table, 0.3 times as noisy."""
    t = Cosine().inverse(2 * (alpha_t.double() / sigma_t.double()).log())
    inside = (t >= 0.4) & (t < 0.5)
    return whole(x_t, alpha_t, torch.where(inside, 0.3 * sigma_t, sigma_t), **cond)


def silent(denoiser, whole, x_t, alpha_t, sigma_t, cond):
    """A zero head."""
    return denoiser.target.to_x_0(torch.zeros_like(x_t), x_t, alpha_t, sigma_t)


@pytest.fixture
def faulty(healthy: list[Path]):
    def make_subject(fault):
        run = load(healthy[0])
        whole = run.denoiser.forward
        run.denoiser.forward = lambda *level, **cond: fault(run.denoiser, whole, *level, cond)
        return subject(run)

    return make_subject


@pytest.mark.parametrize("k", K)
def test_detectors_are_silent_on_healthy_seeds(k, healthy):
    for run in healthy:
        found = LossByT(buckets=k, n=800, memorising=0).look(subject(run))
        assert found.alarms == [], run
        assert {f"loss_by_t_{name}" for name in ("early", "spike", "flat")} <= {r.name for r in found.records}


@pytest.mark.parametrize(
    ("fault", "says"),
    [(broken_scaling, "best linear filter"), (corrupt, "t in [0.4, 0.5) steps"), (silent, "-fold over buckets")],
)
def test_each_detector_sees_its_fault(fault, says, faulty):
    alarms = LossByT(n=800, memorising=0).look(faulty(fault)).alarms
    assert len(alarms) == 1, alarms
    assert says in alarms[0]


def test_a_legitimate_peak_is_no_spike():
    """The sharp one of binary pixels, on which the ratio to a linear filter has it too."""
    t = (torch.arange(10) + torch.rand(1000, 10, generator=torch.Generator().manual_seed(0))) / 10
    shape = torch.exp(-((t - 0.45) ** 2) / (2 * 0.15**2)) + 0.01
    loss = shape * normals(1000, 10, 2).square().mean(-1)
    found = spike(t, loss, torch.ones_like(loss), 10)
    assert found is not None
    assert found.alarm is None
    stepped = torch.where((t >= 0.4) & (t < 0.5), 10 * loss, loss)
    found = spike(t, stepped, torch.ones_like(loss), 10)
    assert found is not None
    assert found.alarm is not None
    assert found.details["bucket"] == 4
    assert spike(t[:20], loss[:20], torch.ones_like(loss[:20]), 10) is None  # too few to tell


def test_the_finding_has_the_families_and_the_optimum(healthy):
    found = LossByT(n=200, repeats=10).look(subject(healthy[0]))
    columns = {"exact_eps", "memorising_v", "filter_x_0", "white_eps", "train_eps", "raw_eps", "held_out_eps_se"}
    assert columns <= found.table.keys()
    assert not {"natural_eps", "binary_eps"} & found.table.keys()  # these are no images
    for panel in ("eps", "x_0", "v"):
        for model, least in zip(found.table[f"held_out_{panel}"], found.table[f"exact_{panel}"], strict=True):
            assert model > 0.9 * least
    again = LossByT(n=200, repeats=10).look(subject(healthy[0]))
    assert again.table == found.table


def test_on_images_there_are_their_families(example_run):
    found = LossByT(n=20, buckets=3, repeats=3).look(subject(example_run))
    assert {"natural_eps", "binary_eps", "memorising_eps"} <= found.table.keys()
    assert found.table["memorising_x_0"][0] < 0.1 * found.table["train_x_0"][0]
    linear = LossByT(n=20, buckets=3, repeats=3, log_y=False)
    assert linear.picture(linear.look(subject(example_run))).width >= 900


@pytest.mark.parametrize("wrong", [{"buckets": 0}, {"repeats": 0}, {"n": 1}, {"memorising": -1}])
def test_bad_options_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}: need"):
        LossByT(**wrong)
