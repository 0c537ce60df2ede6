import itertools
import json
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

import denoiselab
from denoiselab.curve import Curve
from denoiselab.errors import UserError
from denoiselab.sampler import LossDensity
from denoiselab.schedule import Linear, Schedule
from denoiselab.timesteps import (
    Antithetic,
    Curriculum,
    Discrete,
    FromCurve,
    LowDiscrepancy,
    Place,
    Slot,
    Slots,
    Stratified,
    Timesteps,
    Uniform,
)
from exact import OPTIONS, every, make

WORLD, ACCUMULATION = 2, 3
one = cache(make)
PARTS = [(rank, micro) for micro in range(ACCUMULATION) for rank in range(WORLD)]
CPU = torch.device("cpu")
LEAST = 1e-4
"""The p-value below which draws are said to come from another distribution."""


class Even(Schedule):
    """Without points of its own: log-SNR 10 - 20 t."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (10 - 20 * t).sigmoid().sqrt(), (20 * t - 10).sigmoid().sqrt()


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


def middles(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


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


class TestDensities:
    """Each inverse cumulative distribution against the density that its paper states: p(t(u)) dt/du = 1."""

    def slope(self, found: Timesteps) -> tuple[Tensor, Tensor]:
        u = middles(500).requires_grad_()
        t = found.icdf(u, one("schedule", "cosine"))
        (slope,) = torch.autograd.grad(t.sum(), u)
        return t.detach(), slope

    @pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (-0.5, 1.4), (1.0, 0.6)])
    def test_logit_normal(self, loc, scale):
        t, slope = self.slope(make("timesteps", "logit_normal", loc=loc, scale=scale))
        p = (-((t.logit() - loc) ** 2) / (2 * scale**2)).exp() / (scale * math.sqrt(2 * math.pi) * t * (1 - t))
        torch.testing.assert_close(p * slope, torch.ones_like(t), rtol=1e-9, atol=0)
        assert make("timesteps", "logit_normal", loc=loc).icdf(
            torch.tensor([0.5]).double(), Linear()
        ).item() == pytest.approx(1 / (1 + math.exp(-loc)))

    @pytest.mark.parametrize("s", [-1.0, 0.0, 0.81, 1.29, 2 / (math.pi - 2)])
    def test_mode(self, s):
        v = middles(200)
        found = make("timesteps", "mode", s=s).icdf(1 - v, Linear())
        published = 1 - v - s * ((math.pi / 2 * v).cos().square() - 1 + v)
        torch.testing.assert_close(found, published, rtol=1e-12, atol=1e-12)
        t = make("timesteps", "mode", s=s).icdf(middles(100_000), Linear())
        assert (t.diff() > -1e-15).all()

    def test_mode_is_refused_where_it_is_not_monotone(self):
        for s in (-1.01, 1.76):
            v = middles(10_000)
            assert ((1 - v - s * ((math.pi / 2 * v).cos().square() - 1 + v)).diff() > 0).any()
            with pytest.raises(ValueError, match=r"s=.*where the map is monotone"):
                make("timesteps", "mode", s=s)

    @pytest.mark.parametrize(("tau", "k"), [(0.7, 5.0), (0.3, 2.0), (0.5, 1.0)])
    def test_speed(self, tau, k):
        t, slope = self.slope(make("timesteps", "speed", tau=tau, k=k))
        p = torch.where(t < tau, k * torch.ones_like(t), 1.0) / (1 + tau * (k - 1))
        torch.testing.assert_close(p * slope, torch.ones_like(t), rtol=1e-9, atol=0)

    @every("schedule")
    def test_lognormal_is_the_same_over_levels_on_every_schedule(self, schedule):
        """Between the schedule's ends; what lies beyond is at the ends."""
        levels, u = one("schedule", schedule), middles(2000)
        t = make("timesteps", "lognormal", sigma_data=0.8).icdf(u, levels)
        log_sigma = -1.2 + math.log(0.8 / 0.5) + 1.2 * torch.special.ndtri(u)
        ends = -levels.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)) / 2
        inside = (log_sigma > ends[0] + 1e-3) & (log_sigma < ends[1] - 1e-3)
        assert inside.sum() > 1000
        torch.testing.assert_close(-levels.log_snr(t[inside]) / 2, log_sigma[inside], rtol=0, atol=1e-6)
        assert (t[log_sigma < ends[0] - 1e-3] < 1e-9).all()
        assert (t[log_sigma > ends[1] + 1e-3] > 1 - 1e-9).all()

    def test_a_curve_is_the_density(self):
        curve = Curve([0.1, 0.4, 0.9], [3, 1, 2])
        t, slope = self.slope(FromCurve(curve))
        torch.testing.assert_close(curve(t) / curve.total * slope, torch.ones_like(t), rtol=1e-9, atol=0)

    def test_a_corrected_curve_leaves_the_objective_alone(self):
        found, levels = FromCurve(Curve([0, 0.3, 1], [5, 1, 0.5]), correct=True), Linear()
        t = found.icdf(middles(100_000), levels)
        assert (found.weights(t, levels) * (-3 * t).exp()).mean().item() == pytest.approx(
            (1 - math.exp(-3)) / 3, rel=1e-6
        )


