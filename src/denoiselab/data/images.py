"""What the data sets of images share: the split, the codec, flips, and reading."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from denoiselab.data.base import Data, Samples, some
from denoiselab.data.codec import Identity
from denoiselab.data.source import BadSample, OnDisk, Pixels, Source, checked, place
from denoiselab.rng import generator

MEASURED = 1024
"""Training images that sigma_data is measured on."""


class InMemory(Data):
    """Images in memory, as bytes, with a test set of their own, of which ``held_out`` are kept.

    Args:
        batch_size, workers: as for ``Data``.
        held_out: test images that are held out, at most all, each class with its share.
        flip: mirror half of the training images.
        labels: ``classes``; or ``none``, for a set without labels.
        train, test: images (N, C, H, W) as bytes and class indices (N,).
    """

    bins = 256

    def __init__(
        self,
        batch_size: int,
        workers: int,
        held_out: int,
        flip: bool,
        labels: str,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
    ):
        super().__init__(batch_size, workers)
        at_least_one(held_out)
        if labels not in ("classes", "none"):
            raise ValueError(f"labels={labels}: need classes or none")
        (images, label), (others, other_label) = train, test
        kept = stratified(other_label, torch.arange(len(others)), min(held_out, len(others)))
        self.shape = tuple(images.shape[1:])
        known = labels == "classes"
        self.num_classes = self.num_classes if known else 0
        self.train = Pixels(images, label if known else None, torch.arange(len(images)), flip)
        self.train.codec = self.codec = Identity(root_mean_square(self.train))
        held_label = other_label[kept] if known else None
        self.held_out = Pixels(others[kept], held_label, len(images) + kept, codec=self.codec)


class ReadFromDisk(Data):
    """Images that a source reads one by one. What is held out is read once and stays in memory.

    Args:
        batch_size, workers: as for ``Data``.
        source: the training images; those to hold out are taken from them where there is no ``test``.
        test: held-out images of the same classes, or None.
        held_out: how many are held out, at most; of ``source`` at most a tenth. Each class has its share, whatever the
            run's seed.
        flip: mirror half of the training images.
        on_error: ``error`` ends the run at a bad sample; ``skip`` takes another in its place, and says so.
        block: as for ``Stream``.
    """

    train: OnDisk

    def __init__(
        self,
        batch_size: int,
        workers: int,
        source: Source,
        test: Source | None,
        held_out: int,
        flip: bool,
        on_error: str,
        block: int = 0,
    ):
        super().__init__(batch_size, workers)
        if on_error not in ("error", "skip"):
            raise ValueError(f"on_error={on_error}: need error or skip")
        if block < 0:
            raise ValueError(f"block={block}: need a number >= 0")
        at_least_one(held_out)
        self.block, self.on_error, self.num_classes = block, on_error, len(source.classes)
        self._source, self._test = source, test
        self._labelled(source)
        index, others = torch.arange(len(source)), self._labelled(test or source)
        if test is None:
            if len(others) < 10:
                raise ValueError(f"{source.where(0)}, ...: {len(others)} images; need at least 10 where test is null")
            held_out = min(held_out, len(others) // 10)
        self._held_out_index = stratified((test or source).label, others, min(held_out, len(others)))
        if test is None:
            index = index[~torch.isin(index, self._held_out_index)]
        first = self._first(index)
        self.shape, dtype = tuple(first.shape), first.dtype
        self.bins = 256 if dtype == torch.uint8 else None
        self.train = OnDisk(source, index, self.shape, dtype, flip, on_error=on_error)
        self.train.codec = self.codec = Identity(root_mean_square(self.train))

    def _labelled(self, source: Source) -> Tensor:
        """Those that have a label, or all of a set without labels."""
        label = torch.zeros(len(source)) if source.label is None else source.label
        missing = (label < 0).nonzero().flatten().tolist()
        if missing and self.on_error == "error":  # rather now than in the midst of a run
            raise BadSample(f"{place(source, missing[0])}: has no label")
        return (label >= 0).nonzero().flatten()

    def _first(self, index: Tensor) -> Tensor:
        """The first image, or with ``on_error=skip`` the first that is fine: the others must be like it."""
        for i in index.tolist():
            try:
                return checked(self._source, i, None)
            except BadSample:
                if self.on_error == "error" or i == index[min(len(index), 100) - 1]:
                    raise
        raise AssertionError

    @cached_property
    def held_out(self) -> Samples:  # pyright: ignore[reportIncompatibleVariableOverride]
        """In memory, without those that are bad if ``on_error=skip``."""
        source, like = self._test or self._source, self.train
        images, kept = [], []
        for i in self._held_out_index.tolist():
            try:
                images.append(checked(source, i, like.shape, like.dtype))
                kept.append(i)
            except BadSample:
                if self.on_error == "error" or (not kept and i == self._held_out_index[-1]):
                    raise
        index = torch.tensor(kept)
        label = None if source.label is None else source.label[index]
        ids = index if self._test is None else len(self._source) + index
        return Pixels(torch.stack(images), label, ids, codec=self.codec)

    def by_content(self, options: dict[str, Any]) -> dict[str, Any]:
        content = [source.fingerprint for source in (self._source, self._test) if source is not None]
        return {key: value for key, value in options.items() if key not in self.places} | {"content": content}


def check_picture(size: int | None, channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: need 1 or 3")
    if size is not None and size < 1:
        raise ValueError(f"size={size}: need at least 1, or null")


def at_least_one(held_out: int) -> None:
    if held_out < 1:
        raise ValueError(f"held_out={held_out}: need at least 1")


def stratified(label: Tensor | None, candidates: Tensor, n: int, seed: int = 0) -> Tensor:
    """n different candidates, in rising order, each class with its share to within one; fixed by the seed.

    They are shuffled, sorted by class, and taken at equal distances.
    """
    order = candidates[torch.randperm(len(candidates), generator=generator(seed, "held out"))]
    if label is not None:
        order = order[label[order].argsort(stable=True)]
    return order[((torch.arange(n) + 0.5) * len(order) / n).long()].sort().values


def root_mean_square(train: Pixels) -> float:
    """sqrt(E[x^2]) of the images in [-1, 1], to three digits, measured on 1,024 of them that depend on nothing else."""
    parts = some(len(train), MEASURED).split(64)
    squares = [train.batch(part)["x_0"].double().square().mean((1, 2, 3)) for part in parts]
    return round(torch.cat(squares).mean().sqrt().item(), 3)
