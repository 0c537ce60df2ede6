import math

import pytest
import torch

from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.target import EDM, Flow, V
from exact import OPTIONS, ExactNet, Scaled, every, make, noisy_levels, normals, relative, telling_levels, triangle


@every("target", "schedule")
@pytest.mark.parametrize("k", [1e-3, 0.1, 80.0, None])
def test_coefficients_are_homogeneous_of_degree_0(target, schedule, k):
    """None scales every level by its own 1/alpha_t: variance exploding."""
    found, y = make("schedule", schedule), make("target", target)
    t, alpha_t, sigma_t = noisy_levels(found)
    expected = torch.cat(y.coefficients(alpha_t, sigma_t))
    assert relative(torch.cat(y.coefficients(*Scaled(found, k)(t))), expected) < 1e-12


@every("target", "schedule")
def test_coefficients_have_the_shape_and_type_of_the_level(target, schedule):
    y = make("target", target)
    for dtype in (torch.float32, torch.float64):
        level = make("schedule", schedule)(torch.linspace(0, 1, 5, dtype=dtype).view(5, 1, 1))
        for value in y.coefficients(*level):
            assert value.shape == (5, 1, 1)
            assert value.dtype == dtype


@every("target", "schedule")
def test_x_0_and_eps_come_back_from_y(target, schedule):
    """As exactly as float64 can: each is off by its own noise-to-signal ratio times the rounding."""
    y = make("target", target)
    _, alpha_t, sigma_t = telling_levels(make("schedule", schedule), y)
    x_0, eps = normals(len(alpha_t), 8, seed=1), normals(len(alpha_t), 8, seed=2)
    x_t, value = alpha_t * x_0 + sigma_t * eps, y(x_0, eps, alpha_t, sigma_t)
    assert ((y.to_x_0(value, x_t, alpha_t, sigma_t) - x_0).abs() / (1 + sigma_t / alpha_t)).max() < 1e-13
    assert ((y.to_eps(value, x_t, alpha_t, sigma_t) - eps).abs() / (1 + alpha_t / sigma_t)).max() < 1e-13


@every("target", "schedule")
def test_the_two_estimates_make_x_t(target, schedule):
    """For any output of a network, not only the true y."""
    y = make("target", target)
    _, alpha_t, sigma_t = telling_levels(make("schedule", schedule), y)
    x_t, output = normals(len(alpha_t), 8, seed=1), normals(len(alpha_t), 8, seed=2)
    x_0_hat, eps_hat = y.to_x_0(output, x_t, alpha_t, sigma_t), y.to_eps(output, x_t, alpha_t, sigma_t)
    scale = 1 + (alpha_t * x_0_hat).abs()
    assert ((alpha_t * x_0_hat + sigma_t * eps_hat - x_t).abs() / scale).max() < 1e-12
    assert ((y(x_0_hat, eps_hat, alpha_t, sigma_t) - output).abs() / scale).max() < 1e-11


@every("target", "schedule")
def test_precision_is_the_exchange_rate_of_squared_errors(target, schedule):
    y = make("target", target)
    _, alpha_t, sigma_t = telling_levels(make("schedule", schedule), y)
    x_0, eps = normals(len(alpha_t), 64, seed=1), normals(len(alpha_t), 64, seed=2)
    x_t, value = alpha_t * x_0 + sigma_t * eps, y(x_0, eps, alpha_t, sigma_t)
    output = value + normals(len(alpha_t), 64, seed=3)
    error_y = (output - value).square().sum(1)
    error_x_0 = (y.to_x_0(output, x_t, alpha_t, sigma_t) - x_0).square().sum(1)
    ratio = y.precision(alpha_t, sigma_t)[:, 0] * error_x_0 / error_y
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-10)


@every("target")
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_the_weight_formula_is_the_precision(target, sigma_data):
    """The text that people read, evaluated."""
    y = make("target", target, sigma_data=sigma_data)
    for schedule in OPTIONS["schedule"]:
        _, alpha_t, sigma_t = telling_levels(make("schedule", schedule), y)
        names = {"SNR": (alpha_t / sigma_t) ** 2, "sqrt": torch.sqrt}
        formula = eval(y.snr_weight.replace("^", "**"), names) + torch.zeros_like(alpha_t)
        torch.testing.assert_close(y.precision(alpha_t, sigma_t), formula, rtol=1e-12, atol=0)


@every("schedule", "target")
def test_every_target_in_closed_form(schedule, target):
    s = 0.7
    y = make("target", target, sigma_data=s)
    _, alpha_t, sigma_t = telling_levels(make("schedule", schedule), y)
    x_0, eps = normals(len(alpha_t), 8, seed=1), normals(len(alpha_t), 8, seed=2)
    r = sigma_t / alpha_t
    skip, out = s**2 / ((r - 0.002) ** 2 + s**2), s * (r - 0.002) / (r**2 + s**2).sqrt()
    expected = {
        "x0": x_0,
        "eps": eps,
        "v": (alpha_t * eps - sigma_t * x_0) / torch.hypot(alpha_t, sigma_t),
        "flow": eps - x_0,
        "edm": (sigma_t * x_0 / s - alpha_t * s * eps) / torch.hypot(alpha_t * s, sigma_t),
        "consistency": (x_0 - skip * (x_0 + r * eps)) / out,
    }
    tolerance = 1e-14 if target != "consistency" else 1e-11  # whose skip cancels x_0 near its end
    torch.testing.assert_close(y(x_0, eps, alpha_t, sigma_t), expected[target], rtol=tolerance, atol=tolerance)


