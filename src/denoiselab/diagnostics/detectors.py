"""What looks wrong in a loss as a function of t.

None of them reads the loss in one unit alone, since the same healthy model falls in one and rises in another: they
compare with what a filter or the data themselves say of the same times, so that they mean the same for every target,
schedule and data set.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

EARLY = 3.0
"""Times the control that the first bucket's loss may be."""

SPIKE = 5.0
"""Robust standard errors that a bucket may be off its neighbourhood."""

FLAT = 1.5
"""Greatest over smallest bucket of a curve that is flat."""

SLIGHT = 0.01
"""The share of what is predicted that a network is always allowed to be off by."""

FEWEST, MOST = 25, 4
"""Samples in a part of a bucket, and parts of a bucket, among which a step is looked for."""


class Seen(NamedTuple):
    """What a detector measured, whether it is too much, and a sentence for it."""

    value: float
    limit: float
    alarm: str | None
    details: dict[str, Any]


def by_bucket(t: Tensor, values: Tensor, buckets: int) -> Tensor:
    """The mean of values (n,) in each bucket floor(K t), NaN where there is none."""
    place = (t.flatten() * buckets).long().clamp(0, buckets - 1)
    sums = torch.zeros(buckets, dtype=torch.float64).index_add_(0, place, values.flatten().double())
    return sums / torch.bincount(place, minlength=buckets)


def high_early(t: Tensor, loss: Tensor, control: Tensor, power: Tensor, buckets: int) -> Seen | None:
    """The first bucket's loss in units of what the network predicts, over that of the best linear filter; more than 3
    is too much.

    Its own unit is the one that a network is trained to be even in: a network that predicts x_0 has another error in
    units of eps than one that predicts eps. A linear filter is within the reach of any network, and its loss is
    known for any data; at low noise it is near the optimum of data with a density (in units of eps, 1). A hundredth of
    the power of what is predicted counts as nothing. None where no time is in the bucket.

    Args:
        t: times, (n,).
        loss, control: squared errors in that unit there, (n,): the model's, and the filter's on average.
        power: the mean square of what is predicted there, (n,).
    """
    allowed = torch.maximum(control, SLIGHT * power)
    ratio = (by_bucket(t, loss, buckets)[0] / by_bucket(t, allowed, buckets)[0]).item()
    if math.isnan(ratio):
        return None
    alarm = None
    if ratio > EARLY:
        alarm = (
            f"the loss at t < {1 / buckets:.2g} is {ratio:.3g} times that of the best linear filter (alarm at "
            f"{EARLY:g}): something is wrong at low noise, such as the scaling of the data or of the network's input"
        )
    return Seen(ratio, EARLY, alarm, {})


def spike(t: Tensor, loss: Tensor, control: Tensor, buckets: int) -> Seen | None:
    """The largest step onto one bucket and off it again, in robust standard errors; more than 5 is too much. None where
    there are too few samples to tell.

    A bucket that holds a legitimate peak rises and falls smoothly; one whose predictions are wrong has a step at both
    of its edges. So L = log median (loss/control) is read in parts of buckets, and a line through those of each bucket
    is carried on to its edges. Both steps must go the same way, seen from inside, and the smaller counts.
    Its standard error is that of the medians, by the spread of logarithms in each part, together with the spread of
    the steps at all edges (both as 1.4826 times the median absolute deviation), which is what the curve does anyway.

    Args:
        t: times, (n,).
        loss, control: squared errors there in one unit, which one does not matter, (n,).
    """
    t, log = t.flatten(), (loss / control).flatten().clamp_min(1e-30).log()
    parts = min(MOST, len(t) // (buckets * FEWEST))
    if parts < 2 or buckets < 3:
        return None
    place = (t * buckets * parts).long().clamp(0, buckets * parts - 1)
    middle, error = torch.zeros(2, buckets * parts, dtype=torch.float64)
    for k in range(buckets * parts):
        own = log[place == k]
        if len(own) < 5:
            return None
        middle[k] = own.median()
        error[k] = math.sqrt(math.pi / 2 / len(own)) * spread(own)
    x = torch.arange(parts, dtype=torch.float64) + 0.5
    x = x - x.mean()
    to_end = 1 / parts + parts / 2 * x / x.square().sum()  # a line's value at the end of a bucket, by least squares
    middle, error = middle.view(buckets, parts), error.view(buckets, parts)
    left, right = (middle @ to_end)[:-1], (middle @ to_end.flip(0))[1:]
    variance = (error**2 @ to_end**2)[:-1] + (error**2 @ to_end.flip(0) ** 2)[1:]
    step = right - left
    z = step / (variance + spread(step) ** 2).sqrt().clamp_min(1e-12)  # at edge k, between buckets k and k + 1
    enter, leave = torch.cat([-z[:1], z]), torch.cat([-z, z[-1:]])  # the first and the last bucket have one edge
    same = enter * leave > 0
    height = torch.where(same, torch.minimum(enter.abs(), leave.abs()), torch.zeros_like(enter))
    k = int(height.argmax())
    value, up = height[k].item(), bool(enter[k] > 0)
    alarm = None
    if value > SPIKE:
        alarm = (
            f"the loss at t in [{k / buckets:.3g}, {(k + 1) / buckets:.3g}) steps {'up' if up else 'down'} and back, "
            f"by {value:.3g} robust standard errors at both ends (alarm at {SPIKE:g}): these levels are treated "
            "otherwise than their neighbours, as by a damaged table"
        )
    return Seen(value, SPIKE, alarm, {"bucket": k})


def spread(values: Tensor) -> float:
    """1.4826 times the median absolute deviation: a Gaussian's standard deviation."""
    return 1.4826 * (values - values.median()).abs().median().item()


def flat(t: Tensor, losses: dict[str, Tensor], controls: dict[str, Tensor], buckets: int) -> Seen | None:
    """The least, over units, of a curve's greatest bucket over its smallest; below 1.5 is flat.

    Losses are in units of the power of what is predicted, so that a network that predicts nothing has a loss of 1 in
    every bucket. Each unit is looked at (a constant estimate of eps is flat in units of eps alone), but only where the
    control varies by more than 1.5^2: of white data v cannot be told from x_t at all, and there a flat loss is right.
    None where that leaves no unit.

    Args:
        t: times, (n,).
        losses, controls: squared errors there over the power, by unit, (n,): the model's, and the data's own optimum
            where it is known, else the best linear filter's.
    """
    ratios, need = {}, {}
    for unit, loss in losses.items():
        curve, control = (by_bucket(t, values, buckets) for values in (loss, controls[unit]))
        here = curve.isfinite()
        need[unit] = (control[here].max() / control[here].min().clamp_min(1e-300)).item()
        if need[unit] > FLAT**2:
            ratios[unit] = (curve[here].max() / curve[here].min().clamp_min(1e-300)).item()
    if not ratios:
        return None
    unit = min(ratios, key=lambda name: ratios[name])
    alarm = None
    if ratios[unit] < FLAT:
        alarm = (
            f"the loss in units of {unit} varies {ratios[unit]:.3g}-fold over buckets (alarm below {FLAT:g}), where it "
            f"should vary {need[unit]:.3g}-fold: the network may say nothing or always the same, not see t, or predict "
            "another target than is read"
        )
    return Seen(ratios[unit], FLAT, alarm, {"unit": unit, "control": need[unit]})
