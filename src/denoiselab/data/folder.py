"""Images as files in a folder, labelled by their class folders or by a file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from denoiselab.data.images import ReadFromDisk, check_picture
from denoiselab.data.labels import Class, numbered, read_labels
from denoiselab.data.picture import decode, is_image, suffixes
from denoiselab.data.source import Source
from denoiselab.errors import UserError


class ImageFolder(ReadFromDisk):
    """Image files anywhere below a folder, in the order of their names.

    Args:
        batch_size, workers, held_out, flip, on_error: as for ``ReadFromDisk``.
        root: the folder.
        labels: ``folders``: the folder below root that an image is in names its class, and classes are numbered in the
            order of their names, as torchvision does; ``none``; or a file (see ``read_labels``).
        size: the side of the square that images are brought to; null leaves them, and all must be alike.
        channels: 3 for RGB, 1 for grey.
        test: a folder of held-out images, laid out in the same way; null takes them from root.
    """

    places = ("root", "test", "labels")

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        workers: int = 2,
        labels: str = "folders",
        size: int | None = None,
        channels: int = 3,
        test: str | None = None,
        held_out: int = 1000,
        flip: bool = False,
        on_error: str = "error",
    ):
        check_picture(size, channels)
        classes = None if labels in ("folders", "none") else read_labels(Path(labels))
        train = Files("root", Path(root), labels, classes, size, channels)
        others = Files("test", Path(test), labels, classes, size, channels, train.classes) if test else None
        super().__init__(batch_size, workers, train, others, held_out, flip, on_error)

    def by_content(self, options: dict[str, Any]) -> dict[str, Any]:
        return super().by_content(options) | {"labelled": options.get("labels") != "none"}


class Files(Source):
    """Image files below a folder.

    Args:
        option: that names the folder, for errors.
        root: the folder.
        labels: ``folders``, ``none``, or the file that ``given`` was read from.
        given: class by path, or None.
        size, channels: as ``picture.decode`` takes them.
        classes: in their order; None finds them.
    """

    def __init__(
        self,
        option: str,
        root: Path,
        labels: str,
        given: dict[str, Class] | None,
        size: int | None,
        channels: int,
        classes: list[Class] | None = None,
    ):
        if not root.is_dir():
            raise UserError(f"data.{option}={root}: no such folder")
        self.root, self.size, self.channels = root, size, channels
        found = sorted(_walk(root))
        if not found:
            known = ", ".join(sorted(suffixes()))
            raise UserError(f"data.{option}={root}: no image files in it, by their suffix ({known})")
        names = [name for name, _ in found]
        self.names = np.array([os.fsencode(name) for name in names])  # a list would be copied by each loader process
        classed: list[Class | None] | None = None
        if given is not None:
            classed = [given.get(name) for name in names]
        elif labels == "folders" and any("/" in name for name in names):
            classed = [name.partition("/")[0] if "/" in name else None for name in names]
        self.classes, self.label = [], None
        if classed is not None:
            self.classes, self.label = numbered(classed, classes, f"data.labels={labels}")
        content = [found, None if self.label is None else self.label.tolist()]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        return str(self.path(index))

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])

    def read(self, index: int) -> Tensor:
        path = self.path(index)
        if not path.stat().st_size:
            raise ValueError("an empty file")
        return decode(path, self.size, self.channels, path.suffix.lower() == ".npy")


def _walk(root: Path) -> list[tuple[str, int]]:
    """Paths below root of what is an image by its suffix, with / between names, and sizes in bytes."""
    found, folders = [], [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append((Path(entry), f"{prefix}{entry.name}/"))
                elif is_image(entry.name):
                    found.append((prefix + entry.name, entry.stat().st_size))
    return found
