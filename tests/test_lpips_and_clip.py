"""LPIPS and the CLIP score, with random weights in the real formats: the formula, the pairs, and what is refused."""

import sys
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as reference
from torchvision import models

from denoiselab.metrics import LPIPS, Clip, ClipScore
from denoiselab.metrics.networks import sha256
from pictures_of import Images, coloured


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """AlexNet's layers, and a file of them."""
    torch.manual_seed(0)
    net = models.alexnet().eval()
    file = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    save_file(net.state_dict(), file)
    return net, str(file)


def by_hand(net: nn.Module, linear: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """sum_l mean_hw sum_c w_lc (phi(a) - phi(b))^2 after each of AlexNet's five activations."""
    shift, scale = (torch.tensor(x)[:, None, None] for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    total, x, y = 0.0, (a - shift) / scale, (b - shift) / scale
    seen = 0
    for layer in net.features:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU):
            p, q = (h / (1e-8 + h.square().sum(1, keepdim=True)).sqrt() for h in (x, y))
            total = total + ((p - q).square() * linear[f"lin{seen}.model.1.weight"]).sum(1).mean((1, 2))
            seen += 1
    assert seen == 5
    return total


def test_lpips_is_its_formula_with_the_files_weights(alexnet):
    net, file = alexnet
    metric = LPIPS(file)
    linear = torch.load(reference.__file__.replace("lpips.py", "lpips_models/alex.pth"), "cpu", weights_only=True)
    a, b = coloured(3, 64).held_out.x_0, coloured(3, 64, seed=1).held_out.x_0
    with torch.no_grad():
        expected = by_hand(net, linear, a, b).double()
    torch.testing.assert_close(metric.of(a, b), expected, rtol=1e-5, atol=1e-9)
    assert metric.of(a, a).abs().max() == 0
    assert (expected > 1e-7).all()
    assert not any(part.training for part in metric.net.modules())


def test_lpips_measures_pairs_beside_the_mean_image(alexnet):
    metric = LPIPS(alexnet[1])
    data = coloured(6, 40, train=2)
    metric.check(data)
    assert metric.paired
    same, other = (metric.measure(x, None, data)[0] for x in (data.held_out.x_0, data.held_out.x_0.flip(0)))
    assert same.name == "lpips_alex"
    assert same.value == 0 < other.value
    assert same.controls == other.controls
    assert other.controls["mean_image"] > 0
    assert other.protocol["network_sha256"] == sha256(metric.file)
    grey = Images(data.held_out.x_0[:, :1], 1)
    assert metric.measure(grey.held_out.x_0, None, grey)[0].value == 0


def test_what_lpips_cannot_use_is_refused(alexnet, tmp_path):
    with pytest.raises(ValueError, match=r"^net=squeeze: need one of alex, vgg$"):
        LPIPS(alexnet[1], net="squeeze")
    with pytest.raises(ValueError, match=r"^weights=\S+: these are not of VGG: "):
        LPIPS(alexnet[1], net="vgg")
    with pytest.raises(ValueError, match=r"^weights=/nowhere: no such file$"):
        LPIPS("/nowhere")
    with pytest.raises(ValueError, match=r"images of 32 x 32 pixels or more; data of shape \(3, 16, 16\)"):
        LPIPS(alexnet[1]).check(coloured(2, 16))


def test_lpips_is_refused_where_samples_have_no_pair(called, example_run, alexnet):
    result = called("evaluate", f"ckpt={example_run}", "metrics=lpips", f"metrics.lpips.weights={alexnet[1]}")
    assert result.returncode == 2
    assert "compares each sample with the held-out image that it was made of" in result.stderr


# CLIP score


class Brightness:
    """An embedding of images and texts in the plane: (mean, 1), and of the word dark or bright."""

    def __init__(self):
        self.seen: list[str] = []

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        assert images.shape[1] == 3
        assert images.min() >= 0
        assert images.max() <= 1
        self.seen += texts
        of_images = torch.stack([images.mean((1, 2, 3)), torch.full((len(images),), 0.5)], 1)
        of_texts = torch.tensor([[1.0, 0.5] if text == "bright" else [-1.0, 0.5] for text in texts])
        return torch.cosine_similarity(of_images, of_texts)


def test_the_clip_score_takes_lines_in_turn_and_counts_no_opposites(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dark\nbright\n\n")
    data = coloured(4, 8)
    clip = Brightness()
    metric = ClipScore(str(prompts), clip)
    metric.check(data)
    images = torch.ones(70, 1, 8, 8)
    images[::2] = -1  # black, white, black, ...
    (found,) = metric.measure(images, None, data)
    assert clip.seen[:70] == ["dark", "bright"] * 35
    assert clip.seen[70:] == ["bright", "dark"] * 35
    # white with bright: the same direction; black, (0, 0.5), with either: 0.5/sqrt(1.25)
    side = 100 * 0.5 / 1.25**0.5
    assert found.value == pytest.approx((side + 100) / 2, rel=1e-5)
    # white with dark: cos = (-1 + 0.25)/1.25 < 0 counts 0
    assert found.controls["other_texts"] == pytest.approx(side / 2, rel=1e-5)
    assert found.protocol["prompts"] == 2
    assert found.protocol["prompts_sha256"] == sha256(prompts)
    assert found.protocol["extractor"] == "Brightness"


def test_without_texts_or_a_model_the_clip_score_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^prompts=/nowhere: no such file; need a text per line"):
        ClipScore("/nowhere", Brightness())
    (tmp_path / "one.txt").write_text("a digit\na digit\n")
    with pytest.raises(ValueError, match=r"one.txt: need at least two different lines$"):
        ClipScore(str(tmp_path / "one.txt"), Brightness())
    with pytest.raises(ValueError, match=r"has no config.json; need a CLIP model as Hugging Face keeps it$"):
        Clip(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"^clip: is run by transformers, which is not installed; pip install"):
        Clip(str(tmp_path))


def test_the_option_needs_a_file_of_texts_and_a_model(called, example_run, tmp_path):
    result = called("evaluate", f"ckpt={example_run}", "metrics=clip_score")
    assert result.returncode == 2
    assert "metrics.clip_score.prompts=???: this option must be given" in result.stderr
    (tmp_path / "prompts.txt").write_text("a nought\na one\n")
    files = f"metrics.clip_score.prompts={tmp_path}/prompts.txt", f"metrics.clip_score.clip.folder={tmp_path}"
    result = called("evaluate", f"ckpt={example_run}", "metrics=clip_score", *files)
    assert result.returncode == 2
    assert f"clip.folder={tmp_path}: has no config.json" in result.stderr
