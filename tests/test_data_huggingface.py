"""Hugging Face data sets from disk: pictures and arrays, classes of every kind."""

from __future__ import annotations

import shutil
import sys

import datasets
import numpy as np
import pytest
import torch

from data_files import CLASSES, TEST, N, images, picture, write_folder, write_huggingface
from denoiselab.data import BadSample, HuggingFace
from denoiselab.errors import UserError

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(root, content: dict, features: datasets.Features | None = None) -> str:
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(root))
    return str(root)


def test_pictures_and_classes_arrive_whole(tmp_path):
    made = write_huggingface(tmp_path / "d")
    data = HuggingFace(str(tmp_path / "d"))
    assert data.num_classes == CLASSES
    assert sorted(torch.cat([data.train.ids, data.held_out.ids]).tolist()) == [*range(N)]
    for part in (data.train, data.held_out):
        batch = part.batch(slice(None))
        expected = torch.from_numpy(made[batch["id"]]).permute(0, 3, 1, 2).float() / 127.5 - 1
        assert torch.equal(batch["x_0"], expected)
        assert torch.equal(batch["cond"]["label"], batch["id"] % CLASSES)


def test_a_split_may_be_held_out(tmp_path):
    made = write_huggingface(tmp_path / "d", test=True)
    data = HuggingFace(str(tmp_path / "d"), test="test")
    assert len(data.train) == N - TEST
    assert data.held_out.ids.tolist() == [*range(N - TEST, N)]
    assert np.array_equal(data.held_out.images.permute(0, 2, 3, 1).numpy(), made[-TEST:])
    with pytest.raises(UserError, match=r"^data\.split=val: no such split; \S+ has train, test$"):
        HuggingFace(str(tmp_path / "d"), split="val")


def test_a_folder_that_the_library_loads_is_a_data_set(tmp_path):
    """Through load_dataset, as names on the hub are: here its loader of image folders, whose classes are the innermost
    folders."""
    write_folder(tmp_path / "d")
    data = HuggingFace(str(tmp_path / "d"))
    assert len(data.train) + len(data.held_out) == N
    assert data.num_classes == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3, 0, 1, 2], [3, 0, 1, 2]), (["d", "a", "b", "c"], [3, 0, 1, 2]), ([True, False], [1, 0])],
)
def test_numbers_and_names_are_classes(values, expected, tmp_path):
    content = {"image": [picture(v) for v in images(20)], "kind": [values[i % len(values)] for i in range(20)]}
    data = HuggingFace(save(tmp_path / "d", content), label="kind")
    assert data._source.label.tolist() == [expected[i % len(values)] for i in range(20)]
    assert data.num_classes == len(values)
    assert HuggingFace(save(tmp_path / "e", content), label=None).num_classes == 0


@pytest.mark.parametrize("missing", [None, -1])
def test_a_missing_label_is_named(missing, tmp_path):
    content = {"image": [picture(v) for v in images(20)], "label": [missing if i == 7 else i % 2 for i in range(20)]}
    root = save(tmp_path / "d", content)
    with pytest.raises(BadSample, match=rf"^{root} \[train\] \(index 7\): has no label$"):
        HuggingFace(root)


def test_arrays_are_taken_as_they_are(tmp_path):
    values = images(20).astype(np.float32) / 127.5 - 1
    features = datasets.Features({"image": datasets.Array3D((8, 8, 3), "float32")})
    data = HuggingFace(save(tmp_path / "d", {"image": list(values)}, features), label=None)
    assert data.bins is None
    batch = data.train.batch(slice(None))
    assert torch.equal(batch["x_0"], torch.from_numpy(values[batch["id"]]).permute(0, 3, 1, 2))
    values[5, 0, 0, 0] = 1.5
    root = save(tmp_path / "e", {"image": list(values)}, features)
    with pytest.raises(BadSample, match=rf"^{root} \[train\] \(index 5\): has values from .* to 1\.5, need"):
        len(HuggingFace(root, label=None).held_out)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "an empty file"), (b"text", "not an image"), (None, "has no image")]
)
def test_a_bad_picture_is_named_with_its_path_and_index(content, reason, tmp_path):
    rows = [{"bytes": picture_bytes(v), "path": f"{i}.png"} for i, v in enumerate(images(20))]
    rows[9] = None if content is None else {"bytes": content, "path": "9.png"}
    root = save(tmp_path / "d", {"image": rows}, datasets.Features({"image": datasets.Image()}))
    name = "" if content is None else r": 9\.png"
    with pytest.raises(BadSample, match=rf"^{root} \[train\]{name} \(index 9\): {reason}"):
        len(HuggingFace(root, label=None).held_out)


def picture_bytes(values: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    picture(values).save(file, "png")
    return file.getvalue()


def test_mistakes_are_one_line(tmp_path):
    write_huggingface(tmp_path / "d")
    for option in ("image", "label"):
        with pytest.raises(UserError, match=rf"^data\.{option}=img: no such column; \S+ has image, label$"):
            HuggingFace(str(tmp_path / "d"), **{option: "img"})
    for root in ("nobody/nothing-of-this-name", str(tmp_path / "nowhere")):
        with pytest.raises(
            UserError, match=rf"^data\.root={root}: .*; need a folder written by save_to_disk, or"
        ) as refusal:
            HuggingFace(root)
        assert "\n" not in str(refusal.value)


def test_a_moved_data_set_is_the_same_and_another_is_not(tmp_path):
    write_huggingface(tmp_path / "a")
    options = {"root": str(tmp_path / "a"), "split": "train"}
    first = HuggingFace(str(tmp_path / "a")).by_content(options)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert HuggingFace(str(tmp_path / "b")).by_content({**options, "root": str(tmp_path / "b")}) == first
    write_huggingface(tmp_path / "c", images(seed=1))
    assert HuggingFace(str(tmp_path / "c")).by_content(options) != first


def test_a_missing_package_is_asked_for_by_name(tmp_path, monkeypatch):
    from denoiselab.data import Shards

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for data, name, package in ((HuggingFace, "huggingface", "datasets"), (Shards, "shards", "webdataset")):
        line = rf"^data={name}: needs the package {package}; pip install 'denoiselab\[data\]'$"
        with pytest.raises(UserError, match=line):
            data(str(tmp_path / "train-{0..1}.tar"))
