"""Interval, rescale, autoguidance, dynamic threshold and replacement against their papers."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from denoiselab.conditioning import NULL
from denoiselab.errors import UserError
from denoiselab.guidance import CFG, Autoguidance, DynamicThreshold, Interval, Replacement, Rescale
from denoiselab.run import frozen
from denoiselab.sampler import DDIM, Karras, LogSNR
from denoiselab.schedule import Cosine
from denoiselab.target import V
from exact import White, normals, parts, triangle
from guided import HIGH, LABEL, LOW, SCALES, Recording, asked, eight


def test_interval_is_cfg_inside_and_the_plain_denoiser_outside():
    x_t, alpha_t, sigma_t = asked()
    guided, plain = (g(x_t, alpha_t, sigma_t, label=LABEL) for g in (CFG(triangle(), 3.0), triangle()))
    found = Interval(triangle(), 3.0, LOW, HIGH)(x_t, alpha_t, sigma_t, label=LABEL)
    r = (sigma_t / alpha_t)[:, 0]
    inside = (r > LOW) & (r <= HIGH)
    assert 0 < inside.sum() < 6
    assert torch.equal(found[inside], guided[inside])
    assert torch.equal(found[~inside], plain[~inside])
    for k in (1e-3, 50.0):  # the scale of (alpha, sigma) is no matter
        same = Interval(Recording(lambda *level, **cond: level[0]), 3.0, LOW, HIGH)
        assert torch.equal(same.range(k * alpha_t, k * sigma_t)[:, 0], inside)


@pytest.mark.parametrize(("r", "rows"), [(LOW, [6]), (LOW * 1.001, [12]), (HIGH, [12]), (HIGH * 1.001, [6])])
def test_interval_costs_double_inside_only_and_its_upper_end_belongs_to_it(r, rows):
    denoiser = Recording(triangle())
    alpha_t = torch.full((6, 1), 0.5).double()
    Interval(denoiser, 3.0, LOW, HIGH)(normals(6, 2), alpha_t, r * alpha_t, label=LABEL)
    assert [called for called, _ in denoiser.calls] == rows


def test_interval_at_scale_1_is_one_plain_call_everywhere():
    denoiser = Recording(triangle())
    found = Interval(denoiser, 1.0, LOW, HIGH)(*asked(), label=LABEL)
    assert torch.equal(found, triangle()(*asked(), label=LABEL))
    assert [rows for rows, _ in denoiser.calls] == [6]


def images(n: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, alpha_t, sigma_t and labels of images."""
    alpha_t, sigma_t = (value.view(n, 1, 1, 1) for value in Cosine()(torch.linspace(0.2, 0.8, n).double()))
    return normals(n, 1, 4, 4), alpha_t, sigma_t, torch.arange(n) % 3


def told(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, *, label: Tensor | None = None) -> Tensor:
    """A denoiser of images with contrasts and means that depend on the label."""
    label = torch.full((len(x_t),), NULL) if label is None else label
    return (x_t * (1 + 0.5 * label.view(-1, 1, 1, 1))).sin() + 0.2 * label.view(-1, 1, 1, 1)


def contrast(x_0: Tensor) -> Tensor:
    return x_0.flatten(1).std(1)


def test_rescale_gives_each_sample_the_contrast_of_its_condition():
    *level, label = images()
    conditional, guided = told(*level, label=label), CFG(told, 5.0)(*level, label=label)
    assert ((contrast(guided) / contrast(conditional) - 1).abs() > 0.1).all()
    whole = Rescale(told, 5.0, phi=1.0)(*level, label=label)
    torch.testing.assert_close(contrast(whole), contrast(conditional), rtol=1e-10, atol=0)
    direction = whole / guided
    assert (direction.flatten(1).std(1) < 1e-10).all()


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 4.0])
def test_rescale_is_the_papers_formula_on_x_0(scale, phi):
    *level, label = images()
    conditional, guided = told(*level, label=label), CFG(told, scale)(*level, label=label)
    expected = rescale_noise_cfg(guided, conditional, phi)
    torch.testing.assert_close(Rescale(told, scale, phi)(*level, label=label), expected, rtol=1e-10, atol=1e-10)


