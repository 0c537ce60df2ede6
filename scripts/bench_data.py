"""Loading speed: an image folder against plain torchvision, shards against the folder, data in memory against a
training step, and bytes of latents per second from a warm cache.

Contenders alternate within one run, each with two loader processes that live from block to block, so all meet the same
machine. Figures are medians over blocks, with quartiles; a ratio is taken block by block.

    python scripts/bench_data.py [--images 10000] [--latents 32768] [--blocks 9]
        [--output FILE.json]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import denoiselab  # isort: skip  # before torchvision: see denoiselab._torchvision

import numpy as np
import torch
from PIL import Image, ImageFilter

from denoiselab.data import Data, Digits, ImageFolder, Pixels, Samples, Shards, Stream
from denoiselab.data.loader import Loader
from denoiselab.run_folder import hardware, versions

BATCH, WORKERS, SIDE = 128, 2, 64


def write_images(folder: Path, count: int) -> None:
    """PNGs of blurred noise, 64 x 64, in ten class folders, and the same in shards; no two alike."""
    from webdataset.writer import ShardWriter

    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    with ShardWriter(str(folder / "shards" / "train-%04d.tar"), maxcount=2500, verbose=0) as sink:
        for i in range(count):
            noise = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
            content = io.BytesIO()
            noise.filter(ImageFilter.GaussianBlur(1.5)).save(content, "png")
            file = folder / "images" / f"{i % 10}" / f"{i:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.getvalue())
            sink.write({"__key__": f"{i:05d}", "png": content.getvalue(), "cls": i % 10})


def ours(data: Data) -> Iterator[Any]:
    stream = Stream(len(data.train), BATCH, seed=0)
    options: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True, "collate_fn": as_it_is}
    return iter(Loader(data.train, batch_sampler=stream, **options))


def torchvisions(folder: Path) -> Iterator[Any]:
    """What a researcher would write: ImageFolder, ToTensor, and a shuffling DataLoader."""
    from torchvision.datasets import ImageFolder as Reference
    from torchvision.transforms import ToTensor

    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "drop_last": True}
    loader = torch.utils.data.DataLoader(
        Reference(folder, ToTensor()), num_workers=WORKERS, persistent_workers=True, **options
    )
    while True:
        yield from loader


def as_it_is(batch: Any) -> Any:
    return batch


def alternate(contenders: dict[str, Callable[[], Any]], blocks: int, calls: int) -> dict[str, list[float]]:
    """Seconds per call of each contender, block by block, after one block that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(blocks + 1):
        order = [*contenders.items()]
        for name, call in order if block % 2 else reversed(order):
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            if block:
                found[name].append((time.perf_counter() - begin) / calls)
    return found


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def files(folder: Path, blocks: int, calls: int) -> dict[str, Any]:
    """Images per second from PNGs, and ratios of speed to torchvision's in the same block."""
    iterators = {
        "torchvision": torchvisions(folder / "images"),
        "image_folder": ours(ImageFolder(str(folder / "images"), size=SIDE)),
        "shards": ours(Shards(str(folder / "shards"), size=SIDE)),
    }
    seconds = alternate({k: lambda i=i: next(i) for k, i in iterators.items()}, blocks, calls)
    result: dict[str, Any] = {f"{k}_images_per_s": spread([BATCH / s for s in v]) for k, v in seconds.items()}
    for name in ("image_folder", "shards"):
        ratios = [a / b for a, b in zip(seconds["torchvision"], seconds[name], strict=True)]
        result[f"{name}_over_torchvision"] = spread(ratios)
    return result


