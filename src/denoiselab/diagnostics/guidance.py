"""Guidance scales: the same noise under each, and what each costs in variety."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from denoiselab.diagnostics.base import Diagnostic, Finding, Table
from denoiselab.diagnostics.elbow import best_scale, floor
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, render, sheet
from denoiselab.diagnostics.grid import grid, planes
from denoiselab.diagnostics.spread import chroma, saturation, space_for, within_class
from denoiselab.diagnostics.subject import Subject
from denoiselab.errors import UserError
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.space import decoded, positions, vectors_of
from denoiselab.pictures import stacked
from denoiselab.rng import mix

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

NARROW = 0.5
"""Of the spread of real samples of a class: below, guidance is too high."""

POINTS = 1000
"""Most points of each scale in a picture."""

REAL = 2000
"""Most held-out images whose saturation is measured."""


class GuidanceGrid(Diagnostic):
    """The same noise and condition down the columns, a row per scale of classifier-free guidance.

    Models without labels and vectors, and those that were trained with p_null = 0, have nothing to be guided by: it is
    then left out from among the callbacks, and refused as a diagnostic. Table: scale, and the standard deviation of
    all values of the decoded samples; where these are images, their saturation too.

    Args:
        scales: guidance scales, s = 1 + w; 1 is off, 0 unconditional.
        n: samples of each scale.
    """

    def __init__(
        self,
        scales: Sequence[float] = (1, 1.5, 2, 3, 5, 7),
        n: int = 10,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if not scales or not all(math.isfinite(scale) for scale in scales) or len(set(scales)) < len(scales):
            raise ValueError(f"scales={[*scales]}: need different finite numbers")
        if n < 1:
            raise ValueError(f"n={n}: need at least 1")
        self.scales, self.n = [float(scale) for scale in scales], n

    def idle(self, parts: Parts) -> bool:
        return not (parts.num_classes or parts.vector) or parts.config.get("p_null") == 0

    def check(self, parts: Parts) -> None:
        if self.idle(parts):
            why = (
                "p_null=0 trains no unconditional model" if parts.num_classes or parts.vector else "it knows no labels"
            )
            raise ValueError(f"looks at guidance, and this model cannot be guided: {why}")

    def look(self, subject: Subject) -> Finding:
        cond = subject.cond(self.n)
        n = len(next(iter(cond.values())))
        drawn = [subject.draw(n, subject.sampling(scale=scale), cond)[0] for scale in self.scales]
        table: Table = {"scale": self.scales, "std": [samples.double().std().item() for samples in drawn]}
        if drawn[0].ndim == 4:
            table["saturation"] = [saturation(samples) for samples in drawn]
        return Finding(table, swept(subject, n, self.scales), tensors=shown(torch.stack(drawn), cond))

    def draw(self, finding: Finding) -> Image.Image:
        samples, scales = finding.tensors["samples"], finding.table["scale"]
        if samples.ndim == 3:
            titles, tensors = [f"scale {scale:g}" for scale in scales], finding.tensors
            return planes([*samples], titles, tensors.get("label"), tensors.get("real"))
        captions = [f"scale {scale:g}" for scale in scales]
        return grid(
            samples, captions, [], "the same noise and condition down each column, a guidance scale in each row"
        )


class GuidanceSweep(GuidanceGrid):
    """What guidance buys and what it costs: the evaluation's metrics at each scale, and how varied each class still is.

    Guidance trades variety for typical samples (Ho and Salimans 2022, arXiv:2207.12598, section 4), so that a distance
    to the data falls and rises again over the scale; its least is marked with the interval that repeats of other noise
    give (``best_scale``). On class-conditional images it lies between 1 and 2, so look there too.

    Too high a scale is told by the spread within a class over that of held-out samples, in the features of the first
    metric that has some, or of images' pixels or points' coordinates: ``spread`` over all directions, and ``narrowest``
    where classes are large enough to tell in which direction they are narrow. Of eight Gaussians on a ring, along the
    ring, the exact denoiser gives 0.46 at scale 2. The alarm is for the evaluation's own scale, which is swept too,
    where the smaller of both is below 0.5; others are marked ``too_high`` in the table.

    Table, a row per scale, means over repeats: each measurement of the evaluation's metrics, and its standard deviation
    over repeats (``NAME_sd``; None of one repeat); spread, narrowest, too_high; of images, ``saturation``, the share
    of values beyond 0.99, and of colours their mean ``chroma``.

    Args:
        scales: as for GuidanceGrid.
        n: samples that are measured, of each scale and repeat.
        shown: of the first repeat, in the picture.
        repeats: with noise of other seeds, the first being the evaluation's.
        metric: the measurement that is to be least, by name; None for the first whose better is lower.
    """

    def __init__(
        self,
        scales: Sequence[float] = (1, 1.1, 1.25, 1.5, 2, 3, 5, 7),
        n: int = 1000,
        shown: int = 10,
        repeats: int = 3,
        metric: str | None = None,
        every: int = 5000,
        budget: str | None = "5%",
    ):
        super().__init__(scales, n, every, budget)
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: need at least 1")
        if shown < 1:
            raise ValueError(f"shown={shown}: need at least 1")
        self.shown, self.repeats, self.metric = shown, repeats, metric

    def check(self, parts: Parts) -> None:
        super().check(parts)
        if not any(metric.least <= self.n for metric in parts.metrics.values()):
            raise ValueError(f"measures with the evaluation's metrics, and none of them takes n={self.n}; need others")
        if self.n < 2 * parts.num_classes:
            raise ValueError(f"n={self.n}: need at least 2 samples of each of the {parts.num_classes} classes")

    def look(self, subject: Subject) -> Finding:
        own = own_scale(subject.parts.config["guidance"])
        scales: list[float] = sorted(self.scales if own is None else {*self.scales, own})
        cond, images = subject.cond(self.n), subject.images
        n = len(next(iter(cond.values())))
        metrics = [metric for metric in subject.metrics.values() if metric.least <= n]
        space = space_for(subject.metrics, images)
        real, real_label = vectors_of(images.held_out, images, space)
        if "label" not in cond or real_label is None:  # of one class, then
            real_label = torch.zeros(len(real), dtype=torch.long)
        label = cond.get("label")
        of_class = torch.zeros(n, dtype=torch.long) if label is None else label
        found: dict[float, list[dict[str, float | None]]] = {scale: [] for scale in scales}
        records: dict[str, Measurement] = {}
        kept: list[Tensor] = []
        tell = subject.progress("guidance scales and repeats", len(scales) * self.repeats)
        for repeat in range(self.repeats):
            seed = mix(subject.seed, "repeat", repeat) if repeat else None
            for scale in scales:
                samples, _ = subject.draw(n, subject.sampling(scale=scale), cond, seed, f"guidance scale {scale:g}")
                records = {r.name: r for metric in metrics for r in metric.measure(samples, label, images)}
                name = self._distance(records)  # refuses a wrong name before the rest is sampled
                spread = within_class(space.vectors(samples), of_class, real, real_label)
                values = {name: record.value for name, record in records.items()}
                found[scale].append({**values, **extremes(samples), **spread._asdict()})
                if repeat == 0:
                    kept.append(samples[: POINTS if samples.ndim == 2 else self.shown])
                tell(1)
        table: Table = {"scale": scales, **means([found[scale] for scale in scales], [*records])}
        both = zip(table["spread"], table["narrowest"], strict=True)
        least = [everywhere if narrowest is None else min(everywhere, narrowest) for everywhere, narrowest in both]
        table["too_high"] = [value < NARROW for value in least]
        protocol = swept(subject, n, scales, repeats=self.repeats, **space.protocol)
        tensors = shown(torch.stack(kept), cond)
        if samples.ndim == 2:
            tensors["real"] = real[:POINTS].float()
        finding = Finding(table, protocol, tensors=tensors)
        if name is not None:
            curves = [[found[scale][repeat][name] for scale in scales] for repeat in range(self.repeats)]
            best = best_scale(scales, curves)  # pyright: ignore[reportArgumentType]
            finding.facts |= {"distance": name, "controls": records[name].controls, "best": best._asdict()}
            ends = {key: end for key in ("low", "high") if (end := getattr(best, key)) is not None}
            about = {**protocol, **records[name].protocol, "least": name}
            finding.records.append(Measurement("best_guidance_scale", best.scale, "none", ends, about))
        finding.facts |= {"better": {name: record.better for name, record in records.items()}}
        if samples.ndim == 4:
            finding.facts["real"] = extremes(
                torch.cat([part for part, _ in decoded(images.held_out, images, positions(images.held_out, REAL))])
            )
        if own is not None:
            value = least[scales.index(own)]
            finding.records.append(
                Measurement("guidance_spread", value, "none", {"real": 1.0, "alarm": NARROW}, protocol)
            )
            finding.alarms += too_high(own, value)
        return finding

    def _distance(self, records: dict[str, Measurement]) -> str | None:
        lower = [name for name, record in records.items() if record.better == "lower"]
        if self.metric is None:
            return lower[0] if lower else None
        if self.metric not in lower:
            raise UserError(
                f"metric={self.metric}: need one of the measurements that are better when lower: {', '.join(lower)}"
            )
        return self.metric

    def draw(self, finding: Finding) -> Image.Image:
        table, facts = finding.table, finding.facts
        quality = [name for name, better in facts["better"].items() if better == "higher"]
        wanted = [self._distances] * ("distance" in facts) + [self._quality] * bool(quality) + [self._variety]
        figure, axes = sheet(1, len(wanted), 9.6 / len(wanted), 3.1)
        for axis, panel in zip(axes, wanted, strict=True):
            panel(axis, table, facts)
            axis.set_xlabel("guidance scale s (1 is off)")
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        return stacked([super().draw(finding), render(figure)])

    def _distances(self, axis: Axes, table: Table, facts: dict[str, Any]) -> None:
        name, best = facts["distance"], facts["best"]
        band = floor(facts["controls"])
        if band is not None:
            axis.axhspan(*band, color=GREY, alpha=0.35, linewidth=0, label="real data, as many")
        if best["low"] is not None:
            axis.axvspan(
                best["low"], best["high"], color=COLOURS[1], alpha=0.25, linewidth=0, label="95% interval of the least"
            )
        end = ", at the end of the list" if best["at_end"] else ""
        axis.axvline(best["scale"], color=COLOURS[1], linestyle=DASHES[1], label=f"least at {best['scale']:g}{end}")
        sd = [value or 0 for value in table[f"{name}_sd"]]
        axis.errorbar(table["scale"], table[name], sd, fmt="o-", color=COLOURS[0], markersize=4, label=name)
        axis.set(ylabel=name, title="distance to the data")

    def _quality(self, axis: Axes, table: Table, facts: dict[str, Any]) -> None:
        names = [name for name, better in facts["better"].items() if better == "higher"]
        scaled = {name: max(map(abs, table[name])) > 1.5 for name in names}
        for k, name in enumerate(names):
            most = max(map(abs, table[name])) if scaled[name] else 1
            text = f"{name} / {most:g}" if scaled[name] else name
            line(axis, table["scale"], [v / most for v in table[name]], k, text)
        axis.set(ylabel="share", title="quality and coverage", ylim=(None, 1.03))

    def _variety(self, axis: Axes, table: Table, facts: dict[str, Any]) -> None:
        axis.axhline(1, color=GREY, linestyle=DASHES[0], label="held-out data")
        axis.axhline(NARROW, color="#b00000", linestyle=DASHES[2], label=f"too high below {NARROW:g}")
        lines = {"spread": "spread in a class", "narrowest": "where narrowest"}
        for k, (name, text) in enumerate(lines.items()):
            if None not in table[name]:
                line(axis, table["scale"], table[name], k, text)
        for k, name in enumerate(("saturation", "chroma"), 2):
            if name in table:
                ratio = [value / max(facts["real"][name], 1e-3) for value in table[name]]
                line(axis, table["scale"], ratio, k, name)
        axis.set(ylabel="over that of held-out data", title="variety", ylim=(0, None))


def line(axis: Axes, x: Sequence[float], y: Sequence[float], k: int, label: str) -> None:
    """The k-th of an axis's lines."""
    colour, dashes = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)]
    axis.plot(x, y, color=colour, linestyle=dashes, marker="o", markersize=4, label=label)


