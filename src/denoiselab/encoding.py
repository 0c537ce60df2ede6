"""Making latents of a data set: ``denoiselab encode``."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.data import autoencoders
from denoiselab.data.autoencoders import Frozen
from denoiselab.data.base import Batch, Data, Samples
from denoiselab.data.codec import Latent
from denoiselab.data.latents import ENCODER, FORMAT, INDEX, VERSION, Store, read_index
from denoiselab.data.loader import Loader
from denoiselab.errors import CheckpointError, UserError
from denoiselab.exchange import ours
from denoiselab.exchange.files import read_object
from denoiselab.experiment import Parts
from denoiselab.files import write_atomic, write_text
from denoiselab.progress import Progress
from denoiselab.run import load
from denoiselab.run_folder import digest

PLAN = "plan.json"
"""In an unfinished folder: what it will hold."""

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def encode(parts: Parts) -> Path:
    """Latents of a data set in a folder, with the autoencoder, their mean and scale, and how well it reconstructs.

    Shards are written one by one into OUTPUT.partial, which becomes OUTPUT at the end; the same command goes on where
    an earlier one was interrupted.

    Args:
        parts: of a configuration for ``denoiselab encode``.

    Returns:
        The folder.

    Raises:
        UserError: an option cannot work, or the folder holds something else.
    """
    config = parts.config
    for name in ("batch", "shard"):
        if not (isinstance(config[name], int) and config[name] >= 1):
            raise UserError(f"{name}={config[name]}: need a whole number >= 1")
    if config["dtype"] not in DTYPES:
        raise UserError(f"dtype={config['dtype']}: need one of {', '.join(DTYPES)}")
    data, folder = parts.data, Path(config["output"])
    if len(data.shape) != 3 or data.source is not None:
        raise UserError(f"data: need images; this set has samples of shape {data.shape}")
    _ = parts.metrics
    encoder = find_encoder(config["encoder"], config["weights"])
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists() and not (folder / INDEX).is_file():
        raise UserError(f"output={folder}: exists and holds no latents; name a new folder")
    options = data.by_content({key: value for key, value in config["data"].items() if key != "workers"})
    plan = {"data": options, "dtype": config["dtype"], "shard": config["shard"], "encoder": state_of(encoder)}
    if (folder / INDEX).is_file():
        if read_index(folder).get("plan") != digest(plan):
            raise UserError(f"output={folder}: holds other latents; name a new folder")
        print(f"already encoded: {folder}", file=sys.stderr)
        return folder
    _claim(partial, digest(plan))

    encoder.save(partial / ENCODER)
    device = torch.device("cuda" if torch.cuda.is_available() and config["device"] == "auto" else "cpu")
    encoder.to(device)
    splits = {
        split: [*_shards(getattr(data, split), split, encoder, device, config, partial, data.workers)]
        for split in ("train", "held_out")
    }
    shape = _shape(partial / splits["train"][0]["file"])
    mean, scale = statistics(partial, splits["train"], shape)
    sha256 = autoencoders.sha256(partial / ENCODER)
    codec = Latent(str(partial / ENCODER), sha256, mean, scale).to(device)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "shape": list(shape),
        "num_classes": data.num_classes,
        "mean": mean,
        "scale": scale,
        "encoder": {"made_from": config["encoder"], "sha256": sha256},
        "source": {**config["data"], **_absolute(config["data"])},
        "splits": splits,
        "reconstruction": reconstruction(parts, data, codec, device),
        "plan": digest(plan),
    }
    index["fingerprint"] = digest([plan, mean, scale])
    write_text(partial / INDEX, json.dumps(index, indent=2) + "\n")
    (partial / PLAN).unlink()
    partial.rename(folder)
    return folder


def find_encoder(source: str, weights: str) -> Frozen:
    """The autoencoder that a path or a name means: of a run or a checkpoint of ours, of a folder of latents, or of
    diffusers."""
    path = Path(source)
    if (path / ENCODER / "config.json").is_file():
        return autoencoders.read(path / ENCODER)
    if (path / "config.json").is_file() and read_object(path / "config.json").get("format") == autoencoders.FORMAT:
        return autoencoders.read(path)
    is_run = (path / "identity.json").is_file() or path.is_file() or ours.is_export(path)
    if not is_run:
        return autoencoders.of_diffusers(source)
    try:
        run = load(path, weights)
    except CheckpointError as error:
        raise CheckpointError(f"encoder={error}") from None
    if run.denoiser.generates:
        raise UserError(f"encoder={source}: is a run that trained a denoiser; need one of loss=autoencoder")
    arguments = {key: value for key, value in run.parts.config["model"].items() if key != "_partial_"}
    return autoencoders.of_ours(run.denoiser.net, {**arguments, "shape": list(run.parts.shape)})


def state_of(encoder: Frozen) -> str:
    """A hash of an autoencoder's weights."""
    import hashlib

    found = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _claim(partial: Path, plan: str) -> None:
    """Make the unfinished folder, or go on with one of the same plan."""
    if partial.exists():
        if not (partial / PLAN).is_file():
            raise UserError(f"output: {partial} is in the way, and no unfinished latents")
        if read_object(partial / PLAN) != {"plan": plan}:
            shutil.rmtree(partial)
        else:
            print(f"going on with {partial}", file=sys.stderr)
            return
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output={partial}: cannot be made ({error.strerror})") from None
    write_text(partial / PLAN, json.dumps({"plan": plan}) + "\n")