def in_memory(blocks: int) -> dict[str, Any]:
    """Milliseconds of a batch and of a training step of the small U-Net on it, and the batch's share of both."""
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    cifar = Pixels(images, torch.randint(0, 10, (50_000,)), torch.arange(50_000), flip=True)
    result: dict[str, Any] = {}
    for name, samples, batch_size in (("digits", Digits().train, 128), ("cifar10", cifar, 128)):
        load, step = loading(samples, batch_size), training(samples, batch_size)
        calls = 3 if name == "digits" else 1
        seconds = {**alternate({"batch": load}, blocks, 50), **alternate({"step": step}, blocks, calls)}
        shares = [a / (a + b) for a, b in zip(seconds["batch"], seconds["step"], strict=True)]
        ms = {f"{k}_ms": spread([1e3 * s for s in v]) for k, v in seconds.items()}
        result[name] = {**ms, "share": spread(shares)}
    return result


def latents(folder: Path, count: int, blocks: int) -> dict[str, Any]:
    """GB/s of a training batch of latents 4 x 32 x 32, mapped from shards that were just written: bytes of means alone,
    and of means and deviations with the draw between them; in this process, on one thread."""
    from safetensors.torch import save_file

    from denoiselab.data import Latent, autoencoders
    from denoiselab.data.latents import Mapped, Store
    from denoiselab.models import KL

    shape, shards = (4, 32, 32), []
    for k in range(4):
        n = count // 4
        tensors = {"mean": torch.randn(n, *shape), "std": torch.rand(n, *shape), "id": torch.arange(k * n, (k + 1) * n)}
        save_file(tensors, folder / f"{k}.safetensors")
        shards.append({"file": f"{k}.safetensors", "n": n})
    arguments = {"shape": [3, 64, 64], "channels": 8}
    autoencoders.of_ours(KL(**arguments), {"_target_": "denoiselab.models.KL", **arguments}).save(folder / "encoder")
    codec = Latent(str(folder / "encoder"), autoencoders.sha256(folder / "encoder"), [0.0] * 4, 1.0)
    store, each = Store(folder, shards, shape), 4 * 4 * 32 * 32
    found = {name: Mapped(store, codec, sample) for name, sample in (("means", False), ("drawn", True))}
    seconds = alternate({name: loading(samples, BATCH) for name, samples in found.items()}, blocks, 50)
    bytes_read = {"means": BATCH * each, "drawn": 2 * BATCH * each}
    return {f"{k}_GB_per_s": spread([bytes_read[k] / s / 1e9 for s in v]) for k, v in seconds.items()}


def loading(samples: Samples, batch_size: int) -> Callable[[], Any]:
    batches = iter(Stream(len(samples), batch_size, seed=0))
    return lambda: samples.__getitems__(next(batches))


def training(samples: Samples, batch_size: int) -> Callable[[], Any]:
    """Forward, backward and AdamW of unet_digits: of the networks here the cheapest, so the share is an upper bound."""
    from denoiselab.models import UNet

    batch = samples.batch(slice(0, batch_size))
    x_0, label = batch["x_0"], batch["cond"]["label"]
    net = denoiselab.build("metrics=none", "callbacks=none").make("model", shape=tuple(x_0.shape[1:]))
    assert isinstance(net, UNet)
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        net(x_0, torch.zeros(len(x_0)), label).square().mean().backward()
        optimizer.step()

    return step


def show(values: dict[str, dict[str, float]]) -> None:
    for name, value in values.items():
        line = f"{name}: {value['median']:.4g} ({value['lower_quartile']:.4g} to {value['upper_quartile']:.4g})"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--latents", type=int, default=32_768, help="of 16 KiB, and as much for their deviations")
    parser.add_argument("--blocks", type=int, default=9, help="blocks of each, after one that is not counted")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        write_images(Path(name), options.images)
        found = files(Path(name), options.blocks, max(1, options.images // BATCH // 2))
    show(found)
    memory = in_memory(options.blocks)
    show({name: value["share"] for name, value in memory.items()})
    with tempfile.TemporaryDirectory() as name:
        mapped = latents(Path(name), options.latents, options.blocks)
    show(mapped)
    result = {
        "files": found,
        "memory": memory,
        "latents": mapped,
        "batch_size": BATCH,
        "workers": WORKERS,
        "images": options.images,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions() | {"denoiselab": denoiselab.__version__},
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
