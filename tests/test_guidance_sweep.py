"""Guidance scales: the same noise under each, where a distance is least, and when classes are too narrow."""

from pathlib import Path

import pytest
import torch

import denoiselab
from denoiselab.diagnostics import GuidanceGrid, GuidanceSweep
from denoiselab.diagnostics.elbow import best_scale, floor
from denoiselab.diagnostics.guidance import means, own_scale, too_high
from denoiselab.diagnostics.spread import chroma, saturation, within_class
from denoiselab.errors import UserError
from denoiselab.guidance import CFG
from denoiselab.metrics import KernelMMD
from denoiselab.rng import generator, mix
from denoiselab.sampler import DDIM, Trailing
from exact import eight_gaussians, normals
from healthy import subject
from walks import schedule_of

PUBLISHED = {0: 1.80, 0.1: 1.55, 0.3: 3.03, 1: 12.6, 4: 26.2}
"""FID over w of classifier-free guidance on ImageNet 64 x 64 (Ho and Salimans 2022, arXiv:2207.12598, table 1)."""

QUICK = ("metrics=points", "~metrics.mmd", "sampler.steps=10")


def test_the_elbow_of_the_published_curve_is_at_scale_1_1():
    scales, values = [1 + w for w in PUBLISHED], [*PUBLISHED.values()]
    best = best_scale(scales, [values])
    assert (best.scale, best.low, best.high, best.at_end) == (1.1, None, None, False)
    assert best_scale(scales[::-1], [values[::-1]]) == best
    assert best_scale(scales[1:], [values[1:]]).at_end


def test_the_interval_is_as_wide_as_repeats_disagree():
    """Of repeats whose noise is far less than the differences one scale; of repeats that disagree, all that lead."""
    scales = torch.linspace(1, 3, 9)
    curve = (scales - 1.5).square()
    noise = torch.randn(6, 9, generator=generator(0, "elbow-test"))
    sure = best_scale(scales.tolist(), (curve + 1e-4 * noise).tolist())
    unsure = best_scale(scales.tolist(), (curve + noise).tolist())
    assert (sure.scale, sure.low, sure.high) == (1.5, 1.5, 1.5)
    assert unsure.low is not None
    assert unsure.high is not None
    assert unsure.low <= unsure.scale <= unsure.high
    assert unsure.high - unsure.low > 0.5
    assert best_scale(scales.tolist(), (curve + noise).tolist()) == unsure


@pytest.mark.parametrize(("scale", "tangential", "fires"), [(1.0, 1.0, False), (2.0, 0.46, True)])
def test_exact_guidance_narrows_eight_gaussians_along_their_ring(scale: float, tangential: float, fires: bool):
    """Their standard deviation along the ring, measured as such, is what the narrowest direction finds unasked."""
    exact, n = eight_gaussians(), 4000
    label = torch.arange(n) % 8
    found = DDIM(Trailing(), 200)(CFG(exact, scale), schedule_of("cosine"), normals(n, 2), label=label)
    real, real_label = exact.draw(n, seed=1)
    out = exact.centres[label] / exact.centres[label].norm(dim=1, keepdim=True)
    along = ((found - exact.centres[label]) * torch.stack([-out[:, 1], out[:, 0]], 1)).sum(1)
    outwards = ((found - exact.centres[label]) * out).sum(1)
    assert along.std().item() / exact.std == pytest.approx(tangential, abs=0.03)
    assert (outwards.mean() > 0.5 * exact.std) == fires  # past the centres of the modes
    spread = within_class(found, label, real, real_label)
    assert spread.narrowest is not None
    assert spread.narrowest == pytest.approx(tangential, abs=0.06)
    assert spread.spread > spread.narrowest
    alarms = too_high(scale, spread.narrowest)
    assert bool(alarms) == fires
    if fires:
        assert "guidance scale 2 " in alarms[0]


def test_the_spread_is_within_classes_and_in_any_direction():
    """Moved classes are as wide as before; one direction of any is found; small classes tell the whole only."""
    label = torch.arange(4000) % 4
    real = normals(4000, 3) @ torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [0, 0.3, 1]]).double()
    same = within_class(real + 10 * label[:, None], label, real, label)
    assert (same.spread, same.narrowest) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-9))
    direction = torch.linalg.qr(normals(3, 3, seed=2)).Q[:, :1]
    flat = real - 0.8 * (real - real.mean(0)) @ torch.linalg.inv(real.T.cov()) @ direction @ direction.T / (
        direction.T @ torch.linalg.inv(real.T.cov()) @ direction
    )
    found = within_class(flat, label, real, label)
    assert found.narrowest == pytest.approx(0.2, abs=0.02)
    black = torch.cat([flat, torch.full((4000, 2), -1.0)], 1), torch.cat([real, torch.full((4000, 2), -1.0)], 1)
    assert within_class(black[0], label, black[1], label).narrowest == pytest.approx(found.narrowest, rel=1e-6)
    few = within_class(real[:40], label[:40], real, label)
    assert few.narrowest is None
    assert few.spread == pytest.approx(1, abs=0.3)
    with pytest.raises(ValueError, match="need more samples"):
        within_class(real[:1], label[:1], real, label)


def test_saturation_and_chroma_in_closed_form():
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1.0  # red, on grey
    images[1] = -1.0  # black
    assert saturation(images) == pytest.approx((16 + 48) / 96)
    assert chroma(images) == pytest.approx((0.5 + 0) / 2)


