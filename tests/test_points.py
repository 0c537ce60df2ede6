"""Two-dimensional point sets: what is drawn, the exact densities and scores, and how a run on each behaves."""

from __future__ import annotations

import math
from functools import cache

import pytest
import scipy.integrate
import scipy.stats
import torch
import yaml
from torch import Tensor

from denoiselab import data
from denoiselab.checks import check
from denoiselab.compose import compose, conf_dir
from denoiselab.data import EightGaussians, Mixture, Points
from denoiselab.data.points import Known
from denoiselab.data.points.spread import Spread
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.metrics import ModeCoverage
from exact import OPTIONS, make, normals


def _class(option: str) -> type:
    target = yaml.safe_load((conf_dir() / "data" / f"{option}.yaml").read_text())["_target_"]
    return getattr(data, target.rpartition(".")[2], object)


POINTS = [name for name in OPTIONS["data"] if issubclass(_class(name), Points)]
KNOWN = [name for name in POINTS if issubclass(_class(name), Known)]
SPREAD = [name for name in POINTS if issubclass(_class(name), Spread)]
MIXTURES = [name for name in POINTS if issubclass(_class(name), Mixture)]
LABELLED = [name for name in POINTS if name != "swissroll"]


@cache
def made(name: str):
    return make("data", name, n=200)


@cache
def drawn(name: str) -> tuple[Tensor, Tensor | None]:
    points, label = made(name).draw(200_000, seed=1)
    return points.double(), label


def f64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def within(found: Tensor, expected: Tensor | float, most: float = 4.0) -> bool:
    """Whether the mean over the first axis is as expected, in standard errors."""
    return bool(((found.mean(0) - expected).abs() <= most * found.std(0) / math.sqrt(len(found))).all())


# Draws


