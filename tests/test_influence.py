"""A disturbance at one level: what it changes, exactly for white data."""

from pathlib import Path

import pytest
import torch

from denoiselab.diagnostics import Finding, TimestepInfluence
from denoiselab.diagnostics.deterministic import Deterministic
from denoiselab.diagnostics.influence import compared, disturbed, gain, size
from denoiselab.metrics import Features, FrechetDistance
from exact import White, normals
from healthy import subject

SMALL = {"levels": 5, "steps": 12, "n": 128}


def column(found: Finding, walk: str, kind: str, name: str) -> list:
    table = found.table
    here = zip(table["walk"], table["kind"], table[name], strict=True)
    return [value for a, b, value in here if (a, b) == (walk, kind)]


def test_white_data_change_by_a_known_factor(healthy: list[Path]):
    """Each sample, for both disturbances; a second implementation of the walk's gain."""
    path, m = Deterministic(subject(healthy[0]), 10), 0.7
    white = White(std=m**0.5)
    x_T, z = normals(6, 3), 0.1 * normals(6, 3, seed=1)
    at = [0, 3, 9]
    found = disturbed(path, lambda x, rung: white(x, *rung.like(x)), x_T, z, at, m)
    plain = found["nothing", -1]
    torch.testing.assert_close(plain, gain(path, m, 0, -1) * x_T)
    for k in at:
        expected = gain(path, m, k, k) * size(path.levels[k], m) * z
        torch.testing.assert_close(found["perturb", k] - plain, expected)
    for k in at[1:]:
        torch.testing.assert_close(found["skip", k], gain(path, m, 0, k) * x_T)
        assert (found["skip", k] - plain).abs().max() > 1e-4
    assert ("skip", 0) not in found


def test_in_the_limit_of_many_steps_a_perturbation_of_white_data_weighs_the_same_at_every_level(healthy: list[Path]):
    """The flow keeps standardised values: x_0 changes by sqrt(m) strength z, whenever x_t was disturbed."""
    m = 1.3
    path = Deterministic(subject(healthy[0]), 1000)
    for k in (0, 250, 500, 950):
        assert gain(path, m, k, k) * size(path.levels[k], m) == pytest.approx(m**0.5, rel=0.01)


def test_the_closed_form_stands_beside_what_is_measured(healthy: list[Path]):
    """With the white denoiser in the model's place, measured over white is one number at every level."""
    seen = subject(healthy[0])
    m = seen.real(1000)["x_0"].double().square().mean().item()
    white = White(std=m**0.5)
    seen.parts.guidance = lambda denoiser: lambda x_t, alpha, sigma, **cond: white(x_t, alpha, sigma)
    found = TimestepInfluence(**SMALL).look(seen)
    for kind in ("perturb", "skip"):
        pairs = zip(column(found, "model", kind, "mse"), column(found, "model", kind, "white"), strict=True)
        ratios = [measured / white for measured, white in pairs]
        assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)
        assert ratios[0] == pytest.approx(1, abs=0.2)  # the mean square of 256 normals


def test_of_eight_gaussians_the_mode_is_settled_at_noisy_levels(healthy: list[Path]):
    """And the values go on changing after that: the two kinds of influence differ."""
    found = TimestepInfluence(levels=2, steps=30, n=256).look(subject(healthy[0]))
    changed, t = column(found, "exact", "perturb", "class_changed"), column(found, "exact", "perturb", "t")
    mse = column(found, "exact", "perturb", "mse")
    assert t[0] > t[-1]
    assert changed[0] > 0.08 > 0.04 > changed[-1]
    assert changed[0] / changed[-1] > 2 * mse[0] / mse[-1]
    assert found.facts["recognised"] == "mode"


def test_images_have_classes_and_features(example_run: Path):
    found = TimestepInfluence(levels=2, steps=3, n=6).look(subject(example_run, "metrics=digits"))
    assert {*found.table["walk"]} == {"model"}
    assert all(value is not None and value >= 0 for value in found.table["feature_change"])
    assert all(0 <= value <= 1 for value in found.table["class_changed"])


class Brightness(Features):
    """Of each colour."""

    name, protocol = "brightness", {}  # pyright: ignore[reportAssignmentType]

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images.mean((2, 3)), None


def test_features_are_those_of_the_metrics(example_run: Path):
    """Of photographs too, of which the network for digits says nothing."""
    seen = subject(example_run, "metrics=none")
    seen.parts.metrics = {"fd": FrechetDistance(Brightness())}
    images = normals(16, 3, 8, 8).float()
    seen.decode = lambda x_0: images + x_0
    change = compared(seen, torch.zeros(1))(torch.full((1,), 0.5))["feature_change"]
    assert change == pytest.approx(3 * 0.25 / (2 * images.mean((2, 3)).var(0).sum().item()), rel=1e-5)


def test_a_second_look_is_the_same(healthy: list[Path]):
    small = TimestepInfluence(levels=2, steps=3, n=8)
    assert small.look(subject(healthy[1])) == small.look(subject(healthy[1]))


@pytest.mark.parametrize("wrong", [{"levels": 1}, {"levels": 21}, {"n": 1}, {"strength": 0}, {"classes": "some"}])
def test_wrong_options_are_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        TimestepInfluence(**wrong)
