"""The squared error as a function of t, from the lists of a row: a table, and a picture."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from denoiselab.pictures import COLOURS, render

UNITS = {"x_0": "x₀", "eps": "ε", "v": "v"}
SOURCES = {"val": "held out, EMA weights", "val_raw": "held out, raw weights", "train": "training batches"}


def curves(values: dict[str, Any]) -> dict[str, list[Any]]:
    """Columns source, unit, t (the middle of a bucket), error, standard_error and count; empty if a row has none.

    Args:
        values: a row with lists buckets/SOURCE/UNIT, as ``callbacks.LossBuckets`` logs them.
    """
    found: dict[str, list[Any]] = {}
    for source in SOURCES:
        for unit in UNITS:
            means = values.get(f"buckets/{source}/{unit}")
            if not isinstance(means, list):
                continue
            k = len(means)
            columns = {
                "source": [source] * k,
                "unit": [unit] * k,
                "t": [(i + 0.5) / k for i in range(k)],
                "error": means,
                "standard_error": values.get(f"buckets/{source}/{unit}_se", [None] * k),
                "count": values.get(f"buckets/{source}/count", [None] * k),
            }
            for name, column in columns.items():
                found.setdefault(name, []).extend(column)
    return found


def picture(table: dict[str, list[Any]], title: str) -> Image.Image:
    """One plane per unit, a line per source with two standard errors as a band."""
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    units = [unit for unit in UNITS if any(row["unit"] == unit for row in rows)]
    figure = Figure(figsize=(3.6 * len(units), 3.4), layout="constrained")
    planes = figure.subplots(1, len(units), squeeze=False)[0]
    for plane, unit in zip(planes, units, strict=True):
        for source, colour in zip(SOURCES, COLOURS, strict=False):
            line = [row for row in rows if (row["source"], row["unit"]) == (source, unit) and row["error"] is not None]
            if not line:
                continue
            t, error = [row["t"] for row in line], [row["error"] for row in line]
            spread = [2 * (row["standard_error"] or 0.0) for row in line]
            low = [max(e - s, e / 10) for e, s in zip(error, spread, strict=True)]  # a logarithm has no zero
            high = [e + s for e, s in zip(error, spread, strict=True)]
            plane.plot(t, error, color=colour, marker=".", label=SOURCES[source], linewidth=1.2)
            plane.fill_between(t, low, high, color=colour, alpha=0.2, linewidth=0)
        plane.set(title=f"squared error of {UNITS[unit]}", xlabel="t (0 data, 1 noise)", yscale="log", xlim=(0, 1))
        plane.grid(alpha=0.3, linewidth=0.5)
    planes[0].set_ylabel("mean squared error")
    planes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return render(figure, dpi=110)
