"""The densities and scores of points at every noise level, against other implementations and against draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from denoiselab.data import Checkerboard, Circles, EightGaussians, Mixture, Rings, TwoSpirals
from denoiselab.data.points.spread import box
from exact import eight_gaussians, normals
from test_points import KNOWN, POINTS, drawn, f64, made, within

LEVELS = [(1.0, 0.0), (0.9, 0.05), (0.6, 0.8), (0.01, 1.0)]
"""(alpha, sigma), in the units of the points."""


def noised(name: str, n: int, alpha: float, sigma: float) -> Tensor:
    """n points of the set at this noise level, float64."""
    return alpha * made(name).draw(n, seed=2)[0].double() + sigma * normals(n, 2, seed=3)


def test_all_but_the_pinwheel_have_a_density():
    assert set(POINTS) - set(KNOWN) == {"pinwheel"}


# Against other implementations


def _mixture(points, alpha, sigma, means, covariances, weights):
    parts = [
        w
        * scipy.stats.multivariate_normal(alpha * np.array(m), alpha**2 * np.array(c) + sigma**2 * np.eye(2)).pdf(
            points
        )
        for m, c, w in zip(means, covariances, weights, strict=True)
    ]
    return np.log(np.sum(parts, axis=0))


def _rings(points, alpha, sigma, radii, std):
    r, width = np.linalg.norm(points, axis=1), math.hypot(alpha * std, sigma)
    rice = [scipy.stats.rice.pdf(r, alpha * radius / width, scale=width) for radius in radii]
    return np.log(np.mean(rice, axis=0) / (2 * math.pi * r))


def _checkerboard(points, alpha, sigma):
    inside = [(x, y) for x in range(-2, 2) for y in range(-2, 2) if (x + y) % 2 == 0]
    total = 0.0
    for corner in inside:
        sides = [
            scipy.stats.norm.cdf((alpha * (2 * c + 2) - p) / sigma) - scipy.stats.norm.cdf((alpha * 2 * c - p) / sigma)
            for c, p in zip(corner, points.T, strict=True)
        ]
        total = total + sides[0] * sides[1] / (8 * 4 * alpha**2)
    return np.log(total)


def _curve(points, alpha, sigma, curves, share, u, std, half=0.0):
    """Simpson's rule at many points u of curves that are each as likely."""
    width, found = math.hypot(alpha * std, sigma), []
    for point in points:
        value = 0.0
        for curve in curves:
            away = [p - alpha * c for p, c in zip(point, curve, strict=True)]
            if half:
                ndtr, h = scipy.special.ndtr, alpha * half
                sides = [(ndtr((x + h) / width) - ndtr((x - h) / width)) / (2 * h) for x in away]
            else:
                sides = [scipy.stats.norm.pdf(x, scale=width) for x in away]
            value += scipy.integrate.simpson(sides[0] * sides[1] * share, x=u) / len(curves)
        found.append(math.log(value))
    return np.array(found)


def _moons(points, alpha, sigma):
    u = np.linspace(0, math.pi, 4001)
    upper = -1 + 2 * np.cos(u), -0.2 + 2 * np.sin(u)
    lower = 1 - 2 * np.cos(u), 0.8 - 2 * np.sin(u)
    return _curve(points, alpha, sigma, [upper, lower], 1 / math.pi, u, 0.2)


def _swissroll(points, alpha, sigma):
    t = np.linspace(1.5 * math.pi, 4.5 * math.pi, 8001)
    return _curve(points, alpha, sigma, [(t * np.cos(t) / 5, t * np.sin(t) / 5)], 1 / (3 * math.pi), t, 0.2)


def _2spirals(points, alpha, sigma):
    u = np.linspace(0, 3 * math.pi, 20_001)
    x, y = (-u * np.cos(u) + 0.25) / 3, (u * np.sin(u) + 0.25) / 3
    return _curve(points, alpha, sigma, [(x, y), (-x, -y)], 2 * u / (3 * math.pi) ** 2, u, 0.1, 0.25 / 3)


def _8gaussians(points, alpha, sigma):
    means = [[math.cos(k * math.pi / 4) * 4 / 1.414, math.sin(k * math.pi / 4) * 4 / 1.414] for k in range(8)]
    return _mixture(points, alpha, sigma, means, [np.eye(2) * (0.5 / 1.414) ** 2] * 8, [1 / 8] * 8)


def _three(points, alpha, sigma):
    covariances = [[[0.5, 0.3], [0.3, 0.5]], [[0.5, -0.3], [-0.3, 0.5]], [[1.0, 0.0], [0.0, 0.1]]]
    return _mixture(points, alpha, sigma, [[-2, -1], [2, -1], [0, 2]], covariances, [1 / 3] * 3)


