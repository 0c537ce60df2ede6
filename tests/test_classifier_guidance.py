"""Guidance by a classifier, exact or made of kernels."""

import pytest
import torch
from torch import Tensor

from denoiselab.conditioning import NULL
from denoiselab.data.base import Samples
from denoiselab.guidance import CFG, Classifier, Guidance, KernelClassifier, KernelPosterior, scale_from_w
from denoiselab.sampler import Heun, Karras
from denoiselab.schedule import Cosine, Linear
from exact import Mixture, normals, parts, triangle
from guided import LABEL, SCALES, asked


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


def test_a_classifier_of_data_without_labels_is_refused_in_a_line():
    class Unlabelled:
        train = Samples(normals(8, 2))

    with pytest.raises(ValueError, match=r"^data=Unlabelled: has no labels [^\n]*$"):
        KernelClassifier(triangle(), Unlabelled())
