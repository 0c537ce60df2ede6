"""The Inception score."""

from __future__ import annotations

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import DIGITS, Features
from denoiselab.rng import generator

SPLITS = 10


class InceptionScore(Metric):
    """is = exp(mean over x of KL(p(y | x) || p(y))) of a classifier's p(y | x) for samples x (Salimans et al. 2016,
    arXiv:1606.03498, section 4): the mean over 10 parts. is_NAME where the classifier is not Inception of the standard
    weights; is_digits for ``DigitsNet``.

    High where each sample is surely of one class, and all classes are there; at least 1, at most the number of
    classes. It compares with no real images and rewards one perfect image per class (Barratt and Sharma 2018,
    arXiv:1801.01973), so it is never read alone.

    Control ``held_out``: the same of the held-out images, at most n of them. Details: ``std`` over the parts.

    Args:
        features: whose logits are p(y | x).
    """

    least = SPLITS

    def __init__(self, features: Features = DIGITS):
        self.features = features

    def check(self, data: Data) -> None:
        self.features.check(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        found = inception_scores(self.features.logits(generated))
        real = data.codec.decode(data.held_out.draw(len(generated))["x_0"])
        return [
            Measurement(
                self.features.called("is"),
                found.mean().item(),
                better="higher",
                controls={"held_out": inception_scores(self.features.logits(real)).mean().item()},
                protocol={
                    **self.features.protocol,
                    "splits": SPLITS,
                    "n_held_out": len(real),
                },
                details={"std": found.std().item()},
            )
        ]


def inception_scores(logits: Tensor) -> Tensor:
    """Of 10 parts of logits (N, K) in a random order that is always the same, (10,); of fewer where N < 91 leaves some
    empty."""
    order = torch.randperm(len(logits), generator=generator(0, "inception-score", len(logits)))
    found = []
    for part in logits[order].chunk(SPLITS):
        log_p = part.double().log_softmax(1)
        marginal = log_p.exp().mean(0)
        # 0 log 0 = 0: a class that the marginal has lost, no sample has.
        found.append((log_p.exp() * (log_p - marginal.log()).nan_to_num(0)).sum(1).mean().exp())
    return torch.stack(found)
