"""Between two noises: how samples change along the way."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.diagnostics.base import Diagnostic, Finding, Table
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, readable, render, sheet
from denoiselab.diagnostics.grid import grid
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.pictures import stacked
from denoiselab.rng import Noise, mix
from denoiselab.sampler import Sampler
from denoiselab.schedule import Schedule

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

STRANGERS = 8
"""Samples of each row's condition from noises of their own, whose distances are those of unrelated samples."""

REAL = 2000
"""Most real points behind the paths."""

Between = Callable[[float], Tensor]
"""What lies at alpha between two batches, both ends included."""


def lerp(z_0: Tensor, z_1: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) z_0 + alpha z_1. Between independent normals of unit variance its standard deviation is
    sqrt((1 - alpha)^2 + alpha^2), 0.71 half way, where no network has seen pure noise.

    >>> lerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    tensor([[0.5000, 0.5000]])
    """
    return (1 - alpha) * z_0 + alpha * z_1


def slerp(z_0: Tensor, z_1: Tensor, alpha: float) -> Tensor:
    """sin((1 - alpha) theta)/sin(theta) z_0 + sin(alpha theta)/sin(theta) z_1, theta being the angle between a sample's
    two noises (Song et al. 2021, arXiv:2010.02502, appendix D.5). It keeps the norm where both ends have one norm, as
    nearly all noises of many values do. Where they are parallel it is lerp. Between nearly opposite noises of different
    norms, which are common among noises of few values, it leads far away: see ``polar``.

    >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    a, b = z_0.flatten(1).double(), z_1.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    theta = cosine.clamp(-1, 1).arccos().view(-1, *[1] * (z_0.ndim - 1))
    sine = theta.sin()
    first, second = ((part * theta).sin() / sine for part in (1 - alpha, alpha))
    parallel = sine < 1e-6
    first, second = first.where(~parallel, 1 - alpha), second.where(~parallel, alpha)
    return (first * z_0 + second * z_1).to(z_0.dtype)


def polar(z_0: Tensor, z_1: Tensor, alpha: float) -> Tensor:
    """slerp of the two directions, with norm (1 - alpha) |z_0| + alpha |z_1|: as slerp where both norms are equal, and
    what keeps noises of few values in place.

    >>> polar(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 0.5)
    tensor([[1.4142, 1.4142]])
    """
    norm_0, norm_1 = (z.flatten(1).double().norm(dim=1).view(-1, *[1] * (z.ndim - 1)) for z in (z_0, z_1))
    direction = slerp(z_0 / norm_0, z_1 / norm_1, alpha)
    # Exact at both ends: the norms are divided out and multiplied in again only between.
    between = (direction * lerp(norm_0, norm_1, alpha)).to(z_0.dtype)
    return {0.0: z_0, 1.0: z_1}.get(alpha, between)


MODES = {"lerp": lerp, "slerp": slerp, "polar": polar}


class Way(NamedTuple):
    """From where to where, and how it is walked."""

    start: Between
    """The noise that a column's walk starts from, in units of its first level's sigma: (n, ...)."""
    noise: Between
    """The part of it that should be standard normal: (n, ...)."""
    parts: Parts
    """How samples are made of it."""
    cond: dict[str, Tensor]
    """Of both ends, a row each."""
    real: Tensor | None = None
    """What the ends were made of, decoded: (2, n, ...)."""


class Path:
    """A start, then fresh noise."""

    def __init__(self, start: Tensor, rest: Noise):
        self.start: Tensor | None = start
        self.rest = rest

    def __call__(self) -> Tensor:
        start, self.start = self.start, None
        return self.rest() if start is None else start


