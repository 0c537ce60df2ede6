"""A data set of one's own."""

import torch
from sklearn.datasets import make_moons

from denoiselab.data import Data, Samples, Standardise


class Moons(Data):
    """scikit-learn's two interleaving half circles; the label says which.

    Args:
        batch_size: the global batch.
        workers: loader processes.
        n: training points, >= 2; a fifth as many again are held out.
        noise: the standard deviation of the Gaussian noise on the points, >= 0.
    """

    shape = (2,)
    num_classes = 2

    def __init__(self, batch_size: int = 256, workers: int = 0, n: int = 5000, noise: float = 0.05):
        super().__init__(batch_size, workers)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2 points")
        points, label = make_moons(n + n // 5, noise=noise, random_state=0)
        points, label = torch.tensor(points, dtype=torch.float32), torch.tensor(label)
        self.codec = Standardise.of(points[:n])
        x_0, ids = self.codec.encode(points), torch.arange(len(points))
        self.train = Samples(x_0[:n], label[:n], ids[:n])
        self.held_out = Samples(x_0[n:], label[n:], ids[n:])
