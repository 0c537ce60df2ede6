"""Distances in the features of any network: the same numbers as independent references give, whatever the network."""

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd
from torchvision import models

from denoiselab.data import EightGaussians
from denoiselab.metrics import (
    DensityCoverage,
    DigitsFeatures,
    Features,
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    Torchvision,
)
from denoiselab.metrics.features import DIGITS, SEEN, digits_features, real_features
from denoiselab.metrics.frechet import Gaussian, floor_draws, frechet_distance, null_bias
from denoiselab.metrics.kernel import over_subsets, polynomial_mmd2
from denoiselab.metrics.precision_recall import density_coverage, expected_coverage, radii
from denoiselab.scripted import TorchScript
from exact import normals
from pictures_of import coloured, digits


class Pixels(Features):
    """Features of one's own: every fourth pixel; counts how many images it looked at."""

    name = "pixels"

    def __init__(self):
        self.looked = 0

    def look(self, images: Tensor) -> tuple[Tensor, None]:
        self.looked += len(images)
        return images[..., ::4, ::4].flatten(1), None

    @property
    def protocol(self):
        return {"extractor": "pixels", "extractor_sha256": "none", "preprocessing": "every fourth"}


def correlated(n: int, d: int, seed: int) -> Tensor:
    return normals(n, d, seed=seed) @ normals(d, d, seed=seed + 100) + seed


# Frechet distance


def through_sqrtm(a: Tensor, b: Tensor) -> float:
    c, d = (np.cov(rows.numpy(), rowvar=False) for rows in (a, b))
    apart = (a.mean(0) - b.mean(0)).square().sum().item()
    return apart + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)


def through_eigenvalues(a: Tensor, b: Tensor) -> float:
    c, d = torch.cov(a.T), torch.cov(b.T)
    eigenvalues = torch.linalg.eigvals(c @ d).real.clamp_min(0)
    return ((a.mean(0) - b.mean(0)).square().sum() + (c + d).trace() - 2 * eigenvalues.sqrt().sum()).item()


def through_torchmetrics(a: Tensor, b: Tensor) -> float:
    same = nn.Identity()
    same.num_features = a.shape[1]
    metric = FrechetInceptionDistance(feature=same)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return metric.compute().item()


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("reference", [through_sqrtm, through_eigenvalues, through_torchmetrics])
def test_fd_is_that_of_independent_references(reference, d):
    a, b = correlated(500, d, 1), correlated(300, d, 2)
    assert frechet_distance(a, b) == pytest.approx(reference(a, b), rel=1e-8)


def test_fd_of_gaussians_of_one_axis_is_the_closed_form():
    """|mu_a - mu_b|^2 + sum (sd_a - sd_b)^2 where covariances commute."""
    a = normals(400, 6)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # sample covariance I
    scale = torch.tensor([1.0, 2, 3, 0.5, 0.1, 4]).double()
    assert frechet_distance(a, a * scale + 2) == pytest.approx(6 * 4 + (scale - 1).square().sum().item(), rel=1e-10)


def test_fd_of_singular_covariances_is_exact():
    """Fewer rows than features, where a root of the covariances' product loses half of its digits."""
    a = normals(10, 30)
    assert abs(frechet_distance(a, a.flip(0))) < 1e-12
    assert frechet_distance(a, a + 1) == pytest.approx(30, rel=1e-12)
    assert Gaussian.of(a).root.shape == (10, 30)


def test_fd_depends_on_no_order():
    a, b = correlated(200, 8, 1), correlated(200, 8, 2)
    value = frechet_distance(a, b)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a[order], b[order.flip(0)]) == pytest.approx(value, rel=1e-12)
    parts = torch.cat([b[rank::3] for rank in range(3)])  # as three ranks would gather
    assert frechet_distance(a, parts) == pytest.approx(value, rel=1e-12)
    turn = torch.linalg.qr(normals(8, 8, seed=9)).Q
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(value, rel=1e-10)


def test_the_bias_of_two_sets_of_one_distribution_is_known():
    assert null_bias(128, 1000, 1000) == pytest.approx(8.512)
    found = [frechet_distance(normals(1000, 128, seed=s), normals(1000, 128, seed=s + 50)) for s in range(8)]
    mean, error = np.mean(found), np.std(found, ddof=1) / math.sqrt(8)
    assert abs(mean - 8.51) < 0.02 * 8.51 + 3 * error
    assert error < 0.1


