from functools import cache

import pytest
import torch
from scipy import stats
from torch import Tensor

from denoiselab.timesteps import Place, Uniform
from exact import every, make

WORLD, ACCUMULATION = 2, 3
one = cache(make)
PARTS = [(rank, micro) for micro in range(ACCUMULATION) for rank in range(WORLD)]


def place(seed: int = 0, samples_seen: int = 0, rank: int = 0, micro: int = 0) -> Place:
    return Place(seed, samples_seen, rank, WORLD, micro, ACCUMULATION)


def draw(timesteps: str, n: int, where: Place, schedule: str = "cosine") -> Tensor:
    return one("timesteps", timesteps)(n, one("schedule", schedule), where)[0]


def global_batch(timesteps: str, n: int, seed: int = 0, samples_seen: int = 0) -> list[Tensor]:
    """The times of every rank and micro-batch of one optimizer step."""
    return [draw(timesteps, n, place(seed, samples_seen, rank, micro)) for rank, micro in PARTS]


@every("timesteps", "schedule")
def test_times_are_float32_in_the_unit_interval(timesteps, schedule):
    for n in (1, 7, 1000):
        t, w = one("timesteps", timesteps)(n, one("schedule", schedule), place())
        assert t.shape == w.shape == (n,)
        assert t.dtype == w.dtype == torch.float32
        assert ((t >= 0) & (t <= 1)).all()
        assert w.isfinite().all()
        assert (w > 0).all()


@every("timesteps", "schedule")
def test_times_rise_with_their_cumulative_probability(timesteps, schedule):
    u = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    t = one("timesteps", timesteps).icdf(u, one("schedule", schedule))
    assert t.dtype == torch.float64
    assert t.shape == u.shape
    assert (t.diff() >= 0).all()
    assert t[0] >= 0
    assert t[-1] <= 1


@every("timesteps", "schedule")
def test_the_margin_is_the_distribution(timesteps, schedule):
    """150,000 times of many steps, ranks and micro-batches against the distribution that icdf declares, and
    U[0, 1] where that is what the class says; in 100 equal parts, so that ties and gaps show too."""
    found, levels = one("timesteps", timesteps), one("schedule", schedule)
    t = torch.cat([part for step in range(100) for part in global_batch(timesteps, 250, samples_seen=1500 * step)])
    edges = found.icdf(torch.linspace(0, 1, 101, dtype=torch.float64), levels)
    counts = torch.histogram(t.double(), edges).hist
    assert counts.sum() == len(t) == 150_000
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    if isinstance(found, Uniform):
        torch.testing.assert_close(edges, torch.linspace(0, 1, 101, dtype=torch.float64))
        assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3


@every("timesteps")
def test_uniform_times_weigh_the_same(timesteps):
    found = one("timesteps", timesteps)
    if isinstance(found, Uniform):
        assert torch.equal(found(64, one("schedule", "linear"), place())[1], torch.ones(64))


@every("timesteps")
def test_times_are_a_function_of_the_place(timesteps):
    first = draw(timesteps, 64, place(3, 640, 1, 2))
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(first, draw(timesteps, 64, place(3, 640, 1, 2)))


@every("timesteps")
def test_drawing_leaves_the_global_generator_alone(timesteps):
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    draw(timesteps, 64, place())
    assert torch.equal(torch.rand(4), expected)


@every("timesteps")
def test_every_coordinate_of_the_place_matters(timesteps):
    """The draws within their strata too: neighbouring parts do not share their jitter."""
    here = draw(timesteps, 64, place())
    for other in (place(seed=1), place(samples_seen=384), place(rank=1), place(micro=1)):
        there = draw(timesteps, 64, other)
        assert not (here == there).any()
        jitter, others = here * 384 % 1, there * 384 % 1
        assert abs(torch.corrcoef(torch.stack([jitter, others]))[0, 1]) < 0.4
        assert (jitter - others).abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 5, 64])
def test_stratified_has_one_time_in_each_stratum_of_the_global_batch(n):
    t = torch.cat(global_batch("stratified", n)).double()
    strata = (t * n * len(PARTS)).floor().long()
    assert torch.equal(strata.sort().values, torch.arange(n * len(PARTS)))


def test_stratified_times_are_jittered_over_the_whole_stratum():
    """No midpoints, and no one offset for all."""
    t = torch.cat(global_batch("stratified", 2000)).double()
    jitter = t * len(t) % 1
    assert stats.kstest(jitter.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [4, 64])
def test_every_stratified_micro_batch_covers_the_range(n):
    for t in global_batch("stratified", n):
        ends = torch.cat([torch.zeros(1), t.sort().values, torch.ones(1)])
        assert ends.diff().max() <= (len(PARTS) + 1) / (n * len(PARTS)) + 1e-6


def test_stratified_batches_vary_far_less():
    """The variance of a batch's mean of a known loss, against its closed forms: independent draws have
    Var L(t)/N and strata mean L'^2/(12 N^3)."""

    def variance(timesteps: str) -> float:
        means = [
            torch.cat([2.7 * (-3 * t.double()).exp() for t in global_batch(timesteps, 8, seed=seed)]).mean()
            for seed in range(300)
        ]
        return torch.stack(means).var().item()

    n, t = 8 * len(PARTS), (torch.arange(100_000).double() + 0.5) / 100_000
    loss, slope = 2.7 * (-3 * t).exp(), -8.1 * (-3 * t).exp()
    independent, stratified = loss.var().item() / n, slope.square().mean().item() / (12 * n**3)
    assert variance("uniform") == pytest.approx(independent, rel=0.35)
    assert variance("stratified") == pytest.approx(stratified, rel=0.35)
    assert stratified < independent / 500
