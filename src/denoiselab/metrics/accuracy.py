"""Are samples recognised as the class they were asked for?"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import SIDE, check_digits, small

if TYPE_CHECKING:
    from sklearn.svm import SVC

C = 1.0
GAMMA = 0.1


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
                    "preprocessing": f"values in [-1, 1], area-averaged to {SIDE}x{SIDE}",
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
        recognised = torch.as_tensor(classifier(data).predict(pixels(images)))
        cells = data.num_classes * label + recognised
        return cells.bincount(minlength=data.num_classes**2).view(data.num_classes, -1)


@lru_cache(maxsize=1)
def classifier(data: Data) -> SVC:
    """The support vector machine fitted on the training digits."""
    from sklearn.svm import SVC

    assert data.train.label is not None
    machine = SVC(C=C, gamma=GAMMA)  # type: ignore[arg-type]
    return machine.fit(pixels(data.codec.decode(data.train.x_0)), data.train.label.numpy())


def pixels(images: Tensor):
    """Images as rows of 64 pixels, a NumPy array."""
    return small(images).flatten(1).numpy()


def accuracy(confusion: Tensor) -> float:
    """The diagonal's share."""
    return (confusion.diagonal().sum() / confusion.sum()).item()
