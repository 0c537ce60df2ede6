"""How near is an image to the one it stands for?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric

RANGE = 2.0
"""Of values in [-1, 1]."""

WINDOW, SIGMA = 11, 1.5
"""Of SSIM's Gaussian window, in pixels."""

MOST = 100.0
"""The PSNR of images that are the same, in dB; of others at most."""

BATCH = 64
"""Images that are measured together."""

BETTER = {"psnr": "higher", "ssim": "higher", "mse": "lower"}


def window(sides: tuple[int, int]) -> tuple[int, float]:
    """Side and standard deviation of SSIM's window for images of these sides: 11 and 1.5, or in smaller images the
    largest odd side that fits into them, with the standard deviation in proportion."""
    side = min(WINDOW, (min(sides) - 1) // 2 * 2 + 1)
    return side, SIGMA * side / WINDOW


def fidelity(found: Tensor, real: Tensor) -> dict[str, float]:
    """``psnr``, ``ssim`` and ``mse`` of images against others, (N, C, H, W) in [-1, 1]: means over the pairs."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    _, sigma = window((real.shape[-2], real.shape[-1]))
    parts = []
    for one, other in zip(found.split(BATCH), real.split(BATCH), strict=True):
        a, b = one.double(), other.double()
        psnr = peak_signal_noise_ratio(a, b, data_range=RANGE, dim=(1, 2, 3), reduction="none").clamp_max(MOST)
        ssim = structural_similarity_index_measure(a, b, sigma=sigma, data_range=RANGE, reduction="none")
        assert isinstance(ssim, Tensor)
        parts.append(torch.stack([psnr, ssim, (a - b).square().mean((1, 2, 3))]))  # (3, n)
    return dict(zip(BETTER, torch.cat(parts, 1).mean(1).tolist(), strict=True))


class Fidelity(Metric):
    """psnr = 10 log10(2^2/mse) dB, ssim, and mse = mean (found - real)^2 of sample i against the held-out image i of
    which it was made; each the mean over images.

    SSIM is that of Wang et al. (2004, doi:10.1109/TIP.2003.819861), by torchmetrics: a Gaussian window of 11 x 11
    pixels, standard deviation 1.5, at every pixel, with reflected borders. Images of less than 11 pixels a side have a
    smaller one, see ``window``; it is part of the protocol, for values of different windows do not compare. The mean
    of images' PSNRs is above the PSNR of the mean mse. An image that is hit exactly counts 100 dB, and none more.

    Both reward the mean of all images that are possible, which is blurred: samples score less than the best regression
    does, and are not worse for it (Saharia et al. 2021, arXiv:2104.07636, section 4).
    """

    paired = True

    def check(self, data: Data) -> None:
        if len(data.shape) != 3 or min(data.shape[1:]) < 3:
            raise ValueError(f"metrics: psnr and ssim compare images of 3 x 3 pixels or more; data of {data.shape}")

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        real = data.codec.decode(data.held_out.draw(len(generated))["x_0"])
        return measured(fidelity(generated, real), {}, protocol(data))


def measured(
    values: dict[str, float], controls: dict[str, dict[str, float]], protocol: dict[str, Any]
) -> list[Measurement]:
    """One measurement for each name, with the control of that name in each of the controls."""
    return [
        Measurement(name, value, BETTER.get(name, "lower"), {k: v[name] for k, v in controls.items()}, protocol)
        for name, value in values.items()
    ]


def protocol(data: Data) -> dict[str, Any]:
    """What the numbers depend on."""
    import torchmetrics

    side, sigma = window((data.shape[-2], data.shape[-1]))
    return {
        "implementation": f"torchmetrics {torchmetrics.__version__}, float64",
        "pairs": "sample i and held-out image i",
        "data_range": RANGE,
        "window": f"Gaussian, {side} x {side} pixels, sigma {sigma:.3g}, reflected borders",
        "n_held_out": len(data.held_out),
    }
