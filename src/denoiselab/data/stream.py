"""The order of training samples as a function of (seed, samples seen)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from denoiselab.rng import generator

Address = tuple[int, int]
"""(epoch, index): a sample as it is seen in one epoch, for augmentation to be seeded by."""

POOL = 16
"""Blocks that are shuffled together in a block-shuffled order."""


class MicroBatch(list[Address]):
    """The addresses of a micro-batch, and the run's seed, which augmentation is addressed by as well."""

    def __init__(self, addresses: Iterable[Address] = (), seed: int = 0):
        super().__init__(addresses)
        self.seed = seed


class Stream:
    """An endless stream of micro-batches, each a list of addresses.

    Position k of the stream is sample perm_e[k mod n] of epoch e = floor(k/n), perm_e drawn from (seed, e): without
    replacement within an epoch, nothing dropped, batches running over the epoch's end. Optimizer step g takes
    positions [g N, (g + 1) N) of global batch size N; ranks and accumulation only slice it. So the order does not
    depend on them, nor on the number of workers, and a run continues from any step.

    Where reading at random places is slow, ``block`` makes perm_e go through pools of 16 blocks, each block that many
    neighbours and drawn at random, with the samples of a pool shuffled among themselves. All of the above still holds.

    Args:
        n: the number of training samples.
        batch_size: N, the global batch.
        seed: the run's.
        rank, world, accumulation: the slice that is served here; world x accumulation must divide N.
        start: optimizer steps already taken.
        block: samples of a block; 0 for a permutation of all samples.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        start: int = 0,
        block: int = 0,
    ):
        self.n, self.batch_size, self.seed, self.block = n, batch_size, seed, block
        self.rank, self.world, self.accumulation, self.start = rank, world, accumulation, start
        self._epoch, self._order = -1, torch.empty(0)

    def order(self, epoch: int) -> Tensor:
        """The permutation of one epoch."""
        if epoch != self._epoch:
            g = generator(self.seed, "order", epoch)
            order = torch.randperm(self.n, generator=g)
            if self.block:
                place = torch.randperm(-(-self.n // self.block), generator=g)  # of each block in the epoch
                order = order[(place // POOL)[order // self.block].argsort(stable=True)]
            self._epoch, self._order = epoch, order
        return self._order

    def addresses(self, first: int, count: int) -> MicroBatch:
        """The samples at positions first .. first + count - 1."""
        found = MicroBatch(seed=self.seed)
        while count:
            epoch, offset = divmod(first, self.n)
            here = self.order(epoch)[offset : offset + count].tolist()
            found += [(epoch, index) for index in here]
            first, count = first + len(here), count - len(here)
        return found

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self.batch_size // (self.world * self.accumulation)
        step = self.start
        while True:
            for micro in range(self.accumulation):
                part = micro * self.world + self.rank
                yield self.addresses(step * self.batch_size + part * size, size)
            step += 1
