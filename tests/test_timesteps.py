"""Where times are drawn: in the unit interval, by the place in a run, with the margin that icdf declares."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from denoiselab.schedule import Linear, Schedule
from denoiselab.timesteps import Antithetic, Discrete, LowDiscrepancy, Place, Stratified, Timesteps, Uniform
from exact import OPTIONS, every, make, middles, one

WORLD, ACCUMULATION = 2, 3
PARTS = [(rank, micro) for micro in range(ACCUMULATION) for rank in range(WORLD)]
CPU = torch.device("cpu")
LEAST = 1e-4
"""The p-value below which draws are said to come from another distribution."""


def place(seed: int = 0, samples_seen: int = 0, rank: int = 0, micro: int = 0) -> Place:
    return Place(seed, samples_seen, rank, WORLD, micro, ACCUMULATION)


def draw(timesteps: str, n: int, where: Place, schedule: str = "cosine") -> Tensor:
    return one("timesteps", timesteps)(n, one("schedule", schedule), where)[0]


def global_batch(timesteps: str, n: int, seed: int = 0, samples_seen: int = 0) -> list[Tensor]:
    """The times of every rank and micro-batch of one optimizer step."""
    return [draw(timesteps, n, place(seed, samples_seen, rank, micro)) for rank, micro in PARTS]


def global_uniforms(found: Timesteps, n: int, seed: int = 0) -> Tensor:
    """The u of every rank and micro-batch of one optimizer step."""
    return torch.cat([found.uniforms(n, place(seed, 0, rank, micro), CPU) for rank, micro in PARTS])


def fitting(timesteps: str, schedule: str) -> tuple[Timesteps, Schedule]:
    """Both, where the one can draw on the other."""
    found, levels = one("timesteps", timesteps), one("schedule", schedule)
    if isinstance(found, Discrete) and levels.points is None:
        with pytest.raises(ValueError, match="no points of its own"):
            found.check(levels)
        pytest.skip("refused at composition")
    found.check(levels)
    return found, levels


def agree(drawn: Tensor, found: Timesteps, levels: Schedule, bins: int = 100) -> float:
    """The p-value of draws against what icdf declares, in parts of equal probability, ties and gaps included."""
    declared = found.icdf(middles(1_000_000), levels).float().clamp_min(levels.earliest).double()
    edges = declared[:: len(declared) // bins][1:].unique() - 1e-6  # beside a point mass, not on it
    observed, expected = (
        torch.bincount(torch.bucketize(t, edges), minlength=len(edges) + 1) for t in (drawn.double(), declared)
    )
    some = expected > 0
    assert observed[~some].sum() == 0
    expected = expected[some].double() * (len(drawn) / len(declared))
    return stats.chisquare(observed[some].numpy(), expected.numpy()).pvalue if some.sum() > 1 else 1.0


@every("timesteps", "schedule")
def test_times_are_float32_in_the_unit_interval(timesteps, schedule):
    found, levels = fitting(timesteps, schedule)
    for n in (1, 7, 1000):
        t, w = found(n, levels, place())
        assert t.shape == w.shape == (n,)
        assert t.dtype == w.dtype == torch.float32
        assert ((t >= levels.earliest) & (t <= 1)).all()
        assert w.isfinite().all()
        assert (w > 0).all()


@every("timesteps", "schedule")
def test_times_rise_with_their_cumulative_probability(timesteps, schedule):
    found, levels = fitting(timesteps, schedule)
    u = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    t = found.icdf(u, levels)
    assert t.dtype == torch.float64
    assert t.shape == u.shape
    assert (t.diff() >= 0).all()
    assert t[0] >= 0
    assert t[-1] <= 1
    assert (found.icdf(torch.tensor([1.0 - 2**-53, 1.0], dtype=torch.float64), levels) <= 1).all()


@every("timesteps")
def test_the_margin_is_the_distribution(timesteps):
    """A million times of ten steps, ranks and micro-batches, in a batch that no number of points divides."""
    t = torch.cat([part for step in range(10) for part in global_batch(timesteps, 16_667, samples_seen=step)])
    found, levels = one("timesteps", timesteps), one("schedule", "cosine")
    assert len(t) == 1_000_020
    assert agree(t, found, levels) > LEAST
    if type(found).icdf is Uniform.icdf:
        assert stats.kstest(t.numpy(), "uniform").pvalue > LEAST


@every("timesteps", "schedule")
def test_the_margin_is_the_distribution_on_every_schedule(timesteps, schedule):
    found, levels = fitting(timesteps, schedule)
    if timesteps not in ("discrete", "lognormal"):
        u = middles(100)
        assert torch.equal(found.icdf(u, levels), found.icdf(u, one("schedule", "cosine")))
        return
    t = torch.cat([part for step in range(4) for part in global_batch_on(found, levels, 2501, step)])
    assert agree(t, found, levels) > LEAST


def global_batch_on(found: Timesteps, levels: Schedule, n: int, step: int) -> list[Tensor]:
    return [found(n, levels, place(0, step, rank, micro))[0] for rank, micro in PARTS]


@every("timesteps")
def test_uniform_times_weigh_the_same(timesteps):
    found = one("timesteps", timesteps)
    if type(found).icdf is Uniform.icdf:
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
    """The draws within their strata too: neighbouring parts do not share their jitter, unless one offset for all of
    a step is the point."""
    found = one("timesteps", timesteps)
    here = found.uniforms(64, place(), CPU)
    for other in (place(seed=1), place(samples_seen=384), place(rank=1), place(micro=1)):
        there = found.uniforms(64, other, CPU)
        assert not (here == there).any()
        jitter, others = here * 384 % 1, there * 384 % 1
        if not isinstance(found, LowDiscrepancy):
            assert abs(torch.corrcoef(torch.stack([jitter, others]))[0, 1]) < 0.4
            assert (jitter - others).abs().max() > 0.1


STRATIFIED = [name for name in OPTIONS["timesteps"] if isinstance(one("timesteps", name), Stratified)]


@pytest.mark.parametrize("timesteps", STRATIFIED)
@pytest.mark.parametrize("n", [1, 5, 64])
def test_stratified_has_one_draw_in_each_stratum_of_the_global_batch(timesteps, n):
    strata = (global_uniforms(one("timesteps", timesteps), n) * n * len(PARTS)).floor().long()
    assert torch.equal(strata.sort().values, torch.arange(n * len(PARTS)))


def test_only_options_that_say_so_are_not_stratified():
    assert {*OPTIONS["timesteps"]} - {*STRATIFIED} == {"uniform", "low_discrepancy", "antithetic"}


def test_stratified_times_are_jittered_over_the_whole_stratum():
    """No midpoints, and no one offset for all."""
    t = torch.cat(global_batch("stratified", 2000)).double()
    jitter = t * len(t) % 1
    assert stats.kstest(jitter.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("timesteps", ["stratified", "low_discrepancy"])
@pytest.mark.parametrize("n", [4, 64])
def test_every_micro_batch_covers_the_range(timesteps, n):
    for t in global_batch(timesteps, n):
        ends = torch.cat([torch.zeros(1), t.sort().values, torch.ones(1)])
        assert ends.diff().max() <= (len(PARTS) + 1) / (n * len(PARTS)) + 1e-6


@pytest.mark.parametrize("n", [1, 5, 64])
def test_low_discrepancy_is_an_even_grid_with_one_random_offset(n):
    grids = [global_uniforms(LowDiscrepancy(), n, seed).sort().values for seed in range(200)]
    size = n * len(PARTS)
    for u in grids:
        torch.testing.assert_close(u.diff(), torch.full((size - 1,), 1 / size, dtype=torch.float64))
    offsets = torch.stack([u[0] for u in grids]) * size
    assert stats.kstest(offsets.numpy(), "uniform").pvalue > LEAST


@pytest.mark.parametrize(("n", "world", "accumulation"), [(1, 1, 1), (4, 2, 3), (5, 2, 3), (5, 3, 1), (7, 1, 1)])
def test_antithetic_times_come_in_pairs_over_the_global_batch(n, world, accumulation):
    u = torch.cat(
        [
            Antithetic().uniforms(n, Place(0, 0, rank, world, micro, accumulation), CPU)
            for micro in range(accumulation)
            for rank in range(world)
        ]
    )
    pairs = u[: len(u) // 2 * 2].view(-1, 2)
    torch.testing.assert_close(pairs.sum(1), torch.ones(len(pairs), dtype=torch.float64))
    assert len(u.unique()) == len(u) == n * world * accumulation


def test_the_variance_of_a_batch_is_its_closed_form():
    """Of the mean of L(t) = 2.7 e^(-3 t) over the global batch. Independent: Var L/N. Strata: mean L'^2/(12 N^3).
    One offset: the variance of the grid's mean over the offset. Pairs: (Var L + Cov(L(u), L(1 - u)))/N."""

    def variance(timesteps: str) -> float:
        u = torch.stack([global_uniforms(one("timesteps", timesteps), 8, seed) for seed in range(500)])
        return loss(u).mean(1).var().item()

    def loss(t: Tensor) -> Tensor:
        return 2.7 * (-3 * t).exp()

    n, t = 8 * len(PARTS), middles(100_000)
    slope = 3 * loss(t)
    expected = {
        "uniform": loss(t).var() / n,
        "stratified": slope.square().mean() / (12 * n**3),
        "low_discrepancy": loss((middles(1000)[:, None] + torch.arange(n)) / n).mean(1).var(),
        "antithetic": (loss(t).var() + torch.stack([loss(t), loss(1 - t)]).cov()[0, 1]) / n,
    }
    for timesteps, value in expected.items():
        assert variance(timesteps) == pytest.approx(value.item(), rel=0.25), timesteps
    assert expected["stratified"] < expected["low_discrepancy"] / 20
    assert expected["low_discrepancy"] < expected["antithetic"] < expected["uniform"]