@every("schedule")
def test_edm_in_its_own_words(schedule):
    """D = c_skip x + c_out F of the paper's table 1, in its coordinates x = x_t/alpha_t, sigma = sigma_t/alpha_t."""
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    s, sigma = 0.5, sigma_t / alpha_t
    x_t, f = normals(len(alpha_t), 8, seed=1), normals(len(alpha_t), 8, seed=2)
    c_skip = s**2 / (sigma**2 + s**2)
    c_out = sigma * s / (sigma**2 + s**2).sqrt()
    theirs = c_skip * x_t / alpha_t + c_out * f
    assert ((EDM(s).to_x_0(f, x_t, alpha_t, sigma_t) - theirs).abs() / (1 + sigma)).max() < 1e-13
    weight = (sigma**2 + s**2) / (sigma * s) ** 2
    torch.testing.assert_close(EDM(s).precision(alpha_t, sigma_t), weight, rtol=1e-12, atol=0)


@every("schedule")
def test_what_edm_regresses_has_unit_variance_and_is_not_seen_in_x_t(schedule):
    """For x_0 of standard deviation sigma_data: E y^2 = 1 and E y x_t = 0; with sigma_data = 1 it is -v."""
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    for s in (0.3, 1.0, 2.0):
        a_t, b_t = EDM(s).coefficients(alpha_t, sigma_t)
        torch.testing.assert_close((a_t * s) ** 2 + b_t**2, torch.ones_like(a_t), rtol=1e-13, atol=0)
        covariance = (a_t * alpha_t * s**2 + b_t * sigma_t) / torch.hypot(alpha_t * s, sigma_t)
        assert covariance.abs().max() < 1e-13
    for mine, of_v in zip(EDM(1.0).coefficients(alpha_t, sigma_t), V().coefficients(alpha_t, sigma_t), strict=True):
        torch.testing.assert_close(mine, -of_v, rtol=1e-14, atol=0)


def test_flow_is_the_velocity_of_the_straight_path():
    """x_t = (1 - t) x_0 + t eps, whose precision is 1/t^2."""
    t = torch.linspace(0.01, 1, 20).double()[:, None]
    x_0, eps = normals(20, 8, seed=1), normals(20, 8, seed=2)
    velocity = ((1 - t - 1e-3) * x_0 + (t + 1e-3) * eps - ((1 - t) * x_0 + t * eps)) / 1e-3
    torch.testing.assert_close(Flow()(x_0, eps, 1 - t, t), velocity, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(Flow().precision(1 - t, t), t**-2, rtol=1e-12, atol=0)


@every("schedule", "target")
def test_the_score_is_the_gradient_of_the_log_density(schedule, target):
    """Of a mixture's exact denoiser, against automatic differentiation of log p(x_t)."""
    mixture, s = triangle(), 1.3
    y = make("target", target, sigma_data=s)
    _, alpha_t, sigma_t = telling_levels(make("schedule", schedule), y)
    x_0, _ = mixture.draw(len(alpha_t), seed=3)
    x_t = (alpha_t * x_0 + sigma_t * normals(*x_0.shape, seed=4)).requires_grad_()
    variance = alpha_t**2 * mixture.std**2 + sigma_t**2
    away = x_t[:, None] - alpha_t[:, None] * mixture.centres
    (-away.square().sum(-1) / (2 * variance)).logsumexp(1).sum().backward()
    denoiser = Denoiser(ExactNet(mixture, y, s), y, s)
    score = y.to_score(denoiser.ask(x_t.detach(), alpha_t, sigma_t), x_t.detach(), alpha_t, sigma_t)
    assert ((score - x_t.grad) * sigma_t / (1 + alpha_t / sigma_t)).abs().max() < 1e-12


@pytest.mark.parametrize("sigma_data", [0, -1, math.nan])
def test_a_bad_sigma_data_is_refused_in_a_line(sigma_data):
    with pytest.raises(UserError, match=rf"^target\.sigma_data={sigma_data}: need [^\n]*$"):
        make("target", "edm", sigma_data=sigma_data)


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_diffusers_has_the_same_velocity(name, theirs):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(beta_schedule=theirs, beta_start=1e-4, beta_end=0.02)
    index = torch.arange(0, 1000, 37)
    alpha_t, sigma_t = make("schedule", name)(index.double()[:, None] / 999)
    x_0, eps = normals(len(index), 8, seed=1), normals(len(index), 8, seed=2)
    velocity = reference.get_velocity(x_0.float(), eps.float(), index)
    assert relative(V()(x_0, eps, alpha_t, sigma_t), velocity.double()) < 1e-5
    added = reference.add_noise(x_0.float(), eps.float(), index)
    assert relative(alpha_t * x_0 + sigma_t * eps, added.double()) < 1e-5


def test_v_estimates_stay_bounded_where_x_0_and_eps_vanish():
    """At the clean level and at pure noise."""
    one, nothing = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    output, x_t = normals(1, 8, seed=1), normals(1, 8, seed=2)
    for level in ((one, nothing), (nothing, one)):
        assert torch.equal(V().to_x_0(output, x_t, *level), x_t if level[0] else -output)
        assert torch.equal(V().to_eps(output, x_t, *level), output if level[0] else x_t)
