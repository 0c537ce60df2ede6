"""Data sets of Hugging Face's ``datasets`` library, from disk or from the hub."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from denoiselab.data.images import ReadFromDisk, check_picture
from denoiselab.data.labels import Class, class_of, numbered
from denoiselab.data.picture import as_tensor, decode
from denoiselab.data.source import Source
from denoiselab.errors import UserError


class HuggingFace(ReadFromDisk):
    """A data set of the ``datasets`` library (Lhoest et al. 2021, arXiv:2109.02846), memory-mapped.

    Args:
        batch_size, workers, held_out, flip, on_error, block: as for ``ReadFromDisk``; ``block`` for slow disks.
        root: a folder that ``save_to_disk`` wrote, a folder that ``load_dataset`` reads, or a name on the hub.
        split: of the data set.
        image: the column of images, pictures or arrays (see ``picture.decode``).
        label: the column of classes, numbers or names; null for a set without labels.
        size, channels: as for ``ImageFolder``.
        test: the split that is held out; null takes images from ``split``.
    """

    places = ("root",)

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        workers: int = 2,
        split: str = "train",
        image: str = "image",
        label: str | None = "label",
        size: int | None = None,
        channels: int = 3,
        test: str | None = None,
        held_out: int = 1000,
        flip: bool = False,
        on_error: str = "error",
        block: int = 0,
    ):
        check_picture(size, channels)
        train = Table(root, split, image, label, size, channels)
        others = Table(root, test, image, label, size, channels, train.classes) if test else None
        super().__init__(batch_size, workers, train, others, held_out, flip, on_error, block)


class Table(Source):
    """Rows of one split.

    Args:
        root, split, image, label, size, channels: as for ``HuggingFace``.
        classes: in their order; None finds them.
    """

    def __init__(
        self,
        root: str,
        split: str,
        image: str,
        label: str | None,
        size: int | None,
        channels: int,
        classes: list[Class] | None = None,
    ):
        datasets = library()
        self.root, self.split, self.image, self.size, self.channels = root, split, image, size, channels
        rows = opened(root, split)
        for option, column in (("image", image), ("label", label)):
            if column is not None and column not in rows.column_names:
                raise UserError(f"data.{option}={column}: no such column; {root} has {', '.join(rows.column_names)}")
        self.classes, self.label = [], None
        if label is not None:
            given = rows.select_columns([label]).with_format("arrow")[:][label].to_pylist()
            names = getattr(rows.features[label], "names", None)
            known: list[Class] | None = [*range(len(names))] if names else classes
            given = [None if value == -1 else class_of(value) for value in given]  # -1: hidden, as in test splits
            self.classes, self.label = numbered(given, known, f"data.label={label}")
        content = repr((rows._fingerprint, len(rows), rows.features, image, label))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        if isinstance(rows.features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image(decode=False))
        self.rows = rows.select_columns([image])

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        found = self.rows[index][self.image]
        name = found.get("path") if isinstance(found, dict) else None
        return f"{self.root} [{self.split}]{f': {name}' if name else ''}"

    def read(self, index: int) -> Tensor:
        found: Any = self.rows[index][self.image]
        if found is None:
            raise ValueError("has no image")
        if not isinstance(found, dict):
            return as_tensor(np.asarray(found))
        content = found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()
        if not content:
            raise ValueError("an empty file")
        return decode(io.BytesIO(content), self.size, self.channels)


def library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("data=huggingface: needs the package datasets; pip install 'denoiselab[data]'") from None
    return datasets


def opened(root: str, split: str) -> Any:
    """A split of a data set on disk or on the hub.

    Raises:
        UserError: there is none.
    """
    datasets = library()
    folder = Path(root)
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(root) if saved else datasets.load_dataset(root)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.root={root}: {reason}; need a folder written by save_to_disk, or a data set of the hub and a network"
        ) from None
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UserError(f"data.split={split}: no such split; {root} has {', '.join(map(str, found))}")
    return found[split]
