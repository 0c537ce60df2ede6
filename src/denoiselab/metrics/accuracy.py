"""Are samples recognised as the class they were asked for?"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import SIDE, check_digits, small
from denoiselab.metrics.space import decoded, positions, space_of

if TYPE_CHECKING:
    from sklearn.svm import SVC

C = 1.0
GAMMA = 0.1

DIGITS = f"values in [-1, 1], area-averaged to {SIDE}x{SIDE}"
"""What the classifier of digits looks at."""

FITTED = 5_000
"""Most real samples that a classifier is fitted to, and most held-out ones that it is tried on."""

FOLDS = 5


class ClassAccuracy(Metric):
    """class_accuracy: the share of samples that an independent classifier recognises as the class asked for.

    The classifier is scikit-learn's support vector machine with kernel exp(-gamma |x - y|^2) on 8x8 pixels in [-1, 1],
    fitted on the training digits when first asked. It takes no part in training or guiding models and shares nothing
    with the features of fd_digits. C = 1 and gamma = 0.1 are the best of a 4 x 7 grid by five-fold cross-validation
    on the training digits (0.991 right, three times repeated); the held-out digits chose nothing.

    Control ``held_out``: its accuracy on the held-out digits; samples can hardly be asked for more. A high value says
    that samples are typical of their class, not that they are varied: one perfect digit per class gets 1.

    Details: ``per_class``, the accuracy by class asked for (None if never asked); ``classes_covered``, how many of the
    asked classes were recognised at least once; ``confusion``, 10 x 10 counts, row asked for, column recognised.
    Raises ValueError without labels.
    """

    def check(self, data: Data) -> None:
        check_digits(data)

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        import sklearn

        if label is None:
            raise ValueError("label=None: need the class that each sample was asked for")
        confusion = self.confusion(generated, label, data)
        assert data.held_out.label is not None
        control = self.confusion(data.codec.decode(data.held_out.x_0), data.held_out.label, data)
        asked, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        return [
            Measurement(
                "class_accuracy",
                accuracy(confusion),
                better="higher",
                controls={"held_out": accuracy(control)},
                protocol={
                    "classifier": f"SVC, RBF kernel, C={C:g}, gamma={GAMMA:g}, fitted on training digits",
                    "implementation": f"scikit-learn {sklearn.__version__}",
                    "preprocessing": DIGITS,
                    "n_real": len(data.train),
                    "n_held_out": len(data.held_out),
                },
                details={
                    "per_class": [r / n if n else None for r, n in zip(right, asked, strict=True)],
                    "classes_covered": sum(r > 0 for r in right),
                    "confusion": confusion.tolist(),
                },
            )
        ]

    def confusion(self, images: Tensor, label: Tensor, data: Data) -> Tensor:
        """Counts (10, 10), row asked for, column recognised."""
        return counted(label, recogniser(data)(images), data.num_classes)


class Recogniser:
    """Tells the classes of a labelled data set: a support vector machine of scikit-learn with an RBF kernel, fitted on
    training samples.

    Digits are told by the one of ``ClassAccuracy``. Other data are looked at in the space of ``space_of``, points by
    their coordinates and images by averaged pixels, with C = 10 and gamma = 1/(D var); that is much for simple shapes
    and little for photographs, which ``unseen`` says.

    Args:
        data: with labels; of more than 5,000 training samples a fixed random subset is fitted.
    """

    def __init__(self, data: Data):
        if not data.num_classes:
            raise ValueError("data: has no classes that a classifier could tell apart")
        try:
            check_digits(data)
            self.rows, c, gamma, looked_at = pixels, C, GAMMA, DIGITS
        except ValueError:
            space = space_of(data)
            self.rows, c, gamma, looked_at = lambda x: space.vectors(x).numpy(), 10.0, "scale", space.protocol["space"]
        self.data, self.arguments = data, {"C": c, "gamma": gamma}
        self.kind = f"SVC, RBF kernel, C={c:g}, gamma={gamma}"
        self.looked_at = looked_at

    @cached_property
    def _real(self) -> tuple[Any, Tensor]:
        """Rows and labels of what is fitted."""
        batches = [*decoded(self.data.train, self.data, positions(self.data.train, FITTED))]
        labels = torch.cat([label for _, label in batches if label is not None])
        return np.concatenate([self.rows(samples) for samples, _ in batches]), labels

    @cached_property
    def machine(self) -> SVC:
        """Fitted when first asked for."""
        from sklearn.svm import SVC

        rows, labels = self._real
        return SVC(**self.arguments).fit(rows, labels.numpy())

    def __call__(self, samples: Tensor) -> Tensor:
        """The classes (N,) of decoded samples (N, ...)."""
        return torch.as_tensor(self.machine.predict(self.rows(samples))).long()

    @cached_property
    def unseen(self) -> Tensor:
        """Counts (K, K), row the label, column recognised, of real samples that were not fitted: the held-out ones, and
        the training ones by five-fold cross-validation."""
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.svm import SVC

        k, (rows, labels) = self.data.num_classes, self._real
        held_out = self.data.held_out.draw(FITTED)
        seen = self(self.data.codec.decode(held_out["x_0"]))
        found = counted(held_out["cond"]["label"], seen, k)
        if int(labels.bincount(minlength=k).min()) < FOLDS:  # a class would be missing from what is fitted
            return found
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        left_out = cross_val_predict(SVC(**self.arguments), rows, labels.numpy(), cv=folds)
        return found + counted(labels, torch.as_tensor(left_out), k)


@lru_cache(maxsize=1)
def recogniser(data: Data) -> Recogniser:
    """The one of a data set, fitted when first asked; kept for the next metric."""
    return Recogniser(data)


def counted(label: Tensor, recognised: Tensor, classes: int) -> Tensor:
    """Counts (K, K), row the label, column recognised."""
    return (classes * label + recognised).bincount(minlength=classes**2).view(classes, -1)


def pixels(images: Tensor):
    """Images as rows of 64 pixels, a NumPy array."""
    return small(images).flatten(1).numpy()


def accuracy(confusion: Tensor) -> float:
    """The diagonal's share."""
    return (confusion.diagonal().sum() / confusion.sum()).item()
