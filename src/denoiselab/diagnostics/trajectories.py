"""A walk from noise to samples, beside real samples noised to the same levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from denoiselab.diagnostics.base import Diagnostic, Finding, Table
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, render, sheet
from denoiselab.diagnostics.grid import grid
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.pictures import stacked
from denoiselab.rng import Noise, mix
from denoiselab.sampler import State, Walk

APART = 0.05
"""Relative deviations of a standard deviation that are seen as a fault, beyond three standard errors."""

ROWS = {
    "walk_x_t": "walk, x_t",
    "walk_x_0_hat": "walk, x_0_hat",
    "real_x_t": "real, x_t",
    "real_x_0_hat": "real, x_0_hat",
}
"""Tensors, and what they are called in pictures."""


class Trajectories(Diagnostic):
    """x_t and x_0_hat(x_t) along the sampler's walk, beside held-out samples noised to the same levels.

    x_t alone says little: half way down many schedules real samples look like noise too, so a walk is not wrong where
    it does. x_0_hat shows what is decided by then, and the control what should be.

    Whatever the sampler, x_t should have the data's marginals at every level: the standard deviation
    sqrt(alpha_t^2 m + sigma_t^2), m being the mean square of held-out x_0. And the residual
    x_t - alpha_t x_0_hat(x_t) = sigma_t eps_hat should have that of the control. It is less than sigma_t, by what the
    network cannot tell, and not compared with x_t - alpha_t x_0 of the walk's own sample, which along an ODE is not
    noise. The alarm is for ratios off by more than 5 % and three standard errors: too few steps, guidance, a schedule
    that is not the one trained along, or a network whose estimates are off.

    Table, a row per level: ``walked``, the share of the walk that is done; alpha_t, sigma_t, log_snr (None at the
    clean level); ``std`` of x_t, ``std_expected`` and their ratio with its standard error; ``residual`` and
    ``residual_control`` and their ratio (None at the clean level).

    Args:
        left: shares of the walk that are left, in [0, 1]; 1 is pure noise, 0 the sample. The nearest level is taken.
        n: samples that are measured; of a smaller held-out set, no more than it has.
        shown: of them, in the picture; of points, all are.
    """

    def __init__(
        self,
        left: Sequence[float] = (1, 0.75, 0.5, 0.25, 0),
        n: int = 256,
        shown: int = 6,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if not left or not all(0 <= part <= 1 for part in left):
            raise ValueError(f"left={list(left)}: need shares of the walk in [0, 1]")
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        if not 1 <= shown <= n:
            raise ValueError(f"shown={shown}: need a number from 1 to n={n}")
        self.left, self.n, self.shown = [float(part) for part in left], n, shown

    def look(self, subject: Subject) -> Finding:
        batch = subject.real(self.n)
        x_0, n, parts = batch["x_0"].to(subject.device), len(batch["x_0"]), subject.parts
        cond = {name: value.to(subject.device) for name, value in batch["cond"].items()}
        noise = Noise(subject.seed, range(n), subject.data.shape, subject.device)
        eps = Noise(mix(subject.seed, "control"), range(n), subject.data.shape, subject.device)()
        levels = len(parts.sampler.levels(subject.schedule))
        index = [round((1 - part) * (levels - 1)) for part in self.left]
        tell = subject.progress("walking", levels)
        kept = {i: state for i, state in enumerate(subject.walk(noise, parts, cond, tell)) if i in index}
        mean_square = x_0.double().square().mean().item()
        asking = Walk(parts.guidance(subject.denoiser), subject.schedule, noise, parts.sampler.clip, **cond)
        table: Table = {name: [] for name in COLUMNS}
        shown: dict[str, list[Tensor]] = {name: [] for name in ROWS}
        for i in index:
            state = kept[i]
            alpha_t, sigma_t = state.level
            real = alpha_t * x_0 + sigma_t * eps
            walked = estimates(asking, state), estimates(asking, state._replace(x_t=real))
            row = self._row(state, walked, real, mean_square)
            for name, value in zip(COLUMNS, (i / (levels - 1), *row), strict=True):
                table[name].append(value)
            part = slice(n if x_0.ndim == 2 else self.shown)
            for name, x in zip(ROWS, (state.x_t, walked[0], real, walked[1]), strict=True):
                shown[name].append(x[part].float().cpu() if x_0.ndim == 2 else subject.decode(x[part]))
        protocol = subject.protocol(n, left=self.left)
        off = max(abs(value - 1) for value in table["std_ratio"])
        record = Measurement("trajectory_std_error", off, "lower", {"alarm": APART}, dict(protocol))
        tensors = {name: torch.stack(values) for name, values in shown.items()}
        return Finding(table, protocol, [record], alarms(table), tensors=tensors)

    def _row(
        self, state: State, x_0_hats: tuple[Tensor, Tensor], real: Tensor, mean_square: float
    ) -> list[float | None]:
        alpha_t, sigma_t = state.level
        squares = state.x_t.double().square().flatten(1).mean(1)
        expected = (alpha_t**2 * mean_square + sigma_t**2) ** 0.5
        std = squares.mean().sqrt().item()
        # Of a root of a mean, by the delta method; the held-out mean square is of as many samples, of the same spread.
        error = (2 / len(squares)) ** 0.5 * squares.std().item() / (2 * std * expected)
        row = [alpha_t, sigma_t, None, std, expected, std / expected, error]
        if sigma_t == 0:
            return [*row, None, None, None]
        residual, control = (
            (x - alpha_t * x_0_hat).double().square().mean().sqrt().item()
            for x, x_0_hat in zip((state.x_t, real), x_0_hats, strict=True)
        )
        row[2] = 2 * state.level.half_log_snr
        return [*row, residual, control, residual / control]

    def draw(self, finding: Finding) -> Image.Image:
        tensors, table = finding.tensors, finding.table
        names = [
            f"{1 - done:.3g} left, log SNR {snr(value)}"
            for done, value in zip(table["walked"], table["log_snr"], strict=True)
        ]
        above = self._points(finding, names) if tensors["real_x_t"].ndim == 3 else self._images(finding, names)
        figure, (std, residual) = sheet(1, 2, 4.4, 2.9)
        done, measured, control = table["walked"], "walk", "real samples, noised"
        expected = "sqrt(alpha_t² E[x_0²] + sigma_t²)"
        std.plot(done, table["std_expected"], color=GREY, linestyle=DASHES[0], label=expected)
        std.plot(done, table["std"], "o", color=COLOURS[0], markersize=5, label=measured)
        std.set(xlabel="share of the walk done", ylabel="std of x_t", title="the spread of x_t")
        std.set_ylim(0, 1.2 * max(table["std"] + table["std_expected"]))
        std.legend()
        noisy = [
            (d, r, c)
            for d, r, c in zip(done, table["residual"], table["residual_control"], strict=True)
            if r is not None
        ]
        if noisy:
            done, found, real = zip(*noisy, strict=True)
            residual.plot(done, real, color=GREY, linestyle=DASHES[0], label=control)
            residual.plot(done, found, "o", color=COLOURS[0], markersize=5, label=measured)
            residual.set_ylim(0, 1.2 * max(real + found))
            residual.legend()
        residual.set(
            xlabel="share of the walk done",
            ylabel="std of x_t - alpha_t x_0_hat",
            title="what is taken for noise",
        )
        return stacked([above, render(figure)])

    def _images(self, finding: Finding, names: list[str]) -> Image.Image:
        tensors, rows, captions = finding.tensors, [], []
        for k, name in enumerate(names):
            rows += [torch.cat([tensors[f"walk_{x}"][k], tensors[f"real_{x}"][k]]) for x in ("x_t", "x_0_hat")]
            captions += [f"{name}:  x_t", "x_0_hat"]
        return grid(torch.stack(rows), captions, ["the walk", "real samples, noised to the same levels"])

    def _points(self, finding: Finding, names: list[str]) -> Image.Image:
        tensors = finding.tensors
        figure, axes = sheet(len(ROWS), len(names), 2.1, 2.0, sharex=True, sharey=True)
        reach = 1.1 * max(float(tensors[name].abs().quantile(0.999)) for name in ROWS)
        for i, (key, text) in enumerate(ROWS.items()):
            for k, name in enumerate(names):
                axis = axes[i * len(names) + k]
                axis.scatter(*tensors[key][k].numpy().T, s=2, c=COLOURS[0] if i < 2 else GREY, linewidths=0)
                axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
                axis.set_title(name.replace(", ", "\n") if i == 0 else "")
                axis.set_ylabel(f"{text}\n(diffused units)" if k == 0 else "")
        return render(figure)


COLUMNS = (
    *("walked", "alpha_t", "sigma_t", "log_snr", "std", "std_expected", "std_ratio", "std_ratio_se"),
    *("residual", "residual_control", "residual_ratio"),
)


def estimates(walk: Walk, state: State) -> Tensor:
    """x_0_hat of x_t at its level, as the sampler bounds it; x_t itself at the clean level."""
    with torch.no_grad():
        return state.x_t if state.level.sigma == 0 else walk.denoise(state.x_t, state.level)


def snr(value: float | None) -> str:
    return "∞" if value is None else f"{round(value, 1) + 0.0:.1f}"


def alarms(table: Table) -> list[str]:
    """What the walk's standard deviations say."""
    found = []
    for k, (done, error) in enumerate(zip(table["walked"], table["std_ratio_se"], strict=True)):
        where, most = f"with {1 - done:.2g} of the walk left", APART + 3 * error
        limit = f"(alarm beyond 1 +- {most:.2g}: {APART:.0%} and three standard errors)"
        ratio, residual = table["std_ratio"][k], table["residual_ratio"][k]
        if abs(ratio - 1) > most:
            found.append(
                f"{where}, x_t is {ratio:.3g} times as wide as noised data {limit}: guidance, too few steps, another "
                "schedule than that trained along, or estimates of x_0 that are too wide or too narrow"
            )
        if residual is not None and abs(residual - 1) > most:
            found.append(
                f"{where}, what the network takes for noise is {residual:.3g} times as wide as on noised data {limit}: "
                "the walk is where the data are not"
            )
    return found
