"""Draw docs/pictures/points.png: the sets of points in the plane, their densities, and the scores of what is diffused.

python scripts/draw_points.py [FOLDER]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import denoiselab
from denoiselab.data import Points
from denoiselab.data.points import Known
from denoiselab.pictures import COLOURS, render

NAMES = ("8gaussians", "mixture", "circles", "rings", "checkerboard", "moons", "2spirals", "swissroll", "pinwheel")

REACH, DRAWN = 4.6, 3000
"""Half the side of a picture of points, in their units, and how many."""

ALPHA_T, SIGMA_T, SPREAD = math.sqrt(0.91), 0.3, 2.4
"""The noise level of the last row, and half the side of its pictures, in standard deviations."""


def plane(reach: float, n: int) -> Tensor:
    """The middles of n x n cells, (n, n, 2); rows rise."""
    side = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 * reach - reach
    return torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)


def shade(axes: Axes, log_p: Tensor, reach: float) -> None:
    """A density in shades, white where it is 0; the root of it, to see what is thin."""
    p = (log_p - log_p.max()).exp().sqrt()
    axes.imshow(p.numpy(), origin="lower", extent=(-reach, reach, -reach, reach), cmap="Blues", vmin=0, vmax=1)


def column(axes: tuple[Axes, Axes, Axes], name: str, data: Points) -> None:
    """One set: draws, density, and the score of x_t."""
    drawn, density, noised = axes
    points, label = data.draw(DRAWN, seed=1)
    colours = COLOURS[0] if label is None else [COLOURS[k % len(COLOURS)] for k in label.tolist()]
    drawn.scatter(*points.numpy().T, s=1.2, c=colours, linewidths=0)
    drawn.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH))
    drawn.set_title(name, fontsize=11, weight="bold")
    if isinstance(data, Known):
        shade(density, data.log_density(plane(REACH, 92)), REACH)
        mean, std = data.codec.mean.double(), data.codec.std
        shade(noised, data.log_density(std * plane(SPREAD, 60) + ALPHA_T * mean, ALPHA_T, std * SIGMA_T), SPREAD)
        x_t = plane(SPREAD, 15)
        score = data.score_of(x_t, ALPHA_T, SIGMA_T)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 30, "width": 0.008, "color": "#222222"}
        noised.quiver(*x_t.flatten(0, 1).T.numpy(), *score.flatten(0, 1).T.numpy(), **arrows)
        noised.set(xlim=(-SPREAD, SPREAD), ylim=(-SPREAD, SPREAD))
    else:
        for empty in (density, noised):
            empty.text(0.5, 0.5, "no closed form", ha="center", va="center", color="#777777", transform=empty.transAxes)


def draw() -> Figure:
    """A column for each set."""
    figure = Figure(figsize=(1.75 * len(NAMES) + 0.3, 5.6), facecolor="white", layout="constrained")
    grid = figure.subplots(3, len(NAMES))
    for name, axes in zip(NAMES, grid.T, strict=True):
        data = denoiselab.build(f"data={name}").data
        assert isinstance(data, Points)
        column(tuple(axes), name, data)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], aspect="equal")
    words = ("3,000 points,\nby label", "density", "density and score of\n$x_t$ at $\\sigma_t = 0.3$")
    for axes, word in zip(grid[:, 0], words, strict=True):
        axes.set_ylabel(word, fontsize=10)
    return figure


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rcParams.update({"font.family": "DejaVu Sans"})
    render(draw(), dpi=100).quantize(256).save(folder / "points.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "pictures"))
