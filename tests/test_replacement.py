"""The truth in one window of a walk: the law that holds for any model, and what is beyond it."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from denoiselab.diagnostics import Finding, GroundTruthReplacement
from denoiselab.diagnostics.deterministic import Deterministic
from denoiselab.diagnostics.replacement import replaced
from denoiselab.errors import UserError
from denoiselab.metrics.pairs import MOST
from exact import White, eight_gaussians, normals
from healthy import subject

SMALL = {"windows": 4, "steps": 20, "n": 128}


def rows(found: Finding) -> list[dict]:
    return [dict(zip(found.table, values, strict=True)) for values in zip(*found.table.values(), strict=True)]


def of(found: Finding, walk: str, what: str) -> list[dict]:
    return [row for row in rows(found) if (row["walk"], row["replaced"]) == (walk, what)]


@pytest.fixture(scope="module")
def look(healthy: list[Path]) -> Finding:
    return GroundTruthReplacement(**SMALL).look(subject(healthy[0]))


@pytest.mark.parametrize("walk", ["model", "exact"])
def test_the_residual_shrinks_as_the_levels_whatever_the_model(look: Finding, walk: str):
    windows = of(look, walk, "estimate")
    assert len(windows) == SMALL["windows"]
    assert [row["t_to"] for row in windows[:-1]] == [row["t_from"] for row in windows[1:]]
    for row in windows:
        assert row["law_error"] < 1e-6
        assert row["shrinkage"] == pytest.approx(row["law"], rel=1e-6)
        assert row["law"] < 1


def test_replacing_the_last_estimate_alone_returns_the_truth_and_is_apart(look: Finding):
    (last,) = of(look, "model", "last estimate")
    assert last["mse"] == 0
    assert last["window"] is None
    assert min(row["t_to"] for row in of(look, "model", "estimate")) > 0


def test_on_the_exact_score_later_windows_are_worth_more_and_keep_the_mode(look: Finding):
    """The table of eight Gaussians: mean squared error to the truth and the share in its mode, per replaced window."""
    (nothing,) = of(look, "exact", "nothing")
    for what in ("estimate", "x_t"):
        mse = [row["mse"] for row in of(look, "exact", what)]
        agreement = [row["agreement"] for row in of(look, "exact", what)]
        assert all(b < a for a, b in pairwise([nothing["mse"], *mse]))
        assert all(b >= a for a, b in pairwise([nothing["agreement"], *agreement]))
        assert agreement[-1] > 0.9 > 0.5 > agreement[0]
    # from noise alone a mode is hit by chance, one of eight
    assert nothing["agreement"] == pytest.approx(1 / 8, abs=3 * math.sqrt(7 / 64 / SMALL["n"]))


def test_setting_x_t_right_again_is_worth_more_than_the_estimate_but_for_the_first_window(look: Finding):
    """In the first window both are the same: x_T is the noised truth."""
    estimate, reset = of(look, "model", "estimate"), of(look, "model", "x_t")
    assert reset[0]["mse"] == pytest.approx(estimate[0]["mse"], rel=1e-9)
    assert all(b["mse"] < a["mse"] for a, b in list(zip(estimate, reset, strict=True))[1:])


def test_the_control_is_the_exact_denoiser(healthy: list[Path]):
    """Two implementations of E[x_0 | x_t] take the same walk; the data's mean and width are off by a draw."""
    exact = eight_gaussians()
    found = GroundTruthReplacement(**SMALL).look(
        subject(healthy[0], guidance=lambda denoiser: lambda x_t, alpha, sigma, **cond: exact(x_t, alpha, sigma))
    )
    for a, b in zip(of(found, "model", "x_t"), of(found, "exact", "x_t"), strict=True):
        assert a["mse"] == pytest.approx(b["mse"], rel=0.1)
        assert a["agreement"] == pytest.approx(b["agreement"], abs=0.05)


def test_an_exact_denoiser_that_is_told_the_class_stays_in_it(healthy: list[Path]):
    found = GroundTruthReplacement(**SMALL, classes="own").look(subject(healthy[0]))
    (nothing,) = of(found, "exact", "nothing")
    assert nothing["agreement"] > 0.95


def test_of_white_data_each_sample_is_known(healthy: list[Path]):
    """Every step of the exact walk is a product, and the law takes over in the window."""
    path = Deterministic(subject(healthy[0]), 12)
    white, std = White(std=0.8), 0.8
    x_0, eps = std * normals(5, 2), normals(5, 2, seed=1)
    found = replaced(path, lambda x, rung: white(x, *rung.like(x)), x_0, eps, [0, 4, 11])

    def times(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        for t, s in pairwise(path.levels[first : last + 1]):
            gain = t.alpha * std**2 / (t.alpha**2 * std**2 + t.sigma**2)
            x = s.alpha * gain * x + s.sigma / t.sigma * (1 - t.alpha * gain) * x
        return x

    first, hi, lo = path.levels[0], path.levels[4], path.levels[11]
    x_T = first.alpha * x_0 + first.sigma * eps
    torch.testing.assert_close(found["nothing", -1][0], times(x_T, 0, 12))
    left = lo.ratio / hi.ratio * (times(x_T, 0, 4) / hi.alpha - x_0)
    torch.testing.assert_close(found["estimate", 1][0], times(lo.alpha * (x_0 + left), 11, 12))
    torch.testing.assert_close(found["x_t", 1][0], times(lo.alpha * x_0 + lo.sigma * eps, 11, 12))


def test_images_have_a_psnr_and_a_class(example_run: Path):
    found = GroundTruthReplacement(windows=2, steps=5, n=6).look(subject(example_run, "metrics=digits"))
    (last,) = of(found, "model", "last estimate")
    assert last["psnr_db"] == MOST
    assert last["agreement"] == 1
    assert {row["walk"] for row in rows(found)} == {"model"}
    assert found.facts["recognised"] == "class"
    assert all(0 < row["psnr_db"] < 60 for row in rows(found) if row is not rows(found)[-1] and row["mse"] > 0)


def test_a_second_look_is_the_same_and_leaves_the_generator_alone(healthy: list[Path]):
    small = GroundTruthReplacement(windows=2, steps=4, n=8)
    seen = subject(healthy[1])
    before = torch.get_rng_state()
    assert small.look(seen) == small.look(seen)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong", [{"windows": 1}, {"windows": 50}, {"n": 1}, {"classes": "some"}, {"every": 0}, {"budget": "much"}]
)
def test_wrong_options_are_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        GroundTruthReplacement(**wrong)


def test_a_model_that_knows_no_null_must_be_told_classes(healthy: list[Path]):
    seen = subject(healthy[0])
    seen.parts.config["p_null"] = 0
    seen.parts.config["diagnostics"] = {
        "replacement": {"_target_": "denoiselab.diagnostics.GroundTruthReplacement", "classes": "none"}
    }
    with pytest.raises(UserError, match=r"diagnostics\.replacement: classes=none: .* need classes=own"):
        _ = seen.parts.diagnostics
