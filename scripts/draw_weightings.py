"""Draw docs/pictures/weightings.svg and .png: every weighting of conf/ on one axis, the log-SNR.

Above, w_t on the squared x_0 error. Below, what becomes of it with uniform t along the cosine schedule: the density
over the log-SNR with which training weighs the squared error of eps.

python scripts/draw_weightings.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import denoiselab
from denoiselab.compose import options

LEAST, MOST = -10.0, 9.0
"""The log-SNRs shown, within those of the cosine schedule's table."""

# Okabe and Ito's colours, black in place of yellow; each in turn solid, dashed and dotted.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
STYLES = ("-", (0, (5, 2)), (0, (1.2, 1.4)))


def curves() -> tuple[Tensor, dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """The log-SNRs of the table's points that are shown; of each option the formula, w_t and the density there."""
    schedule = denoiselab.build("schedule=cosine").schedule
    t = torch.linspace(0, 1, schedule.points or 1000, dtype=torch.float64)
    t = t[(schedule.log_snr(t) > LEAST) & (schedule.log_snr(t) < MOST)]
    log_snr, (alpha_t, sigma_t), rate = schedule.log_snr(t), schedule(t), schedule.rate(t)
    formulas, weights, densities = {}, {}, {}
    for name in options()["weighting"]:
        weighting = denoiselab.build(f"weighting={name}", "schedule=cosine", "target=v").weighting
        with torch.no_grad():
            weights[name] = weighting.weight(alpha_t, sigma_t, rate)
        density = weights[name] / (log_snr.exp() * rate)
        densities[name] = density / -torch.trapezoid(density, log_snr)
        formulas[name] = weighting.formula + weighting.added
    return log_snr, formulas, weights, densities


def label(axes: Axes, ends: dict[str, float], styles: dict[str, dict], words: dict[str, str]) -> None:
    """Names, with a line to the right end of each curve (in shares of the axes' height), and words beside them."""
    place = {"transform": axes.transAxes, "clip_on": False}
    order = sorted(ends, key=lambda name: -ends[name])
    for k, name in enumerate(order):
        y, colour = 0.99 - k * 0.98 / (len(order) - 1), styles[name]["color"]
        axes.plot([1.0, 1.04], [min(max(ends[name], 0.0), 1.0), y], color="#BBBBBB", linewidth=0.7, **place)
        axes.plot([1.045, 1.115], [y, y], **styles[name], **place)
        axes.text(1.125, y, name, color=colour, weight="bold", va="center", fontsize=10, transform=axes.transAxes)
        axes.text(1.35, y, words[name], va="center", fontsize=9, color="#333333", transform=axes.transAxes)


def draw() -> Figure:
    """Both panels."""
    log_snr, formulas, weights, densities = curves()
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS)], "linewidth": 1.9}
        for i, name in enumerate(formulas)
    }
    figure = Figure(figsize=(12.5, 11), facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.07, right=0.56, top=0.96, bottom=0.06, hspace=0.13)
    upper.set(ylabel="weight $w_t$ on the squared error of $x_0$")
    upper.set_title("Every weighting, as a function of the noise level", loc="left", weight="bold")
    lower.set(ylabel="density over the log-SNR of the squared error of $\\epsilon$")
    lower.set_title("The same with uniform t along the cosine schedule, each of area 1", loc="left", weight="bold")
    lower.set_xlabel("log-SNR in nats: noise on the left, data on the right")

    middles = {name: f"half of it below {middle(log_snr, d)}" for name, d in densities.items()}
    panels = ((upper, weights, -5.0, 7.0, formulas), (lower, densities, -4.0, 0.0, middles))
    for axes, curve, low, high, words in panels:
        for name in formulas:
            axes.plot(log_snr, curve[name], **styles[name])
        axes.set(yscale="log", xlim=(LEAST, MOST), ylim=(10**low, 10**high))
        axes.grid(color="#DDDDDD", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(0, color="#999999", linewidth=0.8)
        ends = {name: (curve[name][0].log10().item() - low) / (high - low) for name in formulas}
        label(axes, ends, styles, words)
    return figure


def middle(log_snr: Tensor, density: Tensor) -> float:
    """The median of a density over falling log-SNRs."""
    share = torch.cumulative_trapezoid(density.flip(0), log_snr.flip(0))
    at = (share >= 0.5 * share[-1]).nonzero()[0, 0]
    return round(log_snr.flip(0)[1:][at].item(), 1) + 0.0  # no -0.0


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "weightings", "svg.fonttype": "path"})
    figure = draw()
    figure.savefig(folder / "weightings.svg", metadata={"Date": None})
    figure.savefig(folder / "weightings.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "pictures"))