def swept(subject: Subject, n: int, scales: Sequence[float], **more: Any) -> dict[str, Any]:
    """The protocol of samples of several guidance scales."""
    listed = ", ".join(f"{scale:g}" for scale in scales)
    return {**subject.protocol(n, **more), "guidance": {"_target_": "denoiselab.guidance.CFG", "scale": listed}}


def shown(samples: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the picture needs: samples (S, n, ...), and the labels of points."""
    found = {"samples": samples}
    if samples.ndim == 3 and "label" in cond:
        found["label"] = cond["label"][: samples.shape[1]]
    return found


def extremes(samples: Tensor) -> dict[str, float]:
    """Of images, how saturated they are; nothing of points."""
    if samples.ndim != 4:
        return {}
    found = {"saturation": saturation(samples)}
    return {**found, "chroma": chroma(samples)} if samples.shape[1] == 3 else found


def means(found: Sequence[Sequence[dict[str, float | None]]], measured: Sequence[str]) -> Table:
    """Columns of means over repeats, found[k][r] being scale k's in repeat r; and the standard deviations of what was
    measured."""
    table: Table = {}
    for name in found[0][0]:
        values = [[row[name] for row in repeats] for repeats in found]
        table[name] = [None if None in row else statistics.fmean(row) for row in values]  # pyright: ignore
        if name in measured:
            table[f"{name}_sd"] = [statistics.stdev(row) if len(row) > 1 else None for row in values]  # pyright: ignore
    return table


def own_scale(guidance: dict[str, Any]) -> float | None:
    """The evaluation's own scale, where it is plain classifier-free guidance."""
    plain = str(guidance.get("_target_", "")).rpartition(".")[2] == "CFG"
    return float(guidance["scale"]) if plain else None


def too_high(scale: float, spread: float) -> list[str]:
    """The alarm of the evaluation's own scale."""
    if spread >= NARROW:
        return []
    cause = "guidance is too high" if scale > 1 else "the network says too much the same of each class"
    return [
        f"at the evaluation's guidance scale {scale:g} a class is {spread:.3g} times as wide as that of held-out data "
        f"(alarm below {NARROW:g}): {cause}"
    ]
