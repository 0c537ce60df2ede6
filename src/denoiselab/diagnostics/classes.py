"""Classes: what decoded samples are recognised as, and models that are asked without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from denoiselab.conditioning import null
from denoiselab.data.points import Mixture
from denoiselab.metrics import accuracy
from denoiselab.metrics.accuracy import ClassAccuracy

if TYPE_CHECKING:
    from denoiselab.diagnostics.subject import Subject
    from denoiselab.experiment import Parts

CLASSES = ("none", "own")


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
        return Recogniser("class", accuracy.recogniser(data))
    return None


def asked(cond: dict[str, Tensor], classes: str, subject: Subject) -> dict[str, Tensor]:
    """A condition on the subject's device: as it is for classes="own"; without classes for "none"."""
    moved = {key: value.to(subject.device) for key, value in cond.items()}
    return null(moved) if classes == "none" else moved


def check_classes(parts: Parts, classes: str) -> None:
    """Raise ValueError where a model that was never asked without a class would be."""
    if classes == "none" and (parts.num_classes or parts.vector) and parts.config.get("p_null") == 0:
        raise ValueError("classes=none: with p_null=0 the model was never asked without one; need classes=own")
