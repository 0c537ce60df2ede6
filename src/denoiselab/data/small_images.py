"""The small image sets of torchvision: read from a folder or downloaded, checked, kept in memory as bytes."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.data.images import InMemory
from denoiselab.errors import UserError

PATIENCE = 20
"""Seconds without an answer after which a download fails."""


def default_root() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/denoiselab, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "denoiselab"


class Torchvision(InMemory):
    """One of torchvision's data sets, its files verified by torchvision's checksums whoever put them there.

    Args:
        batch_size, workers, held_out, flip, labels: as for ``InMemory``.
        root: the folder that holds the set's own folder, as torchvision lays it out; null: the cache, to which the set
            is downloaded once.
        size: side in pixels, in which images are held by black around them, so that networks can halve them more often;
            null: the class's own ``size``.
    """

    name: str
    num_classes = 10
    places = ("root",)
    size: int | None = None
    """The side unless told otherwise; None for that of the files."""

    def __init__(
        self,
        batch_size: int = 128,
        workers: int = 0,
        held_out: int = 2000,
        root: str | None = None,
        flip: bool = False,
        labels: str = "classes",
        size: int | None = None,
    ):
        parts = [self._load(root, train) for train in (True, False)]
        side = parts[0][0].shape[-1]
        size = (self.size or side) if size is None else size
        if size < side or (size - side) % 2:
            raise ValueError(f"size={size}: need {side}, or {side} and an even number more, as in size={side + 4}")
        margin = 4 * [(size - side) // 2]
        parts = [(torch.nn.functional.pad(images, margin), label) for images, label in parts]
        super().__init__(batch_size, workers, held_out, flip, labels, *parts)

    def _load(self, root: str | None, train: bool) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and classes (N,) of one split."""
        import torchvision.datasets

        make = getattr(torchvision.datasets, self.name)
        folder = default_root() if root is None else Path(root)
        download = root is None
        try:
            with _alone(folder) if download else contextlib.nullcontext():
                self._verify(make, folder)
                return self._tensors(make(folder, train=train, download=download))
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())
            if download:
                raise UserError(
                    f"data: {self.name} is not in {folder} and cannot be downloaded ({reason[:200]}); "
                    f"name a folder that holds it with data.root=FOLDER"
                ) from None
            raise UserError(
                f"data.root={root}: no usable {self.name} ({reason[:200]}); need {self.layout} in it; without "
                f"data.root it is downloaded"
            ) from None

    def by_content(self, options: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in options.items() if key != "root"}  # checksums say what lies there

    layout: str
    """What the folder holds, for errors."""

    def _verify(self, make: Any, folder: Path) -> None:
        """Compare what lies in the folder with torchvision's checksums, where torchvision itself does not."""

    def _tensors(self, split: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, its prints kept from stdout, and no waiting for a server that never answers."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    with (folder / ".lock").open("w") as lock, contextlib.redirect_stdout(sys.stderr):
        fcntl.flock(lock, fcntl.LOCK_EX)
        socket.setdefaulttimeout(PATIENCE)
        try:
            yield
        finally:
            socket.setdefaulttimeout(before)


class MNIST(Torchvision):
    """60,000 handwritten digits, 28 x 28, and 10,000 to test on (LeCun et al. 1998, doi:10.1109/5.726791).

    Args:
        batch_size, workers, held_out, root, flip, labels, size: as for ``Torchvision``.
    """

    name = "MNIST"
    size = 32
    layout = "MNIST/raw/train-images-idx3-ubyte and the three others"

    def _verify(self, make: Any, folder: Path) -> None:
        """torchvision checks archives as they arrive, and afterwards asks only whether the unpacked files exist."""
        from torchvision.datasets.utils import calculate_md5

        for name, md5 in make.resources:
            archive = folder / self.name / "raw" / name
            if not archive.is_file():
                continue
            if calculate_md5(archive) != md5:
                raise ValueError(f"{archive} does not match its checksum")
            unpacked = archive.with_suffix("")
            if unpacked.is_file() and gzip.decompress(archive.read_bytes()) != unpacked.read_bytes():
                raise ValueError(f"{unpacked} is not what {name} holds")

    def _tensors(self, split: Any) -> tuple[Tensor, Tensor]:
        images, label = split.data, split.targets.long()
        if images.shape[1:] != (28, 28) or len(label) != len(images) or not 0 <= label.min() <= label.max() < 10:
            raise ValueError(f"{len(images)} images {tuple(images.shape[1:])} and {len(label)} classes")
        return images[:, None], label


class FashionMNIST(MNIST):
    """60,000 articles of clothing in ten classes, 28 x 28, and 10,000 to test on (Xiao et al. 2017, arXiv:1708.07747).

    Args:
        batch_size, workers, held_out, root, flip, labels, size: as for ``Torchvision``.
    """

    name = "FashionMNIST"
    layout = "FashionMNIST/raw/train-images-idx3-ubyte and the three others"


class CIFAR10(Torchvision):
    """50,000 photographs in ten classes, 32 x 32, and 10,000 to test on (Krizhevsky 2009).

    Args:
        batch_size, workers, held_out, root, flip, labels, size: as for ``Torchvision``.
    """

    name = "CIFAR10"
    layout = "cifar-10-batches-py"

    def _tensors(self, split: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)


class CIFAR100(CIFAR10):
    """50,000 photographs in a hundred classes, 32 x 32, and 10,000 to test on (Krizhevsky 2009).

    Args:
        batch_size, workers, held_out, root, flip, labels, size: as for ``Torchvision``.
    """

    name = "CIFAR100"
    num_classes = 100
    layout = "cifar-100-python"
