"""Classifier-free guidance: an extrapolation in one call, and what it does to samples."""

import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.conditioning import NULL
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.guidance import CFG, scale_from_w, unguided
from denoiselab.sampler import Heun, Karras
from denoiselab.schedule import Cosine
from denoiselab.target import Eps, V
from exact import make, normals, triangle
from guided import LABEL, SCALES, Recording, asked, eight


def network() -> Denoiser:
    torch.manual_seed(0)
    net = make("model", "mlp", shape=(2,), num_classes=3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(net, V()).eval()


def test_scale_1_is_one_plain_call():
    denoiser = Recording(network())
    with torch.no_grad():
        guided = CFG(denoiser, 1.0)(*asked(torch.float32), label=LABEL)
        assert torch.equal(guided, denoiser.inner(*asked(torch.float32), label=LABEL))
    ((rows, cond),) = denoiser.calls
    assert rows == 6
    assert torch.equal(cond["label"], LABEL)


def test_scale_0_is_one_unconditional_call():
    denoiser = Recording(network())
    with torch.no_grad():
        guided = CFG(denoiser, 0.0)(*asked(torch.float32), label=LABEL)
        for nothing in ({}, {"label": torch.full((6,), NULL)}):
            torch.testing.assert_close(guided, denoiser.inner(*asked(torch.float32), **nothing), rtol=0, atol=1e-6)
    assert len(denoiser.calls) == 1


@pytest.mark.parametrize("scale", SCALES)
def test_without_a_condition_there_is_nothing_to_guide(scale):
    denoiser = Recording(triangle())
    assert torch.equal(CFG(denoiser, scale)(*asked()), triangle()(*asked()))
    assert len(denoiser.calls) == 1


@pytest.mark.parametrize("scale", SCALES)
def test_guidance_extrapolates_from_the_unconditional(scale):
    """u + scale (c - u), of a network in one batched call."""
    denoiser = Recording(network())
    with torch.no_grad():
        conditional = denoiser.inner(*asked(torch.float32), label=LABEL)
        unconditional = denoiser.inner(*asked(torch.float32), label=torch.full((6,), NULL))
        guided = CFG(denoiser, scale)(*asked(torch.float32), label=LABEL)
    assert (conditional - unconditional).abs().max() > 0.02
    expected = unconditional.double() + scale * (conditional.double() - unconditional.double())
    torch.testing.assert_close(guided.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(denoiser.calls) == 1


def test_each_sample_keeps_its_own_level_and_label():
    guided = CFG(triangle(), 3.0)
    whole = guided(*asked(), label=LABEL)
    for i in range(6):
        alone = guided(*(value[i : i + 1] for value in asked()), label=LABEL[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_guiding_x_0_is_guiding_eps(scale):
    x_t, alpha_t, sigma_t = asked()

    def eps(x_0: Tensor) -> Tensor:
        return (x_t - alpha_t * x_0) / sigma_t

    conditional, unconditional = (triangle()(*asked(), label=label) for label in (LABEL, None))
    guided_eps = eps(unconditional) + scale * (eps(conditional) - eps(unconditional))
    guided = CFG(triangle(), scale)(*asked(), label=LABEL)
    torch.testing.assert_close(guided, Eps().to_x_0(guided_eps, x_t, alpha_t, sigma_t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 4.0])
def test_scale_from_w_is_the_papers_convention(w):
    conditional, unconditional = (triangle()(*asked(), label=label) for label in (LABEL, None))
    guided = CFG(triangle(), scale_from_w(w))(*asked(), label=LABEL)
    torch.testing.assert_close(guided, (1 + w) * conditional - w * unconditional, rtol=1e-10, atol=1e-10)


def test_guided_denoisers_nest():
    """The scales of affine extrapolations multiply."""
    nested = CFG(CFG(triangle(), 2.0), 3.0)(*asked(), label=LABEL)
    torch.testing.assert_close(nested, CFG(triangle(), 6.0)(*asked(), label=LABEL), rtol=1e-10, atol=1e-10)


def test_other_conditions_travel_with_both_halves():
    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, *, label: Tensor, shift: Tensor) -> Tensor:
        return shift + torch.where(label < 0, 0, 1 + label)[:, None]

    shift = normals(6, 2, seed=5)
    guided = CFG(denoiser, 3.0)(*asked(), label=LABEL, shift=shift)
    torch.testing.assert_close(guided, shift + 3 * (1 + LABEL)[:, None], rtol=1e-12, atol=1e-12)


def test_unguided_is_the_denoiser_itself():
    denoiser = triangle()
    assert unguided(denoiser) is denoiser


def test_guidance_pushes_outward_and_shrinks_the_spread():
    """On the circle of eight modes: scale 1 draws the mode of the label, as it is; beyond, samples go past its
    centre, away from the other modes, and huddle between its neighbours."""
    mixture, n = eight(), 2000
    label = torch.arange(n) % 8
    outward = mixture.centres[label] / 2
    found = {}
    for scale in (1.0, 2.0, 4.0):
        guided = CFG(mixture, scale)
        x_0 = Heun(Karras(sigma_max=80.0), 30)(guided, Cosine(), normals(n, 2), label=label)
        radial = (x_0 * outward).sum(1)
        tangential = x_0[:, 0] * outward[:, 1] - x_0[:, 1] * outward[:, 0]
        found[scale] = radial.mean().item(), tangential.std().item()
        assert abs(tangential.mean().item()) < 4 * 0.4 / math.sqrt(n)
    assert found[1.0][0] == pytest.approx(2, abs=4 * 0.4 / math.sqrt(n))
    assert found[1.0][1] == pytest.approx(0.4, rel=4 / math.sqrt(2 * n))
    assert found[4.0][0] > found[2.0][0] + 0.1 > found[1.0][0] + 0.2
    assert found[4.0][1] < 0.9 * found[2.0][1] < 0.9 * 0.9 * found[1.0][1]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused_in_a_line(scale):
    with pytest.raises(UserError, match=rf"^guidance\.scale={scale}: need [^\n]*$"):
        make("guidance", "cfg", scale=scale, denoiser=triangle())
