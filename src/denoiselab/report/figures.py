"""Curves as inline SVG.

Lettering takes the colour of the page's text, so that one figure suits light and dark. Names that come from files
stay out of the figures: the page lists them beside, where they wrap and are escaped.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from denoiselab.report.compute import Chart
from denoiselab.report.runs import Run, finite
from denoiselab.report.statistics import mean_ci

INK = "#010203"
"""Stands for the page's text colour while a figure is drawn."""

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]
"""Okabe and Ito's palette, distinguishable without colour vision, less its black and yellow: they vanish on a page
of the same tone."""

PANELS = {"x_0": "x_0", "eps": "eps (times SNR)", "v": "v (times SNR + 1)"}

LINES = {"val/loss": "held out, EMA", "val/loss_raw": "held out, raw weights", "train/loss": "training batches"}

SOURCES = {"val": "held out, EMA", "val_raw": "held out, raw weights", "train": "training batches"}

STYLE = {
    "val/loss": {"linewidth": 1.8},
    "val/loss_raw": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
    "train/loss": {"linewidth": 0.7},
}

MARKERS = "osD^vP"
"""Beside the colours, so that lines can be told apart without them."""

POINTS = 300
"""Of a curve, at most: more cannot be told apart at the width of a page."""

SPAN = 1e12
"""Largest span of a log axis: one value that underflowed is not to flatten all others."""


def losses(groups: Sequence[Sequence[Run]], names: Iterable[str] = tuple(LINES), title: str = "") -> str | None:
    """Loss over optimizer steps, a colour per group of runs, or per line if all lines are drawn; None without data.

    Several seeds are drawn as their mean, with a band for its 95% interval. The scales fit all lines, drawn or not,
    so that panels beside each other compare.
    """
    wanted, shown, means, last = set(names), False, [], 0
    with _style():
        figure, axis = _panel(4.8, 3.1)
        for i, runs in enumerate(groups):
            for j, name in enumerate(LINES):
                steps, mean, half = _over_seeds([run.series(name) for run in runs])
                if not len(steps):
                    continue
                means.append(mean)
                last = max(last, steps[-1])
                if name in wanted:
                    colour = COLOURS[j if wanted == set(LINES) else i]
                    alone = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
                    axis.plot(steps, mean, color=colour, **STYLE[name], **alone)
                    axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
                    shown = True
        if not shown:
            return None
        _scale(axis, np.concatenate(means), wide=5)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axis.set(xlabel="optimizer step", ylabel="weighted loss", title=title, xlim=(0, last * 1.02 or 1))
        return _svg(figure, "loss over optimizer steps")


def buckets(groups: Sequence[Sequence[Run]], panel: str, sources: Sequence[str] = ("val",)) -> str | None:
    """The squared error over t in one of three units, with 95% error bars; a colour per group, or per source."""
    drawn: list[np.ndarray] = []
    with _style():
        figure, axis = _panel(3.5, 3.0)
        for i, runs in enumerate(groups):
            for j, source in enumerate(sources):
                mean, half = _bucket_means(runs, f"buckets/{source}/{panel}")
                if not np.isfinite(mean).any():
                    continue
                colour = COLOURS[j if len(sources) > 1 else i]
                beside = 0.1 * (j - (len(sources) - 1) / 2)  # so that error bars do not hide each other
                t = (np.arange(len(mean)) + 0.5 + beside) / len(mean)
                axis.errorbar(t, mean, half, color=colour, marker="o", markersize=2.5, linewidth=1.1, elinewidth=0.9)
                drawn.append(mean[np.isfinite(mean)])
        if not drawn:
            return None
        _scale(axis, np.concatenate(drawn), wide=0)
        axis.set(xlabel="t (0 data, 1 noise)", ylabel="mean squared error", xlim=(0, 1), title=PANELS[panel])
        return _svg(figure, f"mean squared error of {panel} over t")


def quality(chart: Chart, labels: Sequence[str]) -> str | None:
    """A measurement over what it costs, with 95% intervals; a colour and a marker per label, None without any of them.

    What real data give is a grey band, or a grey line where its spread is not known.
    """
    lines = {line.label: line.points for line in chart.lines}
    means = np.array([point.mean for points in lines.values() for point in points])
    places = sorted({point.x for points in lines.values() for point in points})
    if not lines.keys() & set(labels):
        return None
    with _style():
        figure, axis = _panel(4.0, 3.0)
        if chart.band:
            low, high, _ = chart.band
            axis.axhspan(low, high, color=INK, alpha=0.12, linewidth=0)
            axis.axhline((low + high) / 2, color=INK, alpha=0.45, linewidth=0.9, linestyle=(0, (1, 2)))
        steps = _costs(axis, places)
        for i, label in enumerate(labels):
            points = lines.get(label, [])
            x = [steps(point.x, i - (len(labels) - 1) / 2) for point in points]
            half = [point.half or 0.0 for point in points]
            style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4.5, "linewidth": 1.2}
            axis.errorbar(x, [point.mean for point in points], half, elinewidth=1.0, capsize=2, **style)
        _limits(axis, chart, means)
        axis.set(xlabel=chart.x)
        return _svg(figure, f"a measurement over {chart.x}")


def _limits(axis: Axes, chart: Chart, means: np.ndarray) -> None:
    """Limits that fit the means, the band, and of intervals what reaches no further beyond them than they span."""
    points = [point for line in chart.lines for point in line.points]
    held = np.concatenate([means, chart.band[:2] if chart.band else []])
    log = held.min() > 0 and means.max() >= 5 * means.min()  # of a band that holds 0, the 0 is what matters
    reach = held.max() - held.min() or abs(held[0])
    ends = np.array([point.mean + sign * (point.half or 0.0) for point in points for sign in (-1, 1)])
    ends = np.clip(ends, held.min() / 2 if log else held.min() - reach, held.max() + reach)
    _scale(axis, np.concatenate([held, ends]), wide=0 if log else math.inf)


