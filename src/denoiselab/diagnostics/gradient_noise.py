"""How noisy a training step is: its loss and its gradient over batch sizes, and how much of that is due to t."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.diagnostics.objective import Objective, taught
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.rng import generator
from denoiselab.timesteps import Place
from denoiselab.timesteps.base import nearest_below

RESAMPLES = 1000
ALTERNATES = -0.5
"""The lag-1 autocorrelation of successive losses below which they are said to alternate."""
SHOWN = 1000
STEPS = 64
"""Successive steps whose losses are compared: the correlation of independent ones is within 1/8 of 0, mostly."""


class GradientNoise(Diagnostic):
    """B_simple = tr(Sigma)/|G|^2, Sigma the covariance of a sample's gradient and G its mean: the batch size at which
    noise and signal are as large, estimated without bias from the mean squared norms of gradients of a small and a
    large batch, |G|^2 = (B |g_B|^2 - b |g_b|^2)/(B - b) and tr(Sigma) = (|g_b|^2 - |g_B|^2)/(1/b - 1/B) (McCandlish
    et al. 2018, arXiv:1812.06162, appendix A.1).

    Beside it, of the loss of a step: its coefficient of variation times sqrt(B), which is constant for independent t;
    its variance between times and at equal times, Var E[l|t] and E Var[l|t] (the law of total variance), estimated
    without bias from pairs of samples at the same t; and by the same pairs the share of the variance of log l that t
    explains. Much of what looks like an unstable loss is t. Stratified times remove the part between times, so all this
    is measured with independent times, of the run's density but never its stratification; a density that is learned
    is learned anew, from losses of these weights. What the run's own drawing
    makes of it is asked apart: the losses of 64 successive steps, which must not alternate.

    Table: per batch size the coefficient of variation with its standard error, what is left of it without the part
    between times, and the mean squared norm of the gradient with its standard error and the straight line in 1/B.

    Args:
        batch_sizes: at least two, rising, each a multiple of the first.
        n: losses measured without gradients, half of them at the times of the other half; a multiple of twice the
            largest batch size.
        repeats: independent gradients of the largest batch, >= 4.
    """

    copies = True

    def __init__(
        self,
        batch_sizes: Sequence[int] = (4, 8, 16, 32, 64),
        n: int = 8192,
        repeats: int = 32,
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        sizes = list(batch_sizes)
        rising = len(sizes) >= 2 and sizes[0] >= 1 and all(b > a for a, b in itertools.pairwise(sizes))
        if not rising or any(b % sizes[0] for b in sizes):
            raise ValueError(f"batch_sizes={sizes}: need at least two, rising, each a multiple of the first")
        if n < 8 * sizes[-1] or n % (2 * sizes[-1]):
            raise ValueError(f"n={n}: need a multiple of {2 * sizes[-1]}, twice the largest batch, at least 4 of them")
        if repeats < 4:
            raise ValueError(f"repeats={repeats}: need at least 4")
        self.sizes, self.n, self.repeats = sizes, n, repeats

    def look(self, subject: Subject) -> Finding:
        objective = Objective(subject)
        timesteps = copy.deepcopy(subject.run.parts.timesteps).to(subject.device)
        batch = subject.run.parts.config["data"]["batch_size"]
        seen = subject.run.step * batch
        timesteps.advance(seen)
        taught(timesteps, objective)
        tell = subject.progress("measuring losses and gradients", self.repeats + 2)

        def times(n: int, what: str, k: int = 0) -> tuple[Tensor, Tensor]:
            u = torch.rand(n, generator=generator(subject.seed, "independent t", what, k), dtype=torch.float64)
            u = u.to(subject.schedule.device)
            t = timesteps.icdf(u, subject.run.schedule)
            w = timesteps.weights(t, subject.run.schedule).cpu()
            return t if timesteps.steps is None else nearest_below(t, timesteps.steps), w

        t, w = times(self.n // 2, "losses")
        pairs = torch.stack([w * objective.values(t, "losses", k) for k in range(2)])  # (2, n/2), at the same times
        tell(1)
        squares = []
        for k in range(self.repeats):
            at, weight = times(self.sizes[-1], "gradients", k)
            squares.append(self.squared_norms(objective, at, weight, k))
            tell(1)
        successive = []
        for k in range(STEPS):
            timesteps.advance(seen + k * batch)
            own, weight = timesteps(self.sizes[-1], subject.run.schedule, Place(subject.seed, seen + k * batch))
            successive.append((weight.cpu() * objective.values(own, "successive", k)).mean().item())
        tell(1)
        noise = noise_scale(torch.tensor(squares, dtype=torch.float64), self.sizes, subject.seed)
        loss = split(pairs)
        lag = lag_1(torch.tensor(successive, dtype=torch.float64))
        table = self.table(pairs, loss, squares, noise)
        return Finding(
            table=table,
            protocol=subject.protocol(
                self.n,
                sampled=False,
                times="independent, of the run's density; never stratified",
                timesteps=type(timesteps).__name__,
                repeats=self.repeats,
            ),
            records=self.records(table, loss, noise, lag, successive),
            alarms=self.alarms(lag, successive, loss, type(timesteps).__name__),
            facts={**loss, **noise, "lag_1": lag, "successive": successive},
            tensors={"t": t[:SHOWN].cpu(), "losses": pairs[0, :SHOWN]},
        )

    def squared_norms(self, objective: Objective, t: Tensor, w: Tensor, k: int) -> list[float]:
        """The mean |g_B|^2 over the batches of each size that one batch of the largest size is made of."""
        first = self.sizes[0]
        sums: list[Tensor | None] = [None] * len(self.sizes)
        counts, squares = [0] * len(self.sizes), [[] for _ in self.sizes]
        for part, (at, weight) in enumerate(zip(t.split(first), w.split(first), strict=True)):
            losses = objective.losses(at, "gradients", k, part)
            gradient = objective.gradient((weight.to(losses) * losses).mean())
            for i, size in enumerate(self.sizes):
                so_far = sums[i]
                sums[i], counts[i] = gradient if so_far is None else so_far + gradient, counts[i] + 1
                if counts[i] == size // first:
                    squares[i].append(((sums[i] / counts[i]).square().sum()).item())  # pyright: ignore
                    sums[i], counts[i] = None, 0
        return [sum(values) / len(values) for values in squares]

    def table(
        self, pairs: Tensor, loss: dict[str, float], squares: list[list[float]], noise: dict[str, float]
    ) -> dict[str, list]:
        found: dict[str, list] = {"batch_size": self.sizes}
        norms = torch.tensor(squares, dtype=torch.float64)
        cv, error = zip(*(variation(pairs, size) for size in self.sizes), strict=True)
        root = [math.sqrt(size) for size in self.sizes]
        found["loss_cv"] = [c / r for c, r in zip(cv, root, strict=True)]
        found["loss_cv_sqrt_b"], found["loss_cv_sqrt_b_se"] = list(cv), list(error)
        found["loss_cv_without_t"] = [math.sqrt(max(loss["within"], 0)) / loss["mean"] / r for r in root]
        found["gradient_squared"] = norms.mean(0).tolist()
        found["gradient_squared_se"] = (norms.std(0) / math.sqrt(self.repeats)).tolist()
        found["gradient_squared_line"] = [noise["signal"] + noise["trace"] / size for size in self.sizes]
        return found

    def records(
        self,
        table: dict[str, list],
        loss: dict[str, float],
        noise: dict[str, float],
        lag: float,
        successive: list[float],
    ) -> list[Measurement]:
        protocol = {"times": "independent", "batch_sizes": self.sizes}
        pooled = math.sqrt(loss["between"] + loss["within"]) / loss["mean"]
        worst = max(abs(value / pooled - 1) for value in table["loss_cv_sqrt_b"])
        found = [
            Measurement("loss_cv_sqrt_b", pooled, "none", protocol=protocol, details={"largest_deviation": worst}),
            Measurement("loss_variance_between_t", loss["between_share"], "none", protocol=protocol, details=loss),
            Measurement("loss_lag_1", lag, "none", {"independent": 0.0}, protocol, {"losses": successive}),
        ]
        if loss["log_share"] is not None:
            found.append(Measurement("log_loss_explained_by_t", loss["log_share"], "none", protocol=protocol))
        if noise["b_simple"] is not None:
            found.append(
                Measurement("gradient_noise_scale", noise["b_simple"], "none", protocol=protocol, details=noise)
            )
        return found

    def alarms(self, lag: float, successive: list[float], loss: dict, timesteps: str) -> list[str]:
        if lag >= ALTERNATES:
            return []
        ratios = [max(a / b, b / a) for a, b in itertools.pairwise(successive)]
        share = loss["log_share"]
        due = "" if share is None else f"; t explains {share:.0%} of the variance of a sample's log loss"
        return [
            f"the losses of successive steps alternate: lag-1 autocorrelation {lag:.2f}, below {ALTERNATES}, by a "
            f"factor of {sorted(ratios)[len(ratios) // 2]:.2g} in the median{due}: look at how {timesteps} draws times "
            "before the optimizer"
        ]

    def draw(self, finding: Finding) -> Image.Image:
        table, facts = finding.table, finding.facts
        figure, (cv, gradient, times, steps) = sheet(2, 2, 4.3, 3.1)
        sizes, pooled = table["batch_size"], math.sqrt(facts["between"] + facts["within"]) / facts["mean"]
        cv.axhspan(0.95 * pooled, 1.05 * pooled, color=GREY, alpha=0.25, label="one sample's, ±5%")
        error = [2 * e for e in table["loss_cv_sqrt_b_se"]]
        cv.errorbar(sizes, table["loss_cv_sqrt_b"], yerr=error, fmt="o", color=COLOURS[0], label="measured, 2 SE")
        left = [c * math.sqrt(b) for c, b in zip(table["loss_cv_without_t"], sizes, strict=True)]
        cv.plot(sizes, left, "--", color=COLOURS[1], label="without the part between times")
        cv.set(xscale="log", xlabel="batch size B", ylabel="cv of a step's loss × sqrt(B)", xticks=sizes)
        cv.set_xticks(sizes, [str(b) for b in sizes])
        cv.set_xticks([], minor=True)
        cv.set(ylim=(0, None), title=f"{facts['between_share']:.0%} of the loss variance is between times")
        inverse = [1 / b for b in sizes]
        line = [facts["signal"] + facts["trace"] * x for x in (0, *inverse)]
        gradient.plot([0, *inverse], line, color=GREY, label="|G|² + tr(Σ)/B")
        error = [2 * e for e in table["gradient_squared_se"]]
        gradient.errorbar(
            inverse, table["gradient_squared"], yerr=error, fmt="o", color=COLOURS[0], label="measured, 2 SE"
        )
        title = "|G|² is lost in the noise: more repeats"
        if facts["b_simple"] is not None:
            low, high = facts["low"], "∞" if facts["high"] is None else digits(facts["high"])
            title = f"B_simple = {digits(facts['b_simple'])} samples [{digits(low)}, {high}]"
        gradient.set(xlabel="1/B", ylabel="mean |g_B|²", title=title, ylim=(0, None))
        losses = finding.tensors["losses"].numpy()
        share = facts["log_share"]
        times.scatter(finding.tensors["t"].numpy(), losses, s=4, color=COLOURS[0], linewidths=0, alpha=0.6)
        times.set(xlabel="t (0 data, 1 noise)", ylabel="loss of one sample")
        if share is not None:
            times.set(yscale="log")
        times.set_title("loss over t" if share is None else f"t explains {share:.0%} of the variance of log loss")
        steps.plot(range(len(facts["successive"])), facts["successive"], color=COLOURS[0], marker=".")
        steps.set(xlabel="successive step, the run's own times", ylabel=f"loss of a step, B = {sizes[-1]}")
        steps.set_title(f"lag-1 autocorrelation {facts['lag_1']:.2f} (independent: 0)")
        for axis in (cv, gradient):
            axis.legend()
        return render(figure)


def digits(value: float) -> str:
    """Three of a number, the rest as zeros."""
    return f"{float(f'{value:.3g}'):,.10g}"


def variation(pairs: Tensor, size: int) -> tuple[float, float]:
    """sqrt(B) times the coefficient of variation of the mean loss of batches of B, of losses (2, n) whose rows are
    independent samples each, at the same times in both; and its standard error."""
    means = pairs.view(2, -1, size).mean(2)
    away = (means - pairs.mean(1, keepdim=True)).square()
    variance = (away.sum(1) / (means.shape[1] - 1)).mean()
    cv = (size * variance).sqrt() / pairs.mean()
    each = away.mean(0)  # two rows of the same times are not independent
    return cv.item(), (cv / 2 * each.std() / each.mean() / math.sqrt(len(each))).item()


def split(pairs: Tensor) -> dict:
    """The variance of a loss between times, the covariance of the two samples at each time, and at equal times, half
    the mean squared difference; and the same share of log losses, None where one is not positive. pairs is (2, n)."""

    def parts(values: Tensor) -> tuple[float, float]:
        away = values - values.mean()
        return (away[0] * away[1]).mean().item(), ((values[0] - values[1]).square().mean() / 2).item()

    between, within = parts(pairs)
    found = {"mean": pairs.mean().item(), "between": between, "within": within}
    found["between_share"] = between / (between + within) if between + within > 0 else 0.0
    found["log_share"] = None
    if bool((pairs > 0).all()):
        between, within = parts(pairs.log())
        found["log_share"] = between / (between + within) if between + within > 0 else 0.0
    return found


def noise_scale(squares: Tensor, sizes: Sequence[int], seed: int) -> dict:
    """|G|^2, tr(Sigma) and their ratio with its 95% bootstrap interval, of mean squared norms (repeats, sizes): the
    smallest and the largest size. The ratio is None where |G|^2 is not above 0, and so is an end of the interval."""
    b, large = sizes[0], sizes[-1]

    def estimate(means: Tensor) -> tuple[Tensor, Tensor]:
        small, big = means[..., 0], means[..., -1]
        return (large * big - b * small) / (large - b), (small - big) / (1 / b - 1 / large)

    signal, trace = (value.item() for value in estimate(squares.mean(0)))
    index = torch.randint(len(squares), (RESAMPLES, len(squares)), generator=generator(seed, "bootstrap"))
    signals, traces = estimate(squares[index].mean(1))
    # 1/B_simple has no pole where |G|^2 crosses 0
    low, high = (signals / traces).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "signal": signal,
        "trace": trace,
        "b_simple": trace / signal if signal > 0 else None,
        "low": 1 / high if high > 0 else None,
        "high": 1 / low if low > 0 else None,
    }


def lag_1(values: Tensor) -> float:
    """The autocorrelation of successive values; 0 where they are all the same."""
    away = values - values.mean()
    size = away.square().sum().item()
    return (away[1:] * away[:-1]).sum().item() / size if size > 0 else 0.0
