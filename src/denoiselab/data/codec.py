"""Codecs: between what people see and what is diffused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Codec(nn.Module):
    """``encode(image) -> x_0`` and ``decode(x_0) -> image``, images in [-1, 1], points in their own units."""

    sigma_data: float
    """The standard deviation of x_0."""

    def encode(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, x_0: Tensor) -> Tensor:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """``_target_`` and the arguments that make this codec again, as primitives."""
        raise NotImplementedError


class Identity(Codec):
    """x_0 is the image itself; decoding clamps to [-1, 1].

    Args:
        sigma_data: the images' root mean square.
    """

    def __init__(self, sigma_data: float):
        super().__init__()
        self.sigma_data = sigma_data

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(-1, 1)

    def config(self) -> dict[str, Any]:
        return {"_target_": "denoiselab.data.Identity", "sigma_data": self.sigma_data}


class Standardise(Codec):
    """x_0 = (points - mean)/std, with the mean per coordinate and one std.

    Args:
        mean: D numbers.
        std: > 0.
    """

    mean: Tensor
    sigma_data = 1.0

    def __init__(self, mean: Sequence[float], std: float):
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)), persistent=False)
        self.std = std

    @classmethod
    def of(cls, points: Tensor) -> Standardise:
        """The codec that makes these points zero-mean and of unit variance."""
        mean = points.mean(0)
        return cls(mean.tolist(), (points - mean).square().mean().sqrt().item())

    def encode(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0 * self.std + self.mean

    def config(self) -> dict[str, Any]:
        return {"_target_": "denoiselab.data.Standardise", "mean": self.mean.tolist(), "std": self.std}