BROKEN = {
    "a.csv": "",
    "b.csv": "time,loss\n0,1\n",
    "c.csv": "t,value\n0,1\n0.5\n",
    "d.csv": "t,value\n0,one\n",
    "e.csv": "t,value\n0,-1\n",
    "f.csv": "t,value\n0.5,1\n0.5,2\n",
    "g.csv": "t,value\n0,1\n1.5,2\n",
    "h.csv": "t,value\n0,nan\n1,1\n",
    "i.csv": "t,value\nnan,1\n1,1\n",
    "j.csv": "t,value\n0,0\n1,0\n",
    "k.json": "[1, 2]",
    "l.json": '{"t": 3, "value": [1]}',
    "m.json": '{"t": [0, 1], "value": [1]}',
    "n.json": '{"t": [0, 1], "value": [1, 1e999]}',
    "o.json": '{"t": [0, 1], "value": [1, null]}',
    "p.json": '{"t": [0, 1], "value": [1, ' + "9" * 400 + "]}",
    "q.json": "[" * 100_000,
    "r.json": '{"t": [], "value": []}',
    "s.json": '{"t": [0, 1], "value": [[1], {}]}',
    "metrics.jsonl": '{"buckets/val/x_0": [1]}\n[1]\nnull\n',
    "u.jsonl": '{"buckets/val/eps": [null, null]}\n',
    "v.jsonl": '{"buckets/val/eps": 3}\n["buckets/val/eps"]\n',
    "w.csv": b"\xff\xfe\x00t,value",
    "x.csv": "t,value\n" + "0," * 200_000 + "\n",
}
"""Files that hold no curve."""


