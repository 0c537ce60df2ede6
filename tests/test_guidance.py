import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor, nn

from denoiselab.conditioning import NULL, Drop, null
from denoiselab.data.base import Samples
from denoiselab.denoiser import Denoiser, Outputs
from denoiselab.errors import UserError
from denoiselab.guidance import (
    CFG,
    Autoguidance,
    Classifier,
    DynamicThreshold,
    Guidance,
    Interval,
    KernelClassifier,
    KernelPosterior,
    Replacement,
    Rescale,
    scale_from_w,
    unguided,
)
from denoiselab.run import frozen
from denoiselab.sampler import DDIM, Heun, Karras, LogSNR, Trailing
from denoiselab.schedule import RATIO, Cosine, Linear
from denoiselab.target import Eps, V
from exact import OPTIONS, Mixture, White, make, normals, parts, triangle

LABEL = torch.arange(6) % 3
SCALES = [-1.0, 0.0, 0.5, 1.0, 2.0, 7.0]


class Recording:
    """A denoiser that remembers how it was called."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((len(x_t), cond))
        return self.inner(x_t, alpha_t, sigma_t, **cond)


def asked(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x_t at a level of its own for each of six samples."""
    alpha_t, sigma_t = Cosine()(torch.linspace(0.1, 0.9, 6, dtype=torch.float64)[:, None])
    return tuple(value.to(dtype) for value in (normals(6, 2), alpha_t, sigma_t))


def eight() -> Mixture:
    """Eight modes on a circle of radius 2, the label naming one."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return Mixture(2 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.4)


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


POINTS = ("data=8gaussians", "model=mlp")


def option(name: str, denoiser: Any, *overrides: str) -> Any:
    """A guidance around a denoiser; autoguidance's bad model says 0."""
    if name != "autoguidance":
        return parts(f"guidance={name}", *overrides).guidance(denoiser=denoiser)
    found = parts(f"guidance={name}", "guidance.bad.ckpt=none", *overrides)
    node = {key: value for key, value in found.config["guidance"].items() if key != "bad"}
    return found.make("guidance", node, denoiser=denoiser, bad=lambda x_t, alpha_t, sigma_t, **cond: 0 * x_t)


GUIDED = [name for name in OPTIONS["guidance"] if name != "none"]


@pytest.mark.parametrize("name", OPTIONS["guidance"])
def test_every_guidance_is_a_denoiser_for_a_sampler(name):
    denoiser = Recording(eight())
    guided = option(name, denoiser, *POINTS)
    sampler, noise, label = Heun(Trailing(), 3), normals(4, 2), torch.arange(4)
    found = sampler(guided, Cosine(), noise, label=label)
    assert found.shape == noise.shape
    assert found.isfinite().all()
    assert len(denoiser.calls) == sampler.nfe
    plain = sampler(eight(), Cosine(), noise, label=label)
    if name in ("none", "cfg", "replacement"):  # which do nothing as they are shipped, or need to be told something
        assert torch.equal(found, plain)
    else:
        assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", GUIDED)
def test_every_guidance_passes_on_what_else_the_denoiser_says_with_its_condition(name):
    class Speaking:
        def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, *, label: Tensor) -> Outputs:
            said = label[:, None] + 0 * x_t
            return Outputs(eight()(x_t, alpha_t, sigma_t, label), variance=said, heads=said[:, None])

        def __call__(self, *level: Tensor, **cond: Tensor) -> Tensor:
            return self.outputs(*level, **cond).x_0

    found = option(name, Speaking(), *POINTS).outputs(*asked(), label=LABEL)
    assert torch.equal(found.variance, LABEL[:, None] + torch.zeros(6, 2))
    assert torch.equal(found.heads, found.variance[:, None])


