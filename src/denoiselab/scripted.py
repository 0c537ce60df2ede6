"""A network in a TorchScript file as features: a program, so that no run's own configuration may name one unless the
user allowed it by name (see denoiselab.trust)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.features import Features
from denoiselab.metrics.networks import device, in_colour, levels, sha256

GIVEN = {"levels": levels, "unit": lambda images: in_colour(images) / 2 + 0.5, "signed": in_colour}
"""What a network may be given, of images in [-1, 1]."""


class TorchScript(Features):
    """What a TorchScript network makes of images, (B, D) or the means of (B, D, H, W): fd_NAME, kd_NAME.

    The file decides what is done to an image after the first step, which the protocol says: grey becomes three
    channels if ``channels`` is 3, and values are given in one of three ranges.

    Args:
        weights: the file.
        name: what measurements are called after.
        range: levels, uint8 in 0..255, rounded; unit, in [0, 1]; signed, in [-1, 1].
        channels: 1 or 3, that it looks at; images of 3 are refused by a network of 1.

    Raises:
        ValueError: there is no such file, or it is no TorchScript.
    """

    def __init__(self, weights: str, name: str, range: str = "levels", channels: int = 3):
        self.file = Path(weights).expanduser()
        if not self.file.is_file():
            raise ValueError(f"features.weights={weights}: no such file")
        if range not in GIVEN:
            raise ValueError(f"features.range={range}: need one of {', '.join(GIVEN)}")
        if channels not in (1, 3):
            raise ValueError(f"features.channels={channels}: need 1 or 3")
        if not name.isidentifier() or name in ("digits", "inception"):
            raise ValueError(f"features.name={name}: need letters, digits and _, and neither digits nor inception")
        self.name, self.range, self.channels = name, range, channels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
                self.net = torch.jit.load(str(self.file), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(
                f"features.weights={weights}: no TorchScript: {' '.join(str(error).split())[:120]}"
            ) from None

    def check(self, data: Data) -> None:
        super().check(data)
        if data.shape[0] > self.channels:
            raise ValueError(f"features.channels={self.channels}: the images have {data.shape[0]}")
        try:
            rows, _ = self.look(torch.zeros(2, *data.shape))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()[:160]
            raise ValueError(f"features.weights={self.file}: fails on images of {data.shape}: {reason}") from None
        if rows.ndim != 2 or len(rows) != 2:
            raise ValueError(f"features.weights={self.file}: gives {tuple(rows.shape)} for 2 images; need (2, D)")
        self.dims = rows.shape[1]

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, None]:
        self.net.to(device())
        x = images.clamp(-1, 1) if self.channels == 1 else in_colour(images)
        x = {"levels": lambda: levels(x)[:, : self.channels], "unit": lambda: x / 2 + 0.5, "signed": lambda: x}[
            self.range
        ]()
        rows = self.net(x.to(device()))
        return (rows.flatten(2).mean(2) if rows.ndim == 4 else rows), None

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "extractor": f"TorchScript {self.name}",
            "extractor_sha256": sha256(self.file),
            "preprocessing": f"{self.range}, {self.channels} channels, as they are; the rest is in the file",
        }
