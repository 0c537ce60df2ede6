"""Image files as tensors: decoded, brought to a size and to a number of channels."""

from __future__ import annotations

from functools import cache
from pathlib import Path, PurePath
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

PIXELS = 89_478_485
"""The most pixels of a file, above which Pillow suspects a decompression bomb."""


@cache
def formats() -> list[str]:
    """What Pillow decodes itself: neither a stub nor a call of another program."""
    Image.init()
    return [name for name in Image.OPEN if name not in ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")]


@cache
def suffixes() -> set[str]:
    """Of files that are taken for images."""
    known = formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in known} | {".npy"}


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image, and is not hidden."""
    path = PurePath(name)
    return path.suffix.lower() in suffixes() and not path.name.startswith(".")


def decode(file: IO[bytes] | Path, size: int | None, channels: int, array: bool = False) -> Tensor:
    """An image file as (channels, H, W): bytes of a picture, bytes or numbers in [-1, 1] of an array.

    Args:
        file: anything that Pillow reads, the first frame of it; with ``array`` a numpy file of shape (H, W) or
            (H, W, channels), which is taken as it is.
        size: the side of the square that a picture is brought to by ``square``; None leaves it.
        channels: 1 for its luma (ITU-R 601), 3 for RGB. Transparency is dropped.

    Raises:
        ValueError, OSError, SyntaxError: it cannot be decoded, or is no such image.
    """
    if array:
        return as_tensor(np.load(file, allow_pickle=False))
    try:
        with Image.open(file, formats=formats()) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {PIXELS}: a decompression bomb?")
            return pixels(image, size, channels)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None


def as_tensor(values: np.ndarray) -> Tensor:
    """An array (H, W) or (H, W, channels) as (channels, H, W), bytes as they are and floats in float32."""
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not (values.dtype == np.uint8 or values.dtype.kind == "f"):
        raise ValueError(f"an array {values.shape} of {values.dtype}; need (H, W, C) of uint8, or of floats in [-1, 1]")
    made = torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.float32))
    return made.permute(2, 0, 1)


def pixels(image: Image.Image, size: int | None, channels: int) -> Tensor:
    """An opened image as (channels, H, W) bytes."""
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255, not scale
        values = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: need 8 or 16 bits per channel")
    if image.mode == "P":  # a transparent colour of a palette can only be told beside an alpha channel
        image = image.convert("RGBA")
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = square(image, size)
    made = torch.from_numpy(np.array(image))
    return made.view(*made.shape[:2], channels).permute(2, 0, 1)


def square(image: Image.Image, size: int) -> Image.Image:
    """The central square at size x size, as ADM prepares ImageNet (Dhariwal and Nichol 2021, arXiv:2105.05233): halved
    by averaging while the shorter side is at least 2 size, then bicubic, then cropped."""
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