@pytest.mark.parametrize("timesteps", [n for n in OPTIONS["timesteps"] if "steps" in one("timesteps", n).__dict__])
def test_steps_are_the_points_of_a_table(timesteps):
    """Of T = 1000: index = floor(1000 t)."""
    if timesteps == "discrete":
        return
    free, snapped = one("timesteps", timesteps), make("timesteps", timesteps, steps=1000)
    levels = one("schedule", "linear")
    (t, w), (points, weights) = (found(500, levels, place()) for found in (free, snapped))
    assert torch.equal(w, weights)
    assert torch.equal((points.double() * 999).round(), (t.double() * 1000).floor().clamp_max(999))
    assert (points.double() * 999 - (points.double() * 999).round()).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "arguments"), [("discrete", {}), ("uniform", {"steps": 50})])
def test_points_are_equally_likely_and_both_ends_among_them(name, arguments):
    """Batches of 6 x 37 = 222, which 50 does not divide."""
    found, levels = make("timesteps", name, **arguments), Linear(50)
    t = torch.cat([part for step in range(300) for part in global_batch_on(found, levels, 37, step)])
    counts = torch.bincount((t.double() * 49).round().long(), minlength=50)
    assert torch.allclose(t * 49, (t * 49).round(), atol=1e-4)
    assert len(counts) == 50
    assert stats.chisquare(counts.numpy()).pvalue > LEAST


@pytest.mark.parametrize("points", [2, 50, 1000, 4000])
def test_the_points_of_a_table_lie_in_their_own_cells(points):
    """Also as float32: what is drawn at a point is counted there."""
    from denoiselab.timesteps.base import cell

    t = torch.arange(points).double() / (points - 1)
    assert torch.equal(cell(t.float(), points), torch.arange(points))
