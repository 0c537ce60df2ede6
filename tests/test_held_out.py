"""Losses by level: of networks whose errors are known, in buckets, and of held-out samples."""

import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.data import Samples
from denoiselab.denoiser import Denoiser
from denoiselab.loss import WeightedLoss
from denoiselab.metrics.loss_by_t import PANELS, Buckets, held_out_losses
from denoiselab.schedule import Schedule
from denoiselab.target import Eps, V
from exact import ExactNet, Mixture, eight_gaussians, every, make, normals, triangle
from losses import Says


def filled(schedule: Schedule, denoiser: Denoiser, mixture: Mixture, n: int) -> tuple[Buckets, Tensor, Tensor]:
    """The errors of n fresh samples in ten buckets; t and x_t."""
    x_0, _ = mixture.draw(n, seed=1)
    t, eps = (torch.arange(n).double() + 0.5)[:, None] / n, normals(n, x_0.shape[1], seed=2)
    loss = WeightedLoss(make("weighting", "min_snr"))
    with torch.no_grad():
        _, told = loss(denoiser, schedule, x_0, eps, t)
    found = Buckets(10)
    found.add(schedule, t[:, 0], told["mse"])
    alpha_t, sigma_t = schedule(t)
    return found, t, alpha_t * x_0 + sigma_t * eps


@every("schedule")
def test_saying_nothing_costs_1_at_every_level(schedule):
    """A network whose output is zero, on eps: the loss is the variance of eps."""
    net = Says(torch.zeros((), dtype=torch.float64))
    row = filled(make("schedule", schedule), Denoiser(net, Eps()), triangle(), 40_000)[0].row("zero")
    assert row["zero/count"] == [4000] * 10
    for mean, error in zip(row["zero/eps"], row["zero/eps_se"], strict=True):
        assert error == pytest.approx(1 / math.sqrt(4000), rel=0.15)  # the mean of two squares has variance 1
        assert abs(mean - 1) < 3 * error


@every("schedule", "target")
@pytest.mark.parametrize("data", [triangle, eight_gaussians])
def test_the_exact_denoiser_reaches_the_optimal_loss(schedule, target, data):
    """The expected squared error of E[x_0 | x_t] is the mean posterior variance, in every bucket and unit; the
    network knows nothing but c_in x_t and c_noise."""
    found, y, mixture = make("schedule", schedule), make("target", target), data()
    denoiser = Denoiser(ExactNet(mixture, y, 1.3), y, 1.3)
    buckets, t, x_t = filled(found, denoiser, mixture, 20_000)
    _, variance = mixture.posterior(x_t, *found(t))
    row = buckets.row("exact")
    snr = found.log_snr(t[:, 0]).exp()
    for panel, factor in zip(PANELS, (1, snr, snr + 1), strict=True):
        optimal = (factor * variance / 2).view(10, -1).mean(1)
        for k in range(10):
            assert abs(row[f"exact/{panel}"][k] - optimal[k]) < 3 * row[f"exact/{panel}_se"][k] + 1e-12


def test_buckets_give_mean_and_standard_error():
    """Against the sample statistics of the same numbers; the middle bucket is empty, the last holds one."""
    schedule = make("schedule", "cosine")
    t = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0]).double()
    mse = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).double()
    found = Buckets(3)
    for part in ([0, 3], [1, 2, 4]):
        found.add(schedule, t[part], mse[part])
    row = found.row("b")
    snr = schedule.log_snr(t).exp()
    assert row["b/count"] == [4, 0, 1]
    for panel, factor in zip(PANELS, (torch.ones(5), snr, snr + 1), strict=True):
        values = factor * mse
        first, empty, one = row[f"b/{panel}"]
        assert first == pytest.approx(values[:4].mean().item(), rel=1e-12)
        assert one == pytest.approx(values[4].item(), rel=1e-12)
        assert row[f"b/{panel}_se"][0] == pytest.approx(values[:4].std().item() / 2, rel=1e-12)
        assert empty is None
        assert row[f"b/{panel}_se"][1:] == [None, None]
    again = Buckets.of(found.sums)
    assert again.row("b") == row
    assert again.count == 3


def digits(n: int = 37) -> Samples:
    return Samples(normals(n, 1, 8, 8).float(), torch.arange(n) % 10, 5 * torch.arange(n) + 3)


