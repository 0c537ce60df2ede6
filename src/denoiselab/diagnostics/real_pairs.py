"""Between two real samples, encoded: by noise, or by walking back to the noise that they come from."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from torch import Tensor

from denoiselab.data.base import some
from denoiselab.diagnostics.base import Finding
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, readable
from denoiselab.diagnostics.interpolation import Between, Interpolation, Way, asks_for_noise, lerp, mse, strangers
from denoiselab.diagnostics.subject import Subject
from denoiselab.errors import UserError
from denoiselab.metrics.base import Measurement
from denoiselab.sampler import Sampler, Spacing, invert
from denoiselab.schedule import Schedule

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

MOST = 5000
"""Held-out samples among which pairs are looked for."""


class Below(Spacing):
    """Time t, and of a spacing's times those below it.

    Args:
        spacing, steps: whose times.
        t: in (0, 1); of a table, the point nearest to it.
    """

    def __init__(self, spacing: Spacing, steps: int, t: float):
        self.spacing, self.steps, self.t = spacing, steps, t

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        t = self.t if schedule.points is None else round(self.t * (schedule.points - 1)) / (schedule.points - 1)
        own = self.spacing.times(schedule, self.steps).to(schedule.device)
        return torch.cat([own.new_tensor([t]), own[own < t]])


def below(sampler: Sampler, schedule: Schedule, t: float) -> Sampler:
    """The same sampler, starting from time t."""
    spacing = Below(sampler.spacing, sampler.steps, t)
    found = copy.copy(sampler)
    found.spacing, found.steps = spacing, len(spacing.times(schedule, 0))
    return found


def pairs(subject: Subject, n: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """n pairs of held-out samples, (n, ...) each, and their labels; where the model knows classes, row i has two of
    class i mod K.

    Raises:
        UserError: there are too few.
    """
    held_out, classes = subject.data.held_out, subject.run.parts.num_classes
    position = some(len(held_out), MOST)
    label = held_out.label[position] if classes and held_out.label is not None else torch.zeros_like(position)
    index = []
    for i in range(n):
        row, k = divmod(i, max(classes, 1))
        of_class = position[label == k]
        if len(of_class) < 2 * row + 2:
            need = f"{2 * row + 2} held-out samples{f' of class {k}' if classes else ''}"
            raise UserError(f"n={n}: pairs of real samples need {need}, and there are {len(of_class)}")
        index.append(of_class[2 * row : 2 * row + 2])
    first, second = (held_out.batch(part) for part in torch.stack(index).unbind(1))
    cond = {"label": first["cond"]["label"]} if classes else {}
    return first["x_0"].to(subject.device), second["x_0"].to(subject.device), cond


class RealPairs(Interpolation):
    """Between two held-out samples of one class."""

    def check(self, parts: Parts) -> None:
        super().check(parts)
        if parts.low_res or parts.vector:
            made_of = "low_res" if parts.low_res else "vector"
            raise ValueError(
                f"needs two real samples of one condition, and this model is told {made_of}, another for each"
            )

    def decoded(self, subject: Subject, first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([subject.decode(first), subject.decode(second)])


class EncodedInterpolation(RealPairs):
    """x_t between q(x_t | x_0) and q(x_t | x_0') of two real samples, sampled from there on (Ho et al. 2020,
    arXiv:2006.11239, section 4.4): x_t = alpha_t lerp(x_0, x_0') + sigma_t mode(eps, eps').

    The paper's is ``mode=lerp``, whose x_t has less noise half way than its level says (``norm``); with slerp it has
    what the network was trained on. eps and eps' are the same in all columns. The larger t, the less of the real
    samples is left at both ends; the walk takes those of the sampler's levels that are below t. ``shared_noise`` and
    the table are as for ``Interpolation``.

    Args:
        t: where to encode, in (0, 1); the paper shows several, half way among them.
        n, columns, mode, shared_noise: as for Interpolation; n pairs of held-out samples of one class.
    """

    name = "encoded_interpolation"

    def __init__(
        self,
        t: float = 0.5,
        n: int = 8,
        columns: int = 9,
        mode: str = "lerp",
        shared_noise: bool = False,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(n, columns, mode, shared_noise, every, budget)
        if not 0 < t < 1:
            raise ValueError(f"t={t}: need a time between 0, data, and 1, noise")
        self.t = t

    def way(self, subject: Subject) -> Way:
        first, second, cond = pairs(subject, self.n)
        parts = subject.sampling(sampler=below(subject.parts.sampler, subject.schedule, self.t))
        level = parts.sampler.levels(subject.schedule)[0]
        noise = self.between(*(self.fresh(subject, end)() for end in (0, 1)))

        def start(alpha: float) -> Tensor:
            return level.alpha / level.sigma * lerp(first, second, alpha) + noise(alpha)

        return Way(start, noise, parts, cond, self.decoded(subject, first, second))

    def look(self, subject: Subject) -> Finding:
        found = super().look(subject)
        for about in (found.protocol, *(record.protocol for record in found.records)):
            about["t"] = self.t
        return found

    def header(self, finding: Finding) -> str:
        mode, sampler = finding.protocol["mode"], finding.facts["sampler"]
        return f"{mode} between two real samples, noised to t = {finding.protocol['t']:g}, {sampler}"


class InvertedInterpolation(RealPairs):
    """Between the noises that two real samples come from: DDIM's steps back to noise (Song et al. 2021,
    arXiv:2010.02502, section 5.4), interpolation there, and the sampler's walk.

    Beside the table of ``Interpolation`` it measures how much is lost on the way there and back, ``inversion_error``:
    the root mean square of sample - x_0 in decoded units, at N/4, N/2 and N of the sampler's steps. It falls as 1/N
    where the network is smooth. Control ``random_noise``: the same of samples of other noises, as if nothing of x_0
    were kept. Guidance applies both ways; scales other than 1 lose more.

    Args:
        n, columns, mode: as for Interpolation; n pairs of held-out samples of one class.
    """

    name = "inverted_interpolation"
    panels = 3

    def __init__(self, n: int = 8, columns: int = 9, mode: str = "slerp", every: int = 2000, budget: str | None = "5%"):
        super().__init__(n, columns, mode, False, every, budget)

    def check(self, parts: Parts) -> None:
        super().check(parts)
        if parts.sampler.steps < 4:
            raise ValueError(
                f"sampler.steps={parts.sampler.steps}: inversion is compared over N/4, N/2 and N; need at least 4"
            )
        if asks_for_noise(parts.sampler, parts.schedule):
            name = type(parts.sampler).__name__
            raise ValueError(
                f"sampler: {name} adds fresh noise, so no noise leads back to x_0; need sampler=ddim or others"
            )

    def way(self, subject: Subject) -> Way:
        first, second, cond = pairs(subject, self.n)
        z_0, z_1 = (encoded(subject, subject.parts.sampler, x_0, cond) for x_0 in (first, second))
        between: Between = self.between(z_0, z_1)
        return Way(between, between, subject.parts, cond, self.decoded(subject, first, second))

    def look(self, subject: Subject) -> Finding:
        found, sampler = super().look(subject), subject.parts.sampler
        x_0, _, cond = pairs(subject, self.n)
        given = found.tensors["real"][0]
        steps = sorted({sampler.steps // 4, sampler.steps // 2, sampler.steps})
        tell, errors = subject.progress("inverting", len(steps)), []
        for count in steps:
            fewer = copy.copy(sampler)
            fewer.steps = count
            z = encoded(subject, fewer, x_0, cond)
            errors.append(math.sqrt(mse(sample(subject, fewer, z, cond), given)))
            tell(1)
        other = sample(subject, sampler, strangers(subject, 0, self.n)(), cond)
        slope = math.log(errors[-1] / errors[0]) / math.log(steps[-1] / steps[0])
        found.facts |= {"steps": steps, "errors": errors, "slope": slope, "random": math.sqrt(mse(other, given))}
        details = {"steps": steps, "errors": errors, "slope": slope}
        controls = {"random_noise": found.facts["random"]}
        record = Measurement("inversion_error", errors[-1], "lower", controls, dict(found.protocol), details)
        found.records.insert(0, record)
        return found

    def header(self, finding: Finding) -> str:
        mode, sampler = finding.protocol["mode"], finding.facts["sampler"]
        return f"{mode} between the noises of two real samples, {sampler} there and back"

    def curves(self, finding: Finding, axes: list[Axes]) -> None:
        super().curves(finding, axes)
        facts, lost = finding.facts, axes[2]
        steps, errors = facts["steps"], facts["errors"]
        lost.axhline(facts["random"], color=GREY, linestyle=DASHES[0], label="samples of other noises")
        first_order = [errors[-1] * steps[-1] / count for count in steps]
        lost.plot(steps, first_order, color=GREY, linestyle=DASHES[1], label="slope -1")
        lost.plot(steps, errors, "o-", color=COLOURS[0], markersize=4, label=f"measured, slope {facts['slope']:.2f}")
        lost.set(
            xlabel="steps each way",
            ylabel="rms error (decoded units)",
            title="there and back",
            yscale="log",
            xscale="log",
        )
        lost.set_xticks(steps, [f"{count}" for count in steps])
        lost.minorticks_off()
        readable(lost.yaxis)
        lost.legend(loc="upper right", bbox_to_anchor=(1, 0.88))


def encoded(subject: Subject, sampler: Sampler, x_0: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The noise that real samples come from."""
    asked = {name: value.to(subject.device) for name, value in cond.items()}
    return invert(sampler, subject.parts.guidance(subject.denoiser), subject.schedule, x_0, **asked)


def sample(subject: Subject, sampler: Sampler, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """What a noise leads to, decoded."""
    asked = {name: value.to(subject.device) for name, value in cond.items()}
    return subject.decode(sampler(subject.parts.guidance(subject.denoiser), subject.schedule, z, **asked))