def test_rescale_is_the_papers_for_v_at_pure_noise():
    """Where v = -x_0, as alpha = 0."""
    x_t, _, _, label = images()
    level = torch.zeros(5, 1, 1, 1).double(), torch.ones(5, 1, 1, 1).double()
    v, guided_v = (-g(x_t, *level, label=label) for g in (told, CFG(told, 5.0)))
    found = Rescale(told, 5.0, 0.7)(x_t, *level, label=label)
    torch.testing.assert_close(found, V().to_x_0(rescale_noise_cfg(guided_v, v, 0.7), x_t, *level))


def test_rescale_leaves_a_flat_image_alone():
    level = images(2)[:3]
    found = Rescale(lambda x_t, *level, label: 0 * x_t + label.view(-1, 1, 1, 1), 3.0, 0.7)(
        *level, label=torch.tensor([0, 1])
    )
    torch.testing.assert_close(found, torch.tensor([2.0, 5.0]).double().view(2, 1, 1, 1).expand(2, 1, 4, 4))


def test_rescale_of_a_single_value_is_cfg():
    def one(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, *, label: Tensor) -> Tensor:
        return label[:, None] + x_t

    level = [value[:, :1] for value in asked()]
    assert torch.equal(Rescale(one, 3.0, 0.7)(*level, label=LABEL), CFG(one, 3.0)(*level, label=LABEL))


@pytest.mark.parametrize("scale", SCALES)
def test_autoguidance_extrapolates_from_the_bad_model(scale):
    good, bad = Recording(triangle()), Recording(White(0.3, 0.5))
    found = Autoguidance(good, lambda *level, label: bad(*level), scale)(*asked(), label=LABEL)
    a, b = triangle()(*asked(), label=LABEL), White(0.3, 0.5)(*asked())
    torch.testing.assert_close(found, b + scale * (a - b), rtol=1e-10, atol=1e-10)
    assert len(good.calls) == 1
    assert len(bad.calls) == (scale != 1)


def test_autoguidance_by_the_model_itself_is_the_model():
    found = Autoguidance(triangle(), triangle(), 3.0)(*asked(), label=LABEL)
    torch.testing.assert_close(found, triangle()(*asked(), label=LABEL), rtol=1e-10, atol=1e-10)


def test_autoguidance_by_the_unconditional_model_is_cfg():
    found = Autoguidance(triangle(), lambda *level, label: triangle()(*level), 3.0)(*asked(), label=LABEL)
    torch.testing.assert_close(found, CFG(triangle(), 3.0)(*asked(), label=LABEL), rtol=1e-10, atol=1e-10)


def test_autoguidance_takes_another_run_as_its_bad_model(example_run: Path):
    found = parts("guidance=autoguidance", f"guidance.bad.ckpt={example_run}", "guidance.scale=3")
    good = frozen(str(example_run))
    level = Cosine()(torch.full((4, 1, 1, 1), 0.5))
    x_t, label = normals(4, 1, 8, 8).float(), torch.arange(4)
    plain = good(x_t, *level, label=label)
    assert plain.std() > 0.1
    torch.testing.assert_close(found.guidance(good)(x_t, *level, label=label), plain, rtol=1e-4, atol=1e-4)
    still = found.guidance(lambda x_t, *level, **cond: 0 * x_t)
    torch.testing.assert_close(still(x_t, *level, label=label), -2 * plain, rtol=1e-4, atol=1e-4)


def test_autoguidance_without_a_bad_model_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"^guidance\.bad\.ckpt=\?\?\?: [^\n]*$"):
        parts("guidance=autoguidance")


def thresholded(x_0: Tensor, **arguments: float) -> Tensor:
    return DynamicThreshold(lambda *level: x_0, **arguments)(x_0, x_0, x_0)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5, 100.0])
@pytest.mark.parametrize("least", [1.0, 2.5])
def test_dynamic_threshold_is_the_papers_formula(percentile, least):
    x_0 = normals(6, 3, 5, 5) * torch.tensor([0.1, 0.3, 1, 2, 5, 20]).double().view(6, 1, 1, 1)
    s = x_0.abs().flatten(1).quantile(percentile / 100, dim=1).clamp_min(least).view(6, 1, 1, 1)
    found = thresholded(x_0, percentile=percentile, least=least)
    torch.testing.assert_close(found, torch.maximum(torch.minimum(x_0, s), -s) / s * least)
    assert found.abs().max() <= least * (1 + 1e-12)
    assert torch.equal(found[0], x_0[0])
    assert (found[5].abs() > 0.999 * least).double().mean() >= 1 - percentile / 100 - 1 / 75


