"""Latents on disk: written once in shards by ``denoiselab encode``, mapped into memory when they are trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.data.base import Batch, Data, Samples
from denoiselab.data.codec import Latent
from denoiselab.data.stream import Address
from denoiselab.errors import UserError
from denoiselab.rng import generator, mix

INDEX = "latents.json"
FORMAT, VERSION = "denoiselab latents", 1
ENCODER = "encoder"
"""The folder of the autoencoder, beside the shards."""

FACTS: dict[str, type] = {
    "shape": list,
    "num_classes": int,
    "mean": list,
    "scale": float,
    "encoder": dict,
    "source": dict,
    "splits": dict,
    "reconstruction": dict,
    "fingerprint": str,
}
"""What latents.json says, and as what."""


class Store:
    """The tensors of consecutive shards, mapped: memory is taken for what is read, and given back when it is needed.

    Args:
        folder: of the shards.
        shards: of each, ``file`` and ``n``.
        shape: of a latent.

    Raises:
        UserError: a shard is missing, truncated, or of another shape.
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], shape: tuple[int, ...]):
        self.parts = [_opened(folder / shard["file"], shard["n"], shape) for shard in shards]
        self.shape, self.random, self.flipped = shape, "std" in self.parts[0], "mean_flipped" in self.parts[0]
        self.ends = torch.tensor([len(part["mean"]) for part in self.parts]).cumsum(0)
        self.ids = torch.cat([part["id"] for part in self.parts])
        self.label = torch.cat([part["label"] for part in self.parts]) if "label" in self.parts[0] else None

    def rows(self, name: str, index: Tensor) -> Tensor:
        """``mean`` or ``std`` at these positions, float32; or ``mean_flipped``, ``std_flipped`` of mirrored images."""
        shard = torch.searchsorted(self.ends, index, right=True)
        first = int(shard[0]) if len(shard) else 0
        if bool((shard == first).all()):
            start = int(self.ends[first]) - len(self.parts[first][name])
            return self.parts[first][name].index_select(0, index - start).float()
        found = torch.empty(len(index), *self.shape)
        for k in shard.unique().tolist():
            here = (shard == k).nonzero().flatten()
            found[here] = self.rows(name, index[here])
        return found


