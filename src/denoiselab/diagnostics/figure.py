"""Figures that are made to be read: one style, and under each what its numbers depend on."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont

from denoiselab.pictures import COLOURS, render
from denoiselab.report.axes import kind, scale_of

if TYPE_CHECKING:
    from denoiselab.diagnostics.base import Finding

__all__ = ["COLOURS", "DASHES", "GREY", "STYLE", "framed", "readable", "render", "scale_of", "sheet"]

GREY = "#8a8a8a"
"""Of controls and closed forms, which are drawn behind what was measured."""

DASHES = ["-", "--", ":", "-."]
"""A second way to tell lines apart."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
}

WIDTH = 900
"""Least width of a picture in pixels, so that what stands under it can be read."""


def sheet(
    rows: int = 1, columns: int = 1, width: float = 3.4, height: float = 2.8, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row.

    Args:
        rows, columns: of axes.
        width, height: of each, in inches.
        options: of ``Figure.subplots``, such as sharey.
    """
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [*figure.subplots(rows, columns, squeeze=False, **options).flat]


def readable(axis: Axis) -> None:
    """Numbers at 1, 2 and 5 of each power of ten on a logarithmic axis; few curves span two of them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def framed(picture: Image.Image, finding: Finding) -> Image.Image:
    """A picture over the facts that its numbers depend on, and over what looks wrong."""
    facts = "  ·  ".join(depends(finding.protocol))
    width = max(WIDTH, picture.width)
    size = max(13, width // 75)
    font = ImageFont.truetype(_font(), size)
    letters = int(width / (0.56 * size))
    lines = [(line, "#555555") for line in textwrap.wrap(facts, letters)]
    lines += [(line, "#b00000") for alarm in finding.alarms for line in textwrap.wrap(f"! {alarm}", letters)]
    step = int(1.4 * size)
    page = Image.new("RGB", (width, picture.height + step * len(lines) + size), "white")
    page.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(page)
    for number, (line, colour) in enumerate(lines):
        pen.text((size, picture.height + size // 3 + number * step), line, fill=colour, font=font)
    return page


def depends(protocol: dict[str, Any]) -> list[str]:
    """The facts of a protocol that every picture is read with, in words."""
    found = [f"{protocol['n']:,} {protocol['counted']}" if "counted" in protocol else f"n = {protocol['n']:,}"]
    if "sampler" in protocol:
        sampler, guidance = protocol["sampler"], protocol["guidance"]
        scale = scale_of(guidance)
        named = "guidance scale" if kind(guidance) == "CFG" else f"{kind(guidance)} guidance, scale"
        found.append("no guidance" if scale is None else f"{named} {scale if isinstance(scale, str) else f'{scale:g}'}")
        steps = f", {sampler['steps']} steps" if "steps" in sampler else ""
        found.append(f"{kind(sampler)}{steps}")
    found.append(f"{'EMA' if protocol['weights'] == 'ema' else protocol['weights']} weights, step {protocol['step']:,}")
    found.append(f"seed {protocol['seed']}")
    return found


def _font() -> str:
    from matplotlib import font_manager

    return font_manager.findfont("DejaVu Sans")
