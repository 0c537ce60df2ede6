"""Inception's features: the network of the standard FID, its weights, its protocol; and the Inception score. With
random weights in the real format, since the real ones are not downloaded by tests."""

import io
import sys
import urllib.error
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore as Reference

from denoiselab.metrics import FrechetDistance, Inception, InceptionScore, KernelDistance, networks
from denoiselab.metrics.frechet import frechet_distance
from denoiselab.metrics.inception_score import inception_scores
from denoiselab.metrics.networks import STANDARD, levels
from denoiselab.rng import generator
from exact import normals
from pictures_of import coloured, digits


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as torch-fidelity's, of random numbers."""
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        net = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])
    state = net.state_dict()
    drawn = torch.Generator().manual_seed(0)
    for name, value in state.items():  # activations that neither vanish nor explode
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=drawn)
    torch.save(state, file)
    return file


@pytest.fixture
def standard(weights, monkeypatch):
    """As if these were the standard weights."""
    monkeypatch.setattr(networks, "STANDARD", networks.sha256(weights))
    return weights


def test_features_and_logits_are_those_of_the_standard_network(weights):
    images = coloured(2, 24).held_out.x_0
    features = Inception(str(weights))
    rows, logits = features(images), features.logits(images)
    assert rows.shape == (2, features.dims) == (2, 2048)
    assert logits.shape == (2, 1008)
    assert rows.dtype == torch.float64
    assert rows.std() > 1e-3
    names = ["2048", "logits_unbiased", "logits"]
    reference = fidelity.FeatureExtractorInceptionV3("reference", names, str(weights))
    stored = ((images + 1) / 2 * 255).round().to(torch.uint8)
    expected = reference(stored)
    torch.testing.assert_close(rows, expected[0].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, expected[1].double(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, expected[2].double(), rtol=1e-5, atol=1e-5)
    assert not any(part.training for part in features.net.modules())


def test_antialiasing_is_that_of_torchmetrics(weights):
    images = coloured(1, 400).held_out.x_0  # made smaller
    rows = {antialias: Inception(str(weights), antialias)(images) for antialias in (False, True)}
    reference = NoTrainInceptionV3("reference", ["2048"], str(weights), antialias=True)
    torch.testing.assert_close(rows[True], reference(levels(images)).double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(rows[True], rows[False], rtol=1e-3)


def test_images_are_rounded_to_levels_and_grey_becomes_colour():
    levels_of = torch.arange(256)
    grey = (levels_of / 127.5 - 1).view(1, 1, 16, 16)
    assert torch.equal(levels(grey), levels_of.view(1, 1, 16, 16).expand(1, 3, 16, 16).byte())
    assert levels(torch.full((1, 3, 1, 1), -1.5)).flatten().tolist() == [0] * 3
    assert levels(torch.full((1, 3, 1, 1), 0.999)).flatten().tolist() == [255] * 3


def test_only_the_standard_weights_are_called_fid(weights, standard):
    data = coloured(5, 16, train=3)
    generated = coloured(2, 16, seed=1).held_out.x_0
    features = Inception(str(weights))
    metrics = FrechetDistance(features, "train"), KernelDistance(features, "train")
    fid, kid = (metric.measure(generated, None, data)[0] for metric in metrics)
    assert (fid.name, kid.name) == ("fid", "kid")
    assert features.called("fd_infinity") == "fid_infinity"
    assert features.called("precision") == "precision_inception"
    assert fid.protocol["extractor"] == "Inception v3, 2015-12-05"
    assert fid.protocol["extractor_sha256"] == networks.sha256(weights)
    assert fid.protocol["preprocessing"] == "rounded to 256 levels, bilinear as in TensorFlow 1, to 299x299"
    assert "torch-fidelity 0." in fid.protocol["network"]
    assert fid.value == pytest.approx(frechet_distance(features(data.train.x_0), features(generated)))


def test_other_weights_are_of_unknown_hash(weights, tmp_path):
    assert networks.STANDARD == STANDARD == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    assert STANDARD.startswith(networks.URL.rpartition("-")[2].removesuffix(".pth"))
    features = Inception(str(weights))
    assert [features.called(what) for what in ("fd", "kd", "is")] == ["fd_inception", "kd_inception", "is_inception"]
    assert features.protocol["extractor"] == "Inception weights of unknown hash"
    file = tmp_path / "same.safetensors"
    save_file(torch.load(weights, weights_only=True), file)
    images = coloured(1, 16).held_out.x_0
    assert torch.equal(Inception(str(file))(images), features(images))
    assert Inception(str(file)) != features


def test_weights_that_are_not_inceptions_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "was_run", "")

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "small.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("{}")
    for name, message in (
        ("evil.pth", "need a file of tensors alone"),
        ("small.pth", "these are not Inception's: "),
        ("list.pth", "need tensors by name"),
        ("text.safetensors", "need a file of tensors alone"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(ValueError, match=rf"^features.weights=\S+{name}: {message}") as refusal:
            Inception(str(tmp_path / name))
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "was_run").exists()


def test_missing_weights_cost_one_line_that_says_where_they_belong(called, example_run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    result = called("evaluate", f"ckpt={example_run}", "metrics=inception")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    place = tmp_path / "hub" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert f"there are no Inception weights at {place}; put https://github.com/toshas/torch-fidelity/" in line
    assert line.endswith("or give weights=FILE, or weights=download")

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"^features.weights=download: <urlopen error no network>; put https\S+ at /"):
        Inception("download")


def test_a_download_is_checked_and_kept(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def fetch(url, file, hash_prefix, progress):
        asked.append((url, hash_prefix))
        Path(file).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    first = Inception("download")
    assert asked == [(networks.URL, STANDARD)]
    assert Inception("download") == Inception() == first
    assert len(asked) == 1


def test_without_torch_fidelity_it_says_what_to_install(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    networks._inception.cache_clear()
    with pytest.raises(ValueError, match=r"not installed; pip install 'denoiselab\[metrics\]'$"):
        Inception(str(weights))


# Inception score


class Given(nn.Module):
    """Logits as they come."""

    def forward(self, logits):
        return logits


def test_the_score_is_that_of_torchmetrics(monkeypatch):
    logits = 3 * normals(203, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are kept
        reference = Reference(feature=Given())
    reference.update(logits)
    order = torch.randperm(203, generator=generator(0, "inception-score", 203))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    mean, std = reference.compute()
    found = inception_scores(logits)
    assert found.mean().item() == pytest.approx(mean.item(), rel=1e-12)
    assert found.std().item() == pytest.approx(std.item(), rel=1e-9)


def test_the_score_of_sure_classes_is_their_number_and_of_unsure_ones_is_one():
    sure = 500 * nn.functional.one_hot(torch.arange(4000) % 4, 9).double()
    assert inception_scores(sure).mean().item() == pytest.approx(4, rel=0.01)
    assert inception_scores(sure).isfinite().all()
    torch.testing.assert_close(inception_scores(torch.zeros(50, 9)), torch.ones(10).double())


def test_digits_score_near_ten_beside_the_held_out_ones():
    data, images, _ = digits(500)
    (found,) = InceptionScore().measure(images, None, data)
    assert found.name == "is_digits"
    assert 8.5 < found.value < 10
    assert found.controls["held_out"] == pytest.approx(found.value, abs=1)
    assert found.protocol["n_held_out"] == 360
    (blurred,) = InceptionScore().measure(images.mean(0, keepdim=True).expand(500, 1, 8, 8), None, data)
    assert blurred.value == pytest.approx(1)


def test_the_file_that_torch_fidelity_unpickles_is_one_of_ours(weights, monkeypatch):
    given = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, *a, **k: given.append((file, k)) or load(file, *a, **k))
    networks._inception.cache_clear()
    Inception(str(weights))
    assert [(type(file), options["weights_only"]) for file, options in given] == [
        (type(weights), True),
        (io.BytesIO, False),
    ]