def test_dynamic_threshold_takes_its_bound_from_each_sample():
    x_0 = torch.tensor([[4.0, 0.5], [0.4, -0.5], [-2.0, 2.0]]).double()
    expected = torch.tensor([[1.0, 0.125], [0.4, -0.5], [-1.0, 1.0]]).double()
    torch.testing.assert_close(thresholded(x_0, percentile=100.0), expected)
    assert thresholded(torch.tensor([[3.0]])).tolist() == [[1.0]]


def test_replaced_steps_shrink_the_residual_by_the_ratio_of_levels_whatever_the_model():
    truth, noise = normals(5, 2, seed=7), normals(5, 2)
    sampler = DDIM(LogSNR(), 12)
    states = list(sampler.walk(Replacement(triangle(), LOW, HIGH), Cosine(), noise, truth=truth, label=LABEL[:5]))
    replaced = 0
    for (x_t, t, *_), (x_s, s, *_) in itertools.pairwise(states[:-1]):
        before, after = x_t / t.alpha - truth, x_s / s.alpha - truth
        if LOW < t.ratio <= HIGH:
            torch.testing.assert_close(after, before * s.ratio / t.ratio, rtol=1e-9, atol=1e-12)
            replaced += 1
        else:
            assert (after - before * s.ratio / t.ratio).abs().max() > 1e-6
    assert 0 < replaced < 11


def test_replacing_the_last_step_gives_the_truth_itself():
    truth = normals(5, 2, seed=7)
    least = DDIM(LogSNR(), 12).levels(Cosine())[-2].ratio
    found = DDIM(LogSNR(), 12)(Replacement(triangle(), 0.0, least * 1.001), Cosine(), normals(5, 2), truth=truth)
    assert torch.equal(found, truth)


def test_without_the_truth_nothing_is_replaced():
    denoiser = Recording(triangle())
    assert torch.equal(Replacement(denoiser)(*asked(), label=LABEL), triangle()(*asked(), label=LABEL))
    replaced = Replacement(denoiser)(*asked(), label=LABEL, truth=normals(6, 2, seed=1))
    assert torch.equal(replaced, normals(6, 2, seed=1))
    assert all(set(cond) == {"label"} for _, cond in denoiser.calls)


def test_replacement_under_a_mask_inpaints():
    """The second coordinate, where the first is given."""
    mixture = eight()
    truth, label = mixture.draw(500)
    mask = torch.tensor([[1.0, 0.0]])
    found = DDIM(Karras(sigma_max=80.0), 40)(Replacement(mixture), Cosine(), normals(500, 2), truth=truth, mask=mask)
    assert torch.equal(found[:, 0], truth[:, 0])
    assert (found[:, 1] - truth[:, 1]).abs().max() > 0.5
    nearest = (found[:, None] - mixture.centres).norm(dim=-1).min(1).values
    assert nearest.mean() < 2 * (truth - mixture.centres[label]).norm(dim=-1).mean()
    everywhere = Replacement(mixture)(*asked(), truth=normals(6, 2, seed=1), mask=torch.zeros(1))
    assert torch.equal(everywhere, mixture(*asked()))


def test_replacement_nests_in_cfg_which_carries_the_truth_along():
    truth = normals(6, 2, seed=1)
    x_t, alpha_t, sigma_t = asked()
    found = CFG(Replacement(triangle(), LOW, HIGH), 3.0)(x_t, alpha_t, sigma_t, label=LABEL, truth=truth)
    inside = Interval(triangle(), 3.0, LOW, HIGH).range(alpha_t, sigma_t)
    expected = torch.where(inside, truth, CFG(triangle(), 3.0)(x_t, alpha_t, sigma_t, label=LABEL))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_scale_of_autoguidance_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"^scale=nan: need [^\n]*$"):
        Autoguidance(triangle(), triangle(), math.nan)
