"""Quality over the number of steps, and over what they cost."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from PIL import Image

from denoiselab.compose import compose, options, plain
from denoiselab.diagnostics.base import Diagnostic, Finding, Table
from denoiselab.diagnostics.elbow import floor
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, readable, render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.errors import UserError
from denoiselab.metrics.base import Measurement
from denoiselab.rng import Noise, mix

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

WARMUP = 1
"""Walks before those that are timed."""

WALKS = 5
"""Walks that are timed; the median counts."""

BATCH = 64
"""Samples of a timed walk."""

Way = tuple[str, int]
"""A sampler's option and its number of steps."""


class QualityVersusSteps(Diagnostic):
    """A distance to the data over steps and over network calls, for several samplers: which is better for what it
    costs.

    At equal steps a method of two calls a step looks better than it is; so the same distances stand over both. Each is
    measured ``repeats`` times with noise of other seeds; a difference within their spread, or within what real data of
    the same number show (the null of mmd2, the floor of a Frechet distance), is none. From where on a sampler reaches
    that is said.

    Heun's method is not always ahead at few steps: from the noisiest level of a cosine table, sigma/alpha = 20,291,
    its first step lands nowhere; its option brings a spacing that starts at 80, and even so it is to be compared at
    equal calls, of which it makes 2 N - 1. Distances of a few hundred points are mostly noise: take thousands.

    Table, a row per sampler and number of steps: ``calls`` of a sample, the distance's mean over repeats, its standard
    deviation and ``reached``, whether the mean is within what real data show, at most the null's 95 %
    quantile, or two standard deviations above the floor; ``ms_per_sample``,
    the median wall-clock time of 5 walks of 64 samples after a warm-up, decoding aside, the device waited for; and
    ``ms_per_call``, which is one number where the network is what costs.

    Args:
        samplers: options of the sampler group, each with the spacing that it brings.
        steps: numbers of steps, >= 1.
        n: samples of each point and repeat.
        repeats: with noise of other seeds, the first being the evaluation's.
        metric: the distance, by the name of its measurement; None for the first whose better is lower.
    """

    def __init__(
        self,
        samplers: Sequence[str] = ("ddim", "heun", "dpmpp_2m"),
        steps: Sequence[int] = (4, 8, 16, 32),
        n: int = 2000,
        repeats: int = 3,
        metric: str | None = None,
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if not samplers or len(set(samplers)) < len(samplers):
            raise ValueError(f"samplers={[*samplers]}: need different options of the sampler group")
        if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
            raise ValueError(f"steps={[*steps]}: need different numbers >= 1")
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: need at least 1")
        self.samplers, self.steps, self.n, self.repeats, self.metric = [*samplers], sorted(steps), n, repeats, metric

    def check(self, parts: Parts) -> None:
        if not any(metric.least <= self.n for metric in parts.metrics.values()):
            raise ValueError(f"measures with the evaluation's metrics, and none of them takes n={self.n}; need others")
        for name in self.samplers:
            if name not in options()["sampler"]:
                raise ValueError(f"samplers: {name} is none; need some of {', '.join(options()['sampler'])}")
            for steps in {self.steps[0], self.steps[-1]}:
                config = plain(compose("sample", ["ckpt=none", *overrides(name, steps)]))
                made = copy.copy(parts)
                made.config = {**parts.config, "sampler": config["sampler"], "spacing": config["spacing"]}
                for part in ("sampler", "spacing"):
                    made.__dict__.pop(part, None)
                made.sampler.levels(parts.schedule)

    def look(self, subject: Subject) -> Finding:
        cond = subject.cond(self.n)
        n = len(next(iter(cond.values()))) if cond else self.n
        found: dict[Way, list[Measurement]] = {}
        calls: dict[Way, float] = {}
        ways = {
            (name, steps): subject.sampling(*overrides(name, steps)) for name in self.samplers for steps in self.steps
        }
        tell = subject.progress("samplers, steps and repeats", len(ways) * self.repeats)
        for repeat in range(self.repeats):
            seed = mix(subject.seed, "repeat", repeat) if repeat else None
            for key, parts in ways.items():
                samples, calls[key] = subject.draw(n, parts, cond, seed, f"{key[0]}, {key[1]} steps")
                found.setdefault(key, []).append(self._distance(subject, samples, cond.get("label")))
                tell(1)
        seconds = seconds_per_sample(subject, ways, min(n, BATCH))
        one = found[next(iter(ways))][0]
        band = floor(one.controls)
        means = {key: statistics.fmean(record.value for record in records) for key, records in found.items()}
        sds = [statistics.stdev(r.value for r in records) if len(records) > 1 else None for records in found.values()]
        table: Table = {
            "sampler": [name for name, _ in ways],
            "steps": [steps for _, steps in ways],
            "calls": [calls[key] for key in ways],
            one.name: [means[key] for key in ways],
            f"{one.name}_sd": sds,
            "reached": [None if band is None else means[key] <= band[1] for key in ways],
            "ms_per_sample": [1e3 * seconds[key] for key in ways],
            "ms_per_call": [1e3 * seconds[key] / calls[key] for key in ways],
        }
        protocol = {
            **subject.protocol(n, repeats=self.repeats, **one.protocol),
            "sampler": several(self.samplers, self.steps),
        }
        protocol["spacing"] = "each sampler's own"
        facts = {"distance": one.name, "controls": one.controls, "band": None if band is None else [*band]}
        facts["first"] = {name: first_reached(table, name) for name in self.samplers}
        (name, steps), value = min(means.items(), key=lambda item: item[1])
        details = {"sampler": name, "steps": steps}
        record = Measurement("best_of_steps", value, "lower", one.controls, {**protocol, "distance": one.name}, details)
        return Finding(table, protocol, [record], facts=facts)

    def _distance(self, subject: Subject, samples: torch.Tensor, label: torch.Tensor | None) -> Measurement:
        """The measurement that is asked for; of the first metric that has it."""
        names = []
        for metric in subject.metrics.values():
            if metric.least <= len(samples):
                for record in metric.measure(samples, label, subject.images):
                    if record.better == "lower" and self.metric in (None, record.name):
                        return record
                    names.append(record.name)
        raise UserError(
            f"metric={self.metric}: need a measurement that is better when lower; there are {', '.join(names)}"
        )

    def draw(self, finding: Finding) -> Image.Image:
        table, facts = finding.table, finding.facts
        name = facts["distance"]
        figure, axes = sheet(1, 3, 3.4, 3.4)
        for axis, over, text in zip(axes, ("steps", "calls"), ("steps", "network calls of a sample"), strict=False):
            if facts["band"] is not None:
                axis.axhspan(*facts["band"], color=GREY, alpha=0.35, linewidth=0, label="real data, as many")
            for k, sampler in enumerate(dict.fromkeys(table["sampler"])):
                rows = [i for i, value in enumerate(table["sampler"]) if value == sampler]
                first = facts["first"][sampler]
                reached = (
                    ""
                    if facts["band"] is None
                    else ": not like real data"
                    if first is None
                    else f": like real data from {first} steps"
                )
                self._line(axis, table, rows, over, name, k, f"{sampler}{reached}")
            repeated = any(value is not None for value in table[f"{name}_sd"])
            unit = f"{name}, ± sd over repeats" if repeated else name
            axis.set(xscale="log", xlabel=text, ylabel=unit, title=f"at equal {over}")
            scale(axis, table[name], facts["band"])
            ticks(axis, table[over])
        for k, sampler in enumerate(dict.fromkeys(table["sampler"])):
            rows = [i for i, value in enumerate(table["sampler"]) if value == sampler]
            self._line(axes[2], table, rows, "calls", "ms_per_sample", k, sampler)
        per_call = statistics.median(table["ms_per_call"])
        reach = [min(table["calls"]), max(table["calls"])]
        law = axes[2].plot(reach, [per_call * count for count in reach], color=GREY, label=f"{per_call:.3g} ms a call")
        axes[2].set(
            xscale="log", yscale="log", xlabel="network calls of a sample", ylabel="ms per sample", title="time"
        )
        ticks(axes[2], table["calls"])
        readable(axes[2].yaxis)
        handles, _ = axes[1].get_legend_handles_labels()
        figure.legend(handles=[*handles, *law], loc="outside lower center", ncols=2)
        return render(figure)

    def _line(self, axis: Axes, table: Table, rows: list[int], x: str, y: str, k: int, label: str) -> None:
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}
        sd = [table[f"{y}_sd"][i] or 0 for i in rows] if f"{y}_sd" in table else None
        axis.errorbar(
            [table[x][i] for i in rows], [table[y][i] for i in rows], sd, marker="o", markersize=4, label=label, **style
        )


