"""The loss as a function of t, beside the least that it can be."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from denoiselab.data.base import Batch
from denoiselab.data.points import Known
from denoiselab.diagnostics import detectors
from denoiselab.diagnostics.base import Diagnostic, Finding, Table
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, render, sheet
from denoiselab.diagnostics.optimal import Family, Filter, Memorised, Optimum, Spectrum, binary, in_panels, white
from denoiselab.diagnostics.subject import Subject
from denoiselab.guidance import DenoiserLike
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.loss_by_t import errors_by_t
from denoiselab.sampler.base import on_cpu
from denoiselab.target import X0, Eps, Target, V

PANELS = ("eps", "x_0", "v")
CURVES = {"held_out": "held out", "train": "training samples", "raw": "held out, raw weights"}
FAMILIES = {
    "filter": "best linear filter of the data",
    "white": "white Gaussian",
    "natural": "Gaussian, power 1/k²",
    "binary": "binary pixels",
}
OPTIMA = {"exact": "optimum of the data", "memorising": "memorising optimum, training samples"}
UNITS: dict[str, Target] = {"eps": Eps(), "x_0": X0(), "v": V()}
BETTER = {"loss_by_t_early": "lower", "loss_by_t_spike": "lower", "loss_by_t_flat": "higher"}

FINE, LINE = 100, 201
"""Least number of parts of [0, 1] of the line through the bars, and points of a family's curve."""


