"""What is measured on samples: against independent references, on real data, and on samples known to be bad."""

import hashlib
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

from denoiselab.data import Digits, EightGaussians
from denoiselab.metrics import (
    ClassAccuracy,
    DigitsNet,
    FrechetDistance,
    KernelMMD,
    ModeCoverage,
    NearestTraining,
    PrecisionRecall,
)
from denoiselab.metrics.features import WEIGHTS, check_digits, digits_features, small
from denoiselab.metrics.frechet import floor_draws, frechet_distance
from denoiselab.metrics.mmd import kernel, mmd2, splits
from denoiselab.metrics.precision_recall import covered, radii
from denoiselab.rng import generator


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def points():
    return EightGaussians(n=2000)


@pytest.fixture(scope="module")
def pick(digits):
    """300 training digits and their labels."""
    index = floor_draws(digits.train.label, 300)[0]
    return digits.train.x_0[index], digits.train.label[index]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test-metrics"), dtype=torch.float64)


def moved(images, std=0.3):
    """Images with a little noise: new, but like them."""
    return (images + std * normal(*images.shape).float()).clamp(-1, 1)


# The shipped network


def test_the_shipped_network_knows_the_held_out_digits(digits):
    net = DigitsNet.pretrained()
    for size in (8, 16, 32):
        held_out = digits.held_out if size == 8 else Digits(size=size).held_out
        assert (net(held_out.x_0).argmax(1) == held_out.label).double().mean() >= 0.985
    assert not net.training
    assert net is DigitsNet.pretrained()


def test_the_shipped_weights_are_small_finite_and_hashed():
    assert WEIGHTS.stat().st_size < 300_000
    assert all(bool(value.isfinite().all()) for value in load_file(WEIGHTS).values())
    assert DigitsNet.pretrained().sha256 == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def test_features_are_those_before_the_logits(digits):
    net, x = DigitsNet.pretrained(), digits.held_out.x_0[:8]
    assert net.features(x).shape == (8, net.num_features)
    torch.testing.assert_close(net.head(net.features(x)), net(x))
    assert digits_features(x).dtype == torch.float64
    assert torch.equal(small(x), x)


# Frechet distance


def test_frechet_distance_is_the_float64_reference():
    a = normal(400, 12) @ normal(12, 12, seed=1) + 3
    b = normal(300, 12, seed=2) @ normal(12, 12, seed=3)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    reference = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(reference, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(reference, rel=1e-8)


def test_frechet_distance_of_a_shift_is_its_square():
    a = normal(200, 5)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.0, 2.0])
    assert frechet_distance(a, a + shift) == pytest.approx(9, rel=1e-9)


def test_frechet_distance_of_equal_sets_is_nothing(digits):
    features = digits_features(digits.held_out.x_0)
    assert abs(frechet_distance(features, features)) < 1e-6
    assert abs(frechet_distance(features, features.flip(0))) < 1e-6


def test_fd_of_training_digits_is_near_the_floor_and_worse_samples_are_not(digits, pick):
    metric = FrechetDistance()
    (real,) = metric.measure(*pick, digits)
    assert real.name == "fd_digits"
    assert real.better == "lower"
    assert 0.6 < real.details["ratio_to_floor"] < 1.4
    assert real.value == pytest.approx(real.details["ratio_to_floor"] * real.controls["floor"])
    (noisy,) = metric.measure(moved(pick[0], 0.5), pick[1], digits)
    assert noisy.controls == real.controls
    assert noisy.details["ratio_to_floor"] > 2
    few = pick[0][pick[1] < 5].repeat_interleave(2, dim=0)
    (dropped,) = metric.measure(few[:300], None, digits)
    assert dropped.details["ratio_to_floor"] > 2


def test_fd_carries_its_protocol(digits, pick):
    (found,) = FrechetDistance().measure(*pick, digits)
    assert found.protocol["extractor"] == "DigitsNet"
    assert found.protocol["extractor_sha256"] == DigitsNet.pretrained().sha256
    assert found.protocol["n_real"] == 360
    assert found.protocol["implementation"] == "QR and singular values, float64"
    assert found.protocol["floor_distinct"] == 300


@pytest.mark.parametrize("n", [7, 300, 1437, 2000])
def test_floor_draws_are_stratified_and_without_replacement(digits, n):
    label = digits.train.label
    draws = floor_draws(label, n)
    share = label.bincount(minlength=10).double() / len(label)
    for index in draws:
        assert len(index) == n
        assert index.unique().numel() == min(n, len(label))
        assert (label[index].bincount(minlength=10) - n * share).abs().max() <= 1
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], floor_draws(label, n)[0])