OTHER = {
    "2spirals": _2spirals,
    "8gaussians": _8gaussians,
    "checkerboard": _checkerboard,
    "circles": lambda *args: _rings(*args, (1.5, 3), 0.24),
    "mixture": _three,
    "moons": _moons,
    "rings": lambda *args: _rings(*args, (0.75, 1.5, 2.25, 3), 0.08),
    "swissroll": _swissroll,
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_density_is_that_of_another_implementation(name):
    """To float32, in which the centres of the eight Gaussians are kept, or to 10 digits."""
    tolerance = 1e-5 if name == "8gaussians" else 1e-10
    for alpha, sigma in LEVELS:
        if name == "checkerboard" and sigma == 0:
            continue
        points = noised(name, 20, alpha, sigma)
        expected = torch.from_numpy(OTHER[name](points.numpy(), alpha, sigma))
        found = made(name).log_density(points, alpha, sigma)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_mixture_has_its_weights():
    uneven = {"means": [[0.0, 1.0], [2.0, -1.0]], "covariances": [[[1.0, 0.2], [0.2, 0.3]], [[0.4, -0.3], [-0.3, 0.9]]]}
    found, points = Mixture(**uneven, weights=[3, 1], n=10), 2 * normals(50, 2)
    for alpha, sigma in LEVELS:
        expected = torch.from_numpy(_mixture(points.numpy(), alpha, sigma, **uneven, weights=[0.75, 0.25]))
        torch.testing.assert_close(found.log_density(points, alpha, sigma), expected, rtol=1e-10, atol=1e-10)


def test_the_checkerboard_without_noise_is_even():
    points, _ = drawn("checkerboard")
    found = made("checkerboard")
    assert (found.log_density(points[:1000]) + math.log(32)).abs().max() < 1e-12
    assert (found.score(points[:1000]) == 0).all()
    assert found.log_density(1e-7 * points[:10], 1e-7).tolist() == pytest.approx([-math.log(32e-14)] * 10, rel=1e-12)
    outside = f64([[1.0, -1.0], [5.0, 1.0], [-3.0, 4.5]])
    assert (found.log_density(outside) == -math.inf).all()
    assert found.score(outside).isnan().all()


@pytest.mark.parametrize(("half", "sigma"), [(1.0, 1.0), (1.0, 0.05), (0.1, 1.0), (1e-3, 1.0), (1.0, 1e-4)])
def test_an_interval_with_noise_holds_its_digits_far_out_and_where_it_is_narrow(half: float, sigma: float):
    """Against distribution functions in 60 digits."""
    import mpmath

    at = [0.0, 0.3, 0.99, 1.0, 1.01, 1.7, 5.0, 20.0, -37.0, 59.3]
    found = box(*(torch.tensor(value, dtype=torch.float64) for value in (at, half, sigma)))
    with mpmath.workdps(60):
        for x, log_q, gradient in zip(at, *(part.tolist() for part in found), strict=True):
            upper, lower = ((mpmath.mpf(s * half) - abs(mpmath.mpf(x))) / mpmath.mpf(sigma) for s in (1, -1))
            mass = (mpmath.erfc(-upper / mpmath.sqrt(2)) - mpmath.erfc(-lower / mpmath.sqrt(2))) / 2
            slope = (mpmath.npdf(lower) - mpmath.npdf(upper)) / mpmath.mpf(sigma) / mass
            assert log_q == pytest.approx(float(mpmath.log(mass / (2 * mpmath.mpf(half)))), rel=1e-12, abs=1e-12)
            assert gradient == pytest.approx(math.copysign(1, x) * float(slope), rel=1e-12, abs=1e-12)


# Against itself and against draws


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.7, 0.4)])
def test_the_density_integrates_to_one(name, alpha, sigma):
    """By the sum over the middles of even cells, whose error falls exponentially where a density is smooth."""
    found = TwoSpirals(n=10, noise=0.25) if name == "2spirals" else made(name)  # which takes time
    reach, width = (7.0, 1 / 4) if sigma or name == "2spirals" else (6.0, 1 / 14)
    side = torch.arange(-reach + width / 2, reach, width, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    mass = found.log_density(grid, alpha, sigma).exp().sum().item() * width**2
    assert mass == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_score_is_the_gradient_of_the_log_density(name, alpha, sigma):
    if name == "checkerboard" and sigma == 0:
        points = drawn(name)[0][:100].clone()
    else:
        points = torch.cat([noised(name, 60, alpha, sigma), 3 * normals(40, 2)])
    points.requires_grad_()
    (gradient,) = torch.autograd.grad(made(name).log_density(points, alpha, sigma).sum(), points)
    torch.testing.assert_close(made(name).score(points, alpha, sigma), gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.1), (0.4, 0.9)])
