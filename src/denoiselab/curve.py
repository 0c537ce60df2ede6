"""A loss as a function of t: what slots, densities and spacings are cut from."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.buffers import ExactBuffers

PANELS = ("eps", "x_0", "v")
LARGEST = 200_000_000
"""Bytes of a file that is still read."""


class Curve(ExactBuffers):
    """A piecewise linear L(t) >= 0 on [0, 1], with its exact integral and that integral's inverse.

    Before its first and after its last point it is constant.

    Args:
        t: times, strictly increasing in [0, 1]; at least one.
        value: L at these times, finite, >= 0 and not all 0.

    >>> falling = Curve([0, 1], [2, 0])                       # L = 2 - 2t, integral 2t - t^2
    >>> falling.cumulative(torch.tensor([0.5, 1.0]).double())
    tensor([0.7500, 1.0000], dtype=torch.float64)
    >>> falling.inverse(torch.tensor([0.75]).double())
    tensor([0.5000], dtype=torch.float64)
    """

    t: Tensor
    value: Tensor
    area: Tensor

    def __init__(self, t: Sequence[float], value: Sequence[float]):
        super().__init__()
        if not len(t) == len(value) >= 1:
            raise ValueError(f"curve: {len(t)} times and {len(value)} values; need as many of each, at least 1")
        times, values = (torch.tensor([float(v) for v in column], dtype=torch.float64) for column in (t, value))
        if not (bool((times.diff() > 0).all()) and 0 <= times[0] <= times[-1] <= 1):
            raise ValueError("curve: its times must rise strictly within [0, 1]")
        if not (bool((values >= 0).all()) and bool(values.isfinite().all()) and values.sum() > 0):
            raise ValueError("curve: its values must be finite and >= 0, and some > 0")
        if times[0] > 0:
            times, values = torch.cat([times.new_zeros(1), times]), torch.cat([values[:1], values])
        if times[-1] < 1:
            times, values = torch.cat([times, times.new_ones(1)]), torch.cat([values, values[-1:]])
        area = torch.cat([times.new_zeros(1), ((values[1:] + values[:-1]) / 2 * times.diff()).cumsum(0)])
        for name, buffer in {"t": times, "value": values, "area": area}.items():
            self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def load(cls, source: str | Path, panel: str = "eps") -> Curve:
        """The curve of a file.

        Args:
            source: a CSV with the columns t and value; a JSON file {"t": [...], "value": [...]}, or such JSON itself;
                or a run's folder or metrics.jsonl, whose last held-out losses per bucket (of the EMA weights) are
                taken at the buckets' centres.
            panel: of a run, in which units: eps, x_0 or v.

        Raises:
            ValueError: nothing to read, or no curve in it; in one line.
        """
        if panel not in PANELS:
            raise ValueError(f"panel={panel}: need one of {', '.join(PANELS)}")
        if not isinstance(source, str | Path) or not str(source).strip():
            raise ValueError(f"curve={source}: need a file with columns t and value, or a run with metrics.jsonl")
        try:
            return cls(*_columns(str(source), panel))
        except (ValueError, TypeError, OverflowError, RecursionError, OSError, csv.Error) as error:
            name, why = (" ".join(str(text).split())[:200] for text in (source, error))
            raise ValueError(f"curve={name}: {why.removeprefix('curve: ')}") from None

    def forward(self, t: Tensor) -> Tensor:
        """L(t)."""
        i = self._segment(self.t, t)
        share = (t - self.t[i]) / (self.t[i + 1] - self.t[i])
        return torch.lerp(self.value[i], self.value[i + 1], share)

    def cumulative(self, t: Tensor) -> Tensor:
        """The integral of L from 0 to t."""
        i = self._segment(self.t, t)
        return self.area[i] + (t - self.t[i]) * (self.value[i] + self(t)) / 2

    def inverse(self, share: Tensor) -> Tensor:
        """min{t : cumulative(t) >= share cumulative(1)}, share in [0, 1]; float64 in and out."""
        target = share * self.total
        i = self._segment(self.area, target)
        rest, left = target - self.area[i], self.value[i]
        width = self.t[i + 1] - self.t[i]
        slope = (self.value[i + 1] - left) / width
        # left x + slope x^2/2 = rest, in the form that does not cancel
        root = (left.square() + 2 * slope * rest).clamp_min(0).sqrt()
        x = 2 * rest / (left + root).clamp_min(torch.finfo(torch.float64).tiny)
        return self.t[i] + x.clamp_min(0).minimum(width)

    @property
    def total(self) -> Tensor:
        """The integral over [0, 1]."""
        return self.area[-1]

    @staticmethod
    def _segment(knots: Tensor, at: Tensor) -> Tensor:
        """i with knots[i] < at <= knots[i + 1], within the range of segments."""
        return (torch.searchsorted(knots, at) - 1).clamp(0, len(knots) - 2)


def _columns(source: str, panel: str) -> tuple[list[float], list[float]]:
    if source.lstrip().startswith("{"):
        return _mapping(json.loads(source))
    path = Path(source)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise ValueError("no such file; need a CSV, a JSON or a run with metrics.jsonl")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"a file of {path.stat().st_size} bytes; {LARGEST} is the most")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return _buckets(text, panel)
    if path.suffix == ".json":
        return _mapping(json.loads(text))
    table = list(csv.DictReader(text.splitlines()))
    if not table or not {"t", "value"} <= table[0].keys():
        raise ValueError("need rows under the columns t and value")
    return [float(row["t"]) for row in table], [float(row["value"]) for row in table]


def _mapping(found: Any) -> tuple[list[float], list[float]]:
    if not isinstance(found, dict) or not all(isinstance(found.get(key), list) for key in ("t", "value")):
        raise ValueError('need {"t": [...], "value": [...]}')
    return found["t"], found["value"]


def _buckets(text: str, panel: str) -> tuple[list[float], list[float]]:
    """Bucket centres and the last row's losses, of the buckets that have one."""
    key = f"buckets/val/{panel}"
    last = None
    for line in text.splitlines():
        if key in line:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by a crash
            last = row.get(key, last) if isinstance(row, dict) else last
    if not isinstance(last, list):
        raise ValueError(f"no row has {key}; train with callbacks.buckets, or name another file")
    filled = [(k, value) for k, value in enumerate(last) if value is not None]
    return [(k + 0.5) / len(last) for k, _ in filled], [value for _, value in filled]
