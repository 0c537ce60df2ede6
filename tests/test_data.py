"""Data sets and codecs."""

from __future__ import annotations

import hashlib

import pytest
import torch

from denoiselab.data import Digits, EightGaussians, Identity, Standardise


def test_the_digits_are_split_once_and_for_all():
    data = Digits()
    assert (len(data.train), len(data.held_out)) == (1437, 360)
    ids = torch.cat([data.train.ids, data.held_out.ids])
    assert sorted(ids.tolist()) == list(range(1797))
    share = data.held_out.label.bincount() / torch.cat([data.train.label, data.held_out.label]).bincount()
    assert share.sub(360 / 1797).abs().max() < 0.004
    digest = hashlib.sha256(data.held_out.ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == HELD_OUT


HELD_OUT = "2fbaae31b8c6aad1"


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits_are_images_in_minus_one_to_one(size: int):
    data = Digits(size=size)
    assert data.shape == (1, size, size)
    assert data.train.x_0.shape == (1437, *data.shape)
    assert data.train.x_0.min() == -1
    assert 0.9 < data.train.x_0.max() <= 1
    assert data.codec.sigma_data == pytest.approx(data.train.x_0.square().mean().sqrt().item(), abs=1e-3)


def test_a_batch_is_fetched_whole():
    batch = Digits().train.__getitems__([(0, 3), (5, 1)])
    assert torch.equal(batch["x_0"], Digits().train.x_0[[3, 1]])
    assert batch["cond"]["label"].tolist() == Digits().train.label[[3, 1]].tolist()


def test_codecs_invert_and_describe_themselves():
    points = EightGaussians().draw(1000)[0]
    codec = Standardise.of(points)
    x_0 = codec.encode(points)
    assert x_0.mean(0).abs().max() < 1e-5
    assert x_0.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(codec.decode(x_0), points, atol=1e-5)
    for made in (codec, Identity(0.75)):
        config = made.config()
        again = {"Standardise": Standardise, "Identity": Identity}[config.pop("_target_").rpartition(".")[2]](**config)
        assert torch.allclose(again.encode(points), made.encode(points))
        assert again.sigma_data == made.sigma_data


def test_a_non_square_image_is_refused_in_one_line(tmp_path):
    from denoiselab.compose import compose
    from denoiselab.errors import UserError
    from denoiselab.training import Job

    (tmp_path / "data").mkdir()
    (tmp_path / "wide.py").write_text(
        "from denoiselab.data import Digits\n\nclass Wide(Digits):\n    def __init__(self, batch_size=8):\n"
        "        super().__init__(batch_size)\n        self.shape = (1, 8, 12)\n"
    )
    (tmp_path / "data" / "wide.yaml").write_text("_target_: wide.Wide\nbatch_size: 8\n")
    with pytest.raises(UserError, match=r"^model\.shape=\(1, 8, 12\): need a square image"):
        Job(compose("train", ["data=wide"], tmp_path))