def _moments() -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and covariance of every option, derived by hand."""
    pi, one, zero = math.pi, torch.eye(2).double(), torch.zeros(2).double()
    found = {
        "8gaussians": (zero, (EightGaussians.radius**2 / 2 + EightGaussians.std**2) * one),
        "circles": (zero, ((1.5**2 + 3**2) / 4 + 0.24**2) * one),
        "rings": (zero, (9 * (1 + 4 + 9 + 16) / 16 / 8 + 0.08**2) * one),
        "pinwheel": (zero, 4 * (1 + 0.3**2 + 0.1**2) / 2 * one),
        "checkerboard": (zero, f64([[16 / 3, 1.0], [1.0, 16 / 3]])),
    }
    # of an upper half circle of radius 2 about 0, mean (0, 4/pi); the lower moon is it turned about (0, 0.3)
    to_upper = f64([-1.0, 4 / pi - 0.5])
    half_circle = torch.diag(f64([2.0, 2 - 16 / pi**2]))
    moons = half_circle + 0.2**2 * one + torch.outer(to_upper, to_upper)
    found["moons"] = f64([0.0, 0.3]), moons
    # E[t cos t] = 2, E[t sin t] = 2/(3 pi), E[t^2] = 9.75 pi^2, E[t^2 cos 2t] = -1/2, E[t^2 sin 2t] = 3 pi
    mean = f64([2, 2 / (3 * pi)])
    second = f64([[9.75 * pi**2 - 0.5, 3 * pi], [3 * pi, 9.75 * pi**2 + 0.5]]) / 2
    found["swissroll"] = mean / 5, (second - torch.outer(mean, mean) + one) / 25
    # with end = L = 3 pi: E[u^2] = L^2/2, E[u^2 cos 2u] = 3/2, E[u^2 sin 2u] = 3/(2 L) - L, E[u cos u] = -4/L,
    # E[u sin u] = 2 - 8/L^2; of s uniform on [0, 1/2], E[s] = 1/4 and E[s^2] = 1/12
    end = 3 * pi
    xx = end**2 / 4 + 3 / 4 + 2 / end + 1 / 12
    yy = end**2 / 4 - 3 / 4 + (2 - 8 / end**2) / 2 + 1 / 12
    xy = (end - 1.5 / end) / 2 + 1 / end + (2 - 8 / end**2) / 4 + 1 / 16
    found["2spirals"] = zero, f64([[xx, xy], [xy, yy]]) / 9 + 0.1**2 * one
    means = f64([[-2.0, -1.0], [2.0, -1.0], [0.0, 2.0]])
    covariances = f64([[0.5 + 0.5 + 1.0, 0.3 - 0.3 + 0.0], [0.0, 0.5 + 0.5 + 0.1]])
    found["mixture"] = zero, (covariances + means.T @ means) / 3
    return found


MOMENTS = _moments()


@pytest.mark.parametrize("name", POINTS)
def test_the_moments_of_draws_are_those_derived(name):
    points, _ = drawn(name)
    mean, covariance = MOMENTS[name]
    assert within(points, mean)
    away = points - mean
    assert within(away[:, :, None] * away[:, None], covariance)


@pytest.mark.parametrize("name", SPREAD)
def test_the_moments_of_centres_are_those_derived(name):
    """To 12 digits, so the nodes of quadratures and their weights are right."""
    made_of = made(name)
    c, w = made_of.centres
    mean, covariance = MOMENTS[name]
    about = (made_of.half**2 / 3 + made_of.std**2) * torch.eye(2).double()
    assert w.sum().item() == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(w @ c, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((w * c.T) @ c - torch.outer(mean, mean) + about, covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", POINTS)
def test_draws_depend_on_the_seed_alone(name):
    torch.manual_seed(3)
    first = made(name).draw(100, seed=5)
    torch.manual_seed(4)
    again, other = make("data", name, n=60).draw(100, seed=5), made(name).draw(100, seed=6)
    assert torch.equal(first[0], again[0])
    assert not (first[0] == other[0]).any()
    assert first[0].dtype == torch.float32
    assert first[0].shape == (100, 2)
    assert (first[1] is None) == (made(name).num_classes == 0)


@pytest.mark.parametrize("name", POINTS)
def test_held_out_points_are_other_draws(name):
    found = made(name)
    assert (len(found.train), len(found.held_out)) == (200, 40)
    points, label = found.draw(240)
    whole = torch.cat([found.train.x_0, found.held_out.x_0])
    torch.testing.assert_close(found.codec.decode(whole), points, rtol=0, atol=1e-5)
    assert len(whole.unique(dim=0)) == 240
    assert torch.cat([found.train.ids, found.held_out.ids]).tolist() == list(range(240))
    assert found.train.x_0.mean(0).abs().max() < 1e-5
    assert found.train.x_0.square().mean().item() == pytest.approx(1, rel=1e-5)
    if label is not None:
        assert torch.equal(torch.cat([found.train.label, found.held_out.label]), label)
        assert found.held_out.batch(slice(2))["cond"]["label"].tolist() == label[200:202].tolist()
    else:
        assert found.train.batch(slice(2))["cond"] == {}


def test_eight_gaussians_are_those_of_runs_made_before():
    codec = EightGaussians().codec
    assert codec.mean.tolist() == pytest.approx([-0.0097028, -0.0151577], abs=1e-6)
    assert codec.std == pytest.approx(2.0316019, rel=1e-6)


# Labels


def test_every_set_but_the_swiss_roll_has_classes():
    assert [name for name in POINTS if made(name).num_classes == 0] == ["swissroll"]
    assert {name: made(name).num_classes for name in LABELLED} == CLASSES


CLASSES = dict(zip(LABELLED, (2, 8, 8, 2, 3, 2, 5, 4), strict=True))


@pytest.mark.parametrize("name", LABELLED)
def test_classes_are_as_likely_as_they_should_be(name):
    label, k = drawn(name)[1], CLASSES[name]
    assert within(torch.nn.functional.one_hot(label, k).double(), 1 / k)


NOISE = 0.5


def _posterior(name: str, points: Tensor) -> Tensor:
    """P(label | point + NOISE eps), (N, classes): components stand label by label."""
    one = torch.ones(len(points), 1).double()
    parts = [made(name).components(y, w, NOISE * w)[0] for y, w in zip(points.split(64), one.split(64), strict=True)]
    return torch.cat(parts).unflatten(1, (CLASSES[name], -1)).logsumexp(2).softmax(1)


@pytest.mark.parametrize("name", [name for name in LABELLED if name in KNOWN])
def test_labels_are_drawn_as_the_density_says(name):
    """Where noise mixes classes, each has its part: E[P(label | y)] = E[sum_k P(k | y)^2]."""
    points, label = (part[:1000] for part in drawn(name))
    p = _posterior(name, points + NOISE * normals(1000, 2))
    told = p.gather(1, label[:, None])[:, 0]
    assert within(told - p.square().sum(1), 0.0)


def test_circles_rings_and_squares_are_told_by_where_a_point_is():
    points, label = drawn("rings")
    ring = (points.norm(dim=1, keepdim=True) - 0.75 * torch.arange(1, 5)).abs().argmin(1)
    assert (ring == label).float().mean() > 0.9999  # 4.7 standard deviations to the middle between two
    points, label = drawn("circles")
    outside = (points.norm(dim=1, keepdim=True) > 2.25).double()
    for k, radius in enumerate((1.5, 3.0)):
        assert within(outside[label == k], scipy.stats.rice.sf(2.25, radius / 0.24, scale=0.24))
    points, label = drawn("checkerboard")
    column, row = ((points + 4) / 2).floor().long().unbind(1)
    assert ((column + row) % 2 == 0).all()
    assert torch.equal(2 * column + row // 2, label)


def test_each_curve_has_its_mean():
    end = 3 * math.pi
    spiral = f64([4 / end + 1 / 4, 2 - 8 / end**2 + 1 / 4]) / 3
    upper, lower = f64([-1, 4 / math.pi - 0.2]), f64([1, 0.8 - 4 / math.pi])
    for name, means in {"moons": (upper, lower), "2spirals": (spiral, -spiral)}.items():
        points, label = drawn(name)
        for k, mean in enumerate(means):
            assert within(points[label == k], mean)


def test_eight_gaussians_overlap_as_they_should():
    points, label = drawn("8gaussians")
    nearest = torch.cdist(points, EightGaussians(n=8).centres.double()).argmin(1)
    half = math.sin(math.pi / 8) * EightGaussians.radius / EightGaussians.std  # to the border, in standard deviations
    assert within((nearest != label).double()[:, None], math.erfc(half / math.sqrt(2)))  # two neighbours, one tail each


@pytest.mark.parametrize("arms", [5, 3])
def test_an_arm_of_the_pinwheel_is_where_it_should_be(arms):
    """The mean of an arm, 2 E[a exp(-i (2 pi k/arms + e^a/4))], by another quadrature."""
    points, label = data.Pinwheel(n=50, arms=arms).draw(100_000, seed=3)

    def mean(part):
        def density(a):
            return 2 * a * part(-math.exp(a) / 4) * scipy.stats.norm.pdf(a, 1, 0.3)

        return scipy.integrate.quad(density, -2, 4, epsabs=1e-12)[0]

    arm = complex(mean(math.cos), mean(math.sin))
    for k in range(arms):
        turned = arm * complex(math.cos(2 * math.pi * k / arms), -math.sin(2 * math.pi * k / arms))
        assert within(points[label == k].double(), f64([turned.real, turned.imag]))


# Runs


SMALL = ("callbacks=none", "trainer.threads=1", "model.width=8", "model.depth=1", "data.n=100", "data.batch_size=8")


@pytest.mark.parametrize("name", POINTS)
def test_a_run_trains_and_is_measured(name, train):
    lines = ["experiment=points", f"data={name}", "trainer.max_steps=2", "sampler.steps=1", "evaluation.n=10"]
    lines += [] if name in MIXTURES else ["~metrics.modes"]
    run = train(*lines, quick=("debug=quick", *SMALL))
    (record,) = run.rglob("evaluations/**/*.json")
    assert "mmd2" in record.read_text()
    assert ("modes_covered" in record.read_text()) == (name in MIXTURES)


@pytest.mark.parametrize("name", [name for name in POINTS if name not in MIXTURES])
def test_what_has_no_modes_is_told_to_drop_their_measurement(name):
    with pytest.raises(ValueError, match=r"^metrics\.modes measures .* wants ~metrics\.modes$"):
        ModeCoverage().check(made(name))


def test_an_unlabelled_set_is_told_that_it_cannot_be_guided():
    lines = ["experiment=points", "data=swissroll", "~metrics.modes", "guidance.scale=2", *SMALL]
    with pytest.raises(UserError, match=r"^guidance=CFG: .*; use guidance=none$"):
        check(Parts(resolve(compose("train", lines))))


MISTAKES = [
    ("8gaussians", {"n": 7}, "data.n=7: need at least 8 points"),
    ("swissroll", {"n": 4}, "data.n=4: need at least 5 points"),
    ("moons", {"noise": 0}, "data.noise=0: need a number >= 0.01"),
    ("moons", {"noise": math.nan}, "data.noise=nan: need a finite number"),
    ("circles", {"noise": 0}, "data.noise=0: need a number > 0"),
    ("circles", {"factor": 1}, "data.factor=1: need a number in (0, 1)"),
    ("rings", {"noise": math.inf}, "data.noise=inf: need a finite number"),
    ("swissroll", {"noise": 0.05}, "data.noise=0.05: need a number >= 0.1"),
    ("2spirals", {"noise": 0.01}, "data.noise=0.01: need a number >= 0.02"),
    ("pinwheel", {"arms": 0}, "data.arms=0: need at least 1"),
    ("mixture", {"means": []}, "data.means=[]: need one pair of numbers per mode"),
    ("mixture", {"means": [1, 2]}, "data.means=[1, 2]: need a list of lists of finite numbers"),
    ("mixture", {"means": [[0, 0], [1]]}, "data.means=[[0, 0], [1]]: need one pair of numbers per mode"),
    ("mixture", {"means": [[0, 0], [1, "a"]]}, "data.means=[[0, 0], [1, 'a']]: need a list of lists of finite"),
    ("mixture", {"means": [[0, math.inf]]}, "data.means=[[0, inf]]: need a list of lists of finite numbers"),
    ("mixture", {"stds": [1, 1]}, "data.stds=[1, 1]: need 3 numbers > 0, one per mode"),
    ("mixture", {"stds": [1, 1, 0]}, "data.stds=[1, 1, 0]: need 3 numbers > 0, one per mode"),
    ("mixture", {"stds": 0.3}, "data.stds=0.3: need a list of finite numbers or null"),
    ("mixture", {"weights": [1, 2]}, "data.weights=[1, 2]: need 3 numbers > 0, one per mode"),
    ("mixture", {"weights": [1, 2, -1]}, "data.weights=[1, 2, -1]: need 3 numbers > 0, one per mode"),
    ("mixture", {"covariances": None}, "need 3 symmetric positive-definite 2 x 2 matrices, one per mode, or stds"),
    ("mixture", {"covariances": [[1, 0], [0, 1]]}, "need a list of lists of lists of finite numbers or null"),
    ("mixture", {"means": [[0, 0]], "covariances": [[[1, 2], [2, 1]]]}, "need 1 symmetric positive-definite 2 x 2"),
    ("mixture", {"means": [[0, 0]], "covariances": [[[1, 0.5], [0, 1]]]}, "need 1 symmetric positive-definite 2 x 2"),
]


@pytest.mark.parametrize(("name", "given", "expected"), MISTAKES)
def test_a_bad_value_is_one_line(name, given, expected):
    with pytest.raises(UserError) as error:
        make("data", name, **given)
    option = list(given)[-1]
    assert str(error.value).startswith(f"data.{option}={given[option]}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


# Modes


UNEVEN = {"means": [[0, 0], [0, 0], [6, 0]], "stds": [0.05, 1.5, 0.5], "weights": [1, 7, 2]}
"""A narrow mode within a wide one, and another."""


def test_a_mixture_may_be_given_by_standard_deviations_and_weights():
    found = make("data", "mixture", n=100, **UNEVEN)
    assert found.weights.tolist() == pytest.approx([0.1, 0.7, 0.2])
    points, label = found.draw(100_000, seed=1)
    assert within(torch.nn.functional.one_hot(label, 3).double(), found.weights)
    for k, (mean, std) in enumerate(zip(UNEVEN["means"], UNEVEN["stds"], strict=True)):
        away = points[label == k].double() - torch.tensor(mean)
        assert within(
            torch.cat([away, away.square(), away.prod(1, keepdim=True)], 1), VARIANCE[0] + std**2 * VARIANCE[1]
        )


VARIANCE = torch.zeros(5).double(), f64([0, 0, 1, 1, 0])


def test_modes_of_a_mixture_are_told_by_their_likelihood_and_counted_by_their_weight():
    found = make("data", "mixture", n=2000, **UNEVEN)
    real, label = found.draw(4000, seed=2)
    (whole,) = ModeCoverage().measure(real, None, found)
    assert whole.value == whole.controls["held_out"] == 3
    assert whole.protocol["least_share"] == pytest.approx([0.01, 0.07, 0.02])
    assert whole.details["share"] == pytest.approx([0.1, 0.7, 0.2], abs=0.03)
    assert whole.details["outside"] < 0.003
    for lost in range(3):
        (part,) = ModeCoverage().measure(real[label != lost], None, found)
        assert part.value == 2
        assert part.details["share"][lost] < 0.01


def test_a_mode_is_as_wide_as_its_covariance():
    """4 standard deviations are 4 along one axis of this mode and 0.4 along the other."""
    tilted = Mixture(means=[[1, 1], [9, 9]], covariances=[[[0.505, 0.495], [0.495, 0.505]]] * 2, n=10)
    along = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    for axis, reach in ((0, 4.0), (1, 0.4)):
        mode, distance = tilted.nearest(1 + along[axis] * torch.tensor([[0.5], [0.99], [1.01]]) * reach)
        assert mode.tolist() == [0, 0, 0]
        assert distance.tolist() == pytest.approx([2, 3.96, 4.04], rel=1e-5)


def test_modes_of_eight_gaussians_are_counted_as_their_nearest_centres():
    found = EightGaussians(n=2000)
    samples = 1.3 * found.draw(3000, seed=4)[0]
    distance, nearest = torch.cdist(samples.double(), found.centres.double()).min(1)
    share = nearest[distance <= 4 * found.std].bincount(minlength=8).double() / 3000
    (measured,) = ModeCoverage().measure(samples, None, found)
    assert measured.details == {"share": share.tolist(), "outside": 1 - share.sum().item()}
    assert measured.value == (share >= 1 / 80).sum()
    assert measured.protocol == {"radius": "4 standard deviations", "least_share": 1 / 80}
