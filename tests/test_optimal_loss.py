"""The least loss there is: against published figures, a second implementation, and drawn data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from denoiselab.compose import options
from denoiselab.data.points import Known
from denoiselab.diagnostics.optimal import Filter, Memorised, Optimum, Spectrum, binary, in_panels, white
from denoiselab.schedule import Cosine, Linear, Schedule
from exact import make, normals

POINTS = torch.linspace(0, 1, 1000, dtype=torch.float64)
NATURAL = Spectrum.natural((1, 256, 256), variance=0.25)
KNOWN = [
    name
    for name in options()["data"]
    if name in ("2spirals", "8gaussians", "checkerboard", "circles", "mixture", "moons", "rings", "swissroll")
]


def panels(family, schedule: Schedule) -> dict[str, Tensor]:
    """At the 1,000 points of a table."""
    return in_panels(family(*schedule(POINTS)), schedule, POINTS)


def tenths(curve: Tensor) -> list[float]:
    return curve.view(10, 100).mean(1).tolist()


class TestNaturalImages:
    def test_the_loss_in_units_of_eps_falls_with_t(self):
        expected = ["0.65", "0.22", "0.094", "0.043", "0.019", "0.0077", "0.0026", "0.0008", "0.0002", "0.00003"]
        found = tenths(panels(NATURAL, Linear())["eps"])
        assert [f"{v:.{len(e) - 2}f}" for v, e in zip(found, expected, strict=True)] == expected

    @pytest.mark.parametrize(("schedule", "valley"), [(Linear(), 403), (Cosine(), 710)])
    def test_v_has_a_valley_where_eps_falls_and_x_0_rises(self, schedule, valley):
        found = panels(NATURAL, schedule)
        assert int(found["v"].argmin()) + 1 == valley
        assert bool((found["eps"].diff() < 0).all())
        assert bool((found["x_0"].diff() > 0).all())


class TestBinaryPixels:
    def test_the_loss_in_units_of_eps_has_a_peak(self):
        expected = [0.0043, 0.284, 0.448, 0.282, 0.129, 0.048, 0.0146, 0.0036, 0.0007, 0.0001]
        assert tenths(panels(binary, Linear())["eps"]) == pytest.approx(expected, rel=0.005, abs=5e-5)

    @pytest.mark.parametrize(("schedule", "peak"), [(Linear(), 221), (Cosine(), 431)])
    def test_its_place(self, schedule, peak):
        assert int(panels(binary, schedule)["eps"].argmax()) + 1 == peak

    @pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
    def test_is_the_error_of_the_posterior_mean(self, sigma):
        """E[x_0 | x_t] = sqrt(v) tanh(sqrt(v) alpha x_t/sigma^2)."""
        alpha, v = 0.8, 0.25
        x_0 = math.sqrt(v) * normals(400_000).sign()
        x_t = alpha * x_0 + sigma * normals(400_000, seed=1)
        error = (x_0 - math.sqrt(v) * (math.sqrt(v) * alpha * x_t / sigma**2).tanh()).square()
        found = binary(torch.tensor(alpha), torch.tensor(sigma), v).item()
        assert abs(error.mean().item() - found) < 4 * error.std().item() / math.sqrt(len(error))


def test_white_noise_is_a_flat_spectrum():
    levels = Cosine()(POINTS)
    assert torch.allclose(
        white(*levels, 0.3), Spectrum(torch.full((1, 4, 4), 0.3, dtype=torch.float64))(*levels), rtol=1e-12
    )
    v = panels(lambda alpha, sigma: white(alpha, sigma), Cosine())["v"]
    assert torch.allclose(v, torch.ones_like(v), rtol=1e-9)  # v says nothing about white data


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_a_filter_has_the_error_that_its_spectrum_says(shape):
    """On correlated data with class means, for which it is the optimum where they are Gaussian."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(30_000) % 2
    x_0 = normals(30_000, *shape).cumsum(-1) + 3 * label.view(-1, *[1] * len(shape))
    linear = Filter(x_0[:20_000], label[:20_000], 2)
    x, told = x_0[20_000:], label[20_000:]
    for alpha, sigma in ((0.9, 0.3), (0.5, 1.0)):
        at = [torch.full((len(x), *[1] * len(shape)), v).double() for v in (alpha, sigma)]
        x_t = alpha * x + sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
        error = (linear(x_t, *at, label=told) - x).square().flatten(1).mean(1)
        expected = Spectrum(linear.power)(torch.tensor(alpha), torch.tensor(sigma)).item()
        assert error.mean().item() == pytest.approx(expected, rel=0.02)
        blind = (Filter(x_0[:20_000])(x_t, *at) - x).square().mean().item()
        assert blind > (1.04 if sigma == 1 else 0.98) * expected


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_label_tells_is_worth_something_and_never_harms(name):
    """Components come in blocks by label: told another label, the same formula is far worse."""
    arguments = {"n": 1000} | ({"means": [[0, 0], [3, 1]], "stds": [0.3, 0.6]} if name == "mixture" else {})
    data = make("data", name, **arguments) if name != "mixture" else _mixture()
    assert isinstance(data, Known)
    x_0, label = data.held_out.x_0.double(), data.held_out.label
    eps, alpha, sigma = normals(*x_0.shape), torch.full((len(x_0), 1), 0.8).double(), torch.full((len(x_0), 1), 0.6)
    x_t = alpha * x_0 + sigma.double() * eps

    def error(told: Tensor | None = None) -> float:
        found = Optimum(data)(x_t, alpha, sigma.double(), **({} if told is None else {"label": told}))
        return (found - x_0).square().mean().item()

    score = data.score_of(x_t, alpha, sigma.double())
    assert error() == pytest.approx(((x_t + 0.36 * score) / 0.8 - x_0).square().mean().item(), rel=1e-5)
    if label is not None:
        assert error(torch.full_like(label, -1)) == pytest.approx(error(), rel=1e-9)
        assert error(label) < error()
        assert error((label + 1) % data.num_classes) > 1.5 * error(label)


def _mixture() -> Known:
    from denoiselab.data.points import Mixture

    return Mixture([[0.0, 0.0], [3.0, 1.0]], stds=[0.3, 0.6], n=1000)


def test_a_network_that_memorised_has_no_error_at_low_noise():
    x_0, label = normals(200, 1, 2, 2), torch.arange(200) % 4
    told = Memorised(x_0, label)
    level = [torch.full((200, 1, 1, 1), v).double() for v in (1.0, 0.01)]
    x_t = x_0 + 0.01 * normals(200, 1, 2, 2, seed=1)
    assert (told(x_t, *level, label=label) - x_0).square().max() < 1e-12
    level = [torch.full((200, 1, 1, 1), v).double() for v in (0.6, 0.8)]
    weight = (-(x_t[5] - 0.6 * x_0[label == 1]).square().flatten(1).sum(1) / (2 * 0.64)).softmax(0)
    expected = (weight.view(-1, 1, 1, 1) * x_0[label == 1]).sum(0)
    assert torch.allclose(told(x_t, *level, label=label)[5], expected)
    everything = told(x_t, *level, label=torch.full_like(label, -1))
    assert torch.allclose(everything, Memorised(x_0)(x_t, *level))
