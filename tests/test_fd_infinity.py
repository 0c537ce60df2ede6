"""The Frechet distance extrapolated in 1/N, and what a Frechet distance does not see."""

import math

import pytest
import torch
from torch import Tensor

from denoiselab.data import Digits
from denoiselab.metrics import ClassAccuracy, DensityCoverage, FrechetDistance, FrechetInfinity, PrecisionRecall
from denoiselab.metrics.features import DIGITS, DigitsNet, labels, real_features
from denoiselab.metrics.frechet import Gaussian, floor_draws, frechet_distance, null_bias
from denoiselab.metrics.infinity import BLOCKS, PARTS, curve, intercept, jackknife, ordered, part
from exact import normals
from pictures_of import coloured, digits
from test_features import Pixels


def pair(d: int, n: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    return normals(n, d, seed=seed), normals(n, d, seed=seed + 1000) + shift


@pytest.mark.parametrize(("d", "n"), [(32, 600), (64, 1000)])
def test_the_bias_of_one_distribution_falls_by_more_than_four_fifths(d, n):
    found = [curve(*pair(d, n, seed)) for seed in range(10)]
    at_n = torch.tensor([distances[0] for _, distances in found])
    assert at_n.mean().item() == pytest.approx(null_bias(d, n, n), rel=0.03)
    left = torch.tensor([intercept(*line) for line in found])
    assert abs(left.mean()) < 0.2 * at_n.mean()
    assert abs(left.mean()) < 4 * left.std() / math.sqrt(10)  # all of it, as far as this can tell


def test_of_different_distributions_it_is_the_distance_between_them():
    shift = 0.3
    lines = [curve(*pair(32, 600, seed, shift)) for seed in range(12)]
    found = torch.tensor([intercept(*line) for line in lines])
    error = found.std() / math.sqrt(12)
    assert abs(found.mean() - 32 * shift**2) < 4 * error
    assert lines[0][1][0] - 32 * shift**2 > 10 * error  # which the distance at n is not
    errors = torch.tensor([jackknife(*pair(32, 600, seed, shift)) for seed in range(4)])
    assert 0.6 < errors.mean() / found.std() < 2


def test_the_line_is_that_of_least_squares():
    sizes = torch.tensor([100.0, 50, 25]).double()
    assert intercept(sizes, 3 + 7 / sizes) == pytest.approx(3, rel=1e-12)
    y = torch.tensor([1.0, 2.0, 9.0]).double()
    x = 1 / sizes
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert intercept(sizes, y) == pytest.approx((y.mean() - slope * x.mean()).item(), rel=1e-10)


def test_parts_are_disjoint_and_all_and_blocks_leave_the_others_where_they_are():
    rows = torch.arange(487.0)[:, None]
    for parts in PARTS:
        whole = torch.cat([part(rows, i, parts) for i in range(parts)])
        assert torch.equal(whole.sort(0).values, rows)
        kept = [torch.cat([part(rows, i, parts, block) for i in range(parts)]) for block in range(BLOCKS)]
        times = torch.cat(kept).flatten().long().bincount()
        assert (times == BLOCKS - 1).all()
        assert all(
            set(part(rows, 0, parts, b).flatten().tolist()) <= set(rows[::parts].flatten().tolist()) for b in (0, 9)
        )
    sizes, distances = curve(normals(90, 3), normals(60, 3, seed=1))
    assert sizes.tolist() == [60, 30, 20, 15]
    assert distances[1].item() == pytest.approx(
        sum(frechet_distance(normals(90, 3)[i::2], normals(60, 3, seed=1)[i::2]) for i in range(2)) / 2
    )


def test_sets_that_hold_classes_in_fixed_shares_are_divided_so():
    """Stratified halves of the training digits are 0 apart at infinity; in random parts they would seem less."""
    train, label = real_features(Digits())[0], labels(Digits().train)
    by_class, at_random, at_n = [], [], []
    for index in floor_draws(label, len(label))[:6]:  # every class in turn
        a, b = train[index[::2]], train[index[1::2]]
        sizes, distances = curve(ordered(a, label[index[::2]]), ordered(b, label[index[1::2]]))
        by_class.append(intercept(sizes, distances))
        at_random.append(intercept(*curve(ordered(a), ordered(b))))
        at_n.append(distances[0].item())
    error = torch.tensor(by_class).std().item() / math.sqrt(6)
    assert abs(sum(by_class) / 6) < 0.2 * sum(at_n) / 6 + 2 * error
    assert sum(at_random) / 6 < -5 * error


def test_digits_are_measured_with_an_interval_and_a_floor():
    data, images, label = digits(600)
    (found,) = FrechetInfinity().measure(images, label, data)
    assert found.name == "fd_infinity_digits"
    assert found.details["low"] < found.value < found.details["high"]
    assert abs(found.controls["floor"]) < found.controls["at_n"]
    assert found.details["fd"][0] == found.controls["at_n"]
    assert found.details["n"] == [600, 300, 200, 150]
    assert found.protocol["n_real"] == 1437
    (noisy,) = FrechetInfinity().measure((images + 0.6).clamp(-1, 1), label, data)
    assert noisy.details["low"] > found.details["high"]
    assert FrechetInfinity().measure(images, label, data) == [found]


def test_too_few_images_are_refused_before_and_when_measuring():
    data, images, _ = digits(100)
    metric = FrechetInfinity()
    metric.check(data)
    assert metric.least == 512
    with pytest.raises(ValueError, match=r"^n=100: need at least 512 samples for a line in 1/n, 8 times the features"):
        metric.measure(images, None, data)
    with pytest.raises(
        ValueError, match=r"^reference=held_out: .* 64 features needs 512 real images in held_out; .* 360$"
    ):
        FrechetInfinity(reference="held_out").check(data)
    few = coloured(10, 8, train=5)
    FrechetInfinity(features=Pixels()).check(few)  # how many features it has shows when it has looked
    with pytest.raises(ValueError, match=r"^n=5: need at least 96"):
        FrechetInfinity(features=Pixels()).measure(few.train.x_0, None, few)


# What it does not see


@pytest.fixture(scope="module")
def fooling() -> tuple[Digits, Tensor]:
    """Images made of noise so that the mean and covariance of their features are those of real digits."""
    data, n = Digits(), 400
    real = Gaussian.of(real_features(data)[1])
    target = real.root.T @ real.root
    net = DigitsNet.pretrained()
    x = normals(n, 1, 8, 8, seed=3).float().clamp(-1, 1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    scale = target.diagonal().sum()
    for _ in range(250):
        rows = net.features(x.clamp(-1, 1)).double()
        apart = (rows.mean(0) - real.mean).square().sum() + (torch.cov(rows.T) - target).square().sum() / scale
        optimizer.zero_grad()
        apart.backward()
        optimizer.step()
    return data, x.detach().clamp(-1, 1)


def test_a_frechet_distance_can_be_fooled_and_precision_and_a_classifier_are_not(fooling):
    """A low distance alone is no proof of good samples: matched moments are enough for it."""
    data, images = fooling
    label = DIGITS.logits(images).argmax(1)  # even the class that the network itself would say
    noise = normals(400, 1, 8, 8, seed=3).float().clamp(-1, 1)
    (fd,), (at_first,) = (FrechetDistance().measure(x, None, data) for x in (images, noise))
    assert at_first.details["ratio_to_floor"] > 20
    assert fd.details["ratio_to_floor"] < 2, fd.details
    precision = PrecisionRecall().measure(images, None, data)[0]
    density = DensityCoverage().measure(images, None, data)[0]
    (accuracy,) = ClassAccuracy().measure(images, label, data)
    assert precision.value < 0.5 < precision.controls["held_out"]
    assert density.value < 0.5 < density.controls["held_out"]
    assert accuracy.value < 0.6 < accuracy.controls["held_out"]
