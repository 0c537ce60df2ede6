"""Small data sets written in the formats that the real ones come in."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

N, TEST, CLASSES = 60, 20, 10


def images(n: int = N, side: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(n, side, side, channels) random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def labels(n: int = N, classes: int = CLASSES) -> np.ndarray:
    return np.arange(n) % classes


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def write_idx(file: Path, values: np.ndarray) -> None:
    """The format of MNIST's files: a magic number, the axes, and bytes."""
    file.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())


def write_mnist(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "MNIST") -> tuple[np.ndarray, np.ndarray]:
    """MNIST's eight files for 60 and 20 images of 28 x 28, archives and unpacked, with their own checksums."""
    import torchvision.datasets

    folder, resources = root / name / "raw", []
    folder.mkdir(parents=True)
    made = images(N + TEST, 28, 1)[..., 0]
    for part, x, y in (("train", made[:N], labels()), ("t10k", made[N:], labels(TEST))):
        for kind, values in (("images-idx3", x), ("labels-idx1", y.astype(np.uint8))):
            file = folder / f"{part}-{kind}-ubyte"
            write_idx(file, values)
            archive = file.with_name(f"{file.name}.gz")
            archive.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
            resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", resources)
    return made, labels()


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, classes: int = 10) -> np.ndarray:
    """CIFAR's pickled batches for 60 and 20 images, with their own checksums; the images, (80, 3, 32, 32)."""
    import torchvision.datasets

    cifar = getattr(torchvision.datasets, f"CIFAR{classes}")
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)
    made = images(N + TEST, 32).transpose(0, 3, 1, 2)
    key, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    target = np.arange(N + TEST) % classes

    def write(name: str, content: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batches(listed: list[list[str]], first: int, count: int) -> list[list[str]]:
        each, found = count // len(listed), []
        for i, (name, _) in enumerate(listed):
            part = slice(first + i * each, first + (i + 1) * each)
            content = {"data": made[part].reshape(each, -1), key: target[part].tolist()}
            found.append([name, write(name, content)])
        return found

    monkeypatch.setattr(cifar, "train_list", batches(cifar.train_list, 0, N))
    monkeypatch.setattr(cifar, "test_list", batches(cifar.test_list, N, TEST))
    meta = write(cifar.meta["filename"], {names: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": meta})
    return made


def write_folder(root: Path, made: np.ndarray | None = None, kind: str = "png", classes: int = 3) -> np.ndarray:
    """root/CLASS/part/000.png, classes in turn; the images in the order of their paths."""
    made = images() if made is None else made
    for i, values in enumerate(made):
        file = root / f"class_{i % classes}" / f"part_{i % 2}" / f"{i:03d}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(values).save(file)
    return made[sorted(range(len(made)), key=lambda i: f"class_{i % classes}/part_{i % 2}/{i:03d}.{kind}")]


def write_huggingface(root: Path, made: np.ndarray | None = None, test: bool = False) -> np.ndarray:
    """A data set with an Image and a ClassLabel column, saved to disk."""
    import datasets

    made = images() if made is None else made
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(CLASSES)])}
    )

    def rows(values: np.ndarray) -> datasets.Dataset:
        content = {"image": [picture(v) for v in values], "label": labels(len(values)).tolist()}
        return datasets.Dataset.from_dict(content, features=features)

    parts = datasets.DatasetDict({"train": rows(made[:-TEST]), "test": rows(made[-TEST:])}) if test else rows(made)
    parts.save_to_disk(str(root))
    return made


def write_shards(root: Path, made: np.ndarray | None = None, each: int = 25, kind: str = "png") -> np.ndarray:
    """Shards made by WebDataset's own writer: PNG, a class, and a .json file beside them."""
    import webdataset

    root.mkdir(parents=True, exist_ok=True)
    made = images() if made is None else made
    with webdataset.ShardWriter(str(root / "train-%04d.tar"), maxcount=each, verbose=0) as sink:
        for i, values in enumerate(made):
            content = {"class": f"class {i % 4}", "odd": i % 2}
            sink.write({"__key__": f"sample{i:06d}", kind: picture(values), "cls": i % CLASSES, "json": content})
    return made


def write_labels(file: Path, pairs: dict[str, Any]) -> None:
    """A .csv or .json of path, class."""
    if file.suffix == ".json":
        file.write_text(json.dumps({"labels": [list(pair) for pair in pairs.items()]}))
    else:
        file.write_text("file,class\n" + "".join(f"{path},{value}\n" for path, value in pairs.items()))


def overrides(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command-line options of a small copy of a data set, which is written to root."""
    if name in ("mnist", "fashion_mnist"):
        write_mnist(root, monkeypatch, {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name])
    elif name in ("cifar10", "cifar100"):
        write_cifar(root, monkeypatch, int(name.removeprefix("cifar")))
    else:
        {"image_folder": write_folder, "huggingface": write_huggingface, "shards": write_shards}[name](root)
    small = ["data.size=8", "data.workers=0"] if name in ("image_folder", "huggingface", "shards") else []
    return [f"data={name}", f"data.root={root}", "data.batch_size=8", *small]
