"""Whether training goes well, by the rows that it wrote."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.errors import UserError
from denoiselab.loss.weighted import WeightedLoss
from denoiselab.metrics.base import Measurement
from denoiselab.rng import Noise
from denoiselab.rows import rows
from denoiselab.timesteps import Place

SWING, RISE, DEVIATIONS = 6.0, 0.2, 4.0
"""Robust standard deviations of a row, share of the minimum that the average may rise, and standard deviations of the
share of dropped conditions."""

BLOWN, NOTHING = 3.0, 0.95
"""Of the loss of a network that answers 0: a row above so many times it, and an end above that share of it."""

WINDOW, FEWEST, SMOOTH, FLAT = 25, 10, 0.2, 0.05
"""Rows that a row is compared with, at most and at least; weight of a row in the average; share of the whole descent
within which a curve is flat."""

CURVES = {
    "train/loss": "training batches",
    "val/loss": "held out, EMA weights",
    "val/loss_raw": "held out, raw weights",
}


class LossCurve(Diagnostic):
    """The training and the held-out loss over steps, as metrics.jsonl has them, and what looks wrong in them.

    Swings: a row is above the median of the up to 25 rows before it by more than 6 robust standard deviations (1.4826
    times the median absolute deviation of these rows, or what successive ones differ by if that is more), or the
    average of rows, exponentially weighted by 0.2, rises by more than 20% of its minimum and by more than 6 of its own
    standard deviations. A learning rate that is too large does this; so do bad samples. Of held-out losses the rise
    counts too: there it is memorisation.

    Both compare with what was before. What happens before the first rows shows against the loss of a network that
    answers 0, as most do at first: a row above 3 times that is an alarm, and so is an end within 5% of it. It is known
    where the loss is a weighted squared error with fixed weights.

    Flat: the step from which the average stays within 5% of the whole descent of where it ends, which says how much of
    the training still changed the loss; an alarm where there was no descent at all.

    Dropped conditions: their share over the run, exactly counted (train/null_share), against p_null; an alarm beyond 4
    standard deviations of a binomial count.
    """

    generates = None

    def __init__(self, every: int = 1000, budget: str | None = "5%"):
        super().__init__(every, budget)

    def look(self, subject: Subject) -> Finding:
        run = subject.run
        found = [row for row in rows(run.folder / "metrics.jsonl") if row["step"] <= run.step]
        curves = {
            name: [(row["step"], float(row[name])) for row in found if isinstance(row.get(name), int | float)]
            for name in CURVES
        }
        if not curves["train/loss"]:
            raise UserError(
                f"diagnostics.loss_curve: no train/loss in {run.folder / 'metrics.jsonl'}; need a run's folder"
            )
        steps, losses = (list(column) for column in zip(*curves["train/loss"], strict=True))
        average = smoothed(losses)
        worst, scales = swings(losses)
        rise, least = risen(average, noise(losses))
        alarms = []
        if worst is not None and worst[1] > SWING:
            alarms.append(
                f"the training loss at step {steps[worst[0]]} is {worst[1]:.3g} robust standard deviations above the "
                f"rows before it (alarm at {SWING:g}): it swings; try a lower learning rate, or look at the data there"
            )
        if rise > RISE:
            alarms.append(
                f"the average training loss rose by {rise:.0%} above its minimum of {average[least]:.3g} at step "
                f"{steps[least]} (alarm at {RISE:.0%}): training diverges; try a lower learning rate"
            )
        zero = answers_nothing(subject)
        if zero is not None:
            highest = max(range(len(losses)), key=lambda i: losses[i])
            if losses[highest] > BLOWN * zero:
                alarms.append(
                    f"the training loss at step {steps[highest]} is {losses[highest]:.3g}, "
                    f"{losses[highest] / zero:.3g} times that of a network that answers 0 (alarm at {BLOWN:g}): it "
                    "blew up; try a lower learning rate"
                )
            if len(losses) >= FEWEST and average[-1] > NOTHING * zero:
                alarms.append(
                    f"the training loss ends at {average[-1]:.3g}, and a network that answers 0 has {zero:.3g}: "
                    "nothing was learned, or all was lost"
                )
        since, fell = flat_since(steps, average, noise(losses))
        if not fell and len(losses) >= 2 * FEWEST:
            alarms.append("the training loss never fell beyond its noise: nothing is learned")
        for name in ("val/loss", "val/loss_raw"):
            if len(curves[name]) > 2:
                at, values = zip(*curves[name], strict=True)
                up, low = risen(list(values), 0.0)
                if up > RISE:
                    alarms.append(
                        f"{name} rose by {up:.0%} above its minimum of {values[low]:.3g} at step {at[low]} (alarm at "
                        f"{RISE:.0%}): the model learns its training samples by heart, or diverges"
                    )
        drops = self.drops(subject, found)
        if drops is not None and abs(drops["share"] - drops["p_null"]) > DEVIATIONS * drops["sd"]:
            alarms.append(
                f"{drops['share']:.4f} of the conditions were dropped in {drops['n']:,} samples, and p_null is "
                f"{drops['p_null']:g} ± {DEVIATIONS * drops['sd']:.4f} ({DEVIATIONS:g} standard deviations)"
            )
        records = [
            Measurement("train_loss_rise", rise, "lower", {"alarm": RISE}),
            Measurement("train_loss_flat_since", float(since), "none", {"last step": float(steps[-1])}),
        ]
        if worst is not None:
            records.append(Measurement("train_loss_swing", worst[1], "lower", {"alarm": SWING}))
        if drops is not None:
            limits = {"p_null": drops["p_null"], "sd": drops["sd"]}
            records.append(Measurement("null_share", drops["share"], "none", limits, {"n": drops["n"]}))
        return Finding(
            table={"step": steps, "train_loss": losses, "average": average, "limit": scales},
            protocol=subject.protocol(len(losses), sampled=False, counted="rows"),
            records=records,
            alarms=alarms,
            facts={
                "curves": {name: [list(point) for point in points] for name, points in curves.items()},
                "flat_since": since,
                "zero": zero,
                "drops": drops,
                "formula": run.loss.formula,
            },
        )

    @staticmethod
    def drops(subject: Subject, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The realised share of dropped conditions over the run, and what it should be."""
        config = subject.run.parts.config
        batch, p, before, counted = config["data"]["batch_size"], config["p_null"], 0, []
        for row in found:
            if "train/loss" in row:
                if row.get("train/null_share") is not None:
                    counted.append((row["step"], row["train/null_share"], (row["step"] - before) * batch))
                before = row["step"]
        n = sum(samples for _, _, samples in counted)
        if not n:
            return None
        share = sum(part * samples for _, part, samples in counted) / n
        return {
            "share": share,
            "p_null": p,
            "n": n,
            "sd": math.sqrt(p * (1 - p) / n),
            "rows": [list(row) for row in counted],
        }

    def draw(self, finding: Finding) -> Image.Image:
        table, facts = finding.table, finding.facts
        drops = facts["drops"]
        figure, axes = sheet(1, 2 if drops else 1, 5.2 if drops else 6.9, 4.0)
        curve = axes[0]
        curve.plot(table["step"], table["train_loss"], color="#9ecae1", linewidth=0.9, label="training batches, rows")
        curve.plot(table["step"], table["average"], color=COLOURS[0], label="their average")
        limit = [float("nan") if value is None else value for value in table["limit"]]
        curve.plot(
            table["step"], limit, color=GREY, linestyle=":", label=f"swing: {SWING:g} robust standard deviations"
        )
        for index, name in enumerate(("val/loss", "val/loss_raw")):
            if facts["curves"][name]:
                points = zip(*facts["curves"][name], strict=True)
                curve.plot(*points, color=COLOURS[index + 1], linestyle=DASHES[index], marker="o", label=CURVES[name])
        curve.axvline(facts["flat_since"], color=GREY, linewidth=0.8, label=f"flat since step {facts['flat_since']}")
        if facts["zero"] is not None:
            zero = f"a network that answers 0: {facts['zero']:.3g}"
            curve.axhline(facts["zero"], color=GREY, linestyle="--", label=zero)
        shown = [*table["train_loss"], *table["average"]]
        low, high = min(shown), max(shown)
        curve.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        curve.set(xlabel="step", ylabel="training loss", title="the loss over steps")
        if low > 0 and high > 10 * low:
            curve.set_yscale("log")
            curve.set_ylim(0.9 * low, 1.1 * high)
        curve.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        if drops:
            self.draw_drops(axes[1], drops)
        return render(figure)

    @staticmethod
    def draw_drops(axis: Any, drops: dict[str, Any]) -> None:
        """The realised share so far, in the interval that shrinks with the number of samples."""
        steps, share, lower, upper, dropped, n = [], [], [], [], 0.0, 0
        for step, part, samples in drops["rows"]:
            dropped, n = dropped + part * samples, n + samples
            wide = DEVIATIONS * math.sqrt(drops["p_null"] * (1 - drops["p_null"]) / n)
            steps.append(step)
            share.append(dropped / n)
            lower.append(drops["p_null"] - wide)
            upper.append(drops["p_null"] + wide)
        axis.fill_between(steps, lower, upper, color=GREY, alpha=0.2, label=f"{DEVIATIONS:g} standard deviations")
        axis.axhline(drops["p_null"], color=GREY, label=f"p_null = {drops['p_null']:g}")
        axis.plot(steps, share, color=COLOURS[3], label="realised, up to the step")
        axis.set(xlabel="step", ylabel="share of samples", title="conditions that were dropped")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


