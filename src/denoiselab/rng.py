"""Randomness as a function of an address: a seed, a purpose and a place, never of what was drawn before.

Nothing about random numbers is saved in a checkpoint, because every draw can be made again from its address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def mix(*address: int | str) -> int:
    """A 63-bit seed from an address such as (seed, "step", rank, samples_seen).

    >>> mix(0, "step", 1) == mix(0, "step", 1) != mix(0, "step", 2)
    True
    """
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by an address."""
    return torch.Generator(device).manual_seed(mix(*address))


class Noise:
    """Standard normals for a list of samples: each call gives every sample its next draw.

    Sample i's stream is addressed by (seed, i) and drawn on the CPU, so it has the same bits whatever the batch
    it is in, the number of ranks, or the device.

    Args:
        seed: the evaluation's seed.
        ids: the sample ids, one per row.
        shape: one sample's shape.
        device, dtype: of what is returned.

    >>> whole, part = Noise(0, range(4), (2,)), Noise(0, [2, 3], (2,))
    >>> bool((whole()[2:] == part()).all() and (whole()[2:] == part()).all())
    True
    """

    def __init__(
        self,
        seed: int,
        ids: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.generators = [generator(seed, "noise", int(i)) for i in ids]
        self.shape, self.device, self.dtype = tuple(shape), device, dtype

    def __call__(self) -> Tensor:
        draws = [torch.randn(self.shape, generator=g, dtype=self.dtype) for g in self.generators]
        return torch.stack(draws).to(self.device)


class From:
    """A given tensor first, then fresh normals of its shape from torch's global generator."""

    def __init__(self, first: Tensor):
        self.first: Tensor | None = first
        self.like = first

    def __call__(self) -> Tensor:
        if self.first is None:
            return torch.randn_like(self.like)
        first, self.first = self.first, None
        return first