def test_the_floor_falls_with_n_and_stands_beside_the_value():
    data, images, _ = digits(400)
    floors = []
    for n in (100, 400):
        (found,) = FrechetDistance().measure(images[:n], None, data)
        floors.append(found.controls["floor"])
        real = real_features(data)[1]
        draws = [frechet_distance(real, real_features(data)[0][i]) for i in floor_draws(data.train.label, n)]
        assert found.controls["floor"] == pytest.approx(np.mean(draws))
    assert floors[0] > 2 * floors[1]  # not 4 times: the held-out digits are 360 each time


# Kernel distance


def test_the_kernel_distance_is_that_of_sums_over_pairs_and_of_torchmetrics():
    x, y = normals(7, 5), normals(4, 5, seed=1) + 0.5

    def k(a, b):
        return (a @ b / 5 + 1).item() ** 3

    within = [
        sum(k(a, b) for a, b in itertools.permutations(rows, 2)) / (len(rows) * (len(rows) - 1)) for rows in (x, y)
    ]
    between = sum(k(a, b) for a in x for b in y) / 28
    assert polynomial_mmd2(x, y).item() == pytest.approx(sum(within) - 2 * between, rel=1e-12)
    assert polynomial_mmd2(x[:4], y).item() == pytest.approx(poly_mmd(x[:4], y).item(), rel=1e-12)


def test_the_kernel_distance_is_unbiased_and_grows_with_a_shift():
    values = torch.tensor(
        [polynomial_mmd2(normals(60, 8, seed=2 * s), normals(40, 8, seed=2 * s + 1)) for s in range(200)]
    )
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    shifted = torch.tensor(
        [polynomial_mmd2(normals(60, 8, seed=2 * s), normals(40, 8, seed=2 * s + 1) + 1) for s in range(5)]
    )
    assert (shifted > values.mean() + 10 * values.std()).all()


def test_subsets_are_always_the_same_and_of_equal_size():
    x, y = normals(1200, 3), normals(700, 3, seed=1)
    found = over_subsets(x, y, 10)
    assert torch.equal(found[:3], over_subsets(x, y, 3))
    assert found.std() > 0
    whole = over_subsets(x[:50], y[:50])  # every subset is all
    torch.testing.assert_close(whole, polynomial_mmd2(x[:50], y[:50]).expand(100))


def test_kd_tells_noisy_digits_from_real_ones():
    data, images, _ = digits(300)
    (real,), (noisy,) = (KernelDistance().measure(x, None, data) for x in (images, (images + 0.6).clamp(-1, 1)))
    assert real.name == "kd_digits"
    assert abs(real.details["above_null"]) < 8 * real.controls["null_std"]
    assert noisy.details["above_null"] > 20 * real.controls["null_std"]
    assert real.protocol["subset_size"] == 300


# Density and coverage