class Zero(nn.Module):
    """A network that answers 0."""

    def __init__(self, outputs: int, like: Tensor):
        super().__init__()
        self.outputs, self.like = outputs, nn.Parameter(torch.zeros_like(like), requires_grad=False)

    def forward(self, x: Tensor, c_noise: Tensor, **cond: Tensor) -> Tensor:
        return torch.zeros_like(x).repeat_interleave(self.outputs, 1)


@torch.no_grad()
def answers_nothing(subject: Subject) -> float | None:
    """The training loss of a network that answers 0, on training samples at the times of the run; None where the loss
    asks for more than one network or its weights learn."""
    run = subject.run
    if type(run.loss) is not WeightedLoss or run.loss.state_dict() or run.parts.timesteps.learns:
        return None
    batch = subject.real(512, train=True)
    x_0 = batch["x_0"].to(run.device)
    timesteps = copy.deepcopy(run.parts.timesteps).to(run.device)
    t, w = timesteps(len(x_0), run.schedule, Place(run.parts.config["seed"], 0, 0, 1, 0, 1))
    t = t.to(torch.promote_types(x_0.dtype, torch.float32)).view(-1, *[1] * (x_0.ndim - 1))
    eps = Noise(subject.seed, batch["id"].tolist(), x_0.shape[1:], run.device)()
    denoiser = copy.copy(run.denoiser)
    denoiser._modules = {
        **run.denoiser._modules,
        "net": Zero(denoiser.net_outputs, next(run.denoiser.parameters())[:0]),
    }
    losses, _ = run.loss(denoiser, run.schedule, x_0, eps, t)
    return (w * losses).mean().item()


