"""Handwritten digits that come with scikit-learn: real scans, nothing to download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Identity

HELD_OUT = 360
SPLIT_SEED = 0


class Digits(Data):
    """1,797 scans of digits 0-9, 8x8, from 43 writers (Alpaydin and Kaynak 1998, doi:10.24432/C50P49), in [-1, 1].

    The split is fixed and stratified: 1,437 to train on, 360 held out, whatever the run's seed.

    Args:
        batch_size: the global batch.
        workers: loader processes.
        size: side in pixels, 8, 16 or 32; above 8 the scans are enlarged bilinearly.
    """

    num_classes = 10

    def __init__(self, batch_size: int = 128, workers: int = 0, size: int = 8):
        super().__init__(batch_size, workers)
        if size not in (8, 16, 32):
            raise ValueError(f"size={size}: need 8, 16 or 32")
        images, labels = load_digits(return_X_y=True)
        scans = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        if size != 8:
            scans = torch.nn.functional.interpolate(scans, size=(size, size), mode="bilinear")
        label = torch.tensor(labels, dtype=torch.int64)
        ids = torch.arange(len(scans))
        train, held_out = (
            torch.tensor(part).sort().values
            for part in train_test_split(ids.numpy(), test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED)
        )
        self.shape = (1, size, size)
        self.bins = 17 if size == 8 else None  # what is enlarged has values between the levels
        self.codec = Identity(sigma_data=round(scans[train].square().mean().sqrt().item(), 3))
        self.train = Samples(self.codec.encode(scans[train]), label[train], train)
        self.held_out = Samples(self.codec.encode(scans[held_out]), label[held_out], held_out)
