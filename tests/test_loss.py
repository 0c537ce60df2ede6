"""Losses of one level at a time: the same in every target, finite with a gradient, and falling in training."""

import pytest
import torch
from torch import Tensor, nn

import denoiselab
from denoiselab.checks import check_pure_noise
from denoiselab.compose import conf_dir
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.loss import WeightedLoss
from exact import OPTIONS, every, make, needing, normals, parts, parts_with, telling_levels
from losses import Says, weighings, weights

OWN = ("WeightedLoss", "Hybrid", "LearnedHybrid")
LOSSES = [
    name
    for name in OPTIONS["loss"]
    if any(f"_target_: denoiselab.loss.{own}\n" in (conf_dir() / "loss" / f"{name}.yaml").read_text() for own in OWN)
]
"""Losses of one level at a time and any target; consistency, distillation and mixed prediction have their own tests."""


def trained_by(loss: str, schedule: str, teacher: str) -> denoiselab.Parts:
    """A small run on digits by a recipe along a schedule; with target=v where that of the recipe is refused there."""
    recipe = parts(f"loss={loss}", *needing(loss, teacher), "model.channels=16")
    config = {**recipe.config, "schedule": parts_with("schedule", schedule).config["schedule"]}
    run = denoiselab.Parts(config)
    try:
        check_pure_noise(run)
    except UserError:
        run = denoiselab.Parts({**config, "target": parts_with("target", "v").config["target"]})
    run.data = recipe.data
    return run


class Told(nn.Module):
    """A network that answers y, made of something else."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.answer, self.dtype_like = y, nn.Parameter(torch.zeros((), dtype=y.dtype))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.answer


@every("schedule", "weighting")
def test_the_loss_and_its_gradient_are_the_same_whichever_target_expresses_them(schedule, weighting):
    """A common x_0_hat, told in every target to the loss of one run."""
    found = make("schedule", schedule)
    speakers = [make("target", name, sigma_data=0.5) for name in OPTIONS["target"]]
    t, alpha_t, sigma_t = telling_levels(found, *speakers)
    x_0, eps, said = (normals(len(t), 16, seed=seed) for seed in (1, 2, 3))
    for _, weigh in weighings(weighting, found):
        weight, error = weights(weigh, found, t), (said - x_0).square().mean(1)
        assert (weight > 0).any()
        slope = weight * 2 * (said - x_0) / 16
        for speaks in speakers:
            x_0_hat = said.clone().requires_grad_()
            eps_hat = (alpha_t * x_0 + sigma_t * eps - alpha_t * x_0_hat) / sigma_t
            denoiser = Denoiser(Told(speaks(x_0_hat, eps_hat, alpha_t, sigma_t)), speaks)
            loss, told = WeightedLoss(weigh)(denoiser, found, x_0, eps, t)
            torch.testing.assert_close(loss, weight[:, 0] * error, rtol=1e-10, atol=0)
            torch.testing.assert_close(told["mse"], error, rtol=1e-10, atol=0)
            assert not told["mse"].requires_grad
            loss.sum().backward()
            assert ((x_0_hat.grad - slope).abs() / (1 + sigma_t / alpha_t) <= 1e-10 * weight).all()


@every("schedule", "target")
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_option_is_finite_per_sample_with_a_gradient(schedule, target, loss):
    found = parts(f"loss={loss}").make("loss")
    levels, says = make("schedule", schedule), make("target", target)
    net, t = (
        Says(normals(16, 4 * found.denoiser.net_outputs, seed=1)),
        (torch.arange(16).double()[:, None] + 0.5) / 16,
    )
    value, told = found(found.denoiser(net, says), levels, normals(16, 4, seed=2), normals(16, 4, seed=3), t)
    assert value.shape == (16,)
    assert "mse" in told
    for part in told.values():
        assert part.shape == (16,)
        assert part.isfinite().all()
        assert not part.requires_grad
    (value * torch.arange(16)).sum().backward()
    assert net.y.grad.isfinite().all()
    assert (net.y.grad[1:].abs().sum(1) > 0).all()
    assert found.formula


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (3, 2, 4, 4), (2, 1, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_option_takes_any_batch_and_rank(loss, shape, dtype):
    found = parts(f"loss={loss}").make("loss")
    target, levels = parts(f"loss={loss}").target, make("schedule", "cosine")
    net = Says(normals(shape[0], found.denoiser.net_outputs * shape[1], *shape[2:], seed=1).to(dtype))
    x_0, eps = (normals(*shape, seed=seed).to(dtype) for seed in (2, 3))
    t = torch.linspace(0.1, 0.9, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    value, told = found(found.denoiser(net, target), levels, x_0, eps, t)
    for tensor in (value, *told.values()):
        assert tensor.shape == shape[:1]
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()


@every("loss", "schedule")
def test_gradients_of_a_network_are_finite_from_the_first_time_to_the_last(loss, schedule, example_run):
    """Of all its weights, in float32, where x_t is nearly data, noise but for a share, and noise; of eps' recipes v's
    where eps says nothing of x_0 at the last time."""
    run = trained_by(loss, schedule, str(example_run))
    torch.manual_seed(0)
    denoiser, found = run.denoiser.train(), run.loss
    for parameter in denoiser.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # nothing at zero, which would hide what is behind it
    first = run.schedule.earliest
    t = torch.tensor([first, first + 1e-6, first + 1e-3, 0.3, 0.7, 0.999, 1 - 1e-6, 1.0])
    batch = run.data.train.batch(torch.arange(len(t)))
    x_0 = batch["x_0"]
    found.advance(0)
    value, _ = found(denoiser, run.schedule, x_0, torch.randn_like(x_0), t.view(-1, 1, 1, 1), **batch["cond"])
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    value.sum().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_option_falls_in_training(loss):
    """On the eight Gaussians, twenty steps of a small network."""
    run = parts(f"loss={loss}", "data=8gaussians", "model=mlp", "model.width=32", "model.depth=1")
    torch.manual_seed(0)
    found = run.make("loss")
    denoiser = run.denoiser_class(run.make("model"), run.target, run.sigma_data)
    x_0, eps = run.data.train.x_0[:256], torch.randn(256, 2)
    t = ((torch.arange(256) + 0.5) / 256)[:, None].clamp_min(run.schedule.earliest)
    label = run.data.train.label[:256]
    optimizer = torch.optim.Adam([*denoiser.parameters(), *found.parameters()], lr=1e-2)
    losses = []
    for step in range(20):
        found.advance(256 * step)
        loss_now = found(denoiser, run.schedule, x_0, eps, t, label=label)[0].mean()
        optimizer.zero_grad()
        loss_now.backward()
        optimizer.step()
        found.after_step(denoiser)
        losses.append(loss_now.item())
    assert losses[-1] < losses[0]


@every("schedule", "target")
def test_unit_is_the_plain_mse_of_the_target(schedule, target):
    found, y = make("schedule", schedule), make("target", target)
    t, alpha_t, sigma_t = telling_levels(found, y)
    x_0, eps, output = (normals(len(t), 16, seed=seed) for seed in (1, 2, 3))
    loss, _ = WeightedLoss(make("weighting", "unit", target=y))(Denoiser(Says(output), y), found, x_0, eps, t)
    plain = (output - y(x_0, eps, alpha_t, sigma_t)).square().mean(1)
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=0)