@pytest.mark.parametrize("name", GUIDED)
def test_every_guidance_treats_each_sample_alone(name):
    guided = option(name, eight(), *POINTS)
    x_t, alpha_t, sigma_t = asked()
    whole = guided(x_t, alpha_t, sigma_t, label=LABEL)
    for i in range(6):
        alone = guided(*(value[i : i + 1] for value in (x_t, alpha_t, sigma_t)), label=LABEL[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_every_guidance_is_finite_at_both_ends_in_float32(name, shape):
    """At pure noise, held at alpha = sigma/1e6, and near the data; for points and images."""

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, *, label: Tensor) -> Tensor:
        return alpha_t * x_t / (alpha_t**2 + sigma_t**2) + 0.1 * label.view(-1, *[1] * len(shape))

    guided = option(name, denoiser, *(POINTS if shape == (2,) else ()))
    levels = torch.tensor([[1 / RATIO, 1.0], [0.6, 0.8], [1.0, 1e-4]])
    alpha_t, sigma_t = (value.view(3, *[1] * len(shape)) for value in levels.T)
    found = guided(normals(3, *shape).float(), alpha_t, sigma_t, label=torch.arange(3))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert found.abs().max() < 100


def test_guidance_needs_the_null_label_where_it_or_what_it_guides_asks_for_it():
    needing = [CFG(triangle(), 2.0), CFG(triangle(), 0.0), Interval(triangle(), 2.0), Rescale(triangle(), 2.0)]
    free = [CFG(triangle(), 1.0), Interval(triangle(), 1.0), Rescale(triangle(), 1.0)]
    free += [Autoguidance(triangle(), triangle(), 3.0), Replacement(triangle()), DynamicThreshold(triangle())]
    free += [Classifier(triangle(), lambda *level: level[0])]
    assert all(guidance.needs_null for guidance in needing)
    assert not any(guidance.needs_null for guidance in free)
    for inner, expected in ((needing[0], True), (free[0], False)):
        for outer in (DynamicThreshold(inner), CFG(inner), Autoguidance(inner, inner), Replacement(inner)):
            assert outer.needs_null is expected
            assert DynamicThreshold(outer).needs_null is expected


@pytest.mark.parametrize("name", [name for name in GUIDED if name != "dynamic_threshold"])  # which brings its own
def test_files_nest_as_objects_do(name):
    """guidance.guidance is what guides the denoiser first."""
    inner = "+guidance.guidance={_target_: denoiselab.guidance.CFG, _partial_: true, scale: 3.0}"
    nested, plain = (option(name, triangle(), *POINTS, inner), option(name, CFG(triangle(), 3.0), *POINTS))
    assert isinstance(nested.denoiser, Guidance)
    torch.testing.assert_close(nested(*asked(), label=LABEL), plain(*asked(), label=LABEL), rtol=1e-10, atol=1e-10)


def test_the_threshold_s_file_thresholds_cfg():
    nested = option("dynamic_threshold", triangle(), *POINTS, "guidance.guidance.scale=3", "guidance.least=0.5")
    expected = DynamicThreshold(CFG(triangle(), 3.0), least=0.5)
    assert torch.equal(nested(*asked(), label=LABEL), expected(*asked(), label=LABEL))


def test_the_order_of_guidance_matters():
    def wide(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor) -> Tensor:
        return 3 * triangle()(x_t, alpha_t, sigma_t, label)

    outside = DynamicThreshold(CFG(wide, 4.0))(*asked(), label=LABEL)
    inside = CFG(DynamicThreshold(wide), 4.0)(*asked(), label=LABEL)
    assert outside.abs().max() <= 1
    assert inside.abs().max() > 1.5


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


def test_null_forgets_labels_and_nothing_else():
    cond = {"label": torch.tensor([3, 0]), "shift": torch.ones(2, 1)}
    nothing = null(cond)
    assert nothing["label"].tolist() == [NULL, NULL]
    assert nothing["label"].dtype == torch.int64
    assert torch.equal(nothing["shift"], cond["shift"])
    assert cond["label"].tolist() == [3, 0]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_drop_forgets_each_label_with_its_probability(p):
    torch.manual_seed(0)
    label = torch.arange(50_000) % 10
    dropped = Drop(p)({"label": label})["label"]
    share = (dropped == NULL).double().mean().item()
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 50_000)
    assert torch.equal(dropped[dropped != NULL], label[dropped != NULL])
    pairs = (dropped[:-1] == NULL).double() * (dropped[1:] == NULL)
    assert abs(pairs.mean().item() - p**2) <= 0.01
    assert Drop(p)({}) == {}
    assert label.min() == 0


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan])
def test_a_bad_drop_is_refused_in_a_line(p):
    with pytest.raises(ValueError, match=rf"^p_null={p}: need [^\n]*$"):
        Drop(p)


