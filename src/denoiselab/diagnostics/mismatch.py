"""Whether noise levels are what the network takes them for."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.diagnostics.optimal import Optimum, control
from denoiselab.diagnostics.subject import Subject, Told
from denoiselab.guidance import DenoiserLike
from denoiselab.metrics.base import Measurement
from denoiselab.rng import Noise
from denoiselab.sampler.base import Rung

PARTS, OFF, ERRORS = 0.1, 0.2, 5.0
"""How far |x_t|^2 may part from its control, and a slope from 1, each beyond so many standard errors."""

TELLS = 0.5
"""A slope is looked at where the control's estimate has at least this share of the mean square of what it estimates:
nearer to the data a network's own error in eps is of the size of what there is to tell, nearer to noise that in x_0."""

LOOKED = 20
"""Most levels at which real samples are noised."""

AT_ONCE = 256
"""Samples in a call of the network."""


class ScheduleMismatch(Diagnostic):
    """mean |x_t|^2 along the sampler's walk against alpha_t^2 E|x_0|^2 + sigma_t^2 d, and on real samples the slopes
    E<eps, eps_hat>/E|eps_hat|^2 and E<x_0, x_0_hat>/E|x_0_hat|^2 against 1.

    A network may be sampled along any schedule, since it is told sigma_t/alpha_t and nothing else; what can be wrong is
    that level: a table off by one, levels of another schedule told in their place, data or latents in another range
    than was trained on, another sigma_data. Then x_t has not the size that its level says, or the network takes out
    another amount of noise than there is. The second shows first, since a walk returns to its level by itself: an
    estimate that is a conditional mean is uncorrelated with its error, so both slopes are 1, whatever the data, the
    target and the level.

    The walk is the evaluation's without guidance, which changes |x_t|^2 by intent. Its control is the same walk with
    the same noise and an exact denoiser: of the data where their density is known, else of the Gaussian with their
    class means and spectrum (``optimal.Filter``). So what coarse steps do is no alarm.

    Alarms: |x_t|^2 parts from the control's by 5 standard errors more than 10% of what is expected, or a slope is off
    by more than 0.2 and by more than 5 standard errors.

    Args:
        n: samples, and held-out samples; where samples are made of held-out ones, no more than there are.
    """

    def __init__(self, n: int = 512, every: int = 2000, budget: str | None = "5%"):
        super().__init__(every, budget)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        self.n = n

    def look(self, subject: Subject) -> Finding:
        cond, levels = subject.cond(self.n), subject.parts.sampler.levels(subject.schedule)
        n = len(next(iter(cond.values()))) if cond else self.n
        tell = subject.progress("the walk", 2 * n + min(LOOKED, len(levels) - 1))
        train = subject.real(4000, train=True)
        label = train["cond"].get("label")
        exact = control(subject)
        walked = self.squares(subject, subject.denoiser, n, cond, tell)
        followed = self.squares(subject, exact, n, cond, tell)
        mean_square = self.mean_square(train["x_0"], label, cond.get("label"))
        states = walked[1]
        expected = torch.tensor([rung.alpha**2 * mean_square + rung.sigma**2 for rung in states], dtype=torch.float64)
        apart = (walked[0] - followed[0]) / expected  # (n, states)
        gap, error = apart.mean(0), apart.std(0) / len(apart) ** 0.5
        slopes = self.slopes(subject, exact, levels[:-1], tell)
        table = {
            "alpha_t": [rung.alpha for rung in states],
            "sigma_t": [rung.sigma for rung in states],
            "square": walked[0].mean(0).tolist(),
            "square_se": (walked[0].std(0) / len(apart) ** 0.5).tolist(),
            "expected": expected.tolist(),
            "control": followed[0].mean(0).tolist(),
        }
        worst = int((gap.abs() - ERRORS * error).argmax())
        values = {
            "gap": gap[worst].item(),
            "slope": max((abs(s["slope"] - 1) for s in slopes if s["tells"]), default=0),
        }
        alarms = []
        if not abs(values["gap"]) <= PARTS + ERRORS * error[worst].item():
            alarms.append(
                f"|x_t|^2 at sigma_t = {states[worst].sigma:.2g} is {values['gap']:+.0%} of what is expected away from "
                f"its control (alarm beyond {PARTS:.0%}): data in another range than was trained on, or a sampler "
                "whose levels are not those of its samples"
            )
        alarms += self.alarms(slopes)
        limits = {"alarm": PARTS}
        return Finding(
            table=table,
            protocol={**subject.protocol(n), "guidance": {"_target_": "none"}},
            records=[
                Measurement("mismatch_square", abs(values["gap"]), "lower", limits),
                Measurement("mismatch_slope", values["slope"], "lower", {"alarm": OFF}),
            ],
            alarms=alarms,
            facts={"slopes": slopes, "control": "exact" if isinstance(exact, Optimum) else "Gaussian"},
        )

    @staticmethod
    def mean_square(x_0: Tensor, label: Tensor | None, asked: Tensor | None) -> float:
        """E|x_0|^2 per value, of the classes that are asked for."""
        square = x_0.double().square().flatten(1).mean(1)
        if label is None or asked is None or not bool((asked >= 0).all()):
            return square.mean().item()
        by_class = {int(k): square[label == k].mean() for k in asked.unique() if (label == k).any()}
        return torch.stack([by_class[int(k)] for k in asked if int(k) in by_class]).mean().item()

    def squares(
        self, subject: Subject, denoiser: DenoiserLike, n: int, cond: dict[str, Tensor], tell: Told
    ) -> tuple[Tensor, list[Rung]]:
        """mean |x_t|^2 of each of n samples at each state of the walk, (n, states), and their levels."""
        found, levels = [], []
        for ids in torch.arange(n).split(AT_ONCE):
            noise = Noise(subject.seed, ids.tolist(), subject.run.parts.shape, subject.device)
            asked = {key: value[ids].to(subject.device) for key, value in cond.items()}
            states = [
                (state.x_t.double().square().flatten(1).mean(1).cpu(), state.level)
                for state in subject.parts.sampler.walk(denoiser, subject.schedule, noise, **asked)
            ]
            found.append(torch.stack([square for square, _ in states], dim=1))
            levels = [level for _, level in states]
            tell(len(ids))
        return torch.cat(found), levels

    @torch.no_grad()
    def slopes(self, subject: Subject, exact: DenoiserLike, levels: list[Rung], tell: Told) -> list[dict]:
        """For some of the levels, and for eps and x_0: the slope, its standard error, and whether it tells."""
        batch = subject.real(self.n)
        x_0 = batch["x_0"].to(subject.device)
        cond = {key: value.to(subject.device) for key, value in batch["cond"].items()}
        eps = Noise(subject.seed, batch["id"].tolist(), x_0.shape[1:], subject.device)()
        mean_square, found = x_0.double().square().mean().item(), []
        for k in sorted({round(i * (len(levels) - 1) / (LOOKED - 1)) for i in range(LOOKED)}):
            rung = levels[k]
            x_t = rung.alpha * x_0 + rung.sigma * eps
            x_0_hat, x_0_exact = (answers(denoiser, x_t, rung, cond) for denoiser in (subject.denoiser, exact))
            eps_hat, eps_exact = ((x_t.double() - rung.alpha * x) / rung.sigma for x in (x_0_hat, x_0_exact))
            for what, real, estimate, best, whole in (
                ("eps", eps, eps_hat, eps_exact, 1.0),
                ("x_0", x_0, x_0_hat, x_0_exact, mean_square),
            ):
                power = estimate.square().mean()
                off = ((real.double() - estimate) * estimate).flatten(1).mean(1) / power
                error = (off.std() / len(off) ** 0.5).item()
                tells = best.square().mean().item() >= TELLS * whole
                found.append({"state": k, "of": what, "slope": 1 + off.mean().item(), "se": error, "tells": tells})
            tell(1)
        return found

    @staticmethod
    def alarms(slopes: list[dict]) -> list[str]:
        """A sentence for the worst slope of each kind."""
        found = []
        for what in ("eps", "x_0"):
            told = [s for s in slopes if s["of"] == what and s["tells"]]
            worst = max(told, key=lambda s: abs(s["slope"] - 1) / max(OFF, ERRORS * s["se"]), default=None)
            if worst is not None and not abs(worst["slope"] - 1) <= max(OFF, ERRORS * worst["se"]):
                found.append(
                    f"{what} over its estimate is {worst['slope']:.2f} at step {worst['state']} (alarm beyond "
                    f"1 ± {OFF}): the network takes out another amount of noise than there is, as where it is told "
                    "another level than that of x_t, or x_0 has another scale than was trained on"
                )
        return found

    def draw(self, finding: Finding) -> Image.Image:
        table, facts = finding.table, finding.facts
        figure, (squares, slopes) = sheet(1, 2, 4.8, 3.4)
        steps = range(len(table["square"]))
        squares.plot(steps, table["expected"], color=GREY, linewidth=3, alpha=0.6, label="alpha_t² E|x_0|² + sigma_t²")
        squares.plot(steps, table["control"], color=GREY, linestyle="--", label=f"the same walk, {facts['control']}")
        error = [2 * value for value in table["square_se"]]
        style: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1}
        squares.errorbar(steps, table["square"], error, label="this model, ± 2 standard errors", **style)
        squares.set(xlabel="state of the walk (0: noise)", ylabel="mean of x_t² per value", title="the size of x_t")
        squares.set_ylim(bottom=0)
        squares.legend()
        slopes.axhspan(1 - OFF, 1 + OFF, color=GREY, alpha=0.15, linewidth=0, label=f"no alarm within {OFF:g}")
        slopes.axhline(1, color=GREY, label="conditional means: 1")
        for what, colour, marker in (("eps", COLOURS[1], "o"), ("x_0", COLOURS[2], "s")):
            told = [s for s in facts["slopes"] if s["of"] == what and s["tells"]]
            where, values = [s["state"] for s in told], [s["slope"] for s in told]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3.5, "capsize": 2, "linewidth": 1}
            slopes.errorbar(where, values, [2 * s["se"] for s in told], label=f"{what} over its estimate", **style)
        slopes.set(xlabel="level of the walk (0: noise)", ylabel="slope, no unit")
        slopes.set_title("real samples noised to these levels")
        slopes.legend(loc="lower left", ncols=2)
        return render(figure)


def answers(denoiser: DenoiserLike, x_t: Tensor, rung: Rung, cond: dict[str, Tensor]) -> Tensor:
    """x_0_hat of all samples at one level, float64."""
    found = [
        denoiser(x_t[rows], *rung.like(x_t[rows]), **{key: value[rows] for key, value in cond.items()})
        for rows in torch.arange(len(x_t), device=x_t.device).split(AT_ONCE)
    ]
    return torch.cat(found).double()
