"""Learned uncertainty as a weighting."""

import pytest
import torch
from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.loss import WeightedLoss
from denoiselab.target import V
from denoiselab.weighting import MinSNR, Uncertainty
from exact import make, normals
from losses import Says


def levels_of(log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt(), torch.ones_like(log_snr)


def test_uncertainty_learns_the_expected_weighted_error():
    """Where the weighted error is e^(2 sin), u becomes 2 sin, and every level then weighs alike."""
    weigh = Uncertainty(0.5)
    log_snr = torch.linspace(-8, 8, 128)
    level = levels_of(log_snr)
    error = (2 * (log_snr / 2).sin()).exp() / weigh.base.weight(*level)
    optimizer = torch.optim.Adam(weigh.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        weigh.apply(error, *level).mean().backward()
        optimizer.step()
    assert (weigh.u(*level[:2]) - 2 * (log_snr / 2).sin()).abs().max() < 0.1
    assert (weigh.weight(*level) * error - 1).abs().max() < 0.1
    assert weigh.apply(error, *level).mean().item() == pytest.approx(
        1 + (2 * (log_snr / 2).sin()).mean().item(), abs=0.01
    )


def test_uncertainty_trains_with_the_loss_and_is_part_of_its_state():
    loss = WeightedLoss(make("weighting", "uncertainty"))
    assert [name for name, _ in loss.named_parameters()] == ["weighting.readout"]
    x_0, eps, t = normals(16, 4, seed=1), normals(16, 4, seed=2), torch.linspace(0.1, 0.9, 16).double()[:, None]
    value, _ = loss(Denoiser(Says(normals(16, 4, seed=3)), V()), make("schedule", "cosine"), x_0, eps, t)
    value.mean().backward()
    assert (loss.weighting.readout.grad.abs() > 0).all()
    nn.init.normal_(loss.weighting.readout)
    again = WeightedLoss(make("weighting", "uncertainty"))
    again.load_state_dict(loss.state_dict())
    level = levels_of(torch.linspace(-8, 8, 9))
    assert torch.equal(again.weighting.u(*level[:2]), loss.weighting.u(*level[:2]))
    assert "exp(-u)" in loss.formula
    assert loss.formula.endswith("+ u")


def test_uncertainty_stays_float32_in_half_precision():
    weigh = Uncertainty()
    nn.init.normal_(weigh.readout, generator=torch.Generator().manual_seed(0))
    level = levels_of(torch.linspace(-8, 8, 9))
    expected = weigh.u(*level[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weigh.u(*level[:2]), expected)
    assert torch.equal(weigh.bfloat16().u(*level[:2]), expected)


def test_uncertainty_takes_another_base():
    level = levels_of(torch.linspace(-8, 8, 9))
    assert torch.equal(Uncertainty(base=MinSNR(3.0)).weight(*level), MinSNR(3.0).weight(*level))
