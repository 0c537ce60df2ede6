"""Images that are read one by one from wherever they lie, and what is done about bad ones."""

from __future__ import annotations

import errno
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from denoiselab.data.base import Batch, Samples
from denoiselab.data.codec import Codec, Identity
from denoiselab.data.labels import Class
from denoiselab.data.stream import Address
from denoiselab.errors import UserError
from denoiselab.rng import mix

BAD_SHARE = 0.01
"""The share of bad samples above which ``on_error=skip`` gives up."""


class Unreadable(UserError):
    """The machine failed to read a sample: the file, the index and why, in one line."""

    def __init__(self, text: str):
        if text.startswith("Caught "):  # a loader process hands over the traceback, whose last line is the message
            text = text.strip().rpartition("\n")[2].partition(": ")[2]
        super().__init__(" ".join(text.split()))


class BadSample(Unreadable):
    """A sample cannot be used, by what its file holds."""


class Source:
    """Images by index: ``read(index)`` is (C, H, W), bytes or numbers in [-1, 1].

    A subclass is read in several processes, so it opens files when it reads. What ``read`` raises is reported with
    ``where(index)``.
    """

    label: Tensor | None
    """(N,) class indices, -1 where one is missing; None for a set without labels."""
    classes: list[Class]
    """What the class indices stand for; empty without labels."""
    fingerprint: str
    """What the source holds, as a hash that does not depend on where it lies."""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Tensor:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """The file, and what is needed to find the image in it."""
        raise NotImplementedError


class Pixels(Samples):
    """Images in memory as they are stored; made x_0 a batch at a time.

    Args:
        images: (N, C, H, W), bytes, or numbers in [-1, 1].
        label: (N,) class indices, or None.
        ids: (N,), each sample's id in the whole data set.
        flip: mirror half of the images, left to right, by a hash of (seed, epoch, index); in training only.
        codec: makes x_0 of images in [-1, 1].
    """

    def __init__(
        self, images: Tensor, label: Tensor | None, ids: Tensor, flip: bool = False, codec: Codec | None = None
    ):
        self.images, self.label, self.ids, self.flip = images, label, ids, flip
        self.codec = codec or Identity(1.0)

    @property
    def x_0(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All of it, encoded."""
        return self.batch(slice(None))["x_0"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, addresses: Sequence[Address]) -> Batch:
        index, flipped = torch.tensor([index for _, index in addresses]), None
        if self.flip:
            seed = getattr(addresses, "seed", 0)
            flipped = torch.tensor([mix(seed, "flip", *address) % 2 == 1 for address in addresses])
        return self._made(index, flipped)

    def batch(self, index: Tensor | slice) -> Batch:
        return self._made(torch.arange(len(self))[index])

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images at these positions, and the positions of what was read in fact."""
        return self.images[index], index

    def _made(self, index: Tensor, flipped: Tensor | None = None) -> Batch:
        images, index = self.read(index)
        if flipped is not None:
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        if images.dtype == torch.uint8:
            images = images.float().div_(127.5).sub_(1)
        cond = {} if self.label is None else {"label": self.label[index]}
        return {"x_0": self.codec.encode(images), "id": self.ids[index], "cond": cond}


class OnDisk(Pixels):
    """Images read from a source when they are asked for, each checked.

    With ``on_error="skip"`` a bad sample is replaced by the one that a hash of its position names. So the stream stays
    a function of (seed, samples seen), whoever met the sample first. Above 1 % of bad samples it stops all the same.

    Args:
        source: the images.
        index: (N,), which of them.
        shape, dtype: of every image, as the source reads it.
        flip, codec: as for ``Pixels``.
        on_error: ``error`` or ``skip``.
    """

    def __init__(
        self,
        source: Source,
        index: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        flip: bool = False,
        codec: Codec | None = None,
        on_error: str = "error",
    ):
        label = None if source.label is None else source.label[index]
        super().__init__(torch.empty(0), label, index, flip, codec)
        self.source, self.shape, self.dtype, self.on_error = source, shape, dtype, on_error
        self.bad = torch.zeros(len(index), dtype=torch.bool).share_memory_()  # known to all loader processes

    @property
    def x_0(self) -> Tensor:
        raise UserError("data: this set is read from files image by image, and what was asked for needs all of train")

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The samples that were replaced so far: index and place."""
        found = self.ids[self.bad].tolist()
        return [{"index": index, "where": self.source.where(index)} for index in found]

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        found = [self._usable(k) for k in index.tolist()]
        return torch.stack([image for image, _ in found]), torch.tensor([k for _, k in found])

    def _usable(self, k: int) -> tuple[Tensor, int]:
        """The image at position k and k; or, of a bad one, another's."""
        for attempt in itertools.count():
            j = mix("instead of", k, attempt) % len(self) if attempt else k
            if not self.bad[j]:
                try:
                    return checked(self.source, int(self.ids[j]), self.shape, self.dtype), j
                except BadSample as error:
                    if self.on_error != "skip":
                        raise
                    self._skip(j, error)
        raise AssertionError

    def _skip(self, j: int, error: BadSample) -> None:
        self.bad[j] = True
        bad = int(self.bad.sum())
        if bad > BAD_SHARE * len(self):
            raise BadSample(f"{error}; {bad} of {len(self)} are bad, more than the 1 % that data.on_error=skip allows")
        print(f"warning: {error}; another is taken in its place ({bad} so far)", file=sys.stderr, flush=True)


def checked(source: Source, index: int, shape: tuple[int, ...] | None, dtype: torch.dtype | None = None) -> Tensor:
    """An image of a source that has a label, if it has any, its shape and dtype, and values in [-1, 1].

    Raises:
        BadSample: it does not.
        Unreadable: the machine failed to read it, whatever the file holds.
    """
    if source.label is not None and source.label[index] < 0:
        raise BadSample(f"{place(source, index)}: has no label")
    try:
        image = source.read(index)
    except MemoryError:
        raise
    except Exception as error:  # decoders, and sources of one's own, raise nearly any type
        reason = f"{place(source, index)}: {' '.join(str(error).split()) or type(error).__name__}"
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EISDIR):
            raise Unreadable(reason) from None
        raise BadSample(reason) from None
    if shape is not None and (image.shape != shape or image.dtype != dtype):
        found, need = ((*s, str(d).removeprefix("torch.")) for s, d in ((image.shape, image.dtype), (shape, dtype)))
        found, need = (" x ".join(map(str, what)) for what in (found, need))
        raise BadSample(f"{place(source, index)}: is {found}, the first is {need}")
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()  # NaN if any value is
        if not (low >= -1 and high <= 1):
            raise BadSample(f"{place(source, index)}: has values from {low:.4g} to {high:.4g}, need numbers in [-1, 1]")
    return image


def place(source: Source, index: int) -> str:
    return f"{source.where(index)} (index {index})"
