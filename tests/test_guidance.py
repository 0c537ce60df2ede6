"""Every guidance as a denoiser, alone and nested, and what cannot be guided."""

import pytest
import torch
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.errors import UserError
from denoiselab.guidance import (
    CFG,
    Autoguidance,
    Classifier,
    DynamicThreshold,
    Guidance,
    Interval,
    Replacement,
    Rescale,
)
from denoiselab.sampler import Heun, Trailing
from denoiselab.schedule import RATIO, Cosine
from exact import OPTIONS, normals, parts, triangle
from guided import GUIDED, LABEL, POINTS, Recording, asked, eight, option


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


@pytest.mark.parametrize("name", ["interval", "rescale", "dynamic_threshold"])
def test_guidance_that_stands_on_the_null_label_is_refused_where_it_was_never_trained(name):
    with pytest.raises(UserError, match=r"^guidance=\w+: [^\n]*p_null=0[^\n]*$"):
        _ = parts(f"guidance={name}", "p_null=0").guidance
