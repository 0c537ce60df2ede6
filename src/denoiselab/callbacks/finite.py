"""The end of a run whose numbers are none any more."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoiselab import sharding
from denoiselab.errors import NonFiniteLoss
from denoiselab.module import Bad, Diffusion

BUCKETS = 10
"""Equal ones of t, by which a sample's time is told."""


def stop_if_not_finite(module: Diffusion) -> None:
    """Raise NonFiniteLoss if any step so far had a loss or a gradient that is not a number: one device read, on all
    ranks at the same place.

    The error's ``report`` has the whole batch, this rank's in front.
    """
    if module.bad is None or (step := int(module.bad.step)) < 0:
        return
    _, norm, samples = module.bad
    if module.trainer.world_size > 1:
        samples = module.all_gather(samples).flatten(0, 1)  # pyright: ignore[reportAttributeAccessIssue]
    raise _error(module, step, Bad(torch.tensor(step), norm, samples))


def stop_if_weights_are_not_finite(module: Diffusion) -> None:
    """Raise NonFiniteLoss if a weight, an average or a state of the optimizer is not a number: one device read, on
    all ranks. What is saved is read by nobody where it holds one."""
    (optimizer, *_) = module.trainer.optimizers
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    state = {
        f"{key} of {names.get(id(parameter), 'a parameter')}": value
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    found = {
        name: sharding.own(value)
        for name, value in {**module.state_dict(), **state}.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    fine = torch.stack([value.isfinite().all().to(module.device) for value in found.values()]).int()
    if module.trainer.world_size > 1:
        torch.distributed.all_reduce(fine, op=torch.distributed.ReduceOp.MIN)
    bad = [name for name, good in zip(found, fine.tolist(), strict=True) if not good]
    if bad:
        step = module.trainer.global_step
        raise NonFiniteLoss(
            f"non-finite values in {bad[0]}{f' and {len(bad) - 1} more' if bad[1:] else ''} at step {step}; "
            "it was not saved; try a lower optimizer.lr or trainer.gradient_clip=1"
        )


def _error(module: Diffusion, step: int, bad: Bad) -> NonFiniteLoss:
    lr = module.trainer.optimizers[0].param_groups[0]["lr"]
    rows = sorted(bad.samples.tolist(), key=lambda row: math.isfinite(row[1]))
    ill = [row for row in rows if not math.isfinite(row[1])]
    if ill:
        t, loss, index = ill[0]
        bucket = min(int(t * BUCKETS), BUCKETS - 1)
        others = f" and of {len(ill) - 1} more" if ill[1:] else ""
        what = f"loss {loss} of sample {index:.0f} at t={t:.4g} (bucket {bucket} of 0-{BUCKETS - 1}){others}"
    else:
        times = [row[0] for row in rows]
        what = f"all losses finite, at t from {min(times):.4g} to {max(times):.4g}"
    ids = [int(row[2]) for row in rows]
    shown = ", ".join(str(index) for index in ids[:8]) + (", ..." if ids[8:] else "")
    error = NonFiniteLoss(
        f"non-finite loss or gradient at step {step}: {what}; gradient norm {float(bad.norm):.4g}, lr {lr:.3g}; batch "
        f"of samples {shown}; no checkpoint was made since; try a lower optimizer.lr or trainer.gradient_clip=1"
    )
    samples = [{"id": int(index), "t": t, "loss": _text(loss)} for t, loss, index in rows]
    error.report = {"step": step, "lr": lr, "gradient_norm": _text(float(bad.norm)), "samples": samples}
    return error


def _text(value: float) -> float | str:
    """A number for JSON, which has no NaN."""
    return value if math.isfinite(value) else str(value)
