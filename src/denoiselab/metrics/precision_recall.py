"""Improved precision and recall: are samples like real digits, and are all real digits covered?"""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import check_digits, digits_features, extractor_protocol, real_features


class PrecisionRecall(Metric):
    """Improved precision and recall of generated digits (Kynkaanniemi et al. 2019, arXiv:1904.06991), in the features
    of ``DigitsNet``.

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest other feature of
    the set (eq. 1). precision is the share of generated samples within the real manifold, recall the share of real
    samples within the generated manifold (eq. 2); both in [0, 1]. The training digits are the real set for both. With
    few samples the balls are large: compare values of the same n only.

    Control ``held_out``: the same with the held-out digits in place of the generated ones, whatever their number.

    Args:
        k: which neighbour a ball reaches to, >= 1; the paper uses 3. Needs more than k samples.
    """

    def __init__(self, k: int = 3):
        if k < 1:
            raise ValueError(f"k={k}: need at least 1")
        self.k, self.least = k, k + 1

    def check(self, data: Data) -> None:
        check_digits(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        train, held_out = real_features(data)
        radius = radii(train, self.k)
        found, control = (self.both(train, radius, rows) for rows in (digits_features(generated), held_out))
        protocol = {
            **extractor_protocol(),
            "k": self.k,
            "reference": "training digits, for precision and recall",
            "n_real": len(train),
            "n_held_out": len(held_out),
        }
        return [
            Measurement(name, value, better="higher", controls={"held_out": held_out_value}, protocol=dict(protocol))
            for name, value, held_out_value in zip(("precision", "recall"), found, control, strict=True)
        ]

    def both(self, real: Tensor, real_radius: Tensor, fake: Tensor) -> tuple[float, float]:
        """(precision, recall)."""
        return covered(fake, real, real_radius), covered(real, fake, radii(fake, self.k))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """L2 distances (N, M) by differences: exactly 0 between equal rows, which the product formula is not."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def radii(rows: Tensor, k: int) -> Tensor:
    """Each row's distance to its k-th nearest other row, (N,)."""
    if len(rows) <= k:
        raise ValueError(f"n={len(rows)}: need more than k={k} samples")
    # The nearest row is the row itself.
    return torch.cat([distances(part, rows).kthvalue(k + 1, dim=1).values for part in rows.split(1024)])


def covered(rows: Tensor, centres: Tensor, radius: Tensor) -> float:
    """Share of rows within the radius of any centre."""
    inside = [(distances(part, centres) <= radius).any(dim=1) for part in rows.split(1024)]
    return torch.cat(inside).double().mean().item()