# Precision and recall


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]]).double()
    assert radii(real, 1).tolist() == [1, 1, 1, 8]
    assert radii(real, 2).tolist() == [2, 1, 2, 9]
    fake = torch.tensor([[3.0], [3.1], [-5.0]]).double()
    # 3.0 is 1 from 2.0 and 7 from 10.0, 3.1 is 6.9 from 10.0, -5.0 is 5 from 0.0.
    assert covered(fake, real, radii(real, 1)) == pytest.approx(2 / 3)
    # radii .1, .1, 8.0: only the ball around -5.0 reaches 0, 1 and 2.
    assert covered(real, fake, radii(fake, 1)) == pytest.approx(3 / 4)


def test_precision_and_recall_of_equal_and_of_distant_distributions(digits, pick):
    metric = PrecisionRecall()
    near = {m.name: m for m in metric.measure(*pick, digits)}
    assert near["precision"].value == 1
    assert near["recall"].value > 0.85
    assert near["precision"].controls["held_out"] > 0.8
    assert near["recall"].controls["held_out"] > 0.8
    assert near["precision"].protocol["k"] == 3
    noise = normal(300, 1, 8, 8).float().clamp(-1, 1)
    far = {m.name: m.value for m in metric.measure(noise, None, digits)}
    assert far["precision"] < 0.1
    assert far["recall"] < 0.1


def test_one_class_alone_has_precision_but_no_recall(digits):
    zeros = digits.train.x_0[digits.train.label == 0]
    found = {m.name: m.value for m in PrecisionRecall().measure(moved(zeros, 0.05), None, digits)}
    assert found["precision"] > 0.95
    assert found["recall"] < 0.2


# Class accuracy


def test_the_classifier_knows_the_held_out_digits(digits, pick):
    (found,) = ClassAccuracy().measure(*pick, digits)
    assert found.name == "class_accuracy"
    assert found.controls["held_out"] >= 0.985
    assert found.value > 0.985
    assert found.details["classes_covered"] == 10


def test_permuted_labels_and_lost_classes_cost_their_share(digits, pick):
    images, label = pick
    right = ClassAccuracy().measure(images, label, digits)[0]
    swapped = torch.where(label == 0, 1, torch.where(label == 1, 0, label))
    found = ClassAccuracy().measure(images, swapped, digits)[0]
    share = (label < 2).double().mean().item()
    assert found.value == pytest.approx(right.value - share, abs=0.01)
    assert found.details["per_class"][0] == 0
    assert found.details["classes_covered"] == 8
    confusion = torch.tensor(found.details["confusion"])
    assert confusion.sum() == len(label)
    assert torch.equal(confusion.sum(1), swapped.bincount(minlength=10))
    assert confusion[0, 1] == swapped.bincount()[0]
    assert (ClassAccuracy().measure(images, (label + 1) % 10, digits)[0]).value < 0.02


def test_classes_never_asked_have_no_accuracy(digits):
    some = digits.train.label == 3
    (found,) = ClassAccuracy().measure(digits.train.x_0[some], digits.train.label[some], digits)
    assert found.details["per_class"][:3] == [None] * 3
    assert found.details["per_class"][3] > 0.95
    assert found.details["classes_covered"] == 1


def test_accuracy_without_labels_is_refused(digits, pick):
    with pytest.raises(ValueError, match=r"^label=None: need the class"):
        ClassAccuracy().measure(pick[0], None, digits)


# Copies


def test_copies_are_seen_and_new_digits_are_not(digits, pick):
    metric = NearestTraining()
    (copied,) = metric.measure(*pick, digits)
    assert copied.value == 0
    assert copied.details["near_share"] == 1
    (near,) = metric.measure(moved(pick[0], 0.03), None, digits)
    assert near.value < 0.15
    (new,) = metric.measure(digits.held_out.x_0, None, digits)
    assert new.value == 1
    assert new.better == "none"
    assert new.details["near_share"] <= 0.02
    assert new.details["generated_median"] == new.controls["held_out_median"]
    (noise,) = metric.measure(normal(50, 1, 8, 8).float().clamp(-1, 1), None, digits)
    assert noise.value > 2


# Points


def test_mmd_is_the_sum_over_pairs():
    x, y = normal(5, 2), normal(4, 2, seed=1) + 1

    def k(a, b):
        return sum(math.exp(-(a - b).square().sum().item() / (2 * (c * 0.7) ** 2)) for c in (0.5, 1, 2)) / 3

    within_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(k(a, b) for a in x for b in y) / 20
    assert mmd2(x, y, 0.7) == pytest.approx(within_x + within_y - 2 * between, rel=1e-9)
    assert kernel(x, y, 0.7).shape == (5, 4)


def test_splits_are_the_same_estimate_on_parts_of_the_pool():
    pool, n, seen = normal(12, 2), 5, set()
    order = torch.rand(200, 12, generator=generator(0, "mmd-null")).argsort(dim=1)
    found = splits(pool, n, 0.7)
    for row, value in list(zip(order, found.tolist(), strict=True))[:20]:
        assert value == pytest.approx(mmd2(pool[row[:n]], pool[row[n:]], 0.7), abs=1e-12)
        seen.add(tuple(row[:n].sort().values.tolist()))
    assert len(seen) > 10