def test_rows_share_their_noise_and_scale_one_is_no_guidance(healthy: list[Path]):
    seen = subject(healthy[0], "sampler.steps=10")
    found = GuidanceGrid([0, 1, 3], n=64).look(seen)
    samples = found.tensors["samples"]
    assert torch.equal(samples[1], seen.draw(64)[0])
    nothing = {"label": torch.full((64,), -1)}
    assert torch.equal(samples[0], seen.draw(64, cond=nothing)[0])
    assert torch.equal(samples[2], seen.draw(64, seen.sampling(scale=3.0))[0])
    assert found.protocol["guidance"]["scale"] == "0, 1, 3"
    assert found.protocol["n"] == 64


def test_five_healthy_models_are_wide_enough_and_guided_ones_are_not(healthy: list[Path]):
    for folder in healthy:
        diagnostic = GuidanceSweep([1], n=400, repeats=1)
        assert diagnostic.look(subject(folder, *QUICK)).alarms == []
    found = GuidanceSweep([1], n=400, repeats=1).look(subject(healthy[0], *QUICK, "guidance.scale=4"))
    assert found.table["scale"] == [1.0, 4.0]
    assert found.table["too_high"] == [False, True]
    (alarm,) = found.alarms
    assert "guidance scale 4 a class is 0." in alarm
    assert "alarm below 0.5" in alarm


def test_a_sweep_measures_what_the_evaluation_does(healthy: list[Path]):
    """Distances of each scale and repeat, again by hand, and where they are least."""
    overrides = ("metrics=points", "sampler.steps=8")
    seen = subject(healthy[0], *overrides)
    found = GuidanceSweep([1, 4], n=200, repeats=2).look(seen)
    table = found.table
    values = []
    for seed in (0, mix(0, "repeat", 1)):
        drawn = seen.draw(200, seen.sampling(scale=4.0), seed=seed)[0]
        values.append(KernelMMD().measure(drawn, None, seen.images)[0].value)
    assert table["mmd2"][1] == pytest.approx(sum(values) / 2, rel=1e-6)
    assert table["mmd2_sd"][1] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-6)
    assert table["mmd2"][0] < table["mmd2"][1]
    assert table["modes_covered"] == [8.0, 8.0]
    assert found.facts["best"]["scale"] == 1.0
    named = {record.name: record for record in found.records}
    assert named["best_guidance_scale"].controls == {"low": 1.0, "high": 1.0}
    assert "saturation" not in table
    with pytest.raises(UserError, match="metric=fd: need one of"):
        GuidanceSweep([1], n=200, repeats=1, metric="fd").look(seen)


def test_digits_have_all_columns(example_run: Path):
    seen = subject(example_run, "sampler.steps=1", "metrics=digits", "~metrics.frechet")
    found = GuidanceSweep([1, 2], n=40, shown=3, repeats=1).look(seen)
    assert {"class_accuracy", "precision", "recall", "saturation", "spread"} <= found.table.keys()
    assert found.table["narrowest"] == [None, None]  # 64 features of 4 samples a class
    assert found.tensors["samples"].shape == (2, 3, 1, 8, 8)
    assert found.protocol["space"] == "features"
    assert "best" not in found.facts  # no measurement of these is better when lower


@pytest.mark.parametrize(
    ("options", "changed", "says"),
    [((), {"num_classes": 0}, "knows no labels"), (("p_null=0",), {}, "p_null=0 trains no unconditional model")],
)
def test_models_that_cannot_be_guided_are_refused_and_left_out(options, changed, says: str, tmp_path: Path):
    """Silently among the callbacks, where the default has it; in one line as a diagnostic."""
    assert "guidance_sweep" in denoiselab.build().callbacks(tmp_path)
    parts = denoiselab.build(*options)
    parts.__dict__.update(changed)  # as of a set without labels
    assert "guidance_sweep" not in parts.callbacks(tmp_path)
    with pytest.raises(ValueError, match=says):
        GuidanceGrid().check(parts)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: GuidanceGrid([]), "scales=.*need different finite numbers"),
        (lambda: GuidanceGrid([1, 1]), "scales=.*need different finite numbers"),
        (lambda: GuidanceGrid([float("inf")]), "scales=.*need different finite numbers"),
        (lambda: GuidanceGrid(n=0), "n=0: need at least 1"),
        (lambda: GuidanceSweep(repeats=0), "repeats=0: need at least 1"),
    ],
)
def test_mistakes_are_named(made, says: str):
    with pytest.raises(ValueError, match=says):
        made()


def test_what_cannot_be_measured_is_refused(healthy: list[Path]):
    with pytest.raises(ValueError, match="none of them takes n=1000"):
        GuidanceSweep().check(subject(healthy[0], "metrics=none").parts)
    with pytest.raises(ValueError, match="n=15: need at least 2 samples of each of the 8 classes"):
        GuidanceSweep(n=15).check(subject(healthy[0], "metrics=points").parts)


def test_small_pieces():
    assert own_scale({"_target_": "denoiselab.guidance.CFG", "scale": 2}) == 2.0
    assert own_scale({"_target_": "denoiselab.guidance.Interval", "low": 0}) is None
    assert floor({"null_mean": 0.0, "null_95": 2.0}) == (-2.0, 2.0)
    assert floor({"floor": 5.0, "floor_std": 0.5}) == (4.0, 6.0)
    assert floor({"null_mean": 0.1, "null_std": 0.2}) == (pytest.approx(-0.3), pytest.approx(0.5))
    assert floor({"held_out": 1.0}) is None
    table = means([[{"a": 1.0, "b": None}, {"a": 3.0, "b": 1.0}]], ["a"])
    assert table == {"a": [2.0], "a_sd": [pytest.approx(2**0.5)], "b": [None]}
