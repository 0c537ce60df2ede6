"""Which of several runs estimates x_0 best, at each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from denoiselab.data.base import Batch
from denoiselab.diagnostics.base import Diagnostic, Finding, Table
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, render, sheet
from denoiselab.diagnostics.loss_by_t import nan, per_bucket
from denoiselab.diagnostics.optimal import control
from denoiselab.diagnostics.subject import Subject
from denoiselab.errors import UserError
from denoiselab.guidance import DenoiserLike
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.loss_by_t import errors_by_t

if TYPE_CHECKING:
    from denoiselab.run import Run

CONFIDENCE = 0.95
UNDETERMINED = "undetermined"


class BestTarget(Diagnostic):
    """E|x_0_hat - x_0|^2 at each t, of this run and of others that were trained on the same data: which target, or
    whatever else they differ in, estimates x_0 best there.

    All are asked about the same x_t, made along this run's schedule of the same held-out samples with the same noise,
    and are told its level, so what differs is the networks. Differences are taken sample by sample, which leaves out
    what all find hard, with 95% intervals (normal, over samples; Bonferroni's over the other runs). A run is the best
    of a bucket where its difference to each other one is beyond the interval; otherwise it is undetermined. Behind
    them is the optimum of the data where their density is known, else the best linear filter.

    Args:
        others: run directories or checkpoints.
        buckets: of t, >= 1.
        n: held-out samples.
        repeats: times per sample.
    """

    def __init__(
        self,
        others: Sequence[str] = (),
        buckets: int = 10,
        n: int = 1000,
        repeats: int = 10,
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        for name, value in {"buckets": buckets, "repeats": repeats}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: need at least 1")
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        if len(others) >= len(COLOURS):
            raise ValueError(f"others: {len(others)} runs; need at most {len(COLOURS) - 1}")
        self.others, self.buckets, self.n, self.repeats = list(others), buckets, n, repeats

    def look(self, subject: Subject) -> Finding:
        from denoiselab.run import load

        batch = subject.real(self.n)
        runs = [subject.run]
        for ckpt in self.others:
            other = load(ckpt, subject.run.weights).to(subject.device)
            self.check_same(subject, batch, other, ckpt)
            runs.append(other)
        names = named(runs)
        asked: dict[str, DenoiserLike] = dict(zip(names, (run.denoiser for run in runs), strict=True))
        asked["control"] = control(subject)
        tell = subject.progress("the runs by t", len(batch["id"]) * len(asked))
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
            for name, denoiser in asked.items()
        }
        t = found["control"][0]
        table = self.table(t, {name: mse for name, (_, mse) in found.items()}, names)
        wins = {name: float(table["best"].count(name)) for name in [*names, UNDETERMINED]}
        mean = {name: mse.mean().item() for name, (_, mse) in found.items()}
        return Finding(
            table=table,
            protocol=subject.protocol(
                len(batch["id"]),
                sampled=False,
                buckets=self.buckets,
                repeats=self.repeats,
                others=[f"{run.folder.name}, step {run.step}" for run in runs[1:]],
            ),
            records=[
                Measurement(
                    "x_0_error",
                    mean[names[0]],
                    "lower",
                    {name: value for name, value in mean.items() if name != names[0]},
                    {"t": "uniform", "n": len(batch["id"])},
                    {f"buckets won by {name}": count for name, count in wins.items()},
                )
            ],
            facts={"names": names, "control": type(asked["control"]).__name__},
        )

    def check_same(self, subject: Subject, batch: Batch, other: Run, ckpt: str) -> None:
        """The other run's data and what it is told are this one's.

        Raises:
            UserError: they are not.
        """
        own = subject.run
        if not other.denoiser.generates:
            raise UserError(f"others={ckpt}: trained an autoencoder; need a run that is sampled")
        theirs = other.held_out(self.n)
        same = theirs["x_0"].shape == batch["x_0"].shape and torch.equal(theirs["id"], batch["id"])
        if not same or not torch.equal(theirs["x_0"], batch["x_0"]):
            raise UserError(
                f"others={ckpt}: its held-out samples are not those of {own.folder.name}; need runs on the same data"
            )
        if theirs["cond"].keys() != batch["cond"].keys():
            told = " and ".join(theirs["cond"]) or "nothing"
            raise UserError(f"others={ckpt}: is told {told}, and {own.folder.name} is not; need the same condition")

    def table(self, t: Tensor, errors: dict[str, Tensor], names: list[str]) -> Table:
        """A row per bucket: each run's error, its difference to the first with an interval, and the best."""
        edges = [k / self.buckets for k in range(self.buckets + 1)]
        table: Table = {"t_from": edges[:-1], "t_to": edges[1:]}
        for name, values in errors.items():
            count, mean, error = per_bucket(t, values, self.buckets)
            table |= {"count": count, name: mean, f"{name}_se": error}
        z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2 + (1 - CONFIDENCE) / 2 * (1 - 1 / max(1, len(names) - 1)))
        for name in names[1:]:
            _, mean, error = per_bucket(t, errors[name] - errors[names[0]], self.buckets)
            table[f"{name} - {names[0]}"] = mean
            table[f"{name} - {names[0]}_95"] = [None if e is None else z * e for e in error]
        table["best"] = [self.best(t, errors, names, k, z) for k in range(self.buckets)]
        return table

    def best(self, t: Tensor, errors: dict[str, Tensor], names: list[str], bucket: int, z: float) -> str:
        """The run that is better than each other one in a bucket."""
        for name in names:
            differences = [
                [column[bucket] for column in per_bucket(t, errors[other] - errors[name], self.buckets)[1:]]
                for other in names
                if other != name
            ]
            if differences and all(
                mean is not None and error is not None and mean > z * error for mean, error in differences
            ):
                return name
        return UNDETERMINED

    def draw(self, finding: Finding) -> Image.Image:
        table, names = finding.table, finding.facts["names"]
        middle = [(a + b) / 2 for a, b in zip(table["t_from"], table["t_to"], strict=True)]
        figure, axes = sheet(1, 2 if len(names) > 1 else 1, 5.0, 3.8)
        best = {"Optimum": "optimum of the data", "Filter": "best linear filter"}[finding.facts["control"]]
        axes[0].plot(middle, nan(table["control"]), color=GREY, linewidth=2.5, alpha=0.7, label=best)
        for index, name in enumerate(names):
            style: dict[str, Any] = {"color": COLOURS[index], "linestyle": DASHES[index % 4]}
            style |= {"marker": "os^vDPX*"[index]}
            error = [2 * value for value in nan(table[f"{name}_se"])]
            axes[0].errorbar(middle, nan(table[name]), error, markersize=4, capsize=2, label=name, **style)
        axes[0].set(xlabel="t (0 data, 1 noise)", ylabel="mean squared error of x_0", title="± 2 standard errors")
        axes[0].set_yscale("log")
        axes[0].legend()
        if len(names) > 1:
            axes[1].axhline(0, color=COLOURS[0], label=names[0])
            whole = nan(table[names[0]])
            for index, name in enumerate(names[1:], 1):
                gap, wide = nan(table[f"{name} - {names[0]}"]), nan(table[f"{name} - {names[0]}_95"])
                style: dict[str, Any] = {"color": COLOURS[index], "linestyle": DASHES[index % 4]}
                style |= {"marker": "os^vDPX*"[index]}
                share = [100 * g / w for g, w in zip(gap, whole, strict=True)]
                error = [100 * e / w for e, w in zip(wide, whole, strict=True)]
                shift = 0.012 * (index - len(names) / 2)
                axes[1].errorbar(
                    [x + shift for x in middle], share, error, markersize=4, capsize=2, label=name, **style
                )
            axes[1].set(
                xlabel="t (0 data, 1 noise)",
                ylabel=f"% of the error of {names[0]}",
                title="difference, paired by sample, 95%; linear within ±10%",
            )
            axes[1].set_yscale("symlog", linthresh=10)
            axes[1].legend()
            where = {n: [k + 1 for k, best in enumerate(table["best"]) if best == n] for n in [*names, UNDETERMINED]}
            words = ";  ".join(f"{n}: {', '.join(map(str, k))}" for n, k in where.items() if k)
            figure.suptitle(f"best in bucket  —  {words}", fontsize=9)
        return render(figure)


def named(runs: list[Run]) -> list[str]:
    """Each run by its target, and where that is not enough by its number too."""
    found: list[str] = []
    for number, run in enumerate(runs, 1):
        denoiser = run.denoiser
        name = type(denoiser.target).__name__ if type(denoiser).has_target else type(denoiser).__name__
        found.append(name if name not in found else f"{name} ({number})")
    return found