class LossByT(Diagnostic):
    """E[mean (eps_hat - eps)^2 | t in bucket k] for the buckets floor(K t), and the same in units of x_0 and v: the
    mean squared error of a sample's values times SNR, 1 and SNR + 1.

    Bars are held-out samples, each at ``repeats`` times that are spread over [0, 1] and with noise addressed by its id
    (``errors_by_t``), so looks at different steps and runs differ by the network alone; whiskers are two standard
    errors. Lines are the same in finer parts of t, training samples, and the raw weights. Behind them is what the
    least loss is (``optimal``): of white Gaussian data, of images with a power spectrum 1/k^2 and of binary pixels, all
    with the variance of the data; the best linear filter of the data themselves, which bounds their optimum from
    above; the optimum itself where their density is known; and, on training samples, that of a network that memorised
    them. What a network is told, the optimum of the data, the memorising one and the filter are told too; where it
    enlarges an image, those are left out that would have to see it.

    Alarms: a first bucket above 3 times the filter, a bucket that stands out by 5 robust standard errors, and a curve
    that is flat within 1.5 where it should not be (``detectors``).

    Args:
        buckets: K >= 1.
        n: held-out samples, and training samples.
        repeats: times per sample; with as many as buckets each sample is in each bucket once.
        log_y: whether the axes are logarithmic.
        memorising: training sets of at most so many samples have the memorising optimum drawn.
    """

    def __init__(
        self,
        buckets: int = 10,
        n: int = 1000,
        repeats: int = 10,
        log_y: bool = True,
        memorising: int = 5000,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        for name, value in {"buckets": buckets, "repeats": repeats}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: need at least 1")
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        if memorising < 0:
            raise ValueError(f"memorising={memorising}: need a number >= 0")
        self.buckets, self.n, self.repeats, self.log_y, self.memorising = buckets, n, repeats, log_y, memorising

    def look(self, subject: Subject) -> Finding:
        real = {"held_out": subject.real(self.n), "train": subject.real(self.n, train=True)}
        asked: dict[str, tuple[DenoiserLike, Batch]] = {name: (subject.denoiser, batch) for name, batch in real.items()}
        if subject.run.weights == "ema" and subject.raw is not None:
            asked["raw"] = (subject.raw, real["held_out"])
        asked |= self.optima(subject, real)
        tell = subject.progress("the loss by t", sum(len(batch["id"]) for _, batch in asked.values()))
        found = {
            name: errors_by_t(
                denoiser,
                subject.schedule,
                batch,
                repeats=self.repeats,
                seed=subject.seed,
                device=subject.device,
                tell=tell,
            )
            for name, (denoiser, batch) in asked.items()
        }
        families = self.families(subject, real["held_out"]["x_0"])
        t, _ = found["held_out"]
        for name, family in families.items():
            found[name] = (t, family(*self.levels(subject, t)))
        grid = torch.linspace(0, 1, LINE, dtype=torch.float64).clamp_min(subject.schedule.earliest)
        lines: dict[str, Any] = {"t": grid.tolist()}
        for name, family in families.items():
            panels = in_panels(family(*self.levels(subject, grid)), on_cpu(subject.schedule), grid)
            lines |= {f"{name}_{panel}": panels[panel].tolist() for panel in PANELS}
        alarms, seen = self.detect(subject, found, real["held_out"]["x_0"])
        return Finding(
            table=self.table(subject, found),
            protocol=subject.protocol(
                len(real["held_out"]["id"]), sampled=False, buckets=self.buckets, repeats=self.repeats
            ),
            records=[*self.records(subject, found), *seen],
            alarms=alarms,
            facts={"lines": lines, "fine": self.fine(subject, *found["held_out"]), "log_y": self.log_y},
        )

    def optima(self, subject: Subject, real: dict[str, Batch]) -> dict[str, tuple[DenoiserLike, Batch]]:
        """Denoisers that are the best there are, and the samples on which they are."""
        if subject.run.made_of:
            return {}
        found: dict[str, tuple[DenoiserLike, Batch]] = {}
        if isinstance(subject.data, Known):
            found["exact"] = (Optimum(subject.data), real["held_out"])
        if len(subject.data.train) <= self.memorising:
            every = subject.real(self.memorising, train=True)
            told = Memorised(every["x_0"], every["cond"].get("label")).to(subject.device)
            found["memorising"] = (told, real["train"])
        return found

    def families(self, subject: Subject, x_0: Tensor) -> dict[str, Family]:
        """Closed forms with the variance of the data."""
        variance = x_0.double().var(0).mean().item()
        train = subject.real(max(self.n, 4000), train=True)
        label = train["cond"].get("label")
        few = label is not None and len(label) < 10 * len(label.unique())
        linear = Filter(train["x_0"]) if few else Filter(train["x_0"], label, subject.run.parts.num_classes)
        found: dict[str, Family] = {"filter": Spectrum(linear.power)}
        found["white"] = lambda alpha, sigma: white(alpha, sigma, variance)
        if x_0.ndim == 4 and subject.images is subject.data:
            found["natural"] = Spectrum.natural(x_0.shape[1:], variance)
            found["binary"] = lambda alpha, sigma: binary(alpha, sigma, variance)
        return found

    @staticmethod
    def levels(subject: Subject, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = subject.schedule(t.to(subject.device, torch.float64))
        return alpha_t.cpu(), sigma_t.cpu()

    def detect(
        self, subject: Subject, found: dict[str, tuple[Tensor, Tensor]], x_0: Tensor
    ) -> tuple[list[str], list[Measurement]]:
        """What looks wrong in the held-out curve, and the detectors' numbers."""
        t, mse = found["held_out"]
        alpha_t, sigma_t = self.levels(subject, t)
        mean_square = x_0.double().square().mean()

        def unit(target: Target) -> tuple[Tensor, Tensor]:
            """What a squared error of x_0 is worth in units of a target, and the mean square of the target."""
            a_t, b_t = target.coefficients(alpha_t, sigma_t)
            return target.precision(alpha_t, sigma_t), a_t**2 * mean_square + b_t**2

        own = subject.denoiser.target if type(subject.denoiser).has_target else V()
        worth, power = unit(own)
        filtered = found["filter"][1]
        best = found["exact"][1] if "exact" in found else filtered
        powers = {name: unit(target) for name, target in UNITS.items()}
        losses, controls = ({name: w * e / p for name, (w, p) in powers.items()} for e in (mse, best))
        seen = {
            "early": detectors.high_early(t, worth * mse, worth * filtered, power, self.buckets),
            "spike": detectors.spike(t, mse, filtered, self.buckets),
            "flat": detectors.flat(t, losses, controls, self.buckets),
        }
        measured = {f"loss_by_t_{name}": value for name, value in seen.items() if value is not None}
        records = [
            Measurement(name, value.value, BETTER[name], {"alarm": value.limit}, details=value.details)
            for name, value in measured.items()
        ]
        return [value.alarm for value in measured.values() if value.alarm], records

    def records(self, subject: Subject, found: dict[str, tuple[Tensor, Tensor]]) -> list[Measurement]:
        """The mean over uniform t, in each unit, with those of the families and of what else was measured."""
        means = {name: in_panels(mse, on_cpu(subject.schedule), t) for name, (t, mse) in found.items()}
        protocol = {"n": found["held_out"][0].shape[0], "repeats": self.repeats, "t": "uniform"}
        return [
            Measurement(
                f"loss_by_t_{panel}",
                means["held_out"][panel].mean().item(),
                "lower",
                {name: value[panel].mean().item() for name, value in means.items() if name != "held_out"},
                protocol,
            )
            for panel in PANELS
        ]

    def table(self, subject: Subject, found: dict[str, tuple[Tensor, Tensor]]) -> Table:
        """A row per bucket; None where it is empty."""
        edges = [k / self.buckets for k in range(self.buckets + 1)]
        table: Table = {"t_from": edges[:-1], "t_to": edges[1:]}
        for name, (t, mse) in found.items():
            for panel, values in in_panels(mse, on_cpu(subject.schedule), t).items():
                count, mean, error = per_bucket(t, values, self.buckets)
                if name not in FAMILIES:
                    table |= {f"{name}_count": count, f"{name}_{panel}": mean, f"{name}_{panel}_se": error}
                else:
                    table[f"{name}_{panel}"] = mean
        return table

    def draw(self, finding: Finding) -> Image.Image:
        figure, axes = sheet(3, 1, 8.6, 3.3)
        for axis, panel in zip(axes, PANELS, strict=True):
            self.draw_panel(axis, finding, panel)
        axes[0].set_title("loss by noise level")
        axes[-1].set_xlabel("t (0 data, 1 noise), in buckets" if self.few(finding) else "t (0 data, 1 noise)")
        handles, names = axes[0].get_legend_handles_labels()  # bars come last there
        figure.legend([handles[-1], *handles[:-1]], [names[-1], *names[:-1]], loc="outside lower center", ncol=3)
        return render(figure)

    @staticmethod
    def few(finding: Finding) -> bool:
        """Whether buckets are few enough for their ranges to be written under them."""
        return len(finding.table["t_from"]) <= 10

    def draw_panel(self, axis: Axes, finding: Finding, panel: str) -> None:
        table, facts = finding.table, finding.facts
        low, high = table["t_from"], table["t_to"]
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        weights = "EMA" if finding.protocol["weights"] == "ema" else finding.protocol["weights"]
        label = f"held out, {weights} weights, ± 2 standard errors"
        mean = [float("nan") if value is None else value for value in table[f"held_out_{panel}"]]
        error = [float("nan") if value is None else 2 * value for value in table[f"held_out_{panel}_se"]]
        width = high[0] - low[0]
        axis.bar(middle, mean, 0.9 * width, color="#bcd9ea", label=label, zorder=1)
        axis.errorbar(middle, mean, error, fmt="none", ecolor=COLOURS[0], capsize=4 if self.few(finding) else 0)
        fine = facts["fine"]
        finer = f"held out, {weights} weights, finer in t"
        axis.plot(fine["t"], nan(fine[panel]), color=COLOURS[0], linewidth=1, label=finer)
        for index, (name, words) in enumerate(CURVES.items()):
            if f"{name}_{panel}" in table and index:
                style: dict[str, Any] = {"color": COLOURS[(0, 3, 2)[index]], "linestyle": DASHES[index]}
                style |= {"marker": "os^"[index] if self.few(finding) else ""}
                axis.plot(middle, nan(table[f"{name}_{panel}"]), markersize=3.5, label=words, **style)
        for index, (name, words) in enumerate(OPTIMA.items()):
            if f"{name}_{panel}" in table:
                style: dict[str, Any] = {
                    "color": (COLOURS[6], COLOURS[4])[index],
                    "marker": "x+"[index] if self.few(finding) else "",
                }
                axis.plot(middle, nan(table[f"{name}_{panel}"]), markersize=5, linestyle=":", label=words, **style)
        for index, (name, words) in enumerate(FAMILIES.items()):
            if f"{name}_{panel}" in facts["lines"]:
                style: dict[str, Any] = {"linestyle": ["-", "--", ":", "-."][index]}
                style |= {"linewidth": 1.6 if index == 0 else 1.1}
                axis.plot(facts["lines"]["t"], facts["lines"][f"{name}_{panel}"], color=GREY, label=words, **style)
        axis.set(xlim=(0, 1), ylabel=f"squared error in units of {panel}")
        if facts["log_y"]:
            shown = [value for value in (*mean, *nan(table[f"filter_{panel}"])) if value > 0]
            axis.set_yscale("log")
            axis.set_ylim(0.3 * min(shown), 3 * max(shown))
        if self.few(finding):
            axis.set_xticks(middle, [f"{a:.2g} to {b:.2g}" for a, b in zip(low, high, strict=True)])
            axis.grid(False, axis="x")

    def fine(self, subject: Subject, t: Tensor, mse: Tensor) -> dict[str, list]:
        """The curve in as many parts of [0, 1] as the samples allow, up to ``FINE``; by the middle of each."""
        parts = max(1, min(FINE, t.numel() // 20))
        panels = in_panels(mse, on_cpu(subject.schedule), t)
        curve = {panel: per_bucket(t, values, parts)[1] for panel, values in panels.items()}
        return {"t": [(k + 0.5) / parts for k in range(parts)], **curve}


def per_bucket(t: Tensor, values: Tensor, buckets: int) -> tuple[list[int], list, list]:
    """Count, mean and its standard error of values (n, repeats) per bucket of t; None where there are too few.

    Samples are what is independent, not the times of one: the error is that of a ratio of sums over samples.
    """
    place = (t * buckets).long().clamp(0, buckets - 1)
    empty = torch.zeros(len(t), buckets, dtype=torch.float64)
    values = values.double()
    sums, counts = (empty.scatter_add(1, place, summed) for summed in (values, torch.ones_like(values)))
    total = counts.sum(0)
    mean = sums.sum(0) / total
    in_it = (counts > 0).sum(0)
    error = ((sums - mean * counts).square().sum(0) * in_it / (in_it - 1)).sqrt() / total
    means, errors = (
        [float(x) if n > least else None for x, n in zip(column.tolist(), in_it.tolist(), strict=True)]
        for column, least in ((mean, 0), (error, 1))
    )
    return [int(n) for n in total.tolist()], means, errors


def nan(values: list[Any]) -> list[float]:
    """For the plot: nothing where there is none."""
    return [float("nan") if value is None else value for value in values]
