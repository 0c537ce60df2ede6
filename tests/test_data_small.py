"""torchvision's small sets: read through torchvision from files in their own formats, and verified."""

from __future__ import annotations

import gzip
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from data_files import CLASSES, TEST, N, labels, write_cifar, write_mnist
from denoiselab.data import CIFAR10, CIFAR100, MNIST, FashionMNIST
from denoiselab.errors import UserError

SETS = {"MNIST": MNIST, "FashionMNIST": FashionMNIST, "CIFAR10": CIFAR10, "CIFAR100": CIFAR100}


def write(name, root, monkeypatch):
    if name.startswith("CIFAR"):
        return write_cifar(root, monkeypatch, int(name.removeprefix("CIFAR")))
    return write_mnist(root, monkeypatch, name)[0][:, None]


@pytest.mark.parametrize("name", SETS)
def test_every_byte_and_class_arrives(name, tmp_path, monkeypatch):
    made = write(name, tmp_path, monkeypatch)
    data = SETS[name](root=str(tmp_path), **({} if name.startswith("CIFAR") else {"size": 28}))
    assert data.train.images.dtype == torch.uint8
    assert np.array_equal(data.train.images.numpy(), made[:N])
    assert np.array_equal(data.held_out.images.numpy(), made[N:])
    classes = 100 if name == "CIFAR100" else 10
    assert (data.shape, data.num_classes, data.bins) == (made.shape[1:], classes, 256)
    assert data.train.label.tolist() == labels(N, classes).tolist()
    assert data.held_out.ids.tolist() == [*range(N, N + TEST)]
    batch = data.train.__getitems__([(0, 5), (3, 7)])
    assert torch.equal(batch["x_0"], torch.from_numpy(made[[5, 7]]).float() / 127.5 - 1)
    assert batch["cond"]["label"].tolist() == [5, 7]
    rms = np.sqrt(np.square(made[:N] / 127.5 - 1).mean())
    assert data.codec.sigma_data == pytest.approx(rms, abs=6e-4)


def test_a_run_does_not_depend_on_where_the_files_lie(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    assert CIFAR10(root=str(tmp_path)).by_content({"root": str(tmp_path), "flip": True}) == {"flip": True}


def test_bytes_become_equally_spaced_levels_from_minus_one_to_one():
    """Bytes 0 and 255 are -1 and 1 exactly, and neighbours are 2/255 apart."""
    from denoiselab.data import Pixels

    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x_0 = Pixels(every, None, torch.arange(1)).x_0.flatten()
    assert (x_0[0], x_0[-1]) == (-1, 1)
    assert torch.allclose(x_0.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=6e-8, rtol=0)


def test_held_out_images_are_of_every_class_and_fixed(tmp_path, monkeypatch):
    write_mnist(tmp_path, monkeypatch)
    data = MNIST(root=str(tmp_path), held_out=CLASSES)
    assert sorted(data.held_out.label.tolist()) == [*range(CLASSES)]
    assert torch.equal(MNIST(root=str(tmp_path), held_out=CLASSES).held_out.ids, data.held_out.ids)
    assert data.held_out.ids.min() >= N


def test_a_larger_size_adds_black(tmp_path, monkeypatch):
    made, _ = write_mnist(tmp_path, monkeypatch)
    x_0 = MNIST(root=str(tmp_path)).train.x_0
    assert torch.equal(x_0[:, 0, 2:-2, 2:-2], torch.from_numpy(made[:N]).float() / 127.5 - 1)
    assert (x_0.sum((0, 1))[[0, 1, -2, -1]] == -N).all()
    for size in (27, 29):
        with pytest.raises(ValueError, match=rf"^size={size}: need 28"):
            MNIST(root=str(tmp_path), size=size)


FILES = {
    "MNIST": [f"{part}-ubyte{suffix}" for part in ("train-images-idx3", "t10k-labels-idx1") for suffix in ("", ".gz")],
    "CIFAR10": ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"],
    "CIFAR100": ["train", "test", "meta"],
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
@pytest.mark.parametrize("damage", ["one bit", "cut"])
def test_a_damaged_file_is_refused_by_its_checksum(name, file, damage, tmp_path, monkeypatch):
    """One flipped bit of a pixel reads well and means nothing is as published."""
    write(name, tmp_path, monkeypatch)
    (path,) = tmp_path.rglob(file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "one bit" else content[:-100] if len(content) > 200 else content[:-1])
    with pytest.raises(
        UserError, match=rf"^data\.root=\S+: no usable {name} \(.*\); need .*; without data\.root it is"
    ):
        SETS[name](root=str(tmp_path))


def test_other_files_that_agree_with_each_other_are_refused(tmp_path, monkeypatch):
    """An archive and what it holds, of another set of the same shape."""
    write_mnist(tmp_path, monkeypatch)
    (archive,) = tmp_path.rglob("train-images-idx3-ubyte.gz")
    content = bytearray(archive.with_suffix("").read_bytes())
    content[500] ^= 1
    archive.with_suffix("").write_bytes(content)
    archive.write_bytes(gzip.compress(content, mtime=0))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz does not match its checksum"):
        MNIST(root=str(tmp_path))


def test_unpacked_files_alone_are_enough_if_they_make_sense(tmp_path, monkeypatch):
    made, _ = write_mnist(tmp_path, monkeypatch)
    for archive in tmp_path.rglob("*.gz"):
        archive.unlink()
    assert np.array_equal(MNIST(root=str(tmp_path), size=28).train.images[:, 0].numpy(), made[:N])


def test_another_folder_is_refused_in_a_line_that_names_the_option(tmp_path):
    with pytest.raises(UserError, match=r"^data\.root=\S+: no usable CIFAR10 \(.*\); need cifar-10-batches-py in it"):
        CIFAR10(root=str(tmp_path))


@pytest.mark.parametrize("name", SETS)
def test_without_a_network_the_line_says_what_to_do(name, tmp_path, monkeypatch, capfd):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError, match=rf"^data: {name} is not in \S+ and cannot be .*no network.*data\.root=FOLDER$"):
        SETS[name]()
    assert capfd.readouterr().out == ""


def test_a_set_is_downloaded_once_to_the_cache_and_its_archives_verified(tmp_path, monkeypatch, capfd):
    """The server's files are replaced by small ones; torchvision fetches, verifies and unpacks them."""
    import torchvision.datasets.utils as utils

    made, _ = write_mnist(tmp_path / "server", monkeypatch)
    files = {path.name: path.read_bytes() for path in (tmp_path / "server").rglob("*.gz")}
    fetched = []

    def retrieve(url, filename, *_):
        fetched.append(url.rpartition("/")[2])
        Path(filename).write_bytes(files[fetched[-1]])

    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops=3: url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = MNIST(size=28)
    assert np.array_equal(data.train.images[:, 0].numpy(), made[:N])
    assert sorted(fetched) == sorted(files)
    assert torch.equal(MNIST(size=28).train.images, data.train.images)
    assert len(fetched) == 4
    assert capfd.readouterr().out == ""
    files["train-images-idx3-ubyte.gz"] = gzip.compress(b"something else")
    for path in (tmp_path / "cache").rglob("train-images*"):
        path.unlink()
    with pytest.raises(UserError, match=r"^data: MNIST is not in"):
        MNIST()