class TestCurve:
    CURVES = st.integers(1, 8).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 1000), min_size=n, max_size=n, unique=True),
            st.lists(st.sampled_from([0.0, 0.001, 0.5, 1.0, 7.0, 1e4]), min_size=n, max_size=n),
        ).filter(lambda pair: sum(pair[1]) > 0)
    )

    @given(CURVES)
    @settings(max_examples=60, deadline=None)
    def test_its_integral_is_exact_and_its_inverse_undoes_it(self, pair):
        t, value = sorted(v / 1000 for v in pair[0]), pair[1]
        curve = Curve(t, value)
        u = torch.linspace(0, 1, 301, dtype=torch.float64)
        whole = curve.cumulative(u)
        knots = [0.0, *[v for v in t if 0 < v < 1], 1.0]
        fine = torch.cat([torch.linspace(a, b, 11, dtype=torch.float64) for a, b in itertools.pairwise(knots)])
        area = integrate.cumulative_trapezoid(curve(fine), fine, initial=0)
        torch.testing.assert_close(curve.cumulative(fine), torch.from_numpy(area), rtol=1e-9, atol=1e-9)
        assert (whole.diff() >= -1e-12).all()
        again = curve.inverse(u)
        assert (again.diff() >= 0).all()
        assert 0 <= again[0] <= again[-1] <= 1
        torch.testing.assert_close(curve.cumulative(again), u * curve.total, rtol=1e-6, atol=1e-9 * max(value))

    def test_it_is_the_least_t_where_the_curve_is_nought(self):
        curve = Curve([0, 0.25, 0.5, 0.75, 1], [1, 0, 0, 0, 1])
        assert curve.inverse(torch.tensor([0.5], dtype=torch.float64)).item() == pytest.approx(0.25)

    def test_it_is_constant_beyond_its_points(self):
        curve = Curve([0.4, 0.6], [1, 3])
        assert curve(torch.tensor([0, 0.2, 0.4, 0.5, 0.6, 0.8, 1]).double()).tolist() == pytest.approx(
            [1, 1, 1, 2, 3, 3, 3]
        )
        assert curve.total.item() == pytest.approx(0.4 + 0.4 + 1.2)

    def test_files_of_each_kind_are_the_same_curve(self, tmp_path):
        csv, table = tmp_path / "l.csv", tmp_path / "l.json"
        csv.write_text("t,other,value\n0.05,x,4\n0.45,y,2\n0.95,z,1\n")
        table.write_text(json.dumps({"t": [0.05, 0.45, 0.95], "value": [4, 2, 1]}))
        run = tmp_path / "run"
        run.mkdir()
        none = [None] * 10
        panels = {"eps": {0: 4.0, 4: 2.0, 9: 1.0}, "x_0": {0: 1.0, 9: 5.0}}
        last = {f"buckets/val/{key}": [row.get(k) for k in range(10)] for key, row in panels.items()}
        older = {"step": 1, "buckets/val/eps": [9.0] * 10, "buckets/val/x_0": none}
        later = {"step": 3, "train/loss": 0.1, "buckets/val/eps_se": none}
        text = "".join(json.dumps(row) + "\n" for row in (older, {"step": 2, **last}, later))
        (run / "metrics.jsonl").write_text(text + '{"step": 4, "buckets/val/eps": [1, ')
        for source in (csv, table, table.read_text(), run, run / "metrics.jsonl"):
            found = Curve.load(str(source))
            assert found.t.tolist() == pytest.approx([0, 0.05, 0.45, 0.95, 1])
            assert found.value.tolist() == [4, 4, 2, 1, 1]
        assert Curve.load(run, "x_0").value.tolist() == [1, 1, 5, 5]

    @pytest.mark.parametrize("name", BROKEN)
    def test_a_broken_file_is_one_line_that_names_it(self, name, tmp_path):
        content = BROKEN[name]
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=name) as error:
            Curve.load(str(tmp_path / name))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600

    @pytest.mark.parametrize("source", ["", "nowhere.csv", "a\nb.csv", "{", "/dev/null", "x" * 5000, "a\0b", None, 3])
    def test_what_is_no_file_is_one_line(self, source):
        with pytest.raises(ValueError, match=r"^curve=") as error:
            Curve.load(source)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600

    def test_a_panel_is_one_of_three(self):
        with pytest.raises(ValueError, match=r"^panel=mse: need one of eps, x_0, v"):
            Curve.load('{"t": [0], "value": [1]}', "mse")