def test_the_noised_density_is_that_of_draws(name, alpha, sigma):
    """E over draws x_0 of N(y; alpha x_0, sigma^2 I)."""
    y = noised(name, 20, alpha, sigma)
    away = y - alpha * drawn(name)[0][:100_000, None]  # (draws, y, 2)
    kernel = (-away.square().sum(-1) / (2 * sigma**2)).exp() / (2 * math.pi * sigma**2)
    assert within(kernel, made(name).log_density(y, alpha, sigma).exp())


# Ends and shapes


@pytest.mark.parametrize("name", KNOWN)
def test_pure_noise_has_the_density_of_noise(name):
    points = normals(50, 2)
    expected = -points.square().sum(1) / (2 * 0.5**2) - math.log(2 * math.pi * 0.5**2)
    torch.testing.assert_close(made(name).log_density(points, 0.0, 0.5), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made(name).score(points, 0.0, 0.5), -points / 0.5**2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Circles, Rings])
def test_the_middle_of_circles_has_no_direction(kind):
    found, middle = kind(n=10), torch.zeros(1, 2).double()
    for alpha, sigma in LEVELS:
        assert found.log_density(middle, alpha, sigma).isfinite().all()
        assert (found.score(middle, alpha, sigma) == 0).all()


@pytest.mark.parametrize("name", KNOWN)
def test_levels_may_differ_from_point_to_point_and_shapes_are_free(name):
    points, alpha, sigma = normals(3, 5, 2), normals(3, 1, 1).abs(), normals(5, 1, seed=1).abs() + 0.1
    log_p, score = made(name).log_density(points, alpha, sigma), made(name).score(points, alpha, sigma)
    assert log_p.shape == (3, 5)
    assert score.shape == (3, 5, 2)
    for i, j in ((0, 0), (1, 4), (2, 3)):
        level = alpha[i, 0, 0].item(), sigma[j, 0].item()
        torch.testing.assert_close(log_p[i, j], made(name).log_density(points[i, j], *level), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(score[i, j], made(name).score(points[i, j], *level), rtol=1e-12, atol=1e-12)
    assert made(name).score(points[:0], 1.0, 0.5).shape == (0, 5, 2)
    coarse = made(name).score(points.float(), 0.8, 0.6)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse.double(), made(name).score(points, 0.8, 0.6), rtol=1e-5, atol=1e-5)


# What is diffused


@pytest.mark.parametrize("name", KNOWN)
def test_the_score_of_what_a_run_diffuses(name):
    """x_t = alpha_t (point - mean)/std + sigma_t eps, whose density over draws is a sum of Gaussians."""
    found, x_0 = made(name), made(name).codec.encode(drawn(name)[0].float()[:50_000]).double()
    alpha_t, sigma_t = 0.8, 0.6
    x_t = alpha_t * x_0[:20] + sigma_t * normals(20, 2)
    away = x_t - alpha_t * x_0[20:, None]
    kernel = (-away.square().sum(-1, keepdim=True) / (2 * sigma_t**2)).exp()
    score = found.score_of(x_t, alpha_t, sigma_t)
    assert within((-away / sigma_t**2 - score) * kernel, 0.0)


def test_the_denoiser_of_eight_gaussians_follows_from_their_score():
    found, exact = EightGaussians(n=8), eight_gaussians()
    found.codec.mean.zero_()
    found.codec.std = math.sqrt(EightGaussians.radius**2 / 2 + EightGaussians.std**2)
    alpha_t = normals(40, 1).abs().clamp(0.05, 0.95)
    sigma_t = (1 - alpha_t**2).sqrt()
    x_t = alpha_t * exact.draw(40)[0] + sigma_t * normals(40, 2, seed=1)
    x_0_hat = (x_t + sigma_t**2 * found.score_of(x_t, alpha_t, sigma_t)) / alpha_t
    torch.testing.assert_close(x_0_hat, exact(x_t, alpha_t, sigma_t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_nodes_stand_as_close_as_the_noise_asks_for(noise):
    found = TwoSpirals(n=10, noise=noise)
    on = f64([[0.1, 0.1], [1.3, -0.4]])
    u = np.linspace(0, 3 * math.pi, 40_001)
    x, y = (-u * np.cos(u) + 0.25) / 3, (u * np.sin(u) + 0.25) / 3
    share = 2 * u / (3 * math.pi) ** 2
    expected = _curve(on.numpy(), 1.0, 0.0, [(x, y), (-x, -y)], share, u, noise, 0.25 / 3)
    torch.testing.assert_close(found.log_density(on), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_narrow_squares_under_much_noise_are_points():
    """Continuous where the width of a square is held."""
    points = normals(20, 2)
    near = [Checkerboard(n=10).score(points, alpha, 1.0) for alpha in (0.9e-5, 1.1e-5)]
    torch.testing.assert_close(*near, rtol=1e-4, atol=1e-4)
