"""Image folders: which file is which class, and what becomes of a picture."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import images, picture, write_folder, write_labels
from denoiselab.data import ImageFolder
from denoiselab.data.picture import decode, suffixes
from denoiselab.errors import UserError


def whole(data) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All images and classes of a set, held-out ones in their places."""
    index = torch.arange(len(data._source))
    return torch.stack([data._source.read(i) for i in index.tolist()]), data._source.label


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "ppm", "tif"])
def test_classes_and_order_are_torchvisions(kind, tmp_path):
    """Against torchvision's ImageFolder on the same files."""
    from torchvision.datasets import ImageFolder as Reference

    write_folder(tmp_path, kind=kind)
    data, reference = ImageFolder(str(tmp_path)), Reference(str(tmp_path))
    found, label = whole(data)
    assert label is not None
    assert label.tolist() == reference.targets
    expected = np.stack([np.asarray(image) for image, _ in reference])
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)
    assert data._source.classes == reference.classes
    assert data.num_classes == 3


def test_a_split_holds_out_a_share_of_each_class_and_nothing_twice(tmp_path):
    made = write_folder(tmp_path, images(200, 4), classes=4)
    data = ImageFolder(str(tmp_path), held_out=12)
    ids = torch.cat([data.train.ids, data.held_out.ids])
    assert sorted(ids.tolist()) == [*range(200)]
    assert data.held_out.label.bincount().tolist() == [3, 3, 3, 3]
    for part in (data.train, data.held_out):
        batch = part.batch(slice(0, 5))
        expected = torch.from_numpy(made[batch["id"]]).permute(0, 3, 1, 2).float() / 127.5 - 1
        assert torch.equal(batch["x_0"], expected)
    assert len(ImageFolder(str(tmp_path), held_out=1000).held_out) == 20  # a tenth is the most


def test_a_folder_of_its_own_may_be_held_out(tmp_path):
    write_folder(tmp_path / "train")
    made = write_folder(tmp_path / "val", images(12, seed=1))
    data = ImageFolder(str(tmp_path / "train"), test=str(tmp_path / "val"))
    assert len(data.train) == 60
    assert np.array_equal(data.held_out.images.permute(0, 2, 3, 1).numpy(), made)
    assert data.held_out.ids.tolist() == [*range(60, 72)]
    (tmp_path / "val" / "other").mkdir()
    picture(made[0]).save(tmp_path / "val" / "other" / "x.png")
    with pytest.raises(UserError, match=r"^data\.labels=folders: class other of the held-out images is not one of"):
        ImageFolder(str(tmp_path / "train"), test=str(tmp_path / "val"))


def test_names_of_any_letters_are_read(tmp_path):
    """Among them one whose bytes are no text."""
    made = images(12)
    names = [f"{i:02d} ä 点.png".encode() for i in range(11)] + [b"99\xff.png"]
    for name, values in zip(names, made, strict=True):
        picture(values).save(tmp_path / os.fsdecode(name))
    data = ImageFolder(str(tmp_path))
    assert np.array_equal(whole(data)[0].permute(0, 2, 3, 1).numpy(), made)


def flat(tmp_path, n=20):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, values in enumerate(images(n)):
        picture(values).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("named", [False, True])
def test_labels_from_a_file(suffix, named, tmp_path):
    """Numbers are class indices; names are numbered in alphabetical order; rows of other files mean nothing."""
    folder, file = flat(tmp_path), tmp_path / f"labels.{suffix}"
    names = ["cat", "ant", "bee", "dog"] if named else [3, 0, 1, 2]
    pairs = {f"{i:02d}.png": names[i % 4] for i in reversed(range(20))}
    write_labels(file, {**pairs, "nobody.png": names[0]})
    data = ImageFolder(str(folder), labels=str(file))
    expected = [2, 0, 1, 3] if named else [3, 0, 1, 2]
    assert data._source.label.tolist() == [expected[i % 4] for i in range(20)]
    assert data.num_classes == 4