def overrides(name: str, steps: int) -> tuple[str, str]:
    """Of a sampler with so many steps."""
    return f"sampler={name}", f"sampler.steps={steps}"


def several(samplers: Sequence[str], steps: Sequence[int]) -> dict[str, Any]:
    """Samplers and steps in words, for the protocol."""
    return {"_target_": ", ".join(samplers), "steps": ", ".join(map(str, steps))}


def seconds_per_sample(subject: Subject, ways: dict[Way, Parts], n: int) -> dict[Way, float]:
    """The median wall-clock time of a walk of n, by one sample, without the drawing of noise and without decoding. All
    have turns, so that a machine that gets slower favours none."""
    z = Noise(subject.seed, range(n), subject.data.shape, subject.device)()
    cond = {name: value[:n] for name, value in subject.cond(n).items()}
    tell = subject.progress("timing", (WARMUP + WALKS) * len(ways))
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for turn in range(WARMUP + WALKS):
        for way, parts in ways.items():
            finished(subject.device)
            begun = time.perf_counter()
            for _ in subject.walk(lambda: z, parts, cond):
                pass
            finished(subject.device)
            if turn >= WARMUP:
                seconds[way].append((time.perf_counter() - begun) / n)
            tell(1)
    return {way: statistics.median(found) for way, found in seconds.items()}


def finished(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_reached(table: Table, sampler: str) -> int | None:
    """The fewest steps from which on a sampler stays within what real data show."""
    rows = [(table["steps"][i], table["reached"][i]) for i, name in enumerate(table["sampler"]) if name == sampler]
    found = None
    for steps, reached in sorted(rows, reverse=True):
        if not reached:
            break
        found = steps
    return found


def scale(axis: Axes, values: list[float], band: list[float] | None) -> None:
    """Logarithmic; around zero linear where an unbiased distance may be below it."""
    if min(values) > 0 and (band is None or band[0] > 0):
        axis.set_yscale("log")
    else:
        axis.set_yscale("symlog", linthresh=max(abs(band[1]) if band else 0.0, 1e-4))


def ticks(axis: Axes, values: Sequence[float]) -> None:
    """At powers of two over the values."""
    low, high = min(values), max(values)
    marks = [2**k for k in range(20) if low / 1.4 <= 2**k <= high * 1.4]
    axis.set_xticks(marks, [f"{mark}" for mark in marks])
    axis.minorticks_off()
