"""Training at full size on a GPU: images per second, the share of the GPU's measured product rate, and memory."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from denoiselab.bench.memory import gpu_peak
from denoiselab.bench.networks import ours_parts
from denoiselab.bench.record import Record, need, result, times
from denoiselab.bench.refusal import Unavailable
from denoiselab.bench.timing import Contender
from denoiselab.bench.trainer import Turns, train
from denoiselab.callbacks import Checkpoints
from denoiselab.data import Data, Identity, Samples
from denoiselab.summary import Summary, summarise

FLOPS = 6
"""Of a training step per multiply-add of its forward pass: two, and twice as many for the backward pass."""


class Seen(Identity):
    """Shows the first three channels of what is noise anyway."""

    def decode(self, x_0: Tensor) -> Tensor:
        return super().decode(x_0[:, :3])


class Noise(Data):
    """Standard normals with random labels: what they are has no influence on the speed.

    Args:
        batch_size: the global batch.
        shape: of a sample.
        num_classes: 0 for none.
        n: samples.
        workers: loader processes.
    """

    def __init__(self, batch_size: int, shape: list[int], num_classes: int, n: int, workers: int = 0):
        super().__init__(batch_size, workers)
        g = torch.Generator().manual_seed(0)
        self.shape, self.num_classes, self.codec = tuple(shape), num_classes, Seen(sigma_data=1.0)
        x_0 = torch.randn(n, *shape, generator=g)
        label = torch.randint(num_classes, (n,), generator=g) if num_classes else None
        self.train = Samples(x_0, label)
        few = slice(0, min(n, 64))
        self.held_out = Samples(x_0[few], None if label is None else label[few], self.train.ids[few] + n)


class Peaks(pl.Callback):
    """MiB that the GPU's allocator held at most while training, and during what is done after the last step: held-out
    loss and pictures of samples. To be the first callback."""

    training = sampling = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:  # compiling is over
            gpu_peak()
        if trainer.global_step == trainer.max_steps:
            self.training = gpu_peak()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.sampling = gpu_peak()


def products(n: int, repeats: int, device: torch.device) -> Contender:
    """Products of two n x n matrices in bfloat16, 2 n^3 operations each."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return Contender("product", lambda: [a @ b for _ in range(repeats)], per=repeats)


def measure(options: dict[str, Any], device: torch.device) -> list[Record]:
    """Images per second of each model in training.

    Args:
        options: rounds, steps (per turn), product (side of the matrices), models: name -> options (as for
            ``denoiselab train``), shape, num_classes, batch, at_least (images per second).
        device: the GPU.

    Raises:
        Unavailable: it is none.
    """
    if device.type != "cuda":
        raise Unavailable("no GPU is present")
    return [throughput(name, model, options, device) for name, model in options["models"].items()]


def throughput(name: str, model: dict[str, Any], options: dict[str, Any], device: torch.device) -> Record:
    """Training of one model, alternating with matrix products; on a CPU too, where no memory is measured."""
    batch, n, repeats = model["batch"], options["product"], options["repeats"]
    peaks = Peaks()
    turns = Turns(f"gpu {name}", options["rounds"], options["steps"], lambda _: [products(n, repeats, device)])
    data = {"_target_": f"{__name__}.Noise", "batch_size": batch, "n": 8 * batch, "workers": 0}
    data |= {"shape": model["shape"], "num_classes": model["num_classes"]}
    # Saving is no part of this: a checkpoint of the largest has 10 GB.
    train(
        model["options"], turns, lambda own: [peaks, *(c for c in own if not isinstance(c, Checkpoints)), turns], data
    )

    cost, (product,) = cost_of(model), turns.others
    flops = FLOPS * cost.multiply_adds
    ours = [flops * batch / seconds for seconds in turns.ours.seconds]
    rate = [2 * n**3 / seconds for seconds in product.seconds]
    facts = {
        "batch": batch,
        "options": model["options"],
        "parameters": cost.parameters,
        "flops_per_image": flops,
        "teraflops": {"training": statistics.median(ours) / 1e12, "product": statistics.median(rate) / 1e12},
        "share_of_product_rate": asdict(result("training / product", [a / b for a, b in zip(ours, rate, strict=True)])),
    }
    if peaks.training:
        facts |= {"peak_mib": {"training": peaks.training, "sampling": peaks.sampling}}
        facts |= {"rise_by_sampling": max(0.0, peaks.sampling / peaks.training - 1)}
    images = result("images/s", [batch / seconds for seconds in turns.ours.seconds])
    own_peak = {"ours": peaks.training} if peaks.training else {}
    found = times([turns.ours, product], own_peak)
    return Record(
        "gpu", f"{name}, batch {batch}", "a step", options["rounds"], found, images, need(model, "at_least"), facts
    )


def cost_of(model: dict[str, Any]) -> Summary:
    """Of the network, without making it."""
    parts = ours_parts(model)
    _ = parts.embedding  # its table has values
    with torch.device("meta"):
        net = parts.model
    return summarise(net.to("meta"), model["shape"], model["num_classes"])