def test_mmd_is_unbiased(points):
    """Fresh pairs of real sets: zero on average, within 4 standard errors."""
    drawn = [points.draw(260, seed=seed)[0].double() for seed in range(1, 121)]
    values = torch.tensor([mmd2(x[:100], x[100:], 4.0) for x in drawn], dtype=torch.float64)
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert (values < 0).any()


def test_mmd_tells_a_shifted_set_and_a_lost_mode_from_real_points(points):
    real, label = points.draw(600, seed=7)
    metric = KernelMMD()
    (same,) = metric.measure(real, None, points)
    assert same.value < same.controls["null_95"] * 2
    assert abs(same.controls["null_mean"]) < same.controls["null_95"] / 4
    assert same.protocol["n_real"] == 400
    assert same.protocol["null_n"] == 600
    for bad in (real + 0.8, real[label != 0].repeat(2, 1)[:600]):
        (found,) = metric.measure(bad, None, points)
        assert found.value > found.controls["null_95"]


def test_mmd_uses_as_much_as_there_is_for_its_null():
    (found,) = KernelMMD().measure(EightGaussians().draw(300)[0], None, EightGaussians(n=100))
    assert found.protocol["null_n"] == 80
    assert found.controls["null_95"] > 0


def test_mode_coverage_counts_modes(points):
    real, label = points.draw(4000, seed=3)
    (found,) = ModeCoverage().measure(real, None, points)
    assert found.value == found.controls["held_out"] == 8
    assert found.details["outside"] < 0.003
    assert found.details["share"] == pytest.approx([1 / 8] * 8, abs=0.03)
    (lost,) = ModeCoverage().measure(real[(label != 2) & (label != 5)], None, points)
    assert lost.value == 6
    assert max(lost.details["share"][2], lost.details["share"][5]) < 0.005
    (away,) = ModeCoverage().measure(3 * real, None, points)
    assert away.value == 0
    assert away.details["outside"] == 1


def test_a_mode_needs_a_tenth_of_its_due(points):
    """9 samples of 800 are too few for a mode, 10 are enough."""
    centres = points.centres
    for few, value in ((9, 7), (10, 8)):
        counts = torch.tensor([few, *[113] * 7])
        counts[1] += 800 - counts.sum()
        (found,) = ModeCoverage().measure(centres.repeat_interleave(counts, dim=0), None, points)
        assert found.value == value


# Refusals


@pytest.mark.parametrize(
    "metric", [FrechetDistance(), ClassAccuracy(), PrecisionRecall(), NearestTraining()], ids=lambda m: type(m).__name__
)
def test_points_are_refused_by_metrics_of_digits(metric, digits, points):
    metric.check(digits)
    with pytest.raises(ValueError, match=r"^metrics=digits measures .* wants metrics=points$") as refusal:
        metric.check(points)
    assert "\n" not in str(refusal.value)


def test_digits_are_refused_by_metrics_of_points(digits, points):
    KernelMMD().check(points)
    ModeCoverage().check(points)
    with pytest.raises(ValueError, match=r"wants metrics=digits$"):
        KernelMMD().check(digits)
    with pytest.raises(ValueError, match="data=8gaussians"):
        ModeCoverage().check(digits)
    with pytest.raises(ValueError, match="need at least 2 held-out points"):
        KernelMMD().check(EightGaussians(n=8))


def test_pictures_in_colour_are_refused(digits):
    class Colour(Digits):
        def __init__(self):
            super().__init__()
            self.shape = (3, 8, 8)

    with pytest.raises(ValueError, match=r"shape \(1, S, S\), 10 classes; data of shape \(3, 8, 8\) with 10"):
        check_digits(Colour())


def test_too_few_samples_are_refused(digits, points, pick):
    with pytest.raises(ValueError, match=r"^n=1: need at least 2"):
        FrechetDistance().measure(pick[0][:1], None, digits)
    with pytest.raises(ValueError, match=r"^n=3: need more than k=3"):
        PrecisionRecall().measure(pick[0][:3], None, digits)
    with pytest.raises(ValueError, match=r"^n=1: need at least 2"):
        KernelMMD().measure(points.draw(1)[0], None, points)
    with pytest.raises(ValueError, match=r"^k=0: need at least 1"):
        PrecisionRecall(k=0)


def test_measuring_twice_gives_the_same_numbers(digits, points, pick):
    for metric, samples, data in (
        (FrechetDistance(), pick, digits),
        (PrecisionRecall(), pick, digits),
        (ClassAccuracy(), pick, digits),
        (NearestTraining(), pick, digits),
        (KernelMMD(), points.draw(100), points),
    ):
        assert metric.measure(*samples, data) == metric.measure(*samples, data)
