"""The Frechet distance between generated and real digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import check_digits, digits_features, extractor_protocol, real_features
from denoiselab.rng import generator

FLOOR_DRAWS = 10


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), in float64.

    The squared 2-Wasserstein distance between Gaussians of these means and (unbiased) covariances (Heusel et al. 2017,
    arXiv:1706.08500, eq. 6), by torchmetrics. In squared units of the features; >= 0 but for rounding.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Features pass through, and as float64: the distance is returned in the dtype that the network returns.
    through = nn.Identity()
    through.num_features = a.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=through)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return metric.compute().item()


class FrechetDistance(Metric):
    """fd_digits: the Frechet distance between generated and held-out digits in the features of ``DigitsNet``.

    This is not FID, whose features are Inception's, and must not be compared with one. The distance is biased upwards
    for finite sets (Chong and Forsyth 2020, arXiv:1911.07023), so it comes with a floor: what as many real training
    digits get, the mean of 10 draws. The draws have the training set's class shares, because samples are asked for
    class by class, and uneven classes alone would raise the floor by half at n = 100. No digit is drawn twice while n
    is at most the training set's size. ``floor_std`` is over these draws, which overlap: fresh digits would vary more.

    Only distances of the same n, against the same held-out digits and with the same weights' hash, can be compared.
    Raises ValueError for fewer than 2 samples; below 65 the samples' covariance is singular and the floor is high.
    """

    least = 2

    def check(self, data: Data) -> None:
        check_digits(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        import torchmetrics

        n = len(generated)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2 samples for a covariance")
        assert data.train.label is not None
        train, held_out = real_features(data)
        value = frechet_distance(held_out, digits_features(generated))
        draws = torch.tensor(
            [frechet_distance(held_out, train[index]) for index in floor_draws(data.train.label, n)],
            dtype=torch.float64,
        )
        floor = draws.mean().item()
        return [
            Measurement(
                "fd_digits",
                value,
                better="lower",
                controls={"floor": floor, "floor_std": draws.std().item()},
                protocol={
                    **extractor_protocol(),
                    "implementation": f"torchmetrics {torchmetrics.__version__}, float64",
                    "reference": "held-out digits",
                    "n_real": len(held_out),
                    "floor": f"mean of {FLOOR_DRAWS} draws of n training digits, stratified",
                },
                details={"ratio_to_floor": value / floor},
            )
        ]


def floor_draws(label: Tensor, n: int) -> list[Tensor]:
    """Positions of n digits, ten times, each class by its share of the labels (N,)."""
    draws = []
    for draw in range(FLOOR_DRAWS):
        shuffled = torch.randperm(len(label), generator=generator(0, "fd-floor", draw))
        by_class = shuffled[label[shuffled].argsort(stable=True)]
        # Even steps through the classes: a random part of each, and no position twice unless n > N.
        draws.append(by_class[torch.arange(n) * len(label) // n])
    return draws
