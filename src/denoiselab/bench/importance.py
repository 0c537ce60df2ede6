"""The history of importance sampling: our update against the loop over samples that is commonly taught.

Both take in the same batches of times and losses at T = 1000 and make the new probabilities. The loop reads one number
and writes one cell per sample; ours makes a fixed number of tensor operations, and must end with the same history, in
the same order, where cells occur several times in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoiselab.bench.record import Record, ratio, times
from denoiselab.bench.refusal import Disagreement
from denoiselab.bench.timing import Contender, alternate
from denoiselab.schedule import Linear
from denoiselab.timesteps import Importance

CELLS, HISTORY, FLOOR = 1000, 10, 0.001


class Loop:
    """The loop over samples, with a ring per cell."""

    def __init__(self, device: torch.device):
        self.losses = torch.zeros(CELLS, HISTORY, dtype=torch.float64, device=device)
        self.count = [0] * CELLS
        self.p = torch.full((CELLS,), 1 / CELLS, dtype=torch.float64, device=device)

    @property
    def oldest_first(self) -> Tensor:
        turn = torch.tensor(self.count, device=self.losses.device)[:, None]
        return self.losses.gather(1, (turn + torch.arange(HISTORY, device=turn.device)) % HISTORY)

    def update(self, t: Tensor, losses: Tensor) -> None:
        index = (t * CELLS).long().clamp(0, CELLS - 1)
        for i in range(len(t)):
            cell = int(index[i].item())
            self.losses[cell, self.count[cell] % HISTORY] = losses[i].item()
            self.count[cell] += 1
        if min(self.count) >= HISTORY:
            size = self.losses.square().mean(1).sqrt()
            self.p = (1 - FLOOR) * size / size.sum() + FLOOR / CELLS


def contender(
    name: str, update: Callable[[Tensor, Tensor], None], batch: int, block: int, device: torch.device
) -> Contender:
    """Takes in a block of batches in a turn; equal ones for every contender."""
    g = torch.Generator().manual_seed(0)
    drawn: list[tuple[Tensor, Tensor]] = []

    def prepare() -> None:
        drawn.clear()
        for _ in range(block):  # small t often, some cells more than HISTORY times in a batch
            u = torch.rand(2, batch, generator=g)
            drawn.append((u[0].square().to(device), u[1].to(device)))

    def run() -> None:
        for t, losses in drawn:
            update(t, losses)

    return Contender(name, run, prepare, per=block)


def measure(options: dict[str, Any], device: torch.device) -> list[Record]:
    """The time of an update.

    Args:
        options: rounds, batch (losses per update), block (updates per turn), at_least.
        device: where the histories are.

    Raises:
        Disagreement: the two end with different histories.
    """
    batch, block = options["batch"], options["block"]
    ours, loop = Importance(Linear(CELLS), history=HISTORY, floor=FLOOR).to(device), Loop(device)
    contenders = [
        contender("ours", ours.update, batch, block, device),
        contender("loop", loop.update, batch, block, device),
    ]
    alternate(contenders, options["rounds"], "importance sampling")
    if not torch.equal(ours.losses, loop.oldest_first) or not torch.allclose(ours.p, loop.p, rtol=1e-12, atol=0):
        raise Disagreement("importance: the two histories differ; nothing is reported")
    return [
        Record(
            "importance",
            f"update with {batch} losses",
            "an update",
            options["rounds"],
            times(contenders),
            ratio(contenders[1], contenders[0]),
            facts={"batch": batch, "block": block, "cells": CELLS, "history": HISTORY},
        )
    ]
