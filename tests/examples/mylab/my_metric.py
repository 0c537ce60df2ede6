"""A metric of one's own."""

from torch import Tensor

from denoiselab.data import Data
from denoiselab.metrics import Measurement, Metric


class MeanGap(Metric):
    """mean_gap: the root mean square difference between the mean sample and the mean held-out sample.

    Control ``train``: the same of the training samples in place of the generated ones.
    """

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        train, held_out = (data.codec.decode(part.x_0) for part in (data.train, data.held_out))

        def gap(samples: Tensor) -> float:
            return (samples.mean(0) - held_out.mean(0)).square().mean().sqrt().item()

        return [
            Measurement(
                "mean_gap",
                gap(generated),
                better="lower",
                controls={"train": gap(train)},
                protocol={"reference": "held-out samples", "n_real": len(held_out)},
            )
        ]
