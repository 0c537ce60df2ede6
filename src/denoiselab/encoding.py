"""Making latents of a data set: ``denoiselab encode``."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from denoiselab.errors import CheckpointError, RunHeld, UserError
from denoiselab.exchange import ours
from denoiselab.exchange.files import read_object
from denoiselab.experiment import Parts
from denoiselab.files import write_atomic, write_text
from denoiselab.progress import Progress
from denoiselab.run import device_of, load
from denoiselab.run_folder import digest

PLAN, LOCK = "plan.json", "lock"
"""In an unfinished folder: what it will hold, and what its writer holds."""

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
    config, data, folder = parts.config, parts.data, Path(str(parts.config["output"]))
    _check(config, data)
    _ = parts.metrics
    encoder = find_encoder(str(config["encoder"]), config["weights"])
    device = device_of(config["device"])
    encoder.to(device)
    _try(encoder, data, device, config["encoder"])
    if folder.exists() and not (folder / INDEX).is_file():
        raise UserError(f"output={folder}: exists and holds no latents; name a new folder")
    content = {"data": _content(data, config["data"]), "encoder": state_of(encoder)}
    content |= {name: config[name] for name in ("dtype", "flip")}
    plan = digest([content, config["shard"]])
    if (folder / INDEX).is_file():
        index = read_index(folder)
        if index.get("content") != digest(content):
            raise UserError(f"output={folder}: holds latents of another set, encoder, dtype or flip; name a new folder")
        if index.get("measured") == _asked(config):
            print(f"already encoded: {folder}", file=sys.stderr)
        else:
            print(f"already encoded, and measured anew: {folder}", file=sys.stderr)
            codec = Latent(str(folder / ENCODER), index["encoder"]["sha256"], index["mean"], index["scale"]).to(device)
            found = {"reconstruction": reconstruction(parts, data, codec, device), "measured": _asked(config)}
            write_text(folder / INDEX, json.dumps({**index, **found}, indent=2) + "\n")
        return folder
    partial = folder.with_name(folder.name + ".partial")
    _claim(partial, plan)
    with _alone(partial):
        index = _write(partial, parts, encoder, device)
        index |= {"content": digest(content), "fingerprint": digest([content, index["mean"], index["scale"]])}
        write_text(partial / INDEX, json.dumps(index, indent=2) + "\n")
        partial.rename(folder)
        for name in (PLAN, LOCK):
            (folder / name).unlink()
    return folder


def _write(partial: Path, parts: Parts, encoder: Frozen, device: torch.device) -> dict[str, Any]:
    """Write the autoencoder and what is missing of the shards; what the index says of them."""
    config, data = parts.config, parts.data
    encoder.save(partial / ENCODER)
    splits = {
        split: [*_shards(getattr(data, split), split, encoder, device, config, partial, data.workers)]
        for split in ("train", "held_out")
    }
    shape = _sizes(partial / splits["train"][0]["file"])[1:]
    mean, scale = statistics(partial, splits["train"], shape)
    sha256 = autoencoders.sha256(partial / ENCODER)
    codec = Latent(str(partial / ENCODER), sha256, mean, scale).to(device)
    return {
        "format": FORMAT,
        "version": VERSION,
        "shape": list(shape),
        "num_classes": data.num_classes,
        "mean": mean,
        "scale": scale,
        "encoder": {"made_from": str(config["encoder"]), "sha256": sha256},
        "source": {**config["data"], **_absolute(data, config["data"])},
        "splits": splits,
        "reconstruction": reconstruction(parts, data, codec, device),
        "measured": _asked(config),
    }


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold an unfinished folder, until this process ends at the latest.

    Raises:
        RunHeld: another process does.
    """
    with (partial / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunHeld(f"output: another process is writing {partial}") from None
        yield


def _check(config: dict[str, Any], data: Data) -> None:
    for name in ("batch", "shard"):
        if not (isinstance(config[name], int) and config[name] >= 1):
            raise UserError(f"{name}={config[name]}: need a whole number >= 1")
    if config["dtype"] not in DTYPES:
        raise UserError(f"dtype={config['dtype']}: need one of {', '.join(DTYPES)}")
    if not Path(str(config["output"])).name:
        raise UserError(f"output={config['output']}: need the name of a folder")
    if len(data.shape) != 3 or data.source is not None:
        raise UserError(f"data: need images; this set has samples of shape {data.shape}")
    if data.low_res or data.vector:
        raise UserError("data: need images alone, and these come with conditions; name the set that they are made of")


def _try(encoder: Frozen, data: Data, device: torch.device, source: str) -> None:
    """An image must come back as large as it went."""
    shape = tuple(data.shape)
    try:
        back = tuple(encoder.decode(encoder.encode(torch.zeros(1, *shape, device=device))[0]).shape[1:])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"encoder={source}: cannot take images of shape {shape} ({reason})") from None
    if back != shape:
        raise UserError(f"encoder={source}: gives images of shape {shape} back as {back}; choose another data.size")


