"""A walk beside noised data: what is shown is what was walked, and its widths are those of the data."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics import Subject, Trajectories
from denoiselab.diagnostics.trajectories import alarms
from denoiselab.run import load
from denoiselab.sampler import DDIM, DDPM, Sampler, Trailing
from denoiselab.target import V
from exact import ExactNet, eight_gaussians
from healthy import subject


def exact(folder: Path, *overrides: str, **changed: Any) -> Subject:
    """A run with the exact denoiser of its data in the place of its network's."""
    run = load(folder)
    run.denoiser = Denoiser(ExactNet(eight_gaussians(), V()), V()).eval()
    return subject(run, *overrides, **changed)


@pytest.mark.parametrize("sampler", [DDIM(Trailing(), 50), DDPM(Trailing(), 200)], ids=["ddim", "ddpm"])
def test_an_exact_denoiser_walks_through_the_datas_marginals(sampler: Sampler, healthy: list[Path]):
    """Deterministic or not: the standard deviation of x_t is sqrt(alpha_t^2 m + sigma_t^2), within 5 %."""
    found = Trajectories(n=400).look(exact(healthy[0], sampler=sampler))
    for ratio, error in zip(found.table["std_ratio"], found.table["std_ratio_se"], strict=True):
        assert abs(ratio - 1) < 0.05
        assert error < 0.05
    for alpha, sigma, expected in zip(
        *(found.table[name] for name in ("alpha_t", "sigma_t", "std_expected")), strict=True
    ):
        assert expected == pytest.approx(math.hypot(alpha, sigma), rel=0.04)  # m is about 1
    assert all(abs(ratio - 1) < 0.06 for ratio in found.table["residual_ratio"][:-1])
    assert found.table["residual"][-1] is None
    assert found.alarms == []


def test_what_is_shown_is_the_walk_and_its_estimates(healthy: list[Path]):
    seen = subject(healthy[0], "sampler.steps=8")
    found = Trajectories(left=[1, 0.5, 0], n=32, shown=4).look(seen)
    x_t, x_0_hat = found.tensors["walk_x_t"], found.tensors["walk_x_0_hat"]
    cond = seen.real(32)["cond"]
    assert torch.equal(seen.decode(x_t[-1]), seen.draw(32, cond=cond)[0])
    assert torch.equal(x_0_hat[-1], x_t[-1])
    assert found.table["walked"] == [0.0, 0.5, 1.0]
    for k in (0, 1):
        level = seen.parts.sampler.levels(seen.schedule)[4 * k].like(x_t[k])
        with torch.no_grad():
            torch.testing.assert_close(x_0_hat[k], seen.denoiser(x_t[k], *level, **cond))
    control = found.tensors["real_x_t"][1]
    noise = (control - found.table["alpha_t"][1] * seen.real(32)["x_0"]) / found.table["sigma_t"][1]
    assert noise.std().item() == pytest.approx(1, abs=0.25)
    torch.testing.assert_close(
        noise,
        (found.tensors["real_x_t"][0] - found.table["alpha_t"][0] * seen.real(32)["x_0"]) / found.table["sigma_t"][0],
        rtol=1e-3,
        atol=1e-4,
    )
    assert torch.equal(x_t, Trajectories(left=[1, 0.5, 0], n=32, shown=4).look(seen).tensors["walk_x_t"])


def test_five_healthy_models_raise_no_alarm(healthy: list[Path]):
    for folder in healthy:
        for sampler in (DDIM(Trailing(), 20), DDPM(Trailing(), 50)):
            assert Trajectories().look(subject(folder, sampler=sampler)).alarms == []


def test_walks_that_leave_the_data_do(healthy: list[Path]):
    """Estimates that are too narrow; a guidance scale that overshoots; a walk of one step, which finds means."""
    run = load(healthy[0])
    narrow = lambda denoiser: lambda *x, **cond: 0.8 * denoiser(*x, **cond)  # noqa: E731
    for seen in (
        subject(run, guidance=narrow, sampler=DDIM(Trailing(), 20)),
        subject(run, "guidance.scale=5", "sampler.steps=20"),
    ):
        found = Trajectories().look(seen)
        assert found.alarms
        assert "times as wide as" in found.alarms[0]


def test_an_alarm_wants_five_percent_and_three_standard_errors():
    table = {"walked": [0.5] * 3, "std_ratio": [1.04, 1.2, 0.8], "std_ratio_se": [0.0, 0.06, 0.02]}
    (alarm,) = alarms({**table, "residual_ratio": [1.0, None, 1.0]})
    assert "with 0.5 of the walk left, x_t is 0.8 times as wide" in alarm
    assert "1 +- 0.11" in alarm


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"left": []}, "need shares of the walk"),
        ({"left": [1.5]}, "need shares of the walk"),
        ({"n": 1}, "n=1: need at least 2"),
        ({"n": 4, "shown": 5}, "shown=5: need a number from 1 to n=4"),
    ],
)
def test_mistakes_are_named(options, says: str):
    with pytest.raises(ValueError, match=says):
        Trajectories(**options)
