"""The score of points in the plane as arrows, beside the exact score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from denoiselab.conditioning import null
from denoiselab.data.points import Known
from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.classes import check_classes
from denoiselab.diagnostics.figure import GREY, render, scale_of, sheet
from denoiselab.diagnostics.optimal import Optimum
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.rng import Noise

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

REACH = 2.2
"""Half the side of a field, in standard deviations of x_t."""

ARROW = 2.0
"""The longest arrow is of a score of so many times the median of the exact one; longer scores differ by colour."""

SHOWN = 300
"""Noised samples in a field."""


class ScoreField(Diagnostic):
    """-eps_hat/sigma_t = (alpha_t x_0_hat - x_t)/sigma_t^2, which estimates grad log p(x_t), on a grid of the plane.

    Where the density is known (``Known``), the exact score stands below, and the table says how far off the field is:
    the median angle between the two over the half of the grid where the exact score is longer, and the relative error
    sqrt(mean |found - exact|^2 / mean |exact|^2) at noised held-out points. For any data, the relative error on the
    grid to -x_t/(alpha_t^2 m + sigma_t^2), the score of white data of their mean square m: small at t = 1, where the
    field is about -x_t.

    Asked for a class under guidance, the field is no score of anything: noising p(x) p(c|x)^w and taking the score do
    not commute (Bradley and Nakkiran 2024, arXiv:2408.09000). It is then said to be a heuristic, and not compared.

    The score grows as 1/sigma_t towards the data, so arrows have a greatest length and colour says the rest.

    Args:
        times: where to look, in (0, 1].
        grid: points of a side, >= 2.
        n: held-out points of the relative error.
        label: the class asked for; None for all classes together.
        most: the median angle, in degrees, beyond which it alarms; in (0, 180).
    """

    def __init__(
        self,
        times: Sequence[float] = (0.1, 0.3, 0.6, 1.0),
        grid: int = 16,
        n: int = 2000,
        label: int | None = None,
        most: float = 20.0,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if not times or not all(0 < t <= 1 for t in times):
            raise ValueError(f"times={list(times)}: need times in (0, 1]")
        if grid < 2:
            raise ValueError(f"grid={grid}: need at least 2 points a side")
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        if not 0 < most < 180:
            raise ValueError(f"most={most}: need an angle between 0 and 180 degrees, such as 20")
        self.times, self.grid, self.n, self.label, self.most = [float(t) for t in times], grid, n, label, most

    def check(self, parts: Parts) -> None:
        if tuple(parts.shape) != (2,):
            raise ValueError(f"draws points in the plane; these data have the shape {tuple(parts.shape)}")
        if self.label is None:
            check_classes(parts, "none")
        elif not 0 <= self.label < parts.num_classes:
            raise ValueError(f"label={self.label}: need null, or one of {parts.num_classes} classes counted from 0")

    @torch.no_grad()
    def look(self, subject: Subject) -> Finding:
        batch = subject.real(self.n)
        x_0 = batch["x_0"].to(subject.device)
        eps = Noise(subject.seed, batch["id"].tolist(), (2,), subject.device)()
        m = x_0.double().square().mean().item()
        side = torch.linspace(-REACH, REACH, self.grid, dtype=torch.float64, device=subject.device)
        square = torch.cartesian_prod(side, side)
        denoiser = subject.parts.guidance(subject.denoiser) if self.label is not None else subject.denoiser
        guided = scale_of(subject.parts.config["guidance"]) if self.label is not None else None
        scale = 1.0 if guided is None else guided
        exact = Optimum(subject.data) if isinstance(subject.data, Known) else None
        tell = subject.progress("looking at the score", len(self.times))

        def asked(x_t: Tensor) -> dict[str, Tensor]:
            whole = torch.full_like(x_t[:, 0], self.label or 0, dtype=torch.long)
            return {} if self.label is None else {"label": whole}

        def score(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            cond = {key: value[:1].expand(len(x_t), *value.shape[1:]) for key, value in batch["cond"].items()}
            cond = null({key: value.to(x_t.device) for key, value in cond.items()}) | asked(x_t)
            return (alpha * denoiser(x_t, alpha, sigma, **cond) - x_t) / sigma**2

        table: dict[str, list] = {
            name: []
            for name in ("t", "alpha_t", "sigma_t", "angle_deg", "relative_error", "error_to_white", "median_score")
        }
        kept: dict[str, list[Tensor]] = {"at": [], "found": [], "exact": [], "x_t": []}
        for t in self.times:
            at = torch.tensor(t, dtype=torch.float64, device=subject.device)
            alpha_t, sigma_t = (level.item() for level in subject.schedule(at))
            size = math.hypot(alpha_t * math.sqrt(m), sigma_t)
            points, noised = size * square, (alpha_t * x_0 + sigma_t * eps).double()
            fields = {}
            for name, where in (("grid", points), ("data", noised)):
                alpha, sigma = (torch.full_like(where[:, :1], level) for level in (alpha_t, sigma_t))
                found = score(where, alpha, sigma)
                fields[name] = found, None if exact is None else exact.score(where, alpha, sigma, **asked(where))
            found, known = fields["grid"]
            white = -points / size**2
            values = [t, alpha_t, sigma_t, None, None, relative(found, white), None]
            if known is not None:
                values[-1] = known.norm(dim=1).median().item()
                if scale == 1:
                    values[3:5] = [angle(found, known), relative(*fields["data"])]
            for name, value in zip(table, values, strict=True):
                table[name].append(value)
            shown = {"at": points, "found": found, "exact": known, "x_t": noised[:SHOWN]}
            for name, value in shown.items():
                if value is not None:
                    kept[name].append(value.cpu())
            tell(1)
        return Finding(
            table=table,
            protocol=subject.protocol(
                len(x_0), sampled=self.label is not None, label=self.label, grid=self.grid, reach=REACH
            ),
            records=self.records(table, exact is not None and scale == 1),
            alarms=self.alarms(table),
            facts={"heuristic": scale != 1, "known": exact is not None},
            tensors={name: torch.stack(values) for name, values in kept.items() if values},
        )

    def records(self, table: dict[str, list], known: bool) -> list[Measurement]:
        protocol = {"grid": self.grid, "reach": f"{REACH} standard deviations of x_t", "label": self.label}
        last = max(range(len(self.times)), key=self.times.__getitem__)
        at = {**protocol, "t": self.times[last]}
        found = [Measurement("score_error_to_white", table["error_to_white"][last], "lower", {}, at)]
        if known:
            details = {"t": self.times, "angle_deg": table["angle_deg"], "relative_error": table["relative_error"]}
            none = {"exact_denoiser": 0.0}
            found += [
                Measurement("score_angle", max(table["angle_deg"]), "lower", none, protocol, details),
                Measurement("score_error", max(table["relative_error"]), "lower", none, protocol, details),
            ]
        return found

    def alarms(self, table: dict[str, list]) -> list[str]:
        pairs = zip(self.times, table["angle_deg"], strict=True)
        off = [(off, t) for t, off in pairs if off is not None and off > self.most]
        if not off:
            return []
        worst, t = max(off)
        return [
            f"the score field is {worst:.0f} degrees off the exact one at t = {t:g} (median where the score is longer; "
            f"{self.most:g} is the most, and {len(off)} of {len(self.times)} times are beyond it): trained too little, "
            "or asked at levels or about classes that it was not trained on"
        ]

    def draw(self, finding: Finding) -> Image.Image:
        from matplotlib.colors import LogNorm

        tensors, table = finding.tensors, finding.table
        rows = ["found", "exact"] if "exact" in tensors else ["found"]
        figure, axes = sheet(len(rows), len(table["t"]), 3.0, 3.1)
        for k, t in enumerate(table["t"]):
            at, reference = tensors["at"][k], tensors[rows[-1]][k].norm(dim=1)
            ends = reference.clamp_min(1e-9).quantile(reference.new_tensor([0.02, 0.98]))
            norm = LogNorm(*ends.tolist())
            step = (at[:, 1].max() - at[:, 1].min()).item() / (len(at) ** 0.5 - 1)
            column = [axes[k + row * len(table["t"])] for row in range(len(rows))]
            drawn = None
            for name, axis in zip(rows, column, strict=True):
                field = tensors[name][k]
                length = field.norm(dim=1, keepdim=True)
                arrows = field / length.clamp_min(1e-30) * (length / (ARROW * reference.median())).clamp_max(1) * step
                axis.scatter(*tensors["x_t"][k].T.numpy(), s=2, color=GREY, alpha=0.5, linewidths=0)
                style = {
                    "angles": "xy",
                    "scale_units": "xy",
                    "scale": 1,
                    "width": 0.007,
                    "cmap": "viridis",
                    "norm": norm,
                }
                drawn = axis.quiver(*at.T.numpy(), *arrows.T.numpy(), length[:, 0].numpy(), **style)
                limit = at.abs().max().item() * 1.08
                axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
                axis.grid(visible=False)
            off, error = table["angle_deg"][k], table["relative_error"][k]
            off = "" if off is None else f"\n{off:.1f}° off, relative error {error:.2g}"
            column[0].set_title(f"t = {t:g}{off}")
            if len(rows) == 2:
                column[1].set_title("exact")
            column[-1].set_xlabel("x_t, first")
            assert drawn is not None
            bar = figure.colorbar(drawn, ax=column, orientation="horizontal", shrink=0.9, aspect=30)
            bar.set_label("|score|, 1/unit of x_t")
            low, high = ends.tolist()
            bar.set_ticks(
                [low, (low * high) ** 0.5, high], labels=[f"{v:.2g}" for v in (low, (low * high) ** 0.5, high)]
            )
            bar.ax.set_xticks([], minor=True)
        axes[0].set_ylabel("x_t, second")
        title = "Score of the model, -eps_hat/sigma_t; grey: held-out points, noised"
        if finding.facts["heuristic"]:
            title = "Guided field: a heuristic, not the score of noised data (arXiv:2408.09000)"
        figure.suptitle(title)
        return render(figure)


def angle(found: Tensor, exact: Tensor) -> float:
    """The median angle in degrees between vectors (N, 2), of those where the exact one is longer than its median."""
    length = exact.norm(dim=1)
    found, exact = found[length > length.median()], exact[length > length.median()]
    across = (found[:, 0] * exact[:, 1] - found[:, 1] * exact[:, 0]).abs()
    return torch.atan2(across, (found * exact).sum(1)).median().rad2deg().item()


def relative(found: Tensor, exact: Tensor) -> float:
    """sqrt(mean |found - exact|^2 / mean |exact|^2)."""
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()