def _costs(axis: Axes, places: list[float]) -> Callable[[float, float], float]:
    """An axis of costs with ticks at those that there are, logarithmic if they span a factor of 3; and where a point
    goes that is to stand a little beside its place, since error bars would hide each other."""
    low, high = places[0], places[-1]
    log = low > 0 and high / low >= 3
    if log:
        axis.set_xscale("log")
        span = math.log(high / low)
        limits = (low * math.exp(-0.08 * span), high * math.exp(0.08 * span))
    else:
        span = high - low
        limits = (low - 0.08 * span, high + 0.08 * span)
    at = {x: (math.log(x / low) if log else x - low) / span for x in places}
    ticks: list[float] = []
    for x in [low, high, *places[1:-1]]:  # the ends first, and of the others those that have room
        if all(abs(at[x] - at[tick]) > 0.13 for tick in ticks):
            ticks.append(x)
    axis.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_xlim(limits)
    return lambda x, beside: x * math.exp(0.012 * beside * span) if log else x + 0.012 * beside * span


def short(value: float) -> str:
    """A large number in a few characters.

    >>> short(50), short(38400), short(773185), short(2.5e15), short(0.5)
    ('50', '38.4k', '773k', '2.5e15', '0.5')
    """
    for size, unit in ((1e12, ""), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0, "")):
        if abs(value) >= size:
            text = f"{value:.3g}" if not unit else f"{value / size:.3g}{unit}"
            return text.replace("e+", "e")
    return f"{value:g}"


def _over_seeds(curves: list[tuple[list[int], list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all curves have, with mean and half width of the interval (0 for one curve)."""
    known = [dict(zip(*curve, strict=True)) for curve in curves if curve[0]]
    steps = sorted(set.intersection(*(set(curve) for curve in known))) if known else []
    if len(steps) > POINTS:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, POINTS).round().astype(int)]
    found = [mean_ci([curve[step] for curve in known]) for step in steps]
    mean, half = np.array([m for m, _ in found]), np.array([h or 0.0 for _, h in found])
    return np.array(steps), mean, half


def _bucket_means(runs: Sequence[Run], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Per bucket: over several seeds, mean and interval of their means; for one, its value and 1.96 standard errors."""
    rows = [(_floats(run.last(name)), _floats(run.last(f"{name}_se"))) for run in runs]
    rows = [(mean, error) for mean, error in rows if len(mean)]
    if not rows:
        return np.array([]), np.array([])
    count = len(rows[0][0])
    rows = [(mean, error) for mean, error in rows if len(mean) == count]
    if len(rows) == 1:
        mean, error = rows[0]
        return mean, 1.96 * np.nan_to_num(error if len(error) == count else np.zeros(count))
    found = [mean_ci(values) for values in np.array([mean for mean, _ in rows]).T]
    return np.array([m for m, _ in found]), np.nan_to_num(np.array([h for _, h in found], dtype=float))


def _floats(values: Any) -> np.ndarray:
    listed = values if isinstance(values, list) else []
    return np.array([np.nan if (number := finite(value)) is None else number for value in listed])


def _style() -> Any:
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "denoiselab",
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "axes.grid": True,
            "grid.color": INK,
            "grid.alpha": 0.13,
            "grid.linewidth": 0.6,
        }
    )


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _scale(axis: Axes, values: np.ndarray, wide: float) -> None:
    """Limits that fit the curves rather than their bands; log scale for positive values that span ``wide``."""
    low, high = float(values.min()), float(values.max())
    if low > 0:
        low = max(low, high / SPAN)
    if low > 0 and high / low >= wide:
        middle, reach = math.sqrt(low) * math.sqrt(high), max(1.25 * math.sqrt(high / low), math.sqrt(12))
        axis.set_yscale("log", nonpositive="clip")
        axis.set_ylim(middle / reach, middle * reach)
        subs = (1, 2, 5) if reach < 30 else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        axis.set_ylim(low - margin, high + margin)


def _margins(figure: Figure, axis: Axes) -> None:
    """Room for the labels, by their number of letters: the browser's font is not known, and a layout that measures
    takes longer than drawing."""
    low, high = axis.get_ylim()
    ticks = axis.yaxis.get_major_formatter().format_ticks([tick for tick in axis.get_yticks() if low <= tick <= high])
    width, height = (72 * side for side in (figure.get_figwidth(), figure.get_figheight()))
    lettering = 0.64 * matplotlib.rcParams["font.size"]
    left = 9 + lettering * max(map(len, ticks), default=1) + (15 if axis.get_ylabel() else 0)
    above = 20 if axis.get_title() or axis.yaxis.get_major_formatter().get_offset() else 7
    figure.subplots_adjust(left=left / width, right=1 - 10 / width, bottom=36 / height, top=1 - above / height)


def _svg(figure: Figure, what: str) -> str:
    """The figure as an SVG element that scales with its column. Its text is all ours: see above."""
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
        _margins(figure, axis)
    # Half the time of savefig, which draws everything twice.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", svg)  # the same in every figure, so not unique on the page
    svg = re.sub(r"font-family: [^;]*;", "font-family: inherit;", svg)
    svg = re.sub(r"\n\s*", " ", svg).replace(INK, "currentColor")
    box = f"0 0 {72 * figure.get_figwidth():g} {72 * figure.get_figheight():g}"
    return re.sub("<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{what}">', svg, count=1)
