"""Published recipes compose, on data in their own format, and say what the papers say."""

from pathlib import Path

import pytest
import torch

from data_files import overrides
from denoiselab.checks import check
from denoiselab.compose import compose
from denoiselab.data import CIFAR10
from denoiselab.experiment import Parts, resolve
from latents import autoencoder, encode


def made(*lines: str) -> Parts:
    parts = Parts(resolve(compose("train", lines)))
    check(parts)
    assert parts.embedding
    with torch.device("meta"):
        assert next(parts.model.parameters()).is_meta
    return parts


def small(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a small copy of a data set that a recipe does not say itself."""
    lines = overrides(name, root, monkeypatch)
    return [line for line in lines if line.startswith(("data.root=", "data.workers="))]


def test_ddpm_on_cifar10(tmp_path, monkeypatch):
    parts = made(*small("cifar10", tmp_path, monkeypatch), "experiment=ddpm_cifar10")
    assert sum(p.numel() for p in parts.model.parameters()) == 35_746_307
    assert (parts.num_classes, parts.sigma_data, parts.data.batch_size) == (0, 1, 128)
    assert parts.weighting.formula == "SNR"
    assert parts.data.train.flip
    assert (parts.sampler.clip, parts.sampler.variance, parts.sampler.steps) == (1.0, "fixed_large", 1000)


def test_adm_on_imagenet64(tmp_path, monkeypatch):
    parts = made(*small("shards", tmp_path, monkeypatch), "experiment=adm_imagenet64")
    assert (parts.shape, parts.outputs, parts.data.batch_size) == ((3, 64, 64), 2, 2048)
    assert 2.94e8 < sum(p.numel() for p in parts.model.parameters()) < 2.97e8  # 296 M with 1,000 classes


def test_dit_on_latents(tmp_path):
    latents = encode(tmp_path / "latents", autoencoder(tmp_path / "net"), "metrics=none", "flip=true")
    parts = made("experiment=dit_imagenet256", f"data.root={latents}")
    assert (parts.data.batch_size, parts.config["guidance"]["scale"], parts.outputs) == (256, 1.5, 2)
    assert 6.7e8 < sum(p.numel() for p in parts.model.parameters()) < 6.8e8


def test_a_set_without_labels_is_the_same_images(tmp_path, monkeypatch):
    small("cifar10", tmp_path, monkeypatch)
    root = str(next(tmp_path.rglob("cifar-10-batches-py")).parent)
    labelled, bare = CIFAR10(root=root), CIFAR10(root=root, labels="none")
    assert (labelled.num_classes, bare.num_classes) == (10, 0)
    for one, other in ((labelled.train, bare.train), (labelled.held_out, bare.held_out)):
        a, b = one.batch(slice(None)), other.batch(slice(None))
        assert torch.equal(a["x_0"], b["x_0"])
        assert torch.equal(a["id"], b["id"])
        assert set(a["cond"]) == {"label"}
        assert b["cond"] == {}
    with pytest.raises(ValueError, match=r"^labels=some: need classes or none$"):
        CIFAR10(root=root, labels="some")
