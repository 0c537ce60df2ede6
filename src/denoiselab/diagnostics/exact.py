"""What is known of a data set beside its samples: the exact denoiser of points with a density, and what a sample is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from denoiselab.conditioning import null
from denoiselab.data.points import Known, Mixture
from denoiselab.metrics.accuracy import ClassAccuracy, classifier, pixels

if TYPE_CHECKING:
    from denoiselab.diagnostics.subject import Subject
    from denoiselab.experiment import Parts

CLASSES = ("none", "own")


class Exact:
    """E[x_0 | x_t] = (x_t + sigma_t^2 grad log p(x_t))/alpha_t of points whose density is known (Efron 2011,
    doi:10.1198/jasa.2011.tm11181): the denoiser that no network can beat, and the control of what networks do.

    Of all classes together; of one mode of a mixture where a label >= 0 names it.

    Args:
        data: what was trained on.
    """

    def __init__(self, data: Known):
        self.data = data

    def score(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: int | None = None) -> Tensor:
        """grad log p(x_t), or grad log p(x_t | label) of a mixture, (B, 2); levels (B, 1)."""
        if label is None:
            return self.data.score_of(x_t, alpha_t, sigma_t)
        mean, std = self.data.codec.mean.to(x_t.device).double(), self.data.codec.std
        alpha, sigma = alpha_t.double(), sigma_t.double()
        gradients = self.data.components(std * x_t.double() + alpha * mean, alpha, std * sigma)[1]
        return (std * gradients[:, label]).to(x_t.dtype)

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Tensor) -> Tensor:
        return (x_t + sigma_t**2 * self.score(x_t, alpha_t, sigma_t)) / alpha_t


class Recogniser(NamedTuple):
    """Says what decoded samples on the CPU are."""

    what: str
    """class or mode."""
    of: Callable[[Tensor], Tensor]
    """Decoded samples (N, ...) to their numbers (N,)."""


def recogniser(subject: Subject) -> Recogniser | None:
    """The likeliest mode where the data are a mixture; the class that ``ClassAccuracy``'s classifier sees where that is
    among the metrics; else None."""
    data = subject.images
    if isinstance(data, Mixture):
        return Recogniser("mode", lambda points: data.nearest(points)[0])
    if len(data.shape) == 3 and any(isinstance(metric, ClassAccuracy) for metric in subject.metrics.values()):
        return Recogniser("class", lambda images: torch.as_tensor(classifier(data).predict(pixels(images))))
    return None


def asked(cond: dict[str, Tensor], classes: str, subject: Subject) -> dict[str, Tensor]:
    """A condition on the subject's device: as it is for classes="own"; without classes for "none"."""
    moved = {key: value.to(subject.device) for key, value in cond.items()}
    return null(moved) if classes == "none" else moved


def check_classes(parts: Parts, classes: str) -> None:
    """Raise ValueError where a model that was never asked without a class would be."""
    if classes == "none" and (parts.num_classes or parts.vector) and parts.config.get("p_null") == 0:
        raise ValueError("classes=none: with p_null=0 the model was never asked without one; need classes=own")