class Mapped(Samples):
    """Latents in the files that hold them, read when they are asked for: x_0 = scale (m + s eps - mean), where an
    image's latents are N(m, s^2) and eps is addressed by (seed, epoch, index).

    Args:
        store: of m and s.
        codec: of the latents.
        sample: draw from N(m, s^2) in training; False for m.
        flip: take the latents of the mirrored image of half of them, by a hash of (seed, epoch, index); in training.
    """

    def __init__(self, store: Store, codec: Latent, sample: bool, flip: bool = False):
        self.store, self.sample, self.flip = store, sample, flip
        self.scale, self.shift = codec.scale, codec.shift.clone()  # the codec itself follows the network to its device
        self.ids, self.label = store.ids, store.label

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def x_0(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All of it, of the means."""
        return self.batch(slice(None))["x_0"]

    def __getitems__(self, addresses: Sequence[Address]) -> Batch:
        index = torch.tensor([index for _, index in addresses])
        eps, flipped, seed = None, None, getattr(addresses, "seed", 0)
        if self.flip:
            flipped = torch.tensor([mix(seed, "flip", *address) % 2 == 1 for address in addresses])
        if self.sample and self.store.random:
            draws = [torch.randn(self.store.shape, generator=generator(seed, "posterior", *one)) for one in addresses]
            eps = torch.stack(draws)
        return self._made(index, eps, flipped)

    def batch(self, index: Tensor | slice) -> Batch:
        return self._made(torch.arange(len(self))[index])

    def _made(self, index: Tensor, eps: Tensor | None = None, flipped: Tensor | None = None) -> Batch:
        latent = self._rows("mean", index, flipped)
        if eps is not None:
            latent.addcmul_(self._rows("std", index, flipped), eps)
        cond = {} if self.label is None else {"label": self.label[index]}
        x_0 = torch.add(self.shift, latent, alpha=self.scale)
        return {"x_0": x_0, "id": self.ids[index], "cond": cond}

    def _rows(self, name: str, index: Tensor, flipped: Tensor | None) -> Tensor:
        found = self.store.rows(name, index)
        if flipped is not None and bool(flipped.any()):
            found[flipped] = self.store.rows(f"{name}_flipped", index[flipped])
        return found


class Latents(Data):
    """Latents that ``denoiselab encode`` made of a data set; what is sampled is decoded by the autoencoder that lies
    beside them.

    Args:
        batch_size: the global batch.
        workers: loader processes.
        root: the folder that was encoded into.
        sample: draw each image's latents anew in every epoch from the distribution that a KL autoencoder gives; False
            for its mean.
        flip: train on mirrored images too, where they were encoded (``flip=true`` of the command).
    """

    train: Mapped

    def __init__(
        self, batch_size: int = 128, workers: int = 0, root: str = "", sample: bool = True, flip: bool = False
    ):
        super().__init__(batch_size, workers)
        folder = Path(root)
        index = read_index(folder)
        self.shape, self.num_classes = tuple(index["shape"]), index["num_classes"]
        self.source, self.reconstruction = index["source"], index["reconstruction"]
        self.codec = Latent(
            str((folder / ENCODER).resolve()), index["encoder"].get("sha256", ""), index["mean"], index["scale"]
        )
        self._fingerprint = index["fingerprint"]
        train, held_out = (Store(folder, index["splits"][split], self.shape) for split in ("train", "held_out"))
        if flip and not train.flipped:
            raise ValueError(
                "flip=true: these were encoded without mirrored images; need `denoiselab encode flip=true`"
            )
        self.train, self._held_out = Mapped(train, self.codec, sample, flip), Mapped(held_out, self.codec, sample=False)

    @cached_property
    def held_out(self) -> Samples:  # pyright: ignore[reportIncompatibleVariableOverride]
        """In memory, always the means."""
        batch = self._held_out.batch(slice(None))
        return Samples(batch["x_0"], batch["cond"].get("label"), batch["id"])

    def by_content(self, options: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in options.items() if key != "root"}
        return kept | {"content": self._fingerprint}


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder of latents says of itself.

    Raises:
        UserError: it is none, is damaged, or is of a later version.
    """
    file = folder / INDEX
    if not file.is_file():
        raise UserError(
            f"data.root={folder}: no {INDEX} is there; make latents with `denoiselab encode data=... encoder=... "
            f"output={folder}`"
        )
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{file}: not the index of latents")
    if index.get("version") != VERSION:
        raise UserError(f"{file}: has layout {index.get('version')!r}; this denoiselab reads {VERSION}")
    for key, kind in FACTS.items():
        if not isinstance(index.get(key), kind):
            raise UserError(f"{file}: says nothing usable of its {key}")
    numbers = [*index["mean"], index["scale"], *index["reconstruction"].values()]
    usable = all(isinstance(value, float) and math.isfinite(value) for value in numbers) and index["scale"] > 0
    if not usable or len(index["mean"]) != next(iter(index["shape"]), None):
        raise UserError(f"{file}: says nothing usable of its mean, scale or reconstruction")
    for split in ("train", "held_out"):
        shards = index["splits"].get(split)
        usable = isinstance(shards, list) and all(
            isinstance(s, dict) and isinstance(s.get("file"), str) and isinstance(s.get("n"), int) for s in shards
        )
        if not usable or not shards or any(Path(s["file"]).name != s["file"] for s in shards):
            raise UserError(f"{file}: says nothing usable of its {split} shards")
    return index


def _opened(file: Path, n: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A shard's tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as found:
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: missing, truncated, or not a shard ({' '.join(str(error).split())[:80]})") from None
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"mean": (n, *shape), "std": (n, *shape), "label": (n,), "id": (n,)}
    expected |= {f"{name}_flipped": (n, *shape) for name in ("mean", "std")}
    if not {"mean", "id"} <= sizes.keys() or any(expected.get(name) != size for name, size in sizes.items()):
        raise UserError(f"{file}: holds {sizes}; need {n} latents of shape {shape} with their ids")
    return tensors
