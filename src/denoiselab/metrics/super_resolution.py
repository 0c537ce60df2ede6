"""Enlarged images against the images they are small versions of, and against themselves made small again."""

from __future__ import annotations

from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.data.super_resolution import area_mean, bicubic
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.pairs import BATCH, Fidelity, fidelity, measured, protocol


class Enlargement(Fidelity):
    """psnr, ssim and mse as ``Fidelity``; and consistency = mean (area means of the sample - low_res)^2: does it show
    what it was made of (Saharia et al. 2021, arXiv:2104.07636, section 4)? All in units of [-1, 1].

    Control ``bicubic``: the same of low_res enlarged by bicubic interpolation, which needs no model.
    """

    def check(self, data: Data) -> None:
        if not data.low_res:
            name = type(data).__name__
            raise ValueError(f"metrics=super_resolution: {name} has no small images; need data=super_resolution")
        super().check(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        batch = data.held_out.draw(len(generated))
        real, low_res = data.codec.decode(batch["x_0"]), batch["cond"]["low_res"]
        found, control = (
            {**fidelity(images, real), "consistency": consistency(images, low_res)}
            for images in (generated, bicubic(low_res, real.shape[-2:]))
        )
        about = {"bicubic": "cubic convolution, a = -0.5", "low_res": " x ".join(map(str, low_res.shape[1:]))}
        return measured(found, {"bicubic": control}, protocol(data) | about)


def consistency(images: Tensor, low_res: Tensor) -> float:
    """mean (area means of the images - low_res)^2."""
    total = 0.0
    for image, small in zip(images.split(BATCH), low_res.split(BATCH), strict=True):
        total += (area_mean(image.double(), small.shape[-2:]) - small).square().sum().item()
    return total / low_res.numel()