def _content(data: Data, options: dict[str, Any]) -> dict[str, Any]:
    """What the images are: neither how many are read at a time, nor by whom."""
    return data.by_content({key: value for key, value in options.items() if key not in ("workers", "batch_size")})


def _asked(config: dict[str, Any]) -> str:
    """A hash of what is measured."""
    return digest([config["metrics"], config["evaluation"]])


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
            raise UserError(
                f"output: {partial} holds unfinished latents of other options; finish them with those, or remove it"
            )
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
            found = [
                _encoded(batch, encoder, device, config, flip=config["flip"] and split == "train")
                for batch in batches
                if len(batch["x_0"])
            ]
            if not found:
                raise UserError(f"data: none of the images {start} to {end - 1} of {split} can be used")
            whole = {name: torch.cat([part[name] for part in found]).contiguous() for name in found[0]}
            content = save(whole)
            write_atomic(file, lambda out, content=content: out.write(content))
        progress(end - start)
        yield {"file": file.name, "n": _sizes(file)[0]}


def _encoded(
    batch: Batch, encoder: Frozen, device: torch.device, config: dict[str, Any], flip: bool
) -> dict[str, Tensor]:
    """What a shard holds of these images; with ``flip`` of their mirror images too."""
    images, found = batch["x_0"].to(device), {}
    for suffix, given in {"": images, **({"_flipped": images.flip(-1)} if flip else {})}.items():
        mean, std = encoder.encode(given)
        found |= {f"mean{suffix}": mean} | ({} if std is None else {f"std{suffix}": std})
    found = {name: value.to(DTYPES[config["dtype"]]).cpu() for name, value in found.items()}
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"encoder={config['encoder']}: gives a {name} that is not finite (dtype={config['dtype']})")
    return {**found, "id": batch["id"], **batch["cond"]}


def _sizes(file: Path) -> tuple[int, ...]:
    """Of the latents of a shard: their number, and the shape of one."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as found:
        return tuple(found.get_slice("mean").get_shape())


def statistics(folder: Path, shards: list[dict[str, Any]], shape: tuple[int, ...]) -> tuple[list[float], float]:
    """The mean per channel, and 1/std of what is drawn in training about it, over the whole set, in float64."""
    store = Store(folder, shards, shape)
    kinds = ["", "_flipped"] if store.flipped else [""]
    n, parts = len(kinds) * len(store.ids), torch.arange(len(store.ids)).split(1024)
    sums = [store.rows(f"mean{kind}", part).double().mean((2, 3)).sum(0) for kind in kinds for part in parts]
    mean = torch.stack(sums).sum(0) / n
    squares = 0.0
    for kind in kinds:
        for part in parts:
            away = store.rows(f"mean{kind}", part).double() - mean.view(-1, 1, 1)
            squares += away.square().mean((1, 2, 3)).sum().item()
            if store.random:
                squares += store.rows(f"std{kind}", part).double().square().mean((1, 2, 3)).sum().item()
    variance = squares / n
    if not variance > 0:
        raise UserError("encoder: gives the same latent for every image; there is nothing to diffuse")
    return mean.tolist(), 1 / math.sqrt(variance)


def reconstruction(parts: Parts, data: Data, codec: Latent, device: torch.device) -> dict[str, float]:
    """What the metrics say of held-out images that went through the autoencoder and back, beside those images: what is
    lost by that alone."""
    given = data.held_out.draw(parts.config["evaluation"]["n"])
    size = parts.config["batch"]
    with torch.no_grad():
        made = [codec.decode(codec.encode(part.to(device))).cpu() for part in given["x_0"].split(size)]
    label = given["cond"].get("label")
    found = [record for metric in parts.metrics.values() for record in metric.measure(torch.cat(made), label, data)]
    return {record.name: record.value for record in found}


def _absolute(data: Data, options: dict[str, Any]) -> dict[str, Any]:
    """The options that say where files lie, as they are from anywhere."""
    paths = {key: Path(options[key]) for key in data.places if isinstance(options.get(key), str)}
    return {key: str(path.absolute()) for key, path in paths.items() if path.exists() or _pattern(path)}


def _pattern(path: Path) -> bool:
    return any(mark in path.name for mark in "*?{") and path.parent.exists()
