"""Samples as pictures: images in a grid, points in a plane."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

SIDE = 56
"""Least side of a tile in pixels: small images are enlarged by whole factors, so that each pixel stays square."""

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933"]
"""Okabe and Ito's palette, distinguishable without colour vision."""


def tiles(images: Tensor, columns: int) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1], row by row."""
    factor = max(1, -(-SIDE // images.shape[-1]))
    enlarged = images.clamp(-1, 1).add(1).div(2).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    grid = make_grid(enlarged.float().cpu(), nrow=columns, padding=max(2, factor // 2), pad_value=0.5)
    return Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())


def panels(points: list[Tensor], titles: list[str], labels: Tensor | None = None) -> Image.Image:
    """One plane per set of points (N, 2), side by side on common axes."""
    figure = Figure(figsize=(3.2 * len(points), 3.4), layout="constrained")
    every = torch.cat(points)
    reach = float(every.abs().quantile(0.999)) * 1.1 if len(every) else 1.0
    colours = COLOURS[0] if labels is None else [COLOURS[int(k) % len(COLOURS)] for k in labels]
    for axis, cloud, title in zip(figure.subplots(1, len(points), squeeze=False)[0], points, titles, strict=True):
        axis.scatter(*cloud.cpu().numpy().T, s=3, c=colours, linewidths=0)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
    return render(figure)


def render(figure: Figure, dpi: int = 130) -> Image.Image:
    """A figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


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
