"""Images in tar files as WebDataset writes them, read at random places."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from denoiselab.data.images import ReadFromDisk, check_picture
from denoiselab.data.labels import Class, class_of, numbered
from denoiselab.data.picture import decode
from denoiselab.data.source import BadSample, Source
from denoiselab.data.tar_index import BLOCK, indexed, library
from denoiselab.errors import UserError

OPEN = 64
"""Shards that a process keeps open."""


class Shards(ReadFromDisk):
    """A set of tar files in WebDataset's format, of any size: the files of a sample stand together and share their
    name up to its first dot (Aizman et al. 2019, arXiv:2001.01858).

    Each shard is gone through once for where its images begin, which is kept in the cache. From then on an image is
    one read at its place, in any order, so that the order is as exact as that of a set in memory.

    Args:
        batch_size, workers, held_out, flip, on_error, block: as for ``ReadFromDisk``; ``block`` for slow disks.
        root: a folder of .tar files, or names with braces, as in ``data/train-{0000..0146}.tar``.
        image: suffixes of the image, separated by ``;``, the first that a sample has.
        label: the suffix of a file that holds the class, a number or a name; ``json:KEY`` for a value of a .json file;
            null for a set without labels.
        size, channels: as for ``ImageFolder``.
        test: held-out shards, like root; null takes images from root.
    """

    places = ("root", "test")

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        workers: int = 2,
        image: str = "png;jpg;jpeg;webp;npy",
        label: str | None = "cls",
        size: int | None = None,
        channels: int = 3,
        test: str | None = None,
        held_out: int = 1000,
        flip: bool = False,
        on_error: str = "error",
        block: int = 0,
    ):
        check_picture(size, channels)
        train = Tar("root", root, image, label, size, channels, on_error)
        others = Tar("test", test, image, label, size, channels, on_error, train.classes) if test else None
        super().__init__(batch_size, workers, train, others, held_out, flip, on_error, block)


class Tar(Source):
    """Images of tar files by index, through the place and length of each.

    Args:
        option: that names the shards, for errors.
        root, image, label, size, channels, on_error: as for ``Shards``.
        classes: in their order; None finds them.
    """

    def __init__(
        self,
        option: str,
        root: str,
        image: str,
        label: str | None,
        size: int | None,
        channels: int,
        on_error: str,
        classes: list[Class] | None = None,
    ):
        self.size, self.channels, self.suffixes = size, channels, image.lower().split(";")
        self.paths = shard_paths(option, root)
        parts, total, texts = [], 0, []
        for path in self.paths:
            part = indexed(path, image, label)
            total += len(part["offset"])
            damage = str(part["damage"])
            if damage:
                reason = f"{path} (index {total}): {damage}"
                if on_error != "skip":
                    raise BadSample(reason)
                print(f"warning: {reason}; what follows in it is left out", file=sys.stderr, flush=True)
            parts.append(part)
            texts += part["label"].tolist()
        if not total:
            raise UserError(f"data.{option}={root}: no samples in {len(self.paths)} shards")
        self.shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part["offset"]) for part in parts])
        self.offset, self.length, self.kind = (
            np.concatenate([part[key] for part in parts]) for key in ("offset", "length", "kind")
        )
        self.classes, self.label = [], None
        if label is not None:
            self.classes, self.label = numbered([class_of(text) for text in texts], classes, f"data.label={label}")
        counts = [len(part["offset"]) for part in parts]
        content = repr([(path.name, path.stat().st_size) for path in self.paths] + [counts, image, label])
        self.fingerprint = hashlib.sha256(content.encode() + self.offset.tobytes()).hexdigest()
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.offset)

    def where(self, index: int) -> str:
        """The shard, and the name in the header before the image."""
        path = self.paths[self.shard[index]]
        if self.length[index] < 0:
            return str(path)
        with path.open("rb") as file:
            header = os.pread(file.fileno(), BLOCK, int(self.offset[index]) - BLOCK)
        return f"{path}: {header[:100].rstrip(bytes(1)).decode(errors='replace')}"

    def read(self, index: int) -> Tensor:
        length = int(self.length[index])
        if length < 0:
            raise ValueError(f"a sample without an image ({', '.join(self.suffixes)})")
        content = os.pread(self._file(int(self.shard[index])), length, int(self.offset[index]))
        if len(content) < length:
            raise ValueError(f"truncated: {len(content)} of {length} bytes" if content or length else "an empty file")
        if not content:
            raise ValueError("an empty file")
        return decode(io.BytesIO(content), self.size, self.channels, self.suffixes[self.kind[index]] == "npy")

    def _file(self, shard: int) -> int:
        """The descriptor of a shard; some stay open."""
        if shard not in self._open:
            if len(self._open) == OPEN:
                self._close()
            self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._open[shard]

    def _close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self._close()


def shard_paths(option: str, root: str) -> list[Path]:
    """The .tar files of a folder in the order of their names, or those that a name with braces stands for."""
    if Path(root).is_dir():
        paths = sorted(Path(root).glob("*.tar"))
    else:
        paths = [Path(name) for name in library().shardlists.expand_urls(root)]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise UserError(f"data.{option}={root}: {f'no file {missing[0]}' if missing else 'no .tar files in it'}")
    return paths
