"""The network as an estimator of x_0: what it is given at each level, and what becomes of its answer."""

import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.schedule import Cosine
from exact import Scaled, White, every, make, noisy_levels, normals
from networks import build, perturbed


class Seen(nn.Module):
    """A network that keeps what it was given and answers with zeros."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor, c_noise: Tensor, **cond: Tensor) -> Tensor:
        self.x, self.c_noise, self.cond = x, c_noise, cond
        return 0 * x


@every("schedule")
@pytest.mark.parametrize("std", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("k", [0.1, 1.0, None])
def test_inputs_have_unit_variance_at_every_level(schedule, std, k):
    alpha_t, sigma_t = Scaled(make("schedule", schedule), k)(torch.linspace(0, 1, 11, dtype=torch.float64)[:, None])
    net = Seen()
    x_t = alpha_t * std * normals(11, 20_000, seed=1) + sigma_t * normals(11, 20_000, seed=2)
    Denoiser(net, make("target", "v"), std)(x_t, alpha_t, sigma_t)
    torch.testing.assert_close(net.x.std(1), torch.ones(11).double(), rtol=0, atol=4 / math.sqrt(40_000))


@every("schedule")
def test_c_noise_is_a_quarter_of_log_sigma_over_alpha(schedule):
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    net = Seen()
    Denoiser(net, make("target", "v"))(normals(len(alpha_t), 2), alpha_t, sigma_t, label=torch.arange(len(alpha_t)))
    assert net.c_noise.shape == (len(alpha_t),)
    torch.testing.assert_close(net.c_noise, (sigma_t / alpha_t).log().flatten() / 4, rtol=1e-12, atol=1e-12)
    assert torch.equal(net.cond["label"], torch.arange(len(alpha_t)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c_noise_is_finite_at_the_clean_level_and_at_pure_noise(dtype):
    net = Seen(dtype)
    alpha_t, sigma_t = torch.eye(2, dtype=dtype)[:, :, None]
    x_0_hat = Denoiser(net, make("target", "v"))(torch.ones(2, 1, dtype=dtype), alpha_t, sigma_t)
    assert net.c_noise.isfinite().all()
    assert net.c_noise.abs().max().item() == pytest.approx(math.log(1e6) / 4)
    assert x_0_hat.isfinite().all()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sample", [torch.bfloat16, torch.float32, torch.float64])
def test_the_estimate_has_the_type_of_x_t_and_the_network_its_own(weights, sample):
    net = Seen(weights)
    alpha_t, sigma_t = (value.to(sample) for value in Cosine()(torch.full((3, 1), 0.5)))
    x_0_hat = Denoiser(net, make("target", "v"))(torch.ones(3, 2, dtype=sample), alpha_t, sigma_t)
    assert x_0_hat.dtype == sample
    assert net.x.dtype == weights
    assert net.c_noise.dtype == torch.promote_types(weights, torch.float32)


@every("target", "schedule")
@pytest.mark.parametrize("k", [0.01, 0.1, 80.0, None])
def test_the_scale_of_x_t_and_its_level_does_not_matter(target, schedule, k):
    """None divides every sample by its own alpha_t."""
    denoiser = Denoiser(perturbed(build("mlp", (2,))), make("target", target), 0.7)
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule), 21)
    x_t = alpha_t * normals(len(alpha_t), 2, seed=1) + sigma_t * normals(len(alpha_t), 2, seed=2)
    scale = 1 / alpha_t if k is None else k
    with torch.no_grad():
        expected = denoiser(x_t, alpha_t, sigma_t)
        found = denoiser(scale * x_t, scale * alpha_t, scale * sigma_t)
    assert ((found - expected).abs() / (1 + expected.abs())).max() < 1e-9


@every("target", "schedule")
def test_a_denoiser_is_what_its_network_and_target_say(target, schedule):
    """Written out, for a network that answers tanh of its input."""

    class Tanh(Seen):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return x.tanh() + c_noise[:, None]

    y, (_, alpha_t, sigma_t) = make("target", target), noisy_levels(make("schedule", schedule))
    x_t = normals(len(alpha_t), 4)
    answer = (x_t / torch.hypot(0.7 * alpha_t, sigma_t)).tanh() + (sigma_t / alpha_t).log() / 4
    expected = y.to_x_0(answer, x_t, alpha_t, sigma_t)
    found = Denoiser(Tanh(), y, 0.7)(x_t, alpha_t, sigma_t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_zero_v_network_is_the_wiener_filter_of_unit_data():
    """v = 0 says x_0 = alpha_t x_t/(alpha_t^2 + sigma_t^2): exact for white data, at any scale of the level."""
    _, alpha_t, sigma_t = noisy_levels(Cosine())
    x_t = normals(len(alpha_t), 4)
    for k in (1.0, 80.0):
        found = Denoiser(Seen(), make("target", "v"))(k * x_t, k * alpha_t, k * sigma_t)
        torch.testing.assert_close(found, White()(k * x_t, k * alpha_t, k * sigma_t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_a_denoiser_wants_data_of_some_width(sigma_data):
    with pytest.raises(ValueError, match=r"^sigma_data=.*: need a number > 0$"):
        Denoiser(Seen(), make("target", "v"), sigma_data)
