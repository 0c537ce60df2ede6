"""Ways to draw t, compared by the variance of the gradient and of the loss that they leave, and by what they cost."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from denoiselab.compose import compose, plain
from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.diagnostics.gradient_noise import split
from denoiselab.diagnostics.objective import Objective, taught
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.rng import generator
from denoiselab.schedule import Schedule
from denoiselab.timesteps import Place, Timesteps

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

RESAMPLES = 1000
PAIRS = 4096
"""Pairs of samples at the same time that the floor is measured with."""
TIMED = 100
"""Draws that are timed; the median counts."""
OTHER = 4.0
"""Standard errors between mean losses beyond which two ways estimate different means."""


class TimestepVariance(Diagnostic):
    """tr Cov of the mean gradient of a batch, and Var of its mean loss, when its times are drawn in different ways, at
    equal batch size, with the importance weights that training would apply, on the same samples and noise.

    A drawing that is uniform in the margin takes away at most the variance between times: at equal times the samples
    differ still, and that floor stands in the figure. Importance weights can go below it. One that learns is taught
    first, by losses of this checkpoint, until it has left its uniform start. A way whose mean loss is not that of the
    first is marked: it has another objective (or is biased), and a smaller variance is no gain then.

    Table: per way the two variances with standard errors, their ratios to the first way's with 95% bootstrap intervals,
    the coefficient of variation of the loss, the mean loss, and milliseconds of a call that draws a batch's times and
    of an update with its losses.

    Args:
        samplers: options of the timesteps group, each with its own options after it, as in "importance floor=0.1".
            The first is what the others are compared with.
        batch_size: B.
        gradients: batches whose gradient is taken, even, >= 8.
        losses: batches whose loss alone is, >= 16.
    """

    copies = True

    def __init__(
        self,
        samplers: Sequence[str] = ("uniform", "stratified", "low_discrepancy", "antithetic", "importance"),
        batch_size: int = 64,
        gradients: int = 48,
        losses: int = 96,
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if not samplers or len({*samplers}) < len(samplers):
            raise ValueError(f"samplers={[*samplers]}: need at least one, each once")
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size}: need at least 2")
        if gradients < 8 or gradients % 2:
            raise ValueError(f"gradients={gradients}: need an even number, at least 8")
        if losses < 16:
            raise ValueError(f"losses={losses}: need at least 16")
        self.samplers, self.batch_size, self.gradients, self.losses = [*samplers], batch_size, gradients, losses

    def check(self, parts: Parts) -> None:
        for option in self.samplers:
            made(option, parts, parts.schedule)

    def look(self, subject: Subject) -> Finding:
        run = subject.run
        ways = {name: made(name, run.parts, run.schedule, subject.config_dir) for name in self.samplers}
        objective = Objective(subject)
        tell = subject.progress("comparing times", len(ways) * (self.gradients + 2) + 1)
        t = torch.rand(PAIRS, generator=generator(subject.seed, "independent t", "pairs"), dtype=torch.float64)
        within = split(torch.stack([objective.values(t, "pairs", k) for k in range(2)]))["within"]
        tell(1)
        squares, means, rows = {}, {}, []
        for name, timesteps in ways.items():
            timesteps.to(subject.device)
            taught(timesteps, objective)
            tell(1)
            halves, first = [], None
            for k in range(self.gradients):
                gradient = objective.gradient(self.weighted(timesteps, objective, "gradient", k))
                if first is None:
                    first = gradient
                else:  # half the squared distance of two independent ones: its mean is the trace
                    halves.append(((gradient - first).square().sum() / 2).item())
                    first = None
                tell(1)
            with torch.no_grad():
                found = [self.weighted(timesteps, objective, "loss", k).item() for k in range(self.losses)]
            tell(1)
            squares[name] = torch.tensor(halves, dtype=torch.float64)
            means[name] = torch.tensor(found, dtype=torch.float64)
            rows.append({"sampler": name, **self.row(squares, means, name, subject.seed)})
            rows[-1] |= timed(timesteps, objective, self.batch_size)
        table = {column: [row[column] for row in rows] for column in rows[0]}
        return Finding(
            table=table,
            protocol=subject.protocol(
                self.gradients * self.batch_size,
                sampled=False,
                batch_size=self.batch_size,
                gradients=self.gradients,
                losses=self.losses,
                device=subject.device.type,
            ),
            records=self.records(rows),
            facts={"floor": within / self.batch_size},
        )

    def weighted(self, timesteps: Timesteps, objective: Objective, what: str, k: int) -> Tensor:
        """The mean weighted loss of batch k, as a training step has it."""
        t, w = timesteps(self.batch_size, objective.schedule, Place(objective.seed, k * self.batch_size))
        losses = objective.losses(t, "timesteps", what, k)
        return (w.to(losses) * losses).mean()

    def row(self, squares: dict[str, Tensor], means: dict[str, Tensor], name: str, seed: int) -> dict:
        """What is said of one way, and its ratios to the first."""
        first = self.samplers[0]
        away = {key: (value - value.mean()).square() * len(value) / (len(value) - 1) for key, value in means.items()}
        found: dict[str, float | bool] = {}
        for what, values in (("gradient", squares), ("loss", away)):
            value, reference = values[name], values[first]
            found[f"{what}_variance"] = value.mean().item()
            found[f"{what}_variance_se"] = value.std().item() / math.sqrt(len(value))
            found[f"{what}_ratio"] = (value.mean() / reference.mean()).item()
            index = torch.randint(len(value), (RESAMPLES, len(value)), generator=generator(seed, "bootstrap", what))
            ratios = value[index].mean(1) / reference[index].mean(1)
            ends = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            found[f"{what}_ratio_low"], found[f"{what}_ratio_high"] = ends
        mean, other = means[name], means[first]
        apart = (mean.mean() - other.mean()).abs() / math.hypot(
            *(part.std().item() / math.sqrt(len(part)) for part in (mean, other))
        )
        found["loss_cv"] = (away[name].mean().sqrt() / mean.mean()).item()
        found["mean_loss"], found["mean_loss_se"] = mean.mean().item(), mean.std().item() / math.sqrt(len(mean))
        found["other_objective"] = name != first and bool(apart > OTHER)
        return found

    def records(self, rows: list[dict]) -> list[Measurement]:
        protocol = {"batch_size": self.batch_size, "compared_with": self.samplers[0]}
        found = []
        for row in rows[1:]:
            key = row["sampler"].partition(" ")[0]
            details = {name: value for name, value in row.items() if name != "sampler"}
            found.append(
                Measurement(
                    f"gradient_variance_{key}",
                    row["gradient_ratio"],
                    "lower",
                    {self.samplers[0]: 1.0},
                    {**protocol, "sampler": row["sampler"]},
                    details,
                )
            )
        return found

    def draw(self, finding: Finding) -> Image.Image:
        table = finding.table
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        names = [row["sampler"] + (" *" if row["other_objective"] else "") for row in rows]
        figure, axes = sheet(1, 3, 4.0, 1.2 + 0.45 * len(rows), sharey=True)
        at = range(len(rows))
        for axis, what, unit in zip(
            axes, ("gradient", "loss"), ("tr Cov of the gradient", "Var of the loss"), strict=False
        ):
            values = [row[f"{what}_ratio"] for row in rows]
            error = [
                [row[f"{what}_ratio"] - row[f"{what}_ratio_low"] for row in rows],
                [row[f"{what}_ratio_high"] - row[f"{what}_ratio"] for row in rows],
            ]
            axis.barh(at, values, color=COLOURS[0], alpha=0.75)
            label = "95% interval" if what == "loss" else None
            axis.errorbar(values, at, xerr=error, fmt="none", ecolor="black", capsize=3, label=label)
            axis.axvline(1, color=GREY, linewidth=1)
            axis.set(xlabel=f"{unit}, over that of {names[0]}", title=f"variance of a batch's {what}")
        floor = finding.facts["floor"] / rows[0]["loss_variance"]
        axes[1].axvline(floor, color=GREY, linestyle="--", label="at equal times: no uniform t goes below")
        axes[2].barh(at, [row["draw_ms"] for row in rows], color=COLOURS[0], label="draw")
        left = [row["draw_ms"] for row in rows]
        axes[2].barh(at, [row["update_ms"] for row in rows], left=left, color=COLOURS[1], label="learn")
        axes[2].set(xlabel="ms per training step", title="what it costs")
        axes[0].set_yticks(at, names)
        axes[0].invert_yaxis()
        shown = [axis.get_legend_handles_labels() for axis in axes[1:]]
        handles, labels = ([*a, *b] for a, b in zip(*shown, strict=True))
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        size = finding.protocol["batch_size"]
        other = "; *: another mean loss, so another objective" if any(table["other_objective"]) else ""
        figure.suptitle(f"Drawing t, at batches of {size} of the same samples and noise{other}")
        return render(figure)


def made(option: str, parts: Parts, schedule: Schedule, config_dir: Path | None = None) -> Timesteps:
    """The way of drawing times that an option, with its own options after it, names.

    Args:
        option: such as "importance floor=0.1".
        parts: of the run.
        schedule: that it was trained along.
        config_dir: the user's own folder of options.

    Raises:
        UserError: no such option, or it cannot draw on this schedule.
    """
    from denoiselab import checks
    from denoiselab.experiment import Parts

    name, *own = option.split()
    overrides = [f"timesteps={name}", *(f"timesteps.{line}" for line in own)]
    node = plain(compose("train", overrides, config_dir))["timesteps"]
    mine = Parts({**parts.config, "timesteps": node}, interface=parts.interface)
    mine.schedule = schedule
    checks.check_timesteps(mine)
    return mine.timesteps


def timed(timesteps: Timesteps, objective: Objective, n: int) -> dict[str, float]:
    """Milliseconds of drawing times, and of learning from their losses; medians."""
    draws, updates, learner = [], [], copy.deepcopy(timesteps)
    for k in range(TIMED):
        began = time.perf_counter()
        t, _ = timesteps(n, objective.schedule, Place(objective.seed, k * n))
        t.sum().item()  # a GPU is done then
        drawn = time.perf_counter()
        if learner.learns:
            learner.update(t, torch.ones_like(t))
            t.sum().item()
        draws.append(drawn - began)
        updates.append(time.perf_counter() - drawn)
    middle = [1000 * sorted(values)[TIMED // 2] for values in (draws, updates)]
    return {"draw_ms": middle[0], "update_ms": middle[1] if timesteps.learns else 0.0}
