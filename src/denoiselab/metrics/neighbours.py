"""Are samples copies of training digits?"""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.precision_recall import distances


class NearestTraining(Metric):
    """nearest_training_ratio: how near samples are to training images, in units of how near new real images are.

    median_i min_j |sample_i - train_j| over the same median for the held-out images in place of the samples, with
    L2 distances in pixels (values in [-1, 1]). About 1: as new as real images. Well below 1: copies, or blurred
    averages. Well above 1: unlike any. No direction is better, so read it beside precision.

    Control ``held_out_median``: the denominator. Details: ``generated_median``, the numerator; ``near_share``, the
    share of samples nearer than the 1st percentile of the held-out distances, 0.01 for new real images.
    """

    def check(self, data: Data) -> None:
        if len(data.shape) != 3:
            raise ValueError(f"metrics=digits measures images; data of shape {data.shape} wants metrics=points")

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        train = data.codec.decode(data.train.x_0)
        samples = nearest(generated, train)
        held_out = nearest(data.codec.decode(data.held_out.x_0), train)
        median, control = samples.median().item(), held_out.median().item()
        return [
            Measurement(
                "nearest_training_ratio",
                median / control,
                better="none",
                controls={"held_out_median": control},
                protocol={
                    "distance": "L2 over pixels in [-1, 1]",
                    "shape": list(data.shape),
                    "n_real": len(data.train),
                    "n_held_out": len(data.held_out),
                },
                details={
                    "generated_median": median,
                    "near_share": (samples < held_out.quantile(0.01)).double().mean().item(),
                },
            )
        ]


def nearest(images: Tensor, train: Tensor) -> Tensor:
    """Each image's L2 distance to the nearest training image, (N,)."""
    rows = train.flatten(1).double()
    parts = images.flatten(1).double().split(1024)
    return torch.cat([distances(part, rows).min(dim=1).values for part in parts])