class _InOrder(torch.utils.data.Dataset):
    """Consecutive samples as they are, a chunk at a time; those that were taken in the place of bad ones left out."""

    def __init__(self, samples: Samples, start: int, end: int, size: int):
        self.samples, self.chunks = samples, torch.arange(start, end).split(size)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, k: int) -> Batch:
        batch = self.samples.batch(self.chunks[k])
        kept = batch["id"] == self.samples.ids[self.chunks[k]]
        cond = {name: value[kept] for name, value in batch["cond"].items()}
        return {"x_0": batch["x_0"][kept], "id": batch["id"][kept], "cond": cond}


def _shards(
    samples: Samples,
    split: str,
    encoder: Frozen,
    device: torch.device,
    config: dict[str, Any],
    folder: Path,
    workers: int,
) -> Iterator[dict[str, Any]]:
    """Write what is not yet written; of each shard its file and how many latents it holds."""
    from safetensors.torch import save

    progress = Progress(f"encoding {split}", len(samples))
    for number, start in enumerate(range(0, len(samples), config["shard"])):
        end, file = min(start + config["shard"], len(samples)), folder / f"{split}-{number:05d}.safetensors"
        if not file.is_file():
            batches = Loader(_InOrder(samples, start, end, config["batch"]), batch_size=None, num_workers=workers)
            found = [_encoded(batch, encoder, device, DTYPES[config["dtype"]], config["encoder"]) for batch in batches]
            whole = {name: torch.cat([part[name] for part in found]).contiguous() for name in found[0]}
            content = save(whole)
            write_atomic(file, lambda out, content=content: out.write(content))
        progress(end - start)
        yield {"file": file.name, "n": _shape(file, whole=True)[0]}


def _encoded(batch: Batch, encoder: Frozen, device: torch.device, dtype: torch.dtype, source: str) -> dict[str, Tensor]:
    try:
        mean, std = encoder.encode(batch["x_0"].to(device))
    except RuntimeError as error:
        shape, reason = tuple(batch["x_0"].shape[1:]), " ".join(str(error).split())[:120]
        raise UserError(f"encoder={source}: cannot take images of shape {shape} ({reason})") from None
    found = {"mean": mean} | ({} if std is None else {"std": std})
    found = {name: value.to(dtype).cpu() for name, value in found.items()}
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"encoder={source}: gives a {name} that is not finite (dtype={str(dtype)[6:]})")
    return {**found, "id": batch["id"], **batch["cond"]}


def _shape(file: Path, whole: bool = False) -> tuple[int, ...]:
    """Of a latent in a shard; or of all of them."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as found:
        shape = tuple(found.get_slice("mean").get_shape())
    return shape if whole else shape[1:]


def statistics(folder: Path, shards: list[dict[str, Any]], shape: tuple[int, ...]) -> tuple[list[float], float]:
    """The mean per channel, and 1/std of what is drawn in training about it, over the whole set, in float64."""
    store = Store(folder, shards, shape)
    n, parts = len(store.ids), torch.arange(len(store.ids)).split(1024)
    sums = torch.stack([store.rows("mean", part).double().mean((2, 3)).sum(0) for part in parts])
    mean = sums.sum(0) / n
    squares = 0.0
    for part in parts:
        away = store.rows("mean", part).double() - mean.view(-1, 1, 1)
        squares += away.square().mean((1, 2, 3)).sum().item()
        if store.random:
            squares += store.rows("std", part).double().square().mean((1, 2, 3)).sum().item()
    variance = squares / n
    if not variance > 0:
        raise UserError("encoder: gives the same latent for every image; there is nothing to diffuse")
    return mean.tolist(), 1 / math.sqrt(variance)


def reconstruction(parts: Parts, data: Data, codec: Latent, device: torch.device) -> dict[str, float]:
    """What the metrics say of held-out images that went through the autoencoder and back: the floor of whatever is
    decoded from latents."""
    given = data.held_out.draw(parts.config["evaluation"]["n"])
    size = parts.config["batch"]
    with torch.no_grad():
        made = [codec.decode(codec.encode(part.to(device))).cpu() for part in given["x_0"].split(size)]
    label = given["cond"].get("label")
    found = [record for metric in parts.metrics.values() for record in metric.measure(torch.cat(made), label, data)]
    return {record.name: record.value for record in found}


def _absolute(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that name existing paths, as they are from anywhere."""
    paths = {key: Path(value) for key, value in options.items() if isinstance(value, str) and not key.startswith("_")}
    return {key: str(path.resolve()) for key, path in paths.items() if path.exists()}