def test_numbers_are_class_indices_whatever_classes_are_there(tmp_path):
    """Twelve classes of which one has no image; as text, 10 would come before 2."""
    folder, numbers = flat(tmp_path), [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    write_labels(tmp_path / "labels.csv", {f"{i:02d}.png": numbers[i % 11] for i in range(20)})
    data = ImageFolder(str(folder), labels=str(tmp_path / "labels.csv"))
    assert data._source.label.tolist() == [numbers[i % 11] for i in range(20)]
    assert data.num_classes == 12


def test_a_mapping_and_a_file_without_a_head_are_labels_as_well(tmp_path):
    folder = flat(tmp_path)
    pairs = {f"{i:02d}.png": i % 3 for i in range(20)}
    (tmp_path / "a.json").write_text(json.dumps(pairs))
    (tmp_path / "b.csv").write_text("".join(f"{path},{value}\n" for path, value in pairs.items()))
    for name in ("a.json", "b.csv"):
        data = ImageFolder(str(folder), labels=str(tmp_path / name))
        assert data._source.label.tolist() == [i % 3 for i in range(20)]


def test_a_set_may_be_without_labels(tmp_path):
    folder = flat(tmp_path)
    write_folder(tmp_path / "classes")
    for root, labels in ((folder, "folders"), (tmp_path / "classes", "none")):
        data = ImageFolder(str(root), labels=labels)
        assert data.num_classes == 0
        assert data.train.label is None
        assert data.train.batch(slice(0, 2))["cond"] == {} == data.held_out.batch(slice(0, 2))["cond"]


MISTAKES = {
    "no folder": ({"root": "/nowhere"}, r"^data\.root=/nowhere: no such folder$"),
    "no test folder": ({"test": "/nowhere"}, r"^data\.test=/nowhere: no such folder$"),
    "empty": ({"root": "empty"}, r"^data\.root=\S*empty: no image files in it, by their suffix \(\.apng, "),
    "few": ({"root": "few"}, r"^\S+00\.png, \.\.\.: 9 images; need at least 10 where test is null$"),
    "no file": (
        {"labels": "/no.csv"},
        r"^data\.labels=/no\.csv: cannot be read as rows of path, class \(.*No such",
    ),
    "no json": ({"labels": "bad.json"}, r"^data\.labels=\S*bad\.json: cannot be read as rows of path, class \("),
    "one column": ({"labels": "one.csv"}, r"^data\.labels=\S*one\.csv: cannot be read as rows of path, class \("),
    "two classes": ({"labels": "two.csv"}, r"^data\.labels=\S*two\.csv: 00\.png has two classes, 1 and 2$"),
    "negative": ({"labels": "negative.csv"}, r"^data\.labels=\S*negative\.csv: class -3; need numbers from 0 on"),
    "channels": ({"channels": 2}, r"^channels=2: need 1 or 3$"),
    "size": ({"size": 0}, r"^size=0: need at least 1, or null$"),
    "held_out": ({"held_out": 0}, r"^held_out=0: need at least 1$"),
    "on_error": ({"on_error": "pass"}, r"^on_error=pass: need error or skip$"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path):
    options, line = MISTAKES[mistake]
    folder = flat(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    for i in range(9):
        (tmp_path / "few" / f"{i:02d}.png").write_bytes((folder / f"{i:02d}.png").read_bytes())
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "one.csv").write_text("00.png\n")
    (tmp_path / "two.csv").write_text("00.png,1\n00.png,2\n")
    (tmp_path / "negative.csv").write_text("".join(f"{i:02d}.png,{i - 3}\n" for i in range(20)))
    paths = {key: str(tmp_path / options[key]) for key in {"root", "test", "labels"} & options.keys()}
    with pytest.raises(ValueError, match=line) as refusal:
        ImageFolder(**{"root": str(folder), **options, **paths})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", [0, 255]), ("L", [7, 200]), ("LA", [7, 200]), ("P", [7, 200]), ("RGB", [7, 200]), ("RGBA", [7, 200])],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_colour(mode, expected, channels, tmp_path):
    image = Image.fromarray(np.array([[7, 200]], dtype=np.uint8))
    image = image.point(lambda v: 255 * (v > 100), mode="1") if mode == "1" else image.convert(mode)
    image.save(tmp_path / "x.png")
    found = decode(tmp_path / "x.png", None, channels)
    assert found.shape == (channels, 1, 2)
    assert found.tolist() == channels * [[expected]]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 7, 257 * 100 + 120, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png", None, 1).flatten().tolist() == [0, 7, 100, 255]


def test_a_transparent_colour_of_a_palette_is_no_warning(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.save(tmp_path / "x.png", transparency=bytes([0, 255]))
    assert decode(tmp_path / "x.png", None, 3).shape == (3, 1, 2)


def test_halving_averages_neighbours(tmp_path):
    """32 x 32 to 8: halved twice along each axis, each mean of two bytes rounded up, and nothing interpolated."""
    values = images(1, 32)[0]
    picture(values).save(tmp_path / "x.png")
    expected = values.astype(int)
    for _ in range(2):
        expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2
        expected = (expected[::2] + expected[1::2] + 1) // 2
    assert np.array_equal(decode(tmp_path / "x.png", 8, 3).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (24, 20), (160, 40)])
def test_the_middle_is_kept_at_any_proportions(width, height, tmp_path):
    """A ramp along the longer side stays a ramp: its middle is in the middle, and its slope is that of the scale."""
    ramp = np.linspace(0, 255, max(width, height))
    values = np.broadcast_to(ramp if width > height else ramp[:, None], (height, width))
    picture(values.round().astype(np.uint8)[..., None]).save(tmp_path / "x.png")
    found = decode(tmp_path / "x.png", 10, 1)[0].double()
    line = found.mean(0) if width > height else found.mean(1)
    slope = 255 / max(width, height) * min(width, height) / 10  # bytes per pixel of the result
    assert line.mean().item() == pytest.approx(127.5, abs=slope / 2 + 1)  # a crop begins at a whole pixel
    assert (line[1:] - line[:-1]).mean().item() == pytest.approx(slope, rel=0.06)
    assert found.std(0 if width > height else 1).max() < 1


def test_a_picture_of_the_right_size_is_left_alone(tmp_path):
    values = images(1, 8)[0]
    picture(values).save(tmp_path / "x.png")
    assert np.array_equal(decode(tmp_path / "x.png", 8, 3).permute(1, 2, 0).numpy(), values)


def test_enlarging_and_reducing_are_bicubic_below_a_factor_of_two(tmp_path):
    """12 to 10 and 8 to 16 against torch's antialiased bicubic (a = -0.5, as Pillow's)."""
    for side, size in ((12, 10), (8, 16)):
        values = 80 + images(1, side)[0] % 96  # far from 0 and 255, where each axis would be clipped
        picture(values).save(tmp_path / "x.png")
        exact = torch.nn.functional.interpolate(
            torch.from_numpy(values).permute(2, 0, 1)[None].double(), size=(size, size), mode="bicubic", antialias=True
        )[0]
        found = decode(tmp_path / "x.png", size, 3).double()
        assert (found - exact).abs().max() < 1.2, (side, size)


def test_no_other_program_decodes_a_file():
    assert not {".eps", ".ps", ".h5", ".wmf"} & suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".npy"} <= suffixes()


def test_a_moved_folder_is_the_same_data_and_a_changed_one_is_not(tmp_path):
    options = {"root": str(tmp_path / "a"), "labels": "folders", "size": 8, "test": None}
    write_folder(tmp_path / "a")
    first = ImageFolder(str(tmp_path / "a")).by_content(options)
    (tmp_path / "a").rename(tmp_path / "b")
    assert ImageFolder(str(tmp_path / "b")).by_content({**options, "root": str(tmp_path / "b")}) == first
    next((tmp_path / "b").rglob("*.png")).unlink()
    assert ImageFolder(str(tmp_path / "b")).by_content(options) != first
    assert str(tmp_path) not in json.dumps(first)
