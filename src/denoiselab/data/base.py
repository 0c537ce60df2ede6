"""What a data set is to the rest: samples, a codec, and a few facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from denoiselab.data.codec import Codec
from denoiselab.data.stream import Address
from denoiselab.rng import generator

Batch = dict[str, Any]
"""{"x_0": (B, ...), "id": (B,), "cond": {"label": (B,)}}."""


class Samples(Dataset):
    """Encoded samples in memory, with labels; fetched a whole batch at a time.

    Args:
        x_0: (N, ...), encoded.
        label: (N,) class indices, or None.
        ids: each sample's id in the whole data set, (N,).
    """

    def __init__(self, x_0: Tensor, label: Tensor | None = None, ids: Tensor | None = None):
        self.x_0, self.label = x_0, label
        self.ids = torch.arange(len(x_0)) if ids is None else ids

    def __len__(self) -> int:
        return len(self.x_0)

    def __getitems__(self, addresses: Sequence[Address]) -> Batch:
        return self.batch(torch.tensor([index for _, index in addresses]))

    def batch(self, index: Tensor | slice) -> Batch:
        """The samples at these positions, as they are: never augmented."""
        cond = {} if self.label is None else {"label": self.label[index]}
        return {"x_0": self.x_0[index], "id": self.ids[index], "cond": cond}

    def draw(self, n: int, seed: int = 0) -> Batch:
        """n different samples, or all where there are fewer, that depend on nothing but the seed; for measurements,
        which need not hold a whole data set in memory."""
        return self.batch(some(len(self), n, seed))


def some(total: int, n: int, seed: int = 0) -> Tensor:
    """min(n, total) different positions below total, in rising order, fixed by the seed."""
    return torch.randperm(total, generator=generator(seed, "draw"))[:n].sort().values


class Data:
    """A training set and a fixed held-out set.

    Args:
        batch_size: the global batch, divided over devices and accumulation.
        workers: loader processes; 0 loads in the training process, best for data in memory.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    vector: int = 0
    """Entries of cond["vector"]; 0 where there is none."""
    low_res: int = 0
    """Channels of cond["low_res"], an image to be enlarged; 0 where there is none."""
    bins: int | None = None
    """Values are this many equally spaced levels from -1 to 1; None for real values."""
    block: int = 0
    """Of the order of samples (``Stream``); 0 for a permutation of all."""
    source: dict[str, Any] | None = None
    """The option, as plain containers, of the data set whose images these latents encode; None for what is seen as it
    is."""
    places: tuple[str, ...] = ()
    """Options that say where files lie."""
    reconstruction: Mapping[str, float] = {}
    """What metrics say of images that went through the codec and back, by name; empty where nothing is lost."""
    codec: Codec
    train: Samples
    held_out: Samples

    def __init__(self, batch_size: int, workers: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: need at least 1")
        if workers < 0:
            raise ValueError(f"workers={workers}: need a number >= 0")
        self.batch_size, self.workers = batch_size, workers

    def by_content(self, options: dict[str, Any]) -> dict[str, Any]:
        """These options with what is read from files in the place of where the files lie, for a run's address: a
        moved folder is the same data, a changed one is not."""
        return options