def plain_density_coverage(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """By the definition, ball by ball."""
    balls, hits = 0, 0
    for i, centre in enumerate(real):
        others = sorted((centre - other).norm().item() for j, other in enumerate(real) if j != i)
        inside = sum((centre - one).norm().item() <= others[k - 1] for one in fake)
        balls, hits = balls + inside, hits + (inside > 0)
    return balls / (k * len(fake)), hits / len(real)


@pytest.mark.parametrize(("n", "m", "k"), [(40, 30, 5), (25, 60, 3), (12, 5, 1)])
def test_density_and_coverage_are_those_of_the_definition(n, m, k):
    real, fake = normals(n, 4), 0.7 * normals(m, 4, seed=1) + 0.2
    assert density_coverage(real, fake, k) == pytest.approx(plain_density_coverage(real, fake, k))


def test_density_and_coverage_of_one_distribution_are_as_expected():
    found = torch.tensor(
        [
            density_coverage(normals(n, 6, seed=s), normals(300, 6, seed=s + 90), 5)
            for s, n in enumerate([150, 600] * 20)
        ]
    ).double()
    for half, n in ((found[::2], 150), (found[1::2], 600)):
        error = half.std(0) / math.sqrt(20)
        expected = torch.tensor([1.0, expected_coverage(n, 300, 5)]).double()
        assert ((half.mean(0) - expected).abs() < 4 * error + 1e-3).all(), (half.mean(0), expected)


def test_real_digits_are_dense_and_cover_and_one_class_does_not():
    data, images, label = digits(500)
    density, coverage = DensityCoverage().measure(images, label, data)
    assert (density.name, coverage.name) == ("density", "coverage")
    assert density.value == pytest.approx(1, abs=0.3)
    assert density.controls["held_out"] == pytest.approx(1, abs=0.1)
    assert coverage.controls["held_out"] == pytest.approx(0.97, abs=0.03)
    assert coverage.value > coverage.controls["expected"] - 0.05
    assert coverage.protocol["k"] == 5
    _, one = DensityCoverage().measure(images[label == 3].repeat(12, 1, 1, 1)[:500], None, data)
    assert one.value < 0.3


# Any features


def test_metrics_measure_in_any_features_and_say_which():
    data = coloured(90, 16, train=60)
    own = Pixels()
    metrics = [metric(features=own) for metric in (FrechetDistance, KernelDistance, PrecisionRecall, DensityCoverage)]
    generated = coloured(30, 16, seed=1).held_out.x_0
    found = {record.name: record for metric in metrics for record in metric.measure(generated, None, data)}
    names = ["fd_pixels", "kd_pixels", "precision_pixels", "recall_pixels", "density_pixels", "coverage_pixels"]
    assert [*found] == names
    assert all(record.protocol["extractor"] == "pixels" for record in found.values())
    assert own.looked == 90 + 30  # each image once
    rows = [x[..., ::4, ::4].flatten(1) for x in (generated, data.held_out.x_0)]
    assert found["fd_pixels"].value == pytest.approx(frechet_distance(*rows))
    train = FrechetDistance(own, reference="train").measure(generated, None, data)[0]
    assert train.protocol["n_real"] == 60
    assert train.protocol["floor_distinct"] == 30
    with pytest.raises(ValueError, match=r"^reference=test: need one of held_out, train"):
        FrechetDistance(own, reference="test")
    with pytest.raises(ValueError, match=r"^features=pixels: this network says no classes"):
        own.logits(generated)
    with pytest.raises(ValueError, match=r"pixels looks at images of 1 or 3 channels; data of shape \(2,\)"):
        FrechetDistance(own).check(EightGaussians(n=10))


def test_features_are_kept_while_images_live_and_not_when_they_change():
    own, images = Pixels(), torch.zeros(5, 3, 8, 8)
    before, entries = own(images), len(SEEN)
    assert own(images) is before
    images += 1
    assert not torch.equal(own(images), before)
    del images
    assert len(SEEN) < entries
    assert DigitsFeatures() == DIGITS
    assert own != DIGITS
    assert digits_features(torch.zeros(3, 1, 8, 8)).dtype == torch.float64


def test_features_of_torchvision_are_what_goes_into_the_last_layer(tmp_path):
    torch.manual_seed(0)
    net = models.resnet18().eval()
    file = tmp_path / "resnet18.safetensors"
    save_file(net.state_dict(), file)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    features = Torchvision("resnet18", str(file), side=64)
    images = coloured(4, 16).held_out.x_0
    rows = features(images)
    assert rows.shape == (4, features.dims) == (4, 512)
    torch.testing.assert_close(features.logits(images), net.fc(rows.float()).double())
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = nn.functional.interpolate(images / 2 + 0.5, 64, mode="bilinear", antialias=True)
    torch.testing.assert_close(features.logits(images), net((x - mean) / std).double())
    assert features.called("fd") == "fd_resnet18"
    assert features == Torchvision("resnet18", str(file), side=64)
    assert features != Torchvision("resnet18", str(file), side=32)
    torch.testing.assert_close(Torchvision("resnet18", str(tmp_path / "resnet18.pth"), side=64)(images), rows)
    assert not any(part.training for part in features.net.modules())


def test_what_torchvision_does_not_have_is_refused(tmp_path):
    file = tmp_path / "w.pth"
    torch.save(nn.Linear(2, 2).state_dict(), file)
    with pytest.raises(ValueError, match=r"^features.model=nothing: torchvision.models has no such classifier"):
        Torchvision("nothing", str(file))
    with pytest.raises(ValueError, match=r"^features.weights=\S+w.pth: these are not of ResNet: "):
        Torchvision("resnet18", str(file))
    with pytest.raises(ValueError, match=r"^features.weights=/nowhere: no such file$"):
        Torchvision("resnet18", "/nowhere")


def test_a_file_with_more_than_tensors_is_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("was run",)

    file = tmp_path / "evil.pth"
    torch.save({"fc.weight": Evil()}, file)
    with pytest.raises(ValueError, match=r"^features.weights=\S+evil.pth: need a file of tensors alone") as refusal:
        Torchvision("resnet18", str(file))
    assert "\n" not in str(refusal.value)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.float()


def scripted(path, module: nn.Module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


@pytest.mark.parametrize(("range", "expected"), [("levels", 318), ("unit", 1.25), ("signed", 0.5)])
def test_a_torchscript_is_given_images_in_its_range(tmp_path, range, expected):
    file = scripted(tmp_path / "net.pt", Doubled())
    data = coloured(6, 8, train=4)
    features = TorchScript(file, "mine", range)
    features.check(data)
    assert features.dims == 3
    rows = features(torch.full((2, 1, 8, 8), 0.25))  # grey becomes three channels, a map of features its mean
    assert rows.tolist() == [[expected] * 3] * 2
    assert features.called("fd") == "fd_mine"
    assert FrechetDistance(features).measure(data.train.x_0, None, data)[0].name == "fd_mine"


def test_a_torchscript_that_does_not_fit_is_refused(tmp_path):
    file = scripted(tmp_path / "net.pt", nn.Linear(7, 2))
    data = coloured(6, 8, train=4)
    with pytest.raises(ValueError, match=r"net.pt: fails on images of \(3, 8, 8\): "):
        TorchScript(file, "mine", "signed").check(data)
    scripted(tmp_path / "flat.pt", nn.Flatten(0))
    with pytest.raises(ValueError, match=r"flat.pt: gives \(384,\) for 2 images; need \(2, D\)$"):
        TorchScript(str(tmp_path / "flat.pt"), "mine").check(data)
    with pytest.raises(ValueError, match=r"^features.channels=1: the images have 3"):
        TorchScript(file, "mine", channels=1).check(data)
    (tmp_path / "text.pt").write_text("no network")
    for wrong, message in (
        ({"weights": "/nowhere"}, "features.weights=/nowhere: no such file"),
        ({"weights": str(tmp_path / "text.pt")}, "text.pt: no TorchScript"),
        ({"range": "0..1"}, "features.range=0..1: need one of levels, unit, signed"),
        ({"name": "inception"}, "features.name=inception: need letters"),
        ({"channels": 2}, "features.channels=2: need 1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            TorchScript(**{"weights": file, "name": "mine", **wrong})


def test_a_runs_own_configuration_may_not_name_a_program():
    from denoiselab import trust
    from denoiselab.errors import UserError

    with pytest.raises(UserError, match="is not among the allowed classes"):
        trust.check({"features": {"_target_": "denoiselab.scripted.TorchScript"}}, "a run")
    trust.check({"features": {"_target_": "denoiselab.metrics.Torchvision"}}, "a run")


def test_a_run_is_measured_in_the_features_of_a_file(called, example_run, tmp_path):
    file = scripted(tmp_path / "net.pt", nn.Sequential(nn.AvgPool2d(2), nn.Flatten()))
    options = (
        f"metrics.fd.features.weights={file}",
        "metrics.fd.features.name=blocks",
        "metrics.fd.features.range=signed",
    )
    result = called("evaluate", f"ckpt={example_run}", "metrics=torchscript", *options, "evaluation.n=20", "rerun=true")
    assert result.returncode == 0, result.stderr
    names = [line.split()[0] for line in result.stderr.splitlines() if line.startswith("  ")]
    assert names[:4] == ["fd_blocks", "kd_blocks", "precision_blocks", "recall_blocks"]
    result = called("evaluate", f"ckpt={example_run}", "metrics=features_digits", "evaluation.n=20")
    assert result.returncode == 2
    assert "metrics.frechet_infinity needs at least 512 samples" in result.stderr


def test_balls_reach_to_the_kth_neighbour():
    rows = torch.tensor([[0.0], [1.0], [3.0]]).double()
    assert radii(rows, 2).tolist() == [3, 2, 3]
