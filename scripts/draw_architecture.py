"""Draw docs/architecture.svg and .png: the types, and the flow of one training step and one sampling call.

python scripts/draw_architecture.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import colors, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

WIDTH, HEIGHT = 100.0, 77.0
"""Of the drawing, in units of a tenth of an inch."""

# Okabe and Ito's colours as edges (yellow a little darker); fills are the same colours mixed with white.
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILION, PURPLE, YELLOW = "#D55E00", "#CC79A7", "#E3D52E"
GREY, BLACK = "#8A8A8A", "#222222"


def tint(colour: str, share: float = 0.16) -> tuple[float, ...]:
    """A colour mixed with white."""
    return tuple(1 - share * (1 - value) for value in colors.to_rgb(colour))


class Drawing:
    """Boxes and arrows on one page."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def box(self, x: float, y: float, w: float, h: float, colour: str, share: float = 0.16, dashed: bool = False):
        """A rounded box with its lower left corner at (x, y)."""
        style = "round,pad=0,rounding_size=1.1"
        line = {"linewidth": 1.3, "linestyle": (0, (4, 2.5)) if dashed else "-"}
        fill = tint(colour, share)
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=fill, edgecolor=colour, **line))

    def text(self, x: float, y: float, words: str, size: float = 11, **style) -> None:
        """Words centred at (x, y)."""
        self.axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": size, "color": BLACK, **style})

    def named(self, x: float, y: float, w: float, h: float, colour: str, name: str, *lines: str) -> None:
        """A box with a name and, below it, what it does; lines that start with > are code."""
        self.box(x, y, w, h, colour)
        top = y + h / 2 + 1.45 * len(lines)
        self.text(x + w / 2, top, name, 12.5, weight="bold")
        for number, line in enumerate(lines, 1):
            family = "monospace" if line.startswith(">") else "sans-serif"
            size = 10 if line.startswith(">") else 10.5
            self.text(x + w / 2, top - 2.9 * number, line.removeprefix(">"), size, family=family)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = BLACK) -> None:
        """A straight arrow."""
        head = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=1.4, **head))

    def label(self, x: float, y: float, words: str, size: float = 11.5, **style) -> None:
        """What an arrow carries."""
        self.text(x, y, words, size, **style)

    def heading(self, x: float, y: float, words: str) -> None:
        """What a row shows."""
        self.text(x, y, words, 14, weight="bold", ha="left")

    def container(self, x: float, y: float, w: float, h: float, name: str, code: str) -> None:
        """A dashed frame with its name at the top left."""
        self.box(x, y, w, h, BLACK, share=0.03, dashed=True)
        self.text(x + 1.6, y + h - 2.8, name, 12.5, weight="bold", ha="left")
        self.text(x + 8, y + h - 2.9, code, 10, family="monospace", ha="left")


