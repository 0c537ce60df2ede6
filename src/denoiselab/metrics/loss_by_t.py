"""The squared error as a function of t: sums per bucket, and measurements at fixed noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from denoiselab.data.base import Batch, Samples
from denoiselab.denoiser import Denoiser
from denoiselab.guidance import DenoiserLike
from denoiselab.loss import Loss
from denoiselab.rng import generator
from denoiselab.schedule import Schedule

PANELS = ("x_0", "eps", "v")
"""The same error in three units: |x_0|^2 times 1, SNR and SNR + 1."""


class Buckets:
    """Counts, sums and sums of squares of the x_0, eps and v errors per bucket floor(K t), on the device.

    ``sums`` (K, 7) is all of the state: add it over ranks, save it, restore it.

    >>> from denoiselab.schedule import Cosine
    >>> buckets = Buckets(2)
    >>> buckets.add(Cosine(), torch.tensor([0.1, 0.2]), torch.tensor([1.0, 3.0]))
    >>> row = buckets.row("b"); row["b/count"], row["b/x_0"]
    ([2, 0], [2.0, None])
    """

    def __init__(self, count: int):
        self.sums = torch.zeros(count, 1 + 2 * len(PANELS), dtype=torch.float64)

    @classmethod
    def of(cls, sums: Tensor) -> Buckets:
        made = cls(len(sums))
        made.sums = sums
        return made

    @property
    def count(self) -> int:
        """K."""
        return len(self.sums)

    def add(self, schedule: Schedule, t: Tensor, mse: Tensor) -> None:
        """Add samples at times t (B,) with mean squared x_0 errors mse (B,). No host synchronisation."""
        snr = schedule.log_snr(t).double().exp()
        error = mse.double()
        panels = torch.stack([error, snr * error, (snr + 1) * error], dim=1)  # (B, 3)
        values = torch.cat([torch.ones_like(panels[:, :1]), panels, panels.square()], dim=1)  # (B, 7)
        bucket = (t * self.count).long().clamp(0, self.count - 1)
        # A product with the one-hot matrix: index_add_ is not deterministic on GPUs.
        self.sums = self.sums.to(t.device) + F.one_hot(bucket, self.count).to(values).T @ values

    def row(self, prefix: str) -> dict[str, list]:
        """Per bucket: count; mean and standard error for each panel; None where a bucket is empty (or has one)."""
        counts = [int(n) for n in self.sums[:, 0].tolist()]
        values: dict[str, list] = {f"{prefix}/count": counts}
        for k, panel in enumerate(PANELS):
            sums = self.sums[:, 1 + k].tolist()
            squares = self.sums[:, 1 + len(PANELS) + k].tolist()
            means = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
            values[f"{prefix}/{panel}"] = means
            values[f"{prefix}/{panel}_se"] = [
                math.sqrt(max(q / n - m * m, 0.0) / (n - 1)) if m is not None and n > 1 else None
                for q, m, n in zip(squares, means, counts, strict=True)
            ]
        return values


@torch.no_grad()
def held_out_losses(
    denoiser: Denoiser,
    schedule: Schedule,
    held_out: Samples,
    *,
    loss: Loss,
    buckets: int = 10,
    repeats: int = 4,
    seed: int = 0,
    batch: int = 512,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[Buckets, Tensor]:
    """The held-out error per bucket, and [sum of the training loss, count].

    Sample i is seen ``repeats`` times, at t = (j + u_i)/repeats and with noise addressed by (seed, i, j), so the
    result depends on neither batch size nor ranks. Ranks take every world-th sample; none is repeated to fill up.
    The denoiser and the loss are put in evaluation mode for the time. A call of the denoiser has at most ``batch``
    rows, but ``repeats`` at least.
    """
    own = torch.arange(len(held_out))[rank::world]
    found, total = Buckets(buckets), torch.zeros(2, dtype=torch.float64, device=device)
    modes = {module: module.training for module in (denoiser, loss)}
    for module in modes:
        module.eval()
    try:
        for part in own.split(max(1, batch // repeats)) if len(own) else ():
            x_0, times, noise, cond = repeated(held_out.batch(part), schedule, repeats, seed, device)
            times = times.flatten().to(device)
            shaped = times.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1))
            losses, parts = loss(denoiser, schedule, x_0, noise, shaped, **cond)
            found.add(schedule, parts.get("t", times), parts["mse"])
            total += torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
    finally:
        for module, training in modes.items():
            module.train(training)
    return found, total


@torch.no_grad()
def errors_by_t(
    denoiser: DenoiserLike,
    schedule: Schedule,
    batch: Batch,
    *,
    repeats: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tell: Callable[[int], object] = lambda done: None,
    at_once: int = 256,
) -> tuple[Tensor, Tensor]:
    """t and the mean over a sample's values of (x_0_hat - x_0)^2 there, (n, repeats) each, on the CPU.

    Sample i is seen at t = (j + u_i)/repeats, j = 0..repeats-1, with the noise of ``held_out_losses``, addressed by
    (seed, i, j). So every ``repeats``-th part of [0, 1] has one time of each sample, and two denoisers can be compared
    sample by sample.

    Args:
        denoiser: any callable (x_t, alpha_t, sigma_t, **cond) -> x_0_hat, in evaluation mode.
        batch: samples with their ids and what the denoiser is told of them.
        tell: is told how many samples were added.
        at_once: rows of a call, at most, but ``repeats`` at least. The result does not depend on it.
    """
    times, errors = [], []
    for part in torch.arange(len(batch["id"])).split(max(1, at_once // repeats)):
        some = {"x_0": batch["x_0"][part], "id": batch["id"][part]}
        some["cond"] = {key: value[part] for key, value in batch["cond"].items()}
        x_0, t, eps, cond = repeated(some, schedule, repeats, seed, device)
        alpha_t, sigma_t = schedule(t.to(device).view(-1, *[1] * (x_0.ndim - 1)))
        x_0_hat = denoiser(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
        times.append(t)
        errors.append((x_0_hat - x_0).square().flatten(1).mean(1).view(-1, repeats).double().cpu())
        tell(len(part))
    return torch.cat(times), torch.cat(errors)


def repeated(
    batch: Batch, schedule: Schedule, repeats: int, seed: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """x_0 and eps (n repeats, ...) and the condition on the device, each sample ``repeats`` times in a row; and its
    times (n, repeats), on the CPU."""
    x_0 = batch["x_0"].repeat_interleave(repeats, 0).to(device)
    u, eps = draws(batch["id"].tolist(), tuple(x_0.shape[1:]), seed, repeats)
    t = ((torch.arange(repeats) + u[:, None]) / repeats).clamp_min(schedule.earliest)
    cond = {key: value.repeat_interleave(repeats, 0).to(device) for key, value in batch["cond"].items()}
    return x_0, t, eps.to(device), cond


def draws(ids: list[int], shape: tuple[int, ...], seed: int, repeats: int) -> tuple[Tensor, Tensor]:
    """u (n,) in [0, 1) and eps (n repeats, ...), each addressed by (seed, id)."""
    u, eps = [], []
    for i in ids:
        g = generator(seed, "held-out", i)
        u.append(torch.rand((), generator=g))
        eps.append(torch.randn((repeats, *shape), generator=g))
    return torch.tensor(u), torch.cat(eps) if eps else torch.zeros(0, *shape)
