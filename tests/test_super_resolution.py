"""Images and small versions of them: the pairs, and how near an enlarged image comes."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_files import images, write_cifar, write_folder
from denoiselab.checks import check
from denoiselab.compose import compose
from denoiselab.data import CIFAR10, Data, Digits, EightGaussians, ImageFolder, Standardise, SuperResolution
from denoiselab.data.base import Batch
from denoiselab.data.super_resolution import Pairs, bicubic
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, identity, resolve
from denoiselab.metrics import Enlargement, Fidelity, Measurement
from denoiselab.metrics.pairs import fidelity, window
from denoiselab.module import Feed
from denoiselab.run_folder import digest
from denoiselab.training import Job
from exact import normals


def means(x_0: Tensor, factor: int) -> Tensor:
    """Over squares of factor x factor pixels, another way."""
    height, width = x_0.shape[-2] // factor, x_0.shape[-1] // factor
    return x_0.double().unflatten(-1, (width, factor)).unflatten(-3, (height, factor)).mean((-1, -3))


def shown(data: Data, batches: int = 5, seed: int = 5) -> list[Batch]:
    """What a run is shown first."""
    feed = Feed(data, seed)
    feed.trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1)  # type: ignore
    return list(islice(iter(feed.train_dataloader()), batches))


@pytest.fixture
def sets(tmp_path: Path, monkeypatch):
    """Digits in memory, CIFAR as bytes with flips, and files with flips."""
    write_cifar(tmp_path / "cifar", monkeypatch)
    write_folder(tmp_path / "folder")

    def make(name: str, wrapped: bool = True, workers: int = 0, factor: int = 2) -> Data:
        makes = {
            "digits": lambda **shared: Digits(**shared),
            "cifar10": lambda **shared: CIFAR10(root=str(tmp_path / "cifar"), flip=True, held_out=8, **shared),
            "folder": lambda **shared: ImageFolder(str(tmp_path / "folder"), flip=True, **shared),
        }
        if wrapped:
            return SuperResolution(makes[name], factor, batch_size=12, workers=workers)
        return makes[name](batch_size=12, workers=0)

    return make


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("name", "factor"), [("digits", 2), ("digits", 4), ("cifar10", 4), ("folder", 2)])
def test_pairs_match_and_all_else_is_as_without_them(name, factor, workers, sets):
    """Order, labels, flips and bits of x_0 are the wrapped set's; low_res is the means of that very x_0."""
    alone, pairs = sets(name, wrapped=False), sets(name, workers=workers, factor=factor)
    for plain, paired in zip(shown(alone), shown(pairs), strict=True):
        assert torch.equal(plain["x_0"], paired["x_0"])
        assert torch.equal(plain["id"], paired["id"])
        assert torch.equal(plain["cond"]["label"], paired["cond"]["label"])
        assert paired["cond"].keys() == {"label", "low_res"}
        assert (paired["cond"]["low_res"] - means(paired["x_0"], factor)).abs().max() < 1e-6
    held_out, drawn = alone.held_out.draw(5), pairs.held_out.draw(5)
    assert torch.equal(held_out["x_0"], drawn["x_0"])
    assert (drawn["cond"]["low_res"] - means(drawn["x_0"], factor)).abs().max() < 1e-6
    facts = ("shape", "num_classes", "vector", "bins", "block", "batch_size")
    assert [getattr(alone, fact) for fact in facts] == [getattr(pairs, fact) for fact in facts]
    assert (pairs.low_res, pairs.codec.config()) == (alone.shape[0], alone.codec.config())
    assert len(pairs.train) == len(alone.train)


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_flipped_images_have_flipped_small_ones(name, sets):
    pairs = sets(name)
    place = {int(i): k for k, i in enumerate(pairs.train.ids)}
    turned = 0
    for batch in shown(pairs):
        still = pairs.train.batch(torch.tensor([place[int(i)] for i in batch["id"]]))
        for now, then in zip(batch["cond"]["low_res"], still["cond"]["low_res"], strict=True):
            assert torch.equal(now, then) or torch.allclose(now, then.flip(-1), atol=1e-6)
            turned += not torch.equal(now, then)
    assert 15 < turned < 45  # of 60