def draw() -> Figure:
    """The whole picture."""
    d = Drawing()

    d.heading(1.5, 74.3, "One training step")
    d.named(1.5, 52.5, 14.5, 12, GREY, "Data", ">Codec.encode(…)")
    d.container(22, 43, 56.5, 29, "Loss", "forward(denoiser, schedule, x_0, eps, t)")
    d.named(24, 52.5, 13.5, 12, GREY, "Noising", r"$x_t = \alpha_t x_0 + \sigma_t\,\epsilon$")
    d.box(43.5, 45.5, 17, 22, BLUE)
    d.text(52, 65.4, "Denoiser", 12.5, weight="bold")
    d.named(45, 56.3, 14, 7, BLUE, "net", ">forward(…)")
    d.named(45, 46.9, 14, 7, PURPLE, "Target", ">coefficients(…)")
    d.named(65, 52.5, 12.6, 12, GREEN, "Weighting", r"$w_t\,|\hat x_0 - x_0|^2$", ">weight(…)")
    d.named(84.5, 52.5, 14, 12, GREY, "Optimizer", "clip, step")
    d.named(84.5, 39, 14, 8, GREY, "EMA", "float32 copy")

    d.arrow((16, 58.5), (24, 58.5))
    d.label(19, 60, "$x_0$")
    d.arrow((37.5, 58.5), (43.5, 58.5))
    d.label(40.4, 60, "$x_t$")
    d.arrow((52, 56.3), (52, 53.9))
    d.label(53.3, 55.2, "$y$", size=10.5)
    d.arrow((60.5, 58.5), (65, 58.5))
    d.label(62.6, 60.2, r"$\hat x_0$")
    d.arrow((77.6, 58.5), (84.5, 58.5))
    d.label(81.6, 60, "loss")
    d.arrow((91.5, 52.5), (91.5, 47))
    d.label(92.5, 49.8, "weights", ha="left", size=10.5)

    d.box(22, 28.5, 56.5, 8.5, ORANGE, share=0.2)
    d.text(24, 34.2, "Schedule", 12.5, weight="bold", ha="left")
    d.text(24, 31.3, "levels(t)", 10, family="monospace", ha="left")
    d.text(57.5, 32.8, r"$x_t = \alpha_t\,x_0 + \sigma_t\,\epsilon$      $t = 0$ data,  $t = 1$ noise", 12.5)
    d.named(1.5, 28.5, 14.5, 8.5, VERMILION, "Timesteps", ">icdf(u, …)")
    d.arrow((16, 32.75), (22, 32.75))
    d.label(18.8, 34.2, "$t$")
    for x, bottom, words in ((30.75, 52.5, ""), (52, 45.5, ""), (71.3, 52.5, ", rate")):
        d.arrow((x, 37), (x, bottom), colour=ORANGE)
        d.label(x + 0.9, 40.1, rf"$\alpha_t, \sigma_t${words}", ha="left")

    d.heading(1.5, 24, "One sampling call")
    d.named(1.5, 13, 14.5, 7.5, GREY, "Noise", "by (seed, id)")
    d.named(1.5, 1.5, 14.5, 7.5, GREY, "Codec", ">decode(x_0)")
    d.box(22, 1.5, 26, 19, YELLOW, share=0.22)
    d.text(24, 7.2, "Sampler", 12.5, weight="bold", ha="left")
    d.text(24, 4.2, "step(walk, x_t, t, s)", 10, family="monospace", ha="left")
    d.named(24, 11.5, 13.5, 7, YELLOW, "Spacing", ">times(…)")
    d.box(60, 1.5, 38.5, 19, SKY, share=0.2)
    d.text(62, 12.5, "Guidance", 12.5, weight="bold", ha="left")
    d.text(62, 9.6, "wraps a denoiser,", 10.5, ha="left")
    d.text(62, 7.2, "same call", 10.5, ha="left")
    d.named(82, 5.5, 15, 11, BLUE, "Denoiser", "EMA weights")

    d.arrow((16, 16.75), (22, 16.75))
    d.label(18.8, 18.2, r"$\epsilon$")
    d.arrow((22, 5.25), (16, 5.25))
    d.label(19, 6.7, "$x_0$")
    d.arrow((30.75, 18.5), (30.75, 28.5))
    d.label(31.6, 24.5, "$t$", ha="left")
    d.arrow((43, 28.5), (43, 20.5), colour=ORANGE)
    d.label(43.9, 24.5, r"$\alpha_t, \sigma_t$", ha="left")
    d.arrow((48, 14.5), (60, 14.5))
    d.label(54, 16, r"$x_t, \alpha_t, \sigma_t$")
    d.arrow((60, 7), (48, 7))
    d.label(54, 8.7, r"$\hat x_0$")
    d.arrow((91.5, 39), (91.5, 16.5))
    d.label(92.5, 28, "weights", ha="left", size=10.5)
    return d.figure


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs"
    rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "denoiselab", "mathtext.fontset": "dejavusans"})
    figure = draw()
    figure.savefig(folder / "architecture.svg", metadata={"Date": None})
    figure.savefig(folder / "architecture.png", dpi=160)


if __name__ == "__main__":
    main()
