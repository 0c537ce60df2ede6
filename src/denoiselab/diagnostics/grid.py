"""Samples side by side: images in a grid whose rows and columns are named, points in planes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.pictures import tiles

SIZE = 14
"""Of letters, in pixels."""

MARGIN = 8


def grid(images: Tensor, rows: Sequence[str], columns: Sequence[str], header: str = "") -> Image.Image:
    """images[i, j] in row i and column j, under a header.

    Args:
        images: (R, C, channels, H, W) in [-1, 1].
        rows: what stands at the left of each row.
        columns: what stands over columns, each over its share of the width: one for each, or fewer for groups.
    """
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), SIZE)
    picture = tiles(images.flatten(0, 1), images.shape[1])
    left = 2 * MARGIN + max(int(font.getlength(line)) for line in rows)
    line = SIZE + MARGIN
    top = line * (bool(header) + any(columns)) + MARGIN // 2
    wide = max(left + picture.width + MARGIN, int(font.getlength(header)) + 2 * MARGIN)
    page = Image.new("RGB", (wide, top + picture.height), "white")
    page.paste(picture, (left, top))
    pen = ImageDraw.Draw(page)
    if header:
        pen.text((MARGIN, MARGIN // 2), header, fill="black", font=font)
    for j, text in enumerate(columns):
        middle = left + picture.width * (j + 0.5) / len(columns)
        pen.text((middle, top - MARGIN // 2), text, fill="black", font=font, anchor="ms")
    for i, text in enumerate(rows):
        middle = top + picture.height * (i + 0.5) / len(rows)
        pen.text((left - MARGIN, middle), text, fill="black", font=font, anchor="rm")
    return page


def planes(
    clouds: Sequence[Tensor], titles: Sequence[str], label: Tensor | None = None, real: Tensor | None = None
) -> Image.Image:
    """Sets of points (N, 2), a plane each on common axes, at most four beside each other.

    Args:
        label: the class of each point, which colours them.
        real: points that are drawn behind each set.
    """
    columns = min(4, len(clouds))
    figure, axes = sheet(-(-len(clouds) // columns), columns, 2.5, 2.6)
    reach = 1.15 * max(float(cloud.abs().quantile(0.999)) for cloud in clouds)
    colours = COLOURS[0] if label is None else [COLOURS[int(k) % len(COLOURS)] for k in label]
    for axis, cloud, title in zip(axes, clouds, titles, strict=False):
        if real is not None:
            axis.scatter(*real.numpy().T, s=1, c=GREY, alpha=0.3, linewidths=0)
        axis.scatter(*cloud.numpy().T, s=3, c=colours, linewidths=0)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
    for axis in axes[len(clouds) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel("y (data units)")
    for axis in axes[max(0, len(clouds) - columns) : len(clouds)]:
        axis.set_xlabel("x (data units)")
    told = ["a colour per class"] * (label is not None) + ["grey: held-out points"] * (real is not None)
    if told:
        figure.suptitle("; ".join(told), fontsize=10)
    return render(figure)
