"""Samples as pictures: images in a grid, points in a plane. And pictures as images."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from denoiselab.data.picture import decode, is_image
from denoiselab.data.super_resolution import bicubic
from denoiselab.errors import UserError

SIDE = 56
"""Least side of a tile in pixels: small images are enlarged by whole factors, so that each pixel stays square."""

COLUMNS, BLOCKS = 10, 4
"""Most small images side by side, and most such blocks, over their enlargements."""

GAP = 10
"""Pixels between pictures under each other."""

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933"]
"""Okabe and Ito's palette, distinguishable without colour vision."""


def tiles(images: Tensor, columns: int) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1], row by row."""
    factor = max(1, -(-SIDE // images.shape[-1]))
    enlarged = images.clamp(-1, 1).add(1).div(2).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    grid = make_grid(enlarged.float().cpu(), nrow=columns, padding=max(2, factor // 2), pad_value=0.5)
    return Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())


def enlargements(low_res: Tensor, samples: Tensor, real: Tensor | None = None) -> Image.Image:
    """Under each of the first 40 small images, whose pixels are squares, its bicubic enlargement, its samples, and the
    real image.

    Args:
        low_res: (N, C, h, w) in [-1, 1].
        samples: (M N, C, H, W), those of image i at i, i + N, ...
        real: (N, C, H, W).
    """
    n, size = len(low_res), samples.shape[-2:]
    columns = min(n, COLUMNS)
    several = len(samples) > n
    named = {"small": F.interpolate(low_res, size, mode="nearest"), "bicubic": bicubic(low_res, size)}
    named |= {f"sample {k + 1}" if several else "sample": part for k, part in enumerate(samples.split(n))}
    named |= {} if real is None else {"real": real}
    rows, captions = [], []
    for start in range(0, min(n, COLUMNS * BLOCKS), columns):
        for caption, images in named.items():
            part = images[start : start + columns]
            missing = part.new_zeros(columns - len(part), *part.shape[1:])  # grey
            rows.append(tiles(torch.cat([part, missing]), columns))
            captions.append(caption)
    return captioned(rows, captions)


def panels(
    points: list[Tensor], titles: list[str], labels: Tensor | None = None, unit: str = "data units"
) -> Image.Image:
    """One plane per set of points (N, 2), side by side on common axes."""
    figure = Figure(figsize=(3.2 * len(points), 3.4), layout="constrained")
    every = torch.cat(points)
    reach = float(every.abs().quantile(0.999)) * 1.1 if len(every) else 1.0
    colours = COLOURS[0] if labels is None else [COLOURS[int(k) % len(COLOURS)] for k in labels]
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    for axis, cloud, title in zip(axes, points, titles, strict=True):
        axis.scatter(*cloud.cpu().numpy().T, s=3, c=colours, linewidths=0)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title, xlabel=f"x ({unit})")
    axes[0].set_ylabel(f"y ({unit})")
    return render(figure)


def render(figure: Figure, dpi: int = 130) -> Image.Image:
    """A figure as a picture; it is empty then, as figures are cycles, whose memory Python takes back late."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    figure.clear()
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def stacked(parts: list[Image.Image]) -> Image.Image:
    """Pictures under each other, each in the middle of a white page."""
    width = max(part.width for part in parts)
    page = Image.new("RGB", (width, sum(part.height for part in parts) + GAP * (len(parts) - 1)), "white")
    top = 0
    for part in parts:
        page.paste(part, ((width - part.width) // 2, top))
        top += part.height + GAP
    return page


def captioned(rows: list[Image.Image], captions: list[str], header: str = "") -> Image.Image:
    """Pictures of equal width under each other, each with its caption at the left and one header above."""
    left, top = 90, 34 if header else 0
    height = top + sum(row.height for row in rows)
    figure = Figure(figsize=((left + rows[0].width) / 100, height / 100), dpi=100)
    y = top
    for row, caption in zip(rows, captions, strict=True):
        middle = 1 - (y + row.height / 2) / height
        figure.text((left - 8) / (left + rows[0].width), middle, caption, ha="right", va="center", fontsize=11)
        y += row.height
    if header:
        figure.text(0.01, 1 - top / 2 / height, header, ha="left", va="center", fontsize=11)
    page = render(figure, dpi=100)
    y = top
    for row in rows:
        page.paste(row, (left, y))
        y += row.height
    return page


def pairs(given: Tensor, made: Tensor, header: str = "") -> Image.Image:
    """Images above what was made of them."""
    return captioned([tiles(images, len(images)) for images in (given, made)], ["given", "made"], header)


def as_image(values: Tensor) -> Image.Image:
    """One image (C, H, W) in [-1, 1], C 1 or 3, as it is."""
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def read(path: Path, channels: int) -> dict[Path, Tensor]:
    """A picture, or those in a folder in the order of their names, as images (channels, H, W) in [-1, 1].

    Raises:
        UserError: it is neither, or one cannot be read.
    """
    files = sorted(file for file in path.iterdir() if is_image(file.name)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"low_res={path}: need a picture, or a folder of pictures")
    found = {}
    for file in files:
        try:
            image = decode(file, None, channels, file.suffix.lower() == ".npy")
        except Exception as error:  # decoders raise nearly any type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"low_res={file}: {reason}") from None
        found[file] = image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image
    return found