class TestSlots:
    HYPERBOLA = Curve(torch.logspace(-3, 0, 3000).tolist(), (1 / torch.logspace(-3, 0, 3000)).tolist())
    """1/t from 0.001 on and 1000 before it: 1 + log(1000 t) is its integral up to t."""

    def test_a_constant_loss_gives_equal_slots(self):
        found = Slots(curve=Curve([0.5], [3]), slots=10)
        torch.testing.assert_close(found.edges, torch.linspace(0, 1, 11, dtype=torch.float64))

    def test_a_loss_like_one_over_t_gives_the_closed_form(self):
        found = Slots(curve=self.HYPERBOLA, slots=10)
        whole = 1 + math.log(1000)
        expected = [0, 1e-3 * whole / 10, *(math.exp(k / 10 * whole - 1) / 1000 for k in range(2, 10)), 1]
        torch.testing.assert_close(found.edges, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("slots", [2, 7, 10])
    def test_slots_carry_equal_shares_and_cover_the_range(self, slots):
        curve = Curve([0, 0.1, 0.5, 1], [9, 2, 0, 1])
        found = Slots(curve=curve, slots=slots)
        assert found.count == slots
        assert found.edges[0] == 0
        assert found.edges[-1] == 1
        assert (found.edges.diff() > 0).all()
        shares = curve.cumulative(found.edges).diff() / curve.total
        torch.testing.assert_close(shares, torch.full_like(shares, 1 / slots))

    def test_one_slot_draws_from_itself_alone_and_from_all_of_it(self):
        edges, levels = [0.0, 0.2, 0.5, 1.0], Linear()
        for k, (low, high) in enumerate(itertools.pairwise(edges)):
            for correct, weight in ((False, 1.0), (True, high - low)):
                found = Slot(k, edges[1:-1], correct=correct)
                t, w = found(2000, levels, Place(0, 0))
                assert low <= t.min() < low + 1e-3
                assert high - 1e-3 < t.max() <= high
                torch.testing.assert_close(w, torch.full_like(w, weight))

    def test_a_mixture_draws_each_slot_with_its_probability(self):
        found = Slots([0.2, 0.5, 0.6], probabilities=[3, 1, 0, 4], correct=False)
        t, w = found(80_000, Linear(), Place(0, 0))
        counts = torch.histogram(t.double(), found.edges).hist
        torch.testing.assert_close(counts / len(t), torch.tensor([3, 1, 0, 4]).double() / 8, rtol=0, atol=1e-4)
        assert torch.equal(w, torch.ones_like(w))

    @pytest.mark.parametrize("steps", [None, 7, 1000])
    def test_a_corrected_mixture_is_unbiased(self, steps):
        """Also where times move to the points of a table that knows nothing of the slots."""
        found = Slots(curve=self.HYPERBOLA, slots=5, probabilities=[1, 2, 3, 4, 5], steps=steps)
        t, w = found(1_000_000, Linear(), Place(0, 0))
        free = middles(1_000_000) if steps is None else torch.arange(steps).double() / (steps - 1)
        expected = (-3 * free).exp().mean().item()
        assert (w.double() * (-3 * t.double()).exp()).mean().item() == pytest.approx(expected, rel=2e-5)
        assert (-3 * t.double()).exp().mean().item() != pytest.approx(expected, rel=0.1)

    def test_a_curriculum_visits_its_order_with_its_budget(self):
        found = Curriculum([2, 0, 1, 0], 100, [0.2, 0.5])
        visited = []
        for samples_seen in range(0, 1000, 50):
            found.advance(samples_seen)
            t = found(50, Linear(), Place(0, samples_seen))[0]
            slots = torch.bucketize(t.double(), found.edges[1:-1], right=True).unique()
            assert len(slots) == 1
            visited.append(slots.item())
        assert visited == [2, 2, 0, 0, 1, 1, 0, 0] * 2 + [2, 2, 0, 0]

    def test_a_round_of_a_corrected_curriculum_is_unbiased(self):
        found = Curriculum([2, 0, 1, 0], 1000, [0.2, 0.5], correct=True)
        total = 0.0
        for samples_seen in range(0, 4000, 500):
            found.advance(samples_seen)
            t, w = found(500, Linear(), Place(0, samples_seen))
            total += (w.double() * (-3 * t.double()).exp()).sum().item()
        assert total / 4000 == pytest.approx((1 - math.exp(-3)) / 3, rel=1e-4)

    def test_boundaries_are_in_the_checkpoint(self):
        state = Slots(curve=self.HYPERBOLA, slots=5).state_dict()
        found = Slots([0.2, 0.4, 0.6, 0.8])
        found.load_state_dict(state)
        assert torch.equal(found.edges, state["edges"])
        assert found.edges[1] < 0.01


REFUSED = [
    (
        "slots",
        {"curve": None},
        "boundaries=null: slots have no boundaries of their own; give them boundaries=[...] or ",
    ),
    ("slots", {"boundaries": [0.1]}, "boundaries=[0.1]: given beside a curve; curve=null"),
    ("slots", {"curve": "x.csv"}, "curve=x.csv: no such file"),
    ("slots", {"slots": 1}, "slots=1: need at least 2"),
    ("slots", {"curve": None, "boundaries": [0.5, 0.2]}, "boundaries=[0.5, 0.2]: need"),
    ("slots", {"curve": None, "boundaries": []}, "boundaries=[]: need"),
    ("slots", {"curve": None, "boundaries": [0, 0.5]}, "boundaries=[0, 0.5]: need"),
    ("slots", {"curve": None, "boundaries": [0.5, math.nan]}, "boundaries=[0.5, nan]: need"),
    ("slots", {"probabilities": [1, 2]}, "probabilities=[1.0, 2.0]: need 10"),
    ("slots", {"slots": 2, "probabilities": [0, 1]}, "probabilities=[0.0, 1.0]: need 2 numbers > 0, or correct=false"),
    ("slots", {"slots": 2, "probabilities": [0, 0], "correct": False}, "probabilities=[0.0, 0.0]: need 2 numbers >= 0"),
    ("slot", {"slot": 10}, "slot=10: need"),
    ("slot", {"slot": -1}, "slot=-1: need"),
    ("slot", {"curve": None}, "boundaries=null: slots have no boundaries"),
    ("curriculum", {"budget": 0}, "budget=0"),
    ("curriculum", {"slots": 2}, "order=[9, 8,"),
    ("curriculum", {"order": []}, "order=[]"),
    ("curriculum", {"curve": None}, "boundaries=null: slots have no boundaries"),
    ("curriculum", {"order": [1], "correct": True}, "order=[1]: need"),
    ("from_curve", {"curve": None}, "curve=None: need a file"),
    ("from_curve", {"panel": "mse"}, "panel=mse: need one of"),
    ("from_curve", {"correct": True, "curve": '{"t": [0, 1], "value": [0, 1]}'}, "correct=true: the curve is 0"),
    ("importance", {"floor": 0}, "floor=0: need"),
    ("importance", {"floor": -0.1}, "floor=-0.1: need"),
    ("importance", {"floor": 1.1}, "floor=1.1: need"),
    ("importance", {"history": 0}, "history=0: need"),
    ("importance", {"steps": 100}, "steps=100: need 1000"),
    ("importance", {"schedule": Even(), "points": 1}, "points=1: need"),
    ("uniform", {"steps": 1}, "steps=1: need"),
    ("uniform", {"steps": "ten"}, "steps=ten: need"),
    ("logit_normal", {"scale": 0}, "scale=0: need"),
    ("lognormal", {"p_std": math.inf}, "p_std=inf: need"),
    ("speed", {"tau": 1}, "tau=1: need"),
    ("speed", {"k": 0.5}, "k=0.5: need"),
    ("mode", {"s": 3}, "s=3: need"),
]


@pytest.mark.parametrize(("timesteps", "arguments", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(timesteps, arguments, message):
    with pytest.raises(UserError) as error:
        make("timesteps", timesteps, **arguments)
    assert str(error.value).startswith(f"timesteps.{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("timesteps=slots timesteps.curve=null", "timesteps.boundaries=null: slots have no boundaries of their own"),
        ("timesteps=slots timesteps.curve=null timesteps.boundaries=[0.5,0.4]", "timesteps.boundaries=[0.5, 0.4]: "),
        ("timesteps=from_curve timesteps.curve=nowhere", "timesteps.curve=nowhere: no such file"),
        ("spacing=loss_density spacing.curve=null", "spacing.curve=None: need a file"),
    ],
)
def test_a_command_line_is_refused_in_one_line(line, message):
    with pytest.raises(UserError) as error:
        getattr(denoiselab.build(*line.split()), line.partition("=")[0])
    assert str(error.value).startswith(message)


class TestLossDensity:
    @every("schedule")
    @pytest.mark.parametrize("steps", [1, 2, 10, 1500])
    def test_times_fall_strictly_from_pure_noise(self, schedule, steps):
        levels = one("schedule", schedule)
        for curve in (Curve([0, 0.2, 1], [4, 2, 1]), Curve([0, 0.1, 0.2, 0.6, 0.8, 1], [1e4, 1, 0, 0, 1, 0])):
            times = LossDensity(curve)(levels, steps)
            assert len(times) == steps
            assert times[0] == 1
            assert (times.diff() < 0).all()
            assert times[-1] > levels.earliest or steps == 1

    def test_they_cut_the_loss_into_equal_parts(self):
        curve = Curve([0, 0.1, 0.5, 1], [9, 2, 0.5, 1])
        times = LossDensity(curve)(Linear(), 20)
        parts = curve.cumulative(torch.cat([times, times.new_zeros(1)])).diff() / curve.total
        torch.testing.assert_close(parts, torch.full_like(parts, -1 / 20))

    def test_a_constant_loss_gives_even_times(self):
        times = LossDensity(Curve([0], [1]))(Linear(), 4)
        assert times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25])
