"""What a perfect estimate would be worth, window by window of a walk."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, Any

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
from denoiselab.metrics.pairs import MOST
from denoiselab.rng import Noise

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

NOTHING, ESTIMATE, RESET, LAST = "nothing", "estimate", "x_t", "last estimate"
"""What is replaced by the truth."""


class GroundTruthReplacement(Diagnostic):
    """Held-out samples are noised to t = 1 and walked back by DDIM; in one window of the walk the truth takes the place
    of the estimate (x_0_hat = x_0), or of the state (x_s = alpha_s x_0 + sigma_s eps, of the first eps).

    How far the sample then is from the truth says what a perfect model would gain there. Much of it is no finding:
    over a replaced window x_t/alpha_t - x_0 is multiplied by r_end/r_start, r = sigma/alpha, whatever the model, and
    replacing the last estimate alone returns x_0 itself. So that law stands in the figure, and the last step belongs to
    no window and has a row of its own. Where the density of the data is known, the exact denoiser takes the same
    walk and is told as much.

    Table: per window its times, mean squared error to x_0 per value (in units of what is diffused) with its standard
    error, PSNR of decoded images in dB (at most 100), the share recognised as the truth is (mode or class; see
    ``recogniser``), and the measured and the exact factor of the law. All is computed in float64 around the network.

    Args:
        windows: of the first N - 1 steps, as equal as they can be; from 2 to steps - 1.
        steps: N, of the walk.
        n: held-out samples.
        classes: none asks the model without classes, so that agreement is not given by the label; own tells it each
            sample's.
    """

    def __init__(
        self,
        windows: int = 6,
        steps: int = 30,
        n: int = 128,
        classes: str = "none",
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        if not 2 <= windows <= steps - 1:
            raise ValueError(f"windows={windows}: need from 2 to steps - 1 = {steps - 1}")
        if classes not in CLASSES:
            raise ValueError(f"classes={classes}: need one of {', '.join(CLASSES)}")
        self.windows, self.steps, self.n, self.classes = windows, steps, n, classes

    def check(self, parts: Parts) -> None:
        check_classes(parts, self.classes)

    @torch.no_grad()
    def look(self, subject: Subject) -> Finding:
        batch = subject.real(self.n)
        path = Deterministic(subject, self.steps)
        cuts = [round(k * (self.steps - 1) / self.windows) for k in range(self.windows + 1)]
        exact = Optimum(subject.data) if isinstance(subject.data, Known) else None
        denoisers = {"model": subject.parts.guidance(subject.denoiser)} | ({"exact": exact} if exact else {})
        tell = subject.progress("replacing", len(denoisers) * len(batch["x_0"]))
        known = recogniser(subject)
        table: dict[str, list] = {}
        for walk, denoiser in denoisers.items():
            parts: list[dict[tuple[str, int], tuple[Tensor, Tensor]]] = []
            for index in torch.arange(len(batch["x_0"])).split(AT_ONCE):
                x_0 = batch["x_0"][index].to(subject.device, torch.float64)
                ids = batch["id"][index].tolist()
                eps = Noise(subject.seed, ids, x_0.shape[1:], subject.device, torch.float64)()
                cond = asked({key: value[index] for key, value in batch["cond"].items()}, self.classes, subject)

                def denoise(x: Tensor, rung, /, *, denoiser=denoiser, cond=cond) -> Tensor:
                    return denoiser(x, *rung.like(x), **cond)

                parts.append(replaced(path, denoise, x_0, eps, cuts))
                tell(len(index))
            truth = batch["x_0"].double()
            for what, window in parts[0]:
                found = torch.cat([part[what, window][0] for part in parts]).cpu()
                away = torch.cat([part[what, window][1] for part in parts], 1).cpu()  # (2, n, ...)
                row = self.row(subject, path, cuts, found, truth, away, what, window)
                agree = None
                if known is not None:
                    agree = (known.of(subject.decode(found)) == known.of(subject.decode(truth))).double().mean().item()
                for name, value in {"walk": walk, "replaced": what, **row, "agreement": agree}.items():
                    table.setdefault(name, []).append(value)
        return Finding(
            table=table,
            protocol=subject.protocol(len(batch["x_0"]), **path.protocol(), windows=self.windows, classes=self.classes),
            records=self.records(table),
            facts={"recognised": None if known is None else known.what},
        )

    @staticmethod
    def row(
        subject: Subject,
        path: Deterministic,
        cuts: list[int],
        found: Tensor,
        truth: Tensor,
        away: Tensor,
        what: str,
        window: int,
    ) -> dict[str, float | int | None]:
        """What is said of one window: where it lies, how far from the truth its samples end, and the law."""
        mse = (found - truth).square().flatten(1).mean(1)
        psnr = None
        if truth.ndim == 4:
            images = (subject.decode(found) - subject.decode(truth)).double().square().flatten(1).mean(1)
            psnr = (10 * (4 / images.clamp_min(1e-300)).log10()).clamp_max(MOST).mean().item()
        row: dict[str, float | int | None] = dict.fromkeys(
            ("window", "t_from", "t_to", "shrinkage", "law", "law_error")
        )
        if what in (ESTIMATE, RESET):
            first, last = path.levels[cuts[window]], path.levels[cuts[window + 1]]
            row |= {"window": window, "t_from": path.t[cuts[window]], "t_to": path.t[cuts[window + 1]]}
        if what == ESTIMATE:
            before, after = away
            law = last.ratio / first.ratio
            size = before.square().mean().sqrt().item()
            error = (after - law * before).square().mean().sqrt().item() / (law * size)
            row |= {"shrinkage": after.square().mean().sqrt().item() / size, "law": law, "law_error": error}
        return {**row, "mse": mse.mean().item(), "mse_se": mse.std().item() / math.sqrt(len(mse)), "psnr_db": psnr}

    @staticmethod
    def records(table: dict[str, list]) -> list[Measurement]:
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        mse = {(row["walk"], row["replaced"], row["window"]): row["mse"] for row in rows}
        windows = [row for row in rows if row["walk"] == "model" and row["replaced"] == ESTIMATE]
        best = min(windows, key=lambda row: row["mse"])
        controls = {walk: mse[walk, NOTHING, None] for walk in ("exact",) if (walk, NOTHING, None) in mse}
        protocol = {"last_step": "in no window: replacing its estimate alone returns x_0"}
        return [
            Measurement("replacement_mse_of_nothing", mse["model", NOTHING, None], "lower", controls, protocol),
            Measurement(
                "replacement_best_window_t",
                (best["t_from"] + best["t_to"]) / 2,
                "none",
                protocol=protocol,
                details={"mse": [row["mse"] for row in windows]},
            ),
            Measurement(
                "replacement_law_error",
                max(row["law_error"] for row in windows),
                "lower",
                {"closed_form": 0.0},
                protocol,
            ),
        ]

    def draw(self, finding: Finding) -> Image.Image:
        table, what = finding.table, finding.facts["recognised"]
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        chosen = {}
        for row in rows:
            chosen.setdefault((row["walk"], row["replaced"]), []).append(row)
        figure, axes = sheet(1, 2 + (what is not None), 3.7, 3.3)
        styles: dict[tuple[str, str], dict[str, Any]] = {
            ("model", ESTIMATE): {"color": COLOURS[0], "marker": "o", "label": "estimate := x_0"},
            ("model", RESET): {"color": COLOURS[1], "marker": "s", "linestyle": "--", "label": "x_t := its true value"},
            ("exact", ESTIMATE): {
                "color": GREY,
                "linewidth": 4,
                "alpha": 0.6,
                "zorder": 1,
                "label": "exact denoiser, estimate := x_0",
            },
        }
        for axis, column in zip(axes, ("mse", "agreement") if what else ("mse",), strict=False):
            for key, style in styles.items():
                if key in chosen:
                    at = [(row["t_from"] + row["t_to"]) / 2 for row in chosen[key]]
                    axis.plot(at, [row[column] for row in chosen[key]], markersize=4, **style)
            for walk, colour in (("exact", GREY), ("model", COLOURS[2])):
                if (walk, NOTHING) in chosen:
                    name = "model, nothing replaced" if walk == "model" else "exact denoiser, nothing replaced"
                    axis.axhline(chosen[walk, NOTHING][0][column], color=colour, linestyle=":", label=name)
        axes[0].set(
            xlabel="t, middle of the replaced window", ylabel="mean squared error to x_0, per value", yscale="log"
        )
        axes[0].set_title("distance to the truth")
        if what:
            axes[1].set(xlabel="t, middle of the replaced window", ylabel=f"share with the truth's {what}")
            axes[1].set(ylim=(-0.03, 1.03), title=f"same {what} as the truth")
        law, windows = axes[-1], chosen["model", ESTIMATE]
        at = [(row["t_from"] + row["t_to"]) / 2 for row in windows]
        law.plot(
            at, [row["law"] for row in windows], color=GREY, linewidth=5, alpha=0.5, label="law, whatever the model"
        )
        law.plot(at, [row["shrinkage"] for row in windows], "o", color=COLOURS[0], markersize=4, label="measured")
        law.set(xlabel="t, middle of the replaced window", ylabel="factor on x_t/alpha_t - x_0", yscale="log")
        law.set_title("what replacing does by itself")
        law.legend(loc="best")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.suptitle("Truth in one window of the walk; replacing the last estimate alone gives x_0, and is left out")
        return render(figure)


def replaced(
    path: Deterministic, denoise: Denoise, x_0: Tensor, eps: Tensor, cuts: list[int]
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """The samples that the walk from alpha_T x_0 + sigma_T eps ends at when the truth stands in one window, by what is
    replaced and window; and x_t/alpha_t - x_0 at the window's start and end, (2, B, ...).

    Args:
        cuts: the levels between windows, from 0 to N - 1, the last noisy one.
    """
    levels, end = path.levels, len(path.levels) - 1

    def noised(k: int) -> Tensor:
        return levels[k].alpha * x_0 + levels[k].sigma * eps

    starts = [noised(0)]
    for first, last in itertools.pairwise(cuts):
        starts.append(path.on(denoise, starts[-1], first, last))
    on = partial(path.on, denoise)
    nowhere = torch.zeros_like(torch.stack([x_0, x_0]))
    found = {(NOTHING, -1): (on(starts[-1], cuts[-1], end), nowhere)}
    for window, (first, last) in enumerate(itertools.pairwise(cuts)):
        after = path.on(lambda x, rung: x_0, starts[window], first, last)
        away = torch.stack([x / levels[k].alpha - x_0 for x, k in ((starts[window], first), (after, last))])
        found[ESTIMATE, window] = (on(after, last, end), away)
        found[RESET, window] = (on(noised(last), last, end), nowhere)
    found[LAST, -1] = (path.on(lambda x, rung: x_0, starts[-1], cuts[-1], end), nowhere)
    return found
