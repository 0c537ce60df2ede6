"""Codecs: between what people see and what is diffused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.data import autoencoders
from denoiselab.errors import CheckpointError

DECODED = 16
"""Latents that are decoded at a time: an image's activations are many times its size."""


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


class Latent(Codec):
    """x_0 = scale (m - mean), m the mean of an autoencoder's latents of an image, and clamp(D(x_0/scale + mean)) back;
    mean per channel, and 1/scale the standard deviation about it over the training set, so that x_0 has unit variance
    (Rombach et al. 2021, arXiv:2112.10752, appendix G, who take the first batch's).

    The autoencoder follows the device and stays float32; it has no part in parameters, state or averages.

    Args:
        folder: of the autoencoder (data/autoencoders.py).
        sha256: of its weights.
        mean: one number per channel of a latent.
        scale: > 0.
    """

    shift: Tensor
    """-scale mean, (C, 1, 1)."""
    sigma_data = 1.0

    def __init__(self, folder: str, sha256: str, mean: Sequence[float], scale: float):
        super().__init__()
        self.folder, self.sha256, self.mean, self.scale = folder, sha256, list(mean), scale
        try:
            self._held = (autoencoders.read(Path(folder), sha256),)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; if the latents were moved, put them, or a link to them, back") from None
        self.register_buffer("shift", -scale * torch.tensor(self.mean).view(-1, 1, 1), persistent=False)

    def encode(self, image: Tensor) -> Tensor:
        return torch.add(self.shift, self._held[0].encode(image)[0], alpha=self.scale)

    def decode(self, x_0: Tensor) -> Tensor:
        latents = ((x_0.float() - self.shift) / self.scale).split(DECODED)
        return torch.cat([self._held[0].decode(part).clamp(-1, 1) for part in latents])

    def config(self) -> dict[str, Any]:
        facts = {"folder": self.folder, "sha256": self.sha256, "mean": self.mean}
        return {"_target_": "denoiselab.data.Latent", **facts, "scale": self.scale}

    def _apply(self, fn, recurse=True):
        """Follow the device, never the dtype."""
        device = fn(torch.zeros((), device=self.shift.device)).device
        self._held[0].to(device)
        self.shift = self.shift.to(device)
        return self
