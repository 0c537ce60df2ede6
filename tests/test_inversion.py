"""From data back to noise: encoding and decoding, closed forms, and diffusers' inverse scheduler."""

import pytest
import torch
from torch import Tensor

from denoiselab.sampler import DDIM, Rung, invert
from denoiselab.schedule import Cosine, Discrete
from exact import Scaled, White, normals, rms, triangle
from walks import schedule_of, slopes, spacing_of


@pytest.mark.parametrize("spacing", ["trailing", "log_snr", "karras"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "ve"])
@pytest.mark.parametrize("exact", [White(0.3, 0.5), triangle()], ids=["gaussian", "mixture"])
def test_encoding_and_decoding_lose_less_with_more_steps(exact, schedule, spacing):
    levels, errors = schedule_of(schedule), []
    x_0 = 0.3 + 0.5 * normals(32, 1) if isinstance(exact, White) else exact.draw(32)[0]
    for steps in (32, 64, 128, 256):
        found = DDIM(spacing_of(spacing), steps)
        errors.append(rms(found(exact, levels, invert(found, exact, levels, x_0)) - x_0))
    assert slopes(errors)[-1] > 0.85
    assert errors[-1] < 0.02


@pytest.mark.parametrize("schedule", ["linear", "cosine", "ve", "flow"])
def test_the_noise_of_gaussian_data_is_the_flows(schedule):
    """In closed form: standardised values stay. And at any scale of the levels."""
    exact, levels, x_0 = White(0.3, 0.5), schedule_of(schedule), 0.3 + 0.5 * normals(64, 1)
    found = DDIM(spacing_of("log_snr"), 1000)
    noise = invert(found, exact, levels, x_0)
    first = found.levels(levels)[0]
    expected = exact.flow(x_0, Rung(1.0, 0.0), first) / first.sigma
    assert rms(noise - expected) < 0.01
    torch.testing.assert_close(invert(found, exact, Scaled(levels, 80.0), x_0), noise, rtol=0, atol=1e-8)


def test_inversion_calls_the_network_once_a_level_with_the_condition():
    calls = []

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor) -> Tensor:
        calls.append((alpha_t[0].item(), sigma_t[0].item()))
        return 5 * x_t

    found = DDIM(spacing_of("trailing"), 7, clip=1.0)
    noise = invert(found, denoiser, Cosine(), torch.ones(2, 1, 4, 4).double(), label=torch.zeros(2))
    noisy = [tuple(rung) for rung in reversed(found.levels(Cosine())[:-1])]
    assert calls == [noisy[0], *noisy[:-1]]
    assert noise.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("steps", [10, 50])
def test_diffusers_takes_the_same_steps_towards_noise(steps):
    """Told what the network says at the level that the step starts from. Their pipelines ask at the level that it
    goes to, about x_t of the one before, and their walks stop at T - T/N, not at T."""
    from diffusers import DDIMInverseScheduler

    reference = DDIMInverseScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="sample", clip_sample=False
    )
    reference.set_timesteps(steps)
    betas = reference.betas.double()
    reference.alphas_cumprod = (1 - betas).cumprod(0)
    schedule, exact, found = Discrete(betas), triangle(), DDIM(spacing_of("leading"), steps)
    x_0, stride = exact.draw(8)[0], 1000 // steps
    first = schedule(torch.zeros(8, 1).double())
    x = first.alpha * x_0 + first.alpha * (x_0 - exact(first.alpha * x_0, *first))  # the step from clean data
    for index in reference.timesteps.tolist()[1:]:
        x_0_hat = exact(x, *schedule(torch.full((8, 1), (index - stride) / 999).double()))
        x = reference.step(x_0_hat, index, x).prev_sample
    last = found.levels(schedule)[0]
    assert (invert(found, exact, schedule, x_0) - x / last.sigma).abs().max() < 1e-8