def test_a_run_names_a_bad_drop():
    with pytest.raises(UserError, match=r"^p_null=1.5: need [^\n]*$"):
        _ = parts("p_null=1.5").drop


LOW, HIGH = 0.3, 2.0


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


def bayes(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The exact log posterior of a mixture's label, and a constant that is none of its business."""
    mixture = triangle()
    away = x_t[:, None] - alpha_t[:, None] * mixture.centres
    return 5 - away.square().sum(-1) / (2 * (alpha_t**2 * mixture.std**2 + sigma_t**2))


def unconditional(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
    return triangle()(x_t, alpha_t, sigma_t)


@pytest.mark.parametrize("scale", SCALES)
@torch.no_grad()
def test_an_exact_classifier_is_classifier_free_guidance(scale):
    """At scale s on an unconditional denoiser; at scale w on a conditional one, in the convention 1 + w."""
    cond = {"label": LABEL}
    guided = Classifier(unconditional, bayes, scale)(*asked(), **cond)
    torch.testing.assert_close(guided, CFG(triangle(), scale)(*asked(), **cond), rtol=1e-8, atol=1e-8)
    guided = Classifier(triangle(), bayes, scale)(*asked(), **cond)
    torch.testing.assert_close(guided, CFG(triangle(), scale_from_w(scale))(*asked(), **cond), rtol=1e-8, atol=1e-8)
    forgetful = Classifier(triangle(), bayes, scale, guidance=lambda denoiser: CFG(denoiser, 0.0))
    torch.testing.assert_close(forgetful(*asked(), **cond), CFG(triangle(), scale)(*asked(), **cond))


def test_a_classifier_at_scale_1_makes_an_unconditional_denoiser_conditional():
    guided = Classifier(unconditional, bayes, 1.0)(*asked(), label=LABEL)
    torch.testing.assert_close(guided, triangle()(*asked(), label=LABEL), rtol=1e-8, atol=1e-8)


def test_a_classifier_leaves_samples_without_a_label_alone():
    label = LABEL.clone()
    label[::2] = NULL
    guided, plain = Classifier(triangle(), bayes, 3.0)(*asked(), label=label), triangle()(*asked(), label=label)
    assert torch.equal(guided[::2], plain[::2])
    assert ((guided - plain)[1::2].abs().amax(1) > 1e-6).all()
    assert torch.equal(Classifier(triangle(), bayes, 3.0)(*asked()), triangle()(*asked()))


def test_classifier_guidance_is_differentiable_where_x_t_is():
    def slope(guided: Guidance) -> Tensor:
        x_t, *level = asked()
        x_t.requires_grad_()
        return torch.autograd.grad(guided(x_t, *level, label=LABEL).square().sum(), x_t)[0]

    found, expected = slope(Classifier(unconditional, bayes, 2.0)), slope(CFG(triangle(), 2.0))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert not Classifier(unconditional, bayes, 2.0)(*asked(), label=LABEL).requires_grad


def test_the_kernel_posterior_is_bayes_rule_written_out():
    x_0, label = normals(40, 2, seed=3), torch.arange(40) % 7 % 3
    x_t, alpha_t, sigma_t = asked()
    found = KernelPosterior(x_0, label, 0.3, 100)(x_t, alpha_t, sigma_t).softmax(1)
    variance = (sigma_t**2 + alpha_t**2 * 0.3**2)[:, None]
    density = (-(x_t[:, None] - alpha_t[:, None] * x_0).square() / (2 * variance)).sum(-1).exp()
    expected = torch.stack([density[:, label == k].sum(1) for k in range(3)], 1) / density.sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_kernel_posterior_keeps_each_class_s_share_where_points_are_left_out():
    """Copies of one point are told from no copies by their number alone."""
    x_0 = torch.cat([torch.zeros(90, 1, 2, 2), torch.ones(10, 1, 2, 2)])
    label = torch.cat([torch.zeros(90), torch.full((10,), 2.0)]).long()
    x_t, level = torch.full((1, 1, 2, 2), 0.5), (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    for most in (1, 4, 1000):
        posterior = KernelPosterior(x_0, label, 0.3, most)
        torch.testing.assert_close(posterior(x_t, *level).softmax(1), torch.tensor([[0.9, 0.0, 0.1]]))
        assert len(posterior.points) == min(most, 90) + min(most, 10)


def test_the_kernel_posterior_spreads_the_points_it_keeps():
    x_0 = torch.arange(100.0)[:, None]
    assert KernelPosterior(x_0, torch.zeros(100).long(), 1.0, 4).points.flatten().tolist() == [0, 25, 50, 75]


def test_the_kernel_posterior_knows_digits():
    data = parts("data=digits").data
    x_0, label = data.held_out.x_0, data.held_out.label
    posterior = KernelPosterior(data.train.x_0, data.train.label, 0.2, 200)
    right = []
    for t in (0.1, 0.5, 0.9):
        alpha_t, sigma_t = (value.float() for value in Cosine()(torch.full((len(x_0), 1, 1, 1), t).double()))
        x_t = alpha_t * x_0 + sigma_t * normals(*x_0.shape).float()
        right.append((posterior(x_t, alpha_t, sigma_t).argmax(1) == label).double().mean().item())
    assert right[0] > 0.95
    assert right[0] > right[1] > right[2]
    assert right[2] < 0.5


def test_kernel_guidance_draws_the_class_from_an_unconditional_denoiser():
    found = parts("guidance=classifier", "data=8gaussians", "model=mlp")
    data = found.data
    exact = Mixture(data.codec.encode(data.centres), data.std / data.codec.std)
    label = torch.arange(400) % 8
    for denoiser, least, most in (
        (found.guidance(lambda *level, label: exact(*level)), 0.8, 1.0),
        (lambda *level, label: exact(*level), 0.05, 0.2),
    ):
        x_0 = Heun(Karras(sigma_max=80.0), 20)(denoiser, Linear(), normals(400, 2), label=label)
        nearest = (x_0[:, None] - exact.centres).norm(dim=-1).argmin(1)
        assert least <= (nearest == label).double().mean() <= most


REFUSED = {
    "guidance=interval guidance.low=-1": r"guidance\.low=-1.*: need ",
    "guidance=interval guidance.low=6": r"guidance\.low=6.*, high=5.0: need ",
    "guidance=interval guidance.scale=inf": r"guidance\.scale=inf: need ",
    "guidance=rescale guidance.phi=1.5": r"guidance\.phi=1.5: need ",
    "guidance=dynamic_threshold guidance.percentile=0": r"guidance\.percentile=0: need ",
    "guidance=dynamic_threshold guidance.percentile=101": r"guidance\.percentile=101: need ",
    "guidance=dynamic_threshold guidance.least=0": r"guidance\.least=0: need ",
    "guidance=replacement guidance.high=0": r"guidance\.low=0.3, high=0: need ",
    "guidance=classifier guidance.scale=nan": r"guidance\.scale=nan: need ",
    "guidance=classifier guidance.bandwidth=0": r"guidance\.bandwidth=0: need ",
    "guidance=classifier guidance.most=0": r"guidance\.most=0: need ",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_value_out_of_range_is_refused_in_a_line(line):
    with pytest.raises(UserError, match=rf"^{REFUSED[line]}[^\n]*$"):
        _ = parts(*line.split()).guidance


def test_a_scale_of_autoguidance_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"^scale=nan: need [^\n]*$"):
        Autoguidance(triangle(), triangle(), math.nan)


def test_a_classifier_of_data_without_labels_is_refused_in_a_line():
    class Unlabelled:
        train = Samples(normals(8, 2))

    with pytest.raises(ValueError, match=r"^data=Unlabelled: has no labels [^\n]*$"):
        KernelClassifier(triangle(), Unlabelled())


@pytest.mark.parametrize("name", ["interval", "rescale", "dynamic_threshold"])
def test_guidance_that_stands_on_the_null_label_is_refused_where_it_was_never_trained(name):
    with pytest.raises(UserError, match=r"^guidance=\w+: [^\n]*p_null=0[^\n]*$"):
        _ = parts(f"guidance={name}", "p_null=0").guidance
