"""Which noise levels decide what: the output's change when a walk is disturbed at one of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from denoiselab.data.points import Known
from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.classes import CLASSES, asked, check_classes, recogniser
from denoiselab.diagnostics.deterministic import AT_ONCE, Denoise, Deterministic
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.diagnostics.optimal import Optimum
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.frechet import FrechetDistance
from denoiselab.rng import Noise
from denoiselab.sampler import Rung
from denoiselab.sampler.ddim import ddim

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

KINDS = {"perturb": "x_t perturbed", "skip": "level skipped"}


class TimestepInfluence(Diagnostic):
    """Samples are walked to from noise by DDIM, and once more with one disturbance at the level t: ``perturb`` adds
    strength sqrt(alpha_t^2 m + sigma_t^2) z to x_t, m being the mean square of x_0; ``skip`` leaves the level out.

    How much the sample changes is asked twice, for the answers differ: the mean squared change of its values, and
    whether it becomes another mode or class, with the change of features where there are any. What a sample is is
    settled at noisy levels, and later ones refine it (Choi et al. 2022, arXiv:2204.00227, section 3; Raya and
    Ambrogioni 2023, arXiv:2305.19693, who find it decided at one critical time).

    Closed form: for white data of the mean square m the walk multiplies x_t by a known number, so its change is known;
    for a perturbation it is nearly the same at every level. What the model has beyond that curve is due to the data.
    Where their density is known, the exact denoiser is disturbed too.

    Table: per kind and level the mean squared change per value with its standard error and that of white data, the
    share of samples whose mode or class changes, and the mean squared change of features, those of the first
    Frechet distance among the metrics, over that between two samples.

    Args:
        levels: how many of the walk's N noisy levels are disturbed, evenly; from 2 to steps.
        steps: N.
        n: samples, >= 2.
        strength: of the perturbation, relative to x_t, > 0.
        classes: none asks the model without classes, so that a sample can become another; own asks for every class in
            turn.
    """

    def __init__(
        self,
        levels: int = 8,
        steps: int = 20,
        n: int = 128,
        strength: float = 0.1,
        classes: str = "none",
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        if not 2 <= levels <= steps:
            raise ValueError(f"levels={levels}: need from 2 to steps = {steps}")
        if not 0 < strength < math.inf:
            raise ValueError(f"strength={strength}: need a number > 0, such as 0.1")
        if classes not in CLASSES:
            raise ValueError(f"classes={classes}: need one of {', '.join(CLASSES)}")
        self.levels, self.steps, self.n, self.strength, self.classes = levels, steps, n, strength, classes

    def check(self, parts: Parts) -> None:
        check_classes(parts, self.classes)

    @torch.no_grad()
    def look(self, subject: Subject) -> Finding:
        path = Deterministic(subject, self.steps)
        m = subject.real(max(self.n, 1000))["x_0"].double().square().mean().item()
        at = sorted({round(k * (self.steps - 1) / (self.levels - 1)) for k in range(self.levels)})
        exact = Optimum(subject.data) if isinstance(subject.data, Known) else None
        denoisers = {"model": subject.parts.guidance(subject.denoiser)} | ({"exact": exact} if exact else {})
        cond, shape = subject.cond(self.n), subject.data.shape
        n = len(next(iter(cond.values()))) if cond else self.n
        tell = subject.progress("disturbing", len(denoisers) * n)
        rows = []
        for walk, denoiser in denoisers.items():
            parts: list[dict[tuple[str, int], Tensor]] = []
            for index in torch.arange(n).split(AT_ONCE):
                noise = Noise(subject.seed, index.tolist(), shape, subject.device, torch.float64)
                told = asked({key: value[index] for key, value in cond.items()}, self.classes, subject)

                def denoise(x: Tensor, rung: Rung, /, *, denoiser=denoiser, told=told) -> Tensor:
                    return denoiser(x, *rung.like(x), **told)

                x_T, z = path.levels[0].sigma * noise(), self.strength * noise()
                parts.append(disturbed(path, denoise, x_T, z, at, m))
                tell(len(index))
            found = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
            plain = found.pop(("nothing", -1))
            same = compared(subject, plain)
            for (kind, k), changed in found.items():
                mse = (changed - plain).square().flatten(1).mean(1)
                white = self.strength**2 * size(path.levels[k], m) ** 2 * gain(path, m, k, k) ** 2
                if kind == "skip":
                    white = (path.levels[0].sigma * (gain(path, m, 0, k) - gain(path, m, 0, -1))) ** 2
                row = {"walk": walk, "kind": kind, "t": path.t[k], "sigma_over_alpha": path.levels[k].ratio}
                row |= {"mse": mse.mean().item(), "mse_se": mse.std().item() / math.sqrt(n), "white": white}
                rows.append(row | same(changed))
        known = recogniser(subject)
        table = {column: [row[column] for row in rows] for column in rows[0]}
        return Finding(
            table=table,
            protocol=subject.protocol(n, **path.protocol(), strength=self.strength, classes=self.classes),
            records=self.records(rows),
            facts={"recognised": None if known is None else known.what},
        )

    def records(self, rows: list[dict]) -> list[Measurement]:
        """The mean t of each kind of change, weighted by it."""
        found = []
        for name, column in (("pixel", "mse"), ("class", "class_changed"), ("feature", "feature_change")):
            centres = {}
            for walk in ("model", "exact"):
                chosen = [row for row in rows if row["walk"] == walk and row["kind"] == "perturb"]
                total = sum(row[column] or 0 for row in chosen)
                if total:
                    centres[walk] = sum(row["t"] * row[column] for row in chosen) / total
            if "model" in centres:
                value, protocol = centres.pop("model"), {"disturbance": "perturb", "strength": self.strength}
                found.append(Measurement(f"influence_{name}_t", value, "none", centres, protocol))
        return found

    def draw(self, finding: Finding) -> Image.Image:
        table, what = finding.table, finding.facts["recognised"]
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        columns = [("mse", "mean squared change, per value", "values")]
        if what is not None:
            columns.append(("class_changed", f"share that changes its {what}", what))
        if rows[0]["feature_change"] is not None:
            columns.append(("feature_change", "share of that between two samples", "features"))
        figure, axes = sheet(1, len(columns), 4.2, 3.3)
        for axis, (column, label, title) in zip(axes, columns, strict=True):
            for i, (kind, words) in enumerate(KINDS.items()):
                for walk, colour in (("exact", GREY), ("model", COLOURS[i])):
                    chosen = [row for row in rows if row["kind"] == kind and row["walk"] == walk]
                    name = words if walk == "model" else f"{words}, exact denoiser"
                    t, values = [row["t"] for row in chosen], [row[column] for row in chosen]
                    if chosen:
                        axis.plot(t, values, "os"[i] + "-" + "-" * i, color=colour, markersize=4, label=name)
                if column == "mse":
                    white = [(row["t"], row["white"]) for row in rows if row["kind"] == kind and row["walk"] == "model"]
                    axis.plot(
                        *zip(*white, strict=True), ":", color="black", lw=1 + i, label=f"{words}, white data: exact"
                    )
            axis.set(xlabel="t of the disturbance (0 data, 1 noise)", ylabel=label, title=f"change of {title}")
        axes[0].set_yscale("log")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.suptitle("What a disturbance at one level of the walk changes")
        return render(figure)


def disturbed(
    path: Deterministic, denoise: Denoise, x_T: Tensor, z: Tensor, at: list[int], m: float
) -> dict[tuple[str, int], Tensor]:
    """The samples of the walk from x_T, and of those that are disturbed at these levels, by kind and level. The first
    level cannot be skipped."""
    states = [x_T]
    for k in range(len(path.levels) - 1):
        states.append(path.on(denoise, states[-1], k, k + 1))
    found = {("nothing", -1): states[-1]}
    for k in at:
        rung = path.levels[k]
        found["perturb", k] = path.on(denoise, states[k] + size(rung, m) * z, k, len(path.levels) - 1)
    for k in at:
        if k > 0:
            before, after, x = path.levels[k - 1], path.levels[k + 1], states[k - 1]
            jumped = ddim(x, denoise(x, before), before, after)
            found["skip", k] = path.on(denoise, jumped, k + 1, len(path.levels) - 1)
    return found


def size(rung: Rung, m: float) -> float:
    """The root mean square of x_t, x_0 having the mean square m."""
    return math.hypot(rung.alpha * math.sqrt(m), rung.sigma)


def gain(path: Deterministic, m: float, first: int, skipped: int) -> float:
    """What DDIM's walk from level ``first`` to the end multiplies x_t by for white data of mean square m, level
    ``skipped`` left out: x_0_hat = alpha_t m/(alpha_t^2 m + sigma_t^2) x_t makes every step a product."""
    levels = [rung for k, rung in enumerate(path.levels[first:], first) if k != skipped or k == first]
    found = 1.0
    for t, s in itertools.pairwise(levels):
        x_0_hat = t.alpha * m / size(t, m) ** 2
        found *= s.sigma / t.sigma + (s.alpha - s.sigma / t.sigma * t.alpha) * x_0_hat
    return found


def compared(subject: Subject, plain: Tensor) -> Callable[[Tensor], dict[str, float | None]]:
    """What is said of changed samples beside those of the undisturbed walk."""
    known, reference = recogniser(subject), subject.decode(plain)
    metrics = subject.metrics.values() if len(subject.images.shape) == 3 else ()
    distances = [metric for metric in metrics if isinstance(metric, FrechetDistance)]
    features = distances[0].features if distances else None
    before = None if known is None else known.of(reference)
    middle = None if features is None else features(reference)

    def compare(changed: Tensor) -> dict[str, float | None]:
        decoded = subject.decode(changed)
        found: dict[str, float | None] = {"class_changed": None, "feature_change": None}
        if known is not None:
            found["class_changed"] = (known.of(decoded) != before).double().mean().item()
        if features is not None and middle is not None:
            between = 2 * middle.var(0).sum()  # the mean squared distance of two samples
            found["feature_change"] = ((features(decoded) - middle).square().sum(1).mean() / between).item()
        return found

    return compare
