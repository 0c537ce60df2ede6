"""Pairs of an image and a small version of it, for networks that enlarge."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from denoiselab.data.base import Batch, Data, Samples
from denoiselab.data.codec import Identity
from denoiselab.data.stream import Address
from denoiselab.errors import UserError


def area_mean(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images (N, C, H, W) averaged over equal rectangles, one for each pixel of the size (h, w); h divides H, w W."""
    return F.interpolate(images, tuple(size), mode="area")


def bicubic(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images (N, C, h, w) enlarged to the size (H, W) by cubic convolution (Keys 1981, doi:10.1109/TASSP.1981.1163711)
    with a = -1/2, as Pillow and Matlab do it, and held in [-1, 1].

    PyTorch takes a = -3/4 unless told to antialias, which enlarging does not ask for.
    """
    return F.interpolate(images, tuple(size), mode="bicubic", antialias=True).clamp(-1, 1)


class SuperResolution(Data):
    """x_0 is an image, and cond["low_res"] its means over squares of factor x factor pixels, which the network enlarges
    bilinearly and sets beside x_t (Saharia et al. 2021, arXiv:2104.07636, section 2).

    The images, their order, labels, flips, what is held out and what is done about bad ones are the wrapped set's. The
    small image is made of the one that is diffused, after any flip, so the two always match.

    Args:
        images: makes the wrapped set, ``images(batch_size=...) -> Data``.
        factor: by how much low_res is smaller, a whole number >= 2 that divides the images' sides.
        batch_size: the global batch; the wrapped set has no other.
        workers: loader processes; None for as many as the wrapped set has.

    >>> from denoiselab.data import Digits
    >>> data = SuperResolution(Digits, factor=2)
    >>> batch = data.train.batch(slice(0, 3))
    >>> batch["x_0"].shape, batch["cond"]["low_res"].shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3, 1, 4, 4]))
    """

    def __init__(self, images: Callable[..., Data], factor: int = 2, batch_size: int = 128, workers: int | None = None):
        super().__init__(batch_size, workers or 0)
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"factor={factor}: need a whole number >= 2")
        own = getattr(images, "keywords", {}).get("batch_size", batch_size)
        if own != batch_size:
            raise ValueError(f"images.batch_size={own}: batches are of pairs; need data.batch_size={own}")
        self.images = _made(images, batch_size)
        self.workers = self.images.workers if workers is None else workers
        self.shape = tuple(self.images.shape)
        self._check(factor)
        self.factor, self.low_res = factor, self.shape[0]
        self.num_classes, self.vector, self.bins = self.images.num_classes, self.images.vector, self.images.bins
        self.block, self.codec = self.images.block, self.images.codec

    def _check(self, factor: int) -> None:
        name = type(self.images).__name__
        if len(self.shape) != 3:
            raise ValueError(f"images={name}: samples of shape {self.shape} are no images; need images, as in digits")
        if not isinstance(self.images.codec, Identity):
            raise ValueError(f"images={name}: are diffused as something else than pixels; need images as they are")
        if self.images.low_res:
            raise ValueError(f"images={name}: has small images already; need a set of images alone")
        height, width = self.shape[1:]
        if height % factor or width % factor:
            fitting = [k for k in range(2, min(height, width) + 1) if height % k == width % k == 0]
            need = f"one of {', '.join(map(str, fitting))}" if fitting else "images of other sides"
            raise ValueError(f"factor={factor}: does not divide images of {height} x {width} pixels; need {need}")

    @cached_property
    def train(self) -> Samples:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Pairs(self.images.train, self.factor)

    @cached_property
    def held_out(self) -> Samples:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Pairs(self.images.held_out, self.factor)

    def by_content(self, options: dict[str, Any]) -> dict[str, Any]:
        images = self.images.by_content(options["images"])
        return options | {"images": {k: v for k, v in images.items() if k not in ("batch_size", "workers")}}


class Pairs(Samples):
    """Samples with cond["low_res"] beside what they have.

    Args:
        images: the samples.
        factor: by how much low_res is smaller.
    """

    def __init__(self, images: Samples, factor: int):
        self.images, self.factor = images, factor
        self.label, self.ids = images.label, images.ids

    @property
    def x_0(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.images.x_0

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The bad samples that others were taken for."""
        return getattr(self.images, "skipped", [])

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, addresses: Sequence[Address]) -> Batch:
        return self._paired(self.images.__getitems__(addresses))

    def batch(self, index: Tensor | slice) -> Batch:
        return self._paired(self.images.batch(index))

    def _paired(self, batch: Batch) -> Batch:
        x_0 = batch["x_0"]
        low_res = area_mean(x_0, [side // self.factor for side in x_0.shape[-2:]])
        return {**batch, "cond": {**batch["cond"], "low_res": low_res}}


def _made(images: Callable[..., Data], batch_size: int) -> Data:
    """The wrapped set; what it refuses is named as an option of ``images``."""
    try:
        return images(batch_size=batch_size)
    except UserError as error:
        options = "|".join(getattr(images, "keywords", {}))
        raise UserError(re.sub(rf"\bdata\.(?=({options})\b)", "data.images.", str(error))) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"images.{error}") from None