def smoothed(values: list[float]) -> list[float]:
    """The average of rows up to each, exponentially weighted; the first few as a plain mean."""
    found: list[float] = []
    for number, value in enumerate(values, 1):
        weight = max(SMOOTH, 1 / number)
        found.append(value if not found else found[-1] + weight * (value - found[-1]))
    return found


def noise(values: list[float]) -> float:
    """The robust standard deviation of a row about its neighbours, by differences of successive rows, which a slow
    descent leaves alone."""
    steps = [b - a for a, b in itertools.pairwise(values)]
    return 1.4826 * statistics.median(abs(step) for step in steps) / math.sqrt(2) if steps else 0.0


def swings(values: list[float]) -> tuple[tuple[int, float] | None, list[float | None]]:
    """(place, z) of the highest row above those before it, and for each row the value at which z is 6; None before
    there are enough."""
    worst, limits = None, []
    for i, value in enumerate(values):
        before = values[max(0, i - WINDOW) : i]
        if len(before) < FEWEST:
            limits.append(None)
            continue
        middle = statistics.median(before)
        scale = max(1.4826 * statistics.median(abs(v - middle) for v in before), noise(before), 1e-12 * abs(middle))
        limits.append(middle + SWING * scale)
        z = (value - middle) / max(scale, 1e-300)
        if worst is None or z > worst[1]:
            worst = (i, z)
    return worst, limits


def risen(average: list[float], sd: float) -> tuple[float, int]:
    """The largest rise above the minimum so far, as a share of that minimum, and where the minimum was; 0 where it is
    within 6 standard deviations of the average, and where the loss is not positive, of which there is no share."""
    own = sd * math.sqrt(SMOOTH / (2 - SMOOTH))
    best, at, low = 0.0, 0, 0
    for i, value in enumerate(average):
        if value < average[low]:
            low = i
        up = value - average[low]
        if average[low] > 0 and up > SWING * own and up / average[low] > best:
            best, at = up / average[low], low
    return best, at


def flat_since(steps: list[int], average: list[float], sd: float) -> tuple[int, bool]:
    """The step from which the average is within 5% of its whole descent of where it ends, or within two standard
    deviations of its own; and whether it fell beyond noise."""
    own = sd * math.sqrt(SMOOTH / (2 - SMOOTH))
    end = statistics.median(average[-max(1, len(average) // 5) :])
    fell = max(average) - end
    band = max(FLAT * fell, 2 * own)
    last = max((i for i, value in enumerate(average) if abs(value - end) > band), default=-1)
    return steps[min(last + 1, len(steps) - 1)], fell > SWING * own