def test_a_bad_file_is_replaced_pair_by_pair(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("denoiselab.data.source.BAD_SHARE", 0.1)
    write_folder(tmp_path)
    (tmp_path / "class_0" / "part_0" / "bad.png").write_bytes(b"")
    data = SuperResolution(lambda **shared: ImageFolder(str(tmp_path), on_error="skip", **shared), batch_size=60)
    (batch,) = shown(data, 1)
    assert (batch["cond"]["low_res"] - means(batch["x_0"], 2)).abs().max() < 1e-6
    assert isinstance(data.train, Pairs)
    assert [Path(row["where"]).name for row in data.train.skipped] == ["bad.png"]
    assert "bad.png" in capsys.readouterr().err


def address(*overrides: str) -> str:
    """What stands for the data in a run's address."""
    config = resolve(compose("train", ["data=super_resolution", *overrides]))
    return digest(identity({**config, "data": Parts(config).data.by_content(config["data"])}, None))


def test_the_address_of_a_run_follows_from_what_is_paired(tmp_path: Path):
    made = images()
    for name in ("here", "moved", "changed"):
        write_folder(tmp_path / name, made if name != "changed" else made[:-1])

    def folder(name: str, *more: str) -> str:
        root = f"data.images.root={tmp_path / name}"
        return address("data@data.images=image_folder", root, "data.images.size=8", *more)

    digits = address()
    assert Job(compose("train", ["data=super_resolution", "metrics=none"])).folder.path.name.endswith(digits)
    assert digits == address("data.workers=2") == address("data.images.workers=1")
    others = [address("data.factor=4"), address("data.images.size=16"), address("data.batch_size=64")]
    others += [folder("here"), folder("changed"), folder("here", "data.images.flip=true")]
    assert len({digits, *others}) == 7
    assert folder("here") == folder("moved") == folder("here", "data.workers=0")


REFUSED = {
    "data.factor=3": r"data\.factor=3: does not divide images of 8 x 8 pixels; need one of 2, 4, 8$",
    "data.factor=1": r"data\.factor=1: need a whole number >= 2$",
    "data.factor=2.5": r"data\.factor=2\.5: need a whole number",
    "data@data.images=8gaussians": r"data\.images=EightGaussians: samples of shape \(2,\) are no images; need images",
    "data@data.images=super_resolution": r"data\.images=SuperResolution: has small images already; need a set",
    "data@data.images=cifar": r"did you mean cifar10\?",
    "data@data.images=image_folder": r"data\.images\.root=\?\?\?: this option must be given$",
    "data@data.images=image_folder data.images.root=nowhere": r"^data\.images\.root=nowhere: no such folder$",
    "data@data.images=cifar10 data.images.root=a": r"^data\.images\.root=a: no .* without data\.images\.root it is",
    "data.images.size=9": r"^data\.images\.size=9: need 8, 16 or 32$",
    "data.images.batch_size=64": r"data\.images\.batch_size=64: batches are of pairs; need data\.batch_size=64$",
    "data.batch_size=0": r"data\.batch_size=0: need at least 1$",
    "data.images.siz=9": r"no option 'siz' here; did you mean size\?",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_enlarged_is_refused_in_one_line(options: str):
    with pytest.raises(UserError, match=REFUSED[options]) as error:
        check(Parts(resolve(compose("train", ["data=super_resolution", "metrics=super_resolution", *options.split()]))))
    assert "\n" not in str(error.value)


def test_samples_made_of_noise_are_compared_with_no_image():
    with pytest.raises(UserError, match=r"^metrics\.enlargement: compares each sample with the held-out image that"):
        check(Parts(resolve(compose("train", ["metrics=super_resolution"]))))


def test_what_is_not_diffused_as_pixels_is_refused():
    def standardised(**shared) -> Data:
        data = Digits(**shared)
        data.codec = Standardise([0.0], 1.0)
        return data

    with pytest.raises(ValueError, match="images=Digits: are diffused as something else than pixels"):
        SuperResolution(standardised)


def test_the_psnr_of_a_constant_error_is_its_closed_form():
    real = normals(70, 3, 16, 12).tanh()
    error = torch.linspace(0.01, 0.5, 70, dtype=torch.float64)
    found = fidelity(real + error.view(-1, 1, 1, 1), real)
    assert found["psnr"] == pytest.approx(sum(10 * math.log10(4 / e**2) for e in error.tolist()) / 70, rel=1e-6)
    assert found["mse"] == pytest.approx(error.square().mean().item(), rel=1e-9)
    exact = fidelity(real, real)
    assert (exact["psnr"], exact["mse"]) == (100, 0)
    assert exact["ssim"] == pytest.approx(1, abs=1e-9)


def ssim(a: Tensor, b: Tensor, side: int, sigma: float) -> float:
    """Of two images (H, W), window by window, as it is written in the paper: a second implementation."""
    half = side // 2
    weight = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    padded = [np.pad(image.numpy(), half, mode="reflect") for image in (a, b)]
    found = []
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            x, y = (image[i : i + side, j : j + side] for image in padded)
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
            cov = (weight * (x - mx) * (y - my)).sum()
            c1, c2 = 0.02**2, 0.06**2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("side", "wide", "sigma"),
    [(16, 11, 1.5), (11, 11, 1.5), (10, 9, 1.5 * 9 / 11), (8, 7, 1.5 * 7 / 11), (4, 3, 4.5 / 11)],
)
def test_ssim_has_the_window_that_fits(side, wide, sigma):
    real = normals(2, 1, side, side).tanh()
    found = (real + 0.3 * normals(2, 1, side, side, seed=1)).clamp(-1, 1)
    expected = sum(ssim(a[0], b[0], wide, sigma) for a, b in zip(found, real, strict=True)) / 2
    assert window((side, side)) == (wide, pytest.approx(sigma))
    assert fidelity(found, real)["ssim"] == pytest.approx(expected, abs=1e-8)


def test_ssim_is_that_of_torchmetrics():
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    real = normals(70, 3, 16, 24).tanh().float()
    found = (real + 0.3 * normals(70, 3, 16, 24, seed=1).float()).clamp(-1, 1)
    expected = StructuralSimilarityIndexMeasure(data_range=2.0)(found, real)
    assert fidelity(found, real)["ssim"] == pytest.approx(float(expected), abs=1e-5)


def test_bicubic_is_what_pillow_makes():
    small = normals(2, 1, 5, 7).tanh().float()
    for image, large in zip(small, bicubic(small, (20, 21)), strict=True):
        expected = Image.fromarray(image[0].numpy()).resize((21, 20), Image.Resampling.BICUBIC)
        assert np.abs(large[0].numpy() - np.asarray(expected).clip(-1, 1)).max() < 1e-5


def by_name(records: list[Measurement]) -> dict[str, Measurement]:
    return {record.name: record for record in records}


def test_consistency_is_the_error_of_the_sample_made_small_again():
    data = SuperResolution(Digits, factor=4)
    batch = data.held_out.draw(70)
    low_res = batch["cond"]["low_res"]
    blocks = low_res.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert by_name(Enlargement().measure(blocks, None, data))["consistency"].value < 1e-12
    assert by_name(Enlargement().measure(blocks + 0.25, None, data))["consistency"].value == pytest.approx(1 / 16)
    found = by_name(Enlargement().measure(batch["x_0"], batch["cond"]["label"], data))
    assert (found["psnr"].value, found["ssim"].value) == (100, pytest.approx(1))
    control = bicubic(low_res, (8, 8))
    for name, value in fidelity(control, batch["x_0"]).items():
        assert found[name].controls == {"bicubic": pytest.approx(value, rel=1e-9)}
    expected = (means(control, 4) - low_res).square().mean().item()
    assert found["consistency"].controls == {"bicubic": pytest.approx(expected, rel=1e-5)}
    assert found["psnr"].better == found["ssim"].better == "higher"
    assert found["mse"].better == found["consistency"].better == "lower"
    assert found["ssim"].protocol["window"] == "Gaussian, 7 x 7 pixels, sigma 0.955, reflected borders"


def test_pairs_of_any_images_can_be_measured():
    """Without small images, as reconstructions are."""
    data = Digits()
    real = data.held_out.draw(9)["x_0"]
    found = by_name(Fidelity().measure(real + 0.5, None, data))
    assert found["psnr"].value == pytest.approx(10 * math.log10(16), rel=1e-6)
    assert found.keys() == {"psnr", "ssim", "mse"}
    with pytest.raises(ValueError, match="compare images of 3 x 3 pixels or more"):
        Fidelity().check(EightGaussians(n=100))