def small_unet() -> Denoiser:
    torch.manual_seed(0)
    net = make("model", "unet_digits", shape=(1, 8, 8), num_classes=10, dropout=0.3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return Denoiser(net, V())


def measured(denoiser: Denoiser, held_out: Samples, **arguments) -> tuple[Buckets, Tensor]:
    loss = WeightedLoss(make("weighting", "min_snr"))
    return held_out_losses(denoiser, make("schedule", "cosine"), held_out, loss=loss, **arguments)


def test_the_held_out_loss_is_the_same_again_and_without_dropout():
    denoiser, held_out = small_unet(), digits()
    for training in (True, False):
        denoiser.train(training)
        torch.manual_seed(int(training))
        buckets, total = measured(denoiser, held_out)
        assert denoiser.training == denoiser.net.training == training
        if training:
            first, sum_of_losses = buckets, total
    assert torch.equal(first.sums, buckets.sums)
    assert torch.equal(sum_of_losses, total)
    assert not torch.equal(measured(denoiser, held_out, seed=1)[0].sums, buckets.sums)


def test_the_training_mode_comes_back_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            raise RuntimeError("broken")

    denoiser = Denoiser(Fails(), V()).train()
    with pytest.raises(RuntimeError, match="broken"):
        measured(denoiser, digits())
    assert denoiser.training


def test_the_held_out_loss_does_not_depend_on_the_batch():
    denoiser, held_out = small_unet(), digits()
    whole, total = measured(denoiser, held_out, batch=512)
    for batch in (1, 7, 64):
        part, sum_of_losses = measured(denoiser, held_out, batch=batch)
        torch.testing.assert_close(part.sums, whole.sums, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sum_of_losses, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_held_out_loss_does_not_depend_on_the_ranks(world):
    """Ranks of an odd number of samples add up to one rank, nothing left out and nothing twice."""
    denoiser, held_out = small_unet(), digits()
    whole, total = measured(denoiser, held_out, repeats=3)
    ranks = [measured(denoiser, held_out, repeats=3, rank=rank, world=world) for rank in range(world)]
    torch.testing.assert_close(sum(b.sums for b, _ in ranks), whole.sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum(t for _, t in ranks), total, rtol=1e-6, atol=0)
    assert total[1] == whole.sums[:, 0].sum() == 37 * 3


def test_more_ranks_than_samples_are_fine():
    denoiser, held_out = small_unet(), digits(2)
    _, total = measured(denoiser, held_out)
    ranks = [measured(denoiser, held_out, rank=rank, world=3)[1] for rank in range(3)]
    torch.testing.assert_close(sum(ranks), total, rtol=1e-6, atol=0)


def test_each_sample_is_seen_once_in_every_part_of_the_range():
    denoiser, held_out = small_unet(), digits()
    buckets, _ = measured(denoiser, held_out, repeats=5, buckets=5)
    assert buckets.sums[:, 0].tolist() == [37] * 5


def test_samples_have_times_and_noise_of_their_own():
    """A network that says nothing of equal data: only the noise tells samples apart."""
    held_out = Samples(torch.zeros(37, 1, 8, 8), torch.zeros(37, dtype=torch.int64), torch.arange(37))

    class Nothing(Says):
        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            return 0 * x

    denoiser = Denoiser(Nothing(torch.zeros(())), Eps())
    row = measured(denoiser, held_out, repeats=1, buckets=20)[0].row("own")
    assert sum(n > 0 for n in row["own/count"]) > 10
    (error,) = measured(denoiser, held_out, repeats=1, buckets=1)[0].row("own")["own/eps_se"]
    assert error == pytest.approx(math.sqrt(2 / 64 / 37), rel=0.4)


def test_a_samples_noise_is_addressed_by_its_id():
    """A subset of the samples in another order has the errors that they have in the whole."""
    denoiser, held_out = small_unet(), digits()
    order = torch.tensor([30, 4, 11])
    subset = Samples(held_out.x_0[order], held_out.label[order], held_out.ids[order])
    alone = [
        Samples(held_out.x_0[i : i + 1], held_out.label[i : i + 1], held_out.ids[i : i + 1]) for i in order.tolist()
    ]
    expected = sum(measured(denoiser, one)[0].sums for one in alone)
    torch.testing.assert_close(measured(denoiser, subset)[0].sums, expected, rtol=1e-6, atol=1e-6)