class Interpolation(Diagnostic):
    """Samples from noises between z_0 and z_1: a row per pair, a column per alpha.

    Along a deterministic sampler x_0 is a function of x_T, and what lies between two noises lies between their samples
    (Song et al. 2021, arXiv:2010.02502, section 5.3). A stochastic sampler with fresh noise in every column shows how
    little x_T decides of x_0: neighbours are nearly as far apart as strangers. With ``shared_noise`` every column walks
    with the same fresh noise, and x_0 is a function of x_T again, though a nearly constant one where the fresh noise
    decides: columns that look the same say just that.

    Row i is asked for one condition, from noise i of the evaluation's seed to noise n + i, so that both ends are
    samples of the evaluation. Table: alpha; ``norm``, the root mean square of the noise, and ``norm_expected``, its
    closed form; ``adjacent_mse``, the mean squared difference to the column before; ``adjacent_ratio``, the same
    over that of unrelated samples of one condition.

    Args:
        n: pairs, >= 1.
        columns: values of alpha from 0 to 1, evenly spaced, >= 3.
        mode: slerp, or lerp; for points polar.
        shared_noise: one path of fresh noise for all columns of a row; of no effect on deterministic samplers.
    """

    name = "interpolation"
    """What its measurements are called by."""

    def __init__(
        self,
        n: int = 8,
        columns: int = 9,
        mode: str = "slerp",
        shared_noise: bool = False,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if n < 1:
            raise ValueError(f"n={n}: need at least 1")
        if columns < 3:
            raise ValueError(f"columns={columns}: need at least 3")
        if mode not in MODES:
            raise ValueError(f"mode={mode}: need one of {', '.join(MODES)}")
        self.n, self.columns, self.mode, self.shared_noise = n, columns, mode, shared_noise

    @property
    def alphas(self) -> list[float]:
        return [j / (self.columns - 1) for j in range(self.columns)]

    def way(self, subject: Subject) -> Way:
        """What is interpolated."""
        cond = subject.cond(self.n)
        z_0, z_1 = (self.fresh(subject, end)() for end in (0, 1))
        between = self.between(z_0, z_1)
        return Way(between, between, subject.parts, cond)

    def between(self, first: Tensor, second: Tensor) -> Between:
        return lambda alpha: MODES[self.mode](first, second, alpha)

    def fresh(self, subject: Subject, end: int) -> Noise:
        """The normals of samples 0 .. n - 1 of the evaluation (end 0), or of n .. 2n - 1."""
        ids = range(end * self.n, (end + 1) * self.n)
        return Noise(subject.seed, ids, subject.data.shape, subject.device)

    def source(self, subject: Subject, start: Tensor, column: int) -> Path:
        """A column's start, then every row's fresh noise; both ends have that of the evaluation's own samples."""
        last = self.columns - 1
        if self.shared_noise or column in (0, last):
            rest = self.fresh(subject, 0 if self.shared_noise else column // last)
            rest()  # a sample's first normal is where its walk starts
        else:
            rest = strangers(subject, column, self.n)
        return Path(start, rest)

    def look(self, subject: Subject) -> Finding:
        way = self.way(subject)
        tell = subject.progress("interpolating", self.columns + STRANGERS)

        def sample(noise: Callable[[], Tensor], parts: Parts) -> Tensor:
            made = subject.decode(deque(subject.walk(noise, parts, way.cond), maxlen=1).pop().x_t)
            tell(1)
            return made

        columns = [sample(self.source(subject, way.start(a), j), way.parts) for j, a in enumerate(self.alphas)]
        others = [sample(strangers(subject, -k - 1, self.n), subject.parts) for k in range(STRANGERS)]
        ends = mse(columns[0], columns[-1])
        unrelated = sum(mse(a, b) for a, b in itertools.combinations(others, 2)) / math.comb(STRANGERS, 2)
        adjacent = [mse(a, b) for a, b in itertools.pairwise(columns)]
        steps = self.columns - 1
        protocol = subject.protocol(self.n, mode=self.mode, shared_noise=self.shared_noise, columns=self.columns)
        table: Table = {
            "alpha": self.alphas,
            "norm": [way.noise(alpha).double().square().mean().sqrt().item() for alpha in self.alphas],
            "norm_expected": [math.hypot(1 - a, a) if self.mode == "lerp" else 1.0 for a in self.alphas],
            "adjacent_mse": [None, *adjacent],
            "adjacent_ratio": [None, *(value / unrelated for value in adjacent)],
        }
        ratio, smoothness = sum(adjacent) / steps / unrelated, max(adjacent) / ends
        records = [
            Measurement(f"{self.name}_smoothness", smoothness, "lower", {"straight": 1 / steps**2}, dict(protocol)),
            Measurement(f"{self.name}_adjacent_ratio", ratio, "none", {"unrelated": 1.0}, dict(protocol)),
        ]
        facts = {
            "sampler": type(subject.parts.sampler).__name__,
            "stochastic": asks_for_noise(subject.parts.sampler, subject.schedule),
            "unrelated_mse": unrelated,
            "ends_mse": ends,
        }
        tensors = {"samples": torch.stack(columns, 1)}
        tensors |= {"real": way.real} if way.real is not None else {}
        if tensors["samples"].ndim == 3:
            data = subject.images
            tensors["data"] = data.codec.decode(data.held_out.draw(REAL)["x_0"]).float()
        return Finding(table, protocol, records, facts=facts, tensors=tensors)

    def draw(self, finding: Finding) -> Image.Image:
        samples = finding.tensors["samples"]
        above = self._paths(finding) if samples.ndim == 3 else self._images(finding)
        figure, axes = sheet(1, self.panels, 8.8 / self.panels, 2.9)
        self.curves(finding, axes)
        return stacked([above, render(figure)])

    panels = 2
    """Beside each other, under the samples."""

    def _images(self, finding: Finding) -> Image.Image:
        samples, real = finding.tensors["samples"], finding.tensors.get("real")
        columns = [f"{alpha:.3g}" for alpha in finding.table["alpha"]]
        if real is not None:
            samples = torch.cat([real[0][:, None], samples, real[1][:, None]], 1)
            columns = ["real", *columns, "real"]
        rows = [f"pair {i + 1}" for i in range(len(samples))]
        return grid(samples, rows, columns, f"{self.header(finding)}; columns: alpha")

    def _paths(self, finding: Finding) -> Image.Image:
        """The samples of each row, joined in the order of alpha."""
        figure, (plane,) = sheet(1, 1, 5.2, 5.2)
        data = finding.tensors["data"]
        plane.scatter(*data.numpy().T, s=2, c=GREY, alpha=0.3, linewidths=0, label="held-out data")
        for i, row in enumerate(finding.tensors["samples"].numpy()):
            colour = COLOURS[i % len(COLOURS)]
            plane.plot(*row.T, color=colour, linewidth=0.9, marker="o", markersize=3)
            plane.plot(*row[[0, -1]].T, color=colour, linestyle="", marker="s", markersize=6)
        plane.plot(
            [], [], "o-", color=COLOURS[0], markersize=3, linewidth=0.9, label="samples along alpha, a colour per pair"
        )
        plane.plot([], [], "s", color=COLOURS[0], markersize=6, label="alpha = 0 and 1")
        if "real" in finding.tensors:
            plane.plot(*finding.tensors["real"].flatten(0, 1).numpy().T, "kx", markersize=6, label="real ends")
        low, high = data.amin(0), data.amax(0)
        (left, bottom), (right, top) = (1.1 * low - 0.1 * high).tolist(), (1.1 * high - 0.1 * low).tolist()
        plane.set(xlabel="x (data units)", ylabel="y (data units)", aspect="equal", title=self.header(finding))
        plane.set(xlim=(left, right), ylim=(bottom, top))
        plane.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        return render(figure)

    def header(self, finding: Finding) -> str:
        """What is seen, in words."""
        facts, protocol = finding.facts, finding.protocol
        kind = "one noise path for all columns" if protocol["shared_noise"] else "fresh noise in every column"
        return f"{protocol['mode']} between two noises, {facts['sampler']}" + (
            f", {kind}" if facts["stochastic"] else ""
        )

    def curves(self, finding: Finding, axes: list[Axes]) -> None:
        """The noise's norm, and how far apart neighbours are."""
        table, facts, (norm, far) = finding.table, finding.facts, axes[:2]
        alphas = table["alpha"]
        fine = torch.linspace(0, 1, 101).tolist()
        norm.plot(fine, [1.0] * 101, color=GREY, linestyle=DASHES[0], label="slerp, in many dimensions")
        norm.plot(fine, [math.hypot(1 - a, a) for a in fine], color=GREY, linestyle=DASHES[1], label="lerp, expected")
        norm.plot(
            alphas, table["norm"], "o-", color=COLOURS[0], markersize=4, label=f"{finding.protocol['mode']}, measured"
        )
        norm.set(xlabel="alpha (0, 1: the ends)", ylabel="root mean square", title="the noise between", ylim=(0, None))
        norm.legend()
        middles = [(a + b) / 2 for a, b in itertools.pairwise(alphas)]
        straight = facts["ends_mse"] / facts["unrelated_mse"] / len(middles) ** 2
        far.axhline(1, color=GREY, linestyle=DASHES[0], label="unrelated samples")
        far.axhline(straight, color=GREY, linestyle=DASHES[1], label="on a straight line")
        far.plot(middles, table["adjacent_ratio"][1:], "o-", color=COLOURS[0], markersize=4, label="measured")
        far.set(
            xlabel="alpha (0, 1: the ends)",
            ylabel="squared distance / that of unrelated",
            title="neighbours apart",
            yscale="log",
        )
        readable(far.yaxis)
        far.legend()


def strangers(subject: Subject, number: int, n: int) -> Noise:
    """Normals of n rows that no sample of the evaluation has."""
    return Noise(mix(subject.seed, "stranger", number), range(n), subject.data.shape, subject.device)


def mse(a: Tensor, b: Tensor) -> float:
    """The mean squared difference per value."""
    return (a.double() - b.double()).square().mean().item()


class _Silent:
    """A denoiser that says 0, and a variance of 0 to those who ask."""

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Outputs:
        return Outputs(torch.zeros_like(x_t), variance=torch.zeros_like(x_t))


def asks_for_noise(sampler: Sampler, schedule: Schedule) -> bool:
    """Whether a sampler's steps are stochastic."""
    asked: list[Tensor] = []

    def noise() -> Tensor:
        asked.append(torch.zeros(1, 1))
        return asked[-1]

    sampler(_Silent(), schedule, noise)
    return len(asked) > 1
