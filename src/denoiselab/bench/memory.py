"""The most memory that one network needs for a step, alone.

On a GPU that is what its allocator says. On a CPU each network has a process of its own, whose peak resident memory is
compared with what it was before the network was made: a process that held both could not tell them apart, and freed
memory of one would serve the other.

    python -m denoiselab.bench.memory '{"side": "ours", ...}'
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from denoiselab.bench.timing import Contender

if TYPE_CHECKING:
    from denoiselab.bench.networks import Pair

STATUS = Path("/proc/self/status")


def peaks(pair: Pair, contenders: list[Contender], model: dict[str, Any], work: str, batch: int) -> dict[str, float]:
    """MiB by contender: weights, gradients, activations and whatever the operations need."""
    if pair.x.is_cuda:
        nets: list[nn.Module] = [pair.ours, pair.theirs]
        return {c.name: on_gpu(c, net) for c, net in zip(contenders, nets, strict=True)}
    asked = {"model": model, "kind": pair.kind, "config": pair.config, "work": work, "batch": batch}
    asked["threads"] = torch.get_num_threads()
    return {c.name: in_a_process({**asked, "side": c.name}) for c in contenders}


def on_gpu(contender: Contender, net: nn.Module) -> float:
    """What the allocator held at most during a turn, without what else lies on the GPU."""
    net.zero_grad(set_to_none=True)
    contender.run()
    net.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated() / 2**20
    gpu_peak()
    contender.run()
    weights = sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
    return gpu_peak() - before + weights / 2**20


def gpu_peak() -> float:
    """MiB that the GPU's allocator held at most since this was last asked; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


def in_a_process(asked: dict[str, Any]) -> float:
    """Run this file for one network."""
    command = [sys.executable, "-m", "denoiselab.bench.memory", json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked["threads"])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def highest() -> float:
    """MiB that this process had resident at most. On Linux from the kernel's own account of this program: that of
    getrusage begins with what the process was before it became this program, which is its parent's size."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def rise(asked: dict[str, Any]) -> float:
    """MiB that a network needs for three steps beyond what was there before it was made."""
    from denoiselab.bench import networks

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    model, batch = asked["model"], asked["batch"]
    # What both sides load, whichever is measured: packages, threads, and libraries that wait for a first call.
    parts = networks.ours_parts(model)
    _ = parts.embedding, getattr(networks.diffusers(), asked["kind"])
    importlib.import_module("denoiselab.models")
    nn.Conv2d(8, 8, 3)(torch.zeros(8, 8, 32, 32)).sum().backward()
    before = highest()
    if asked["side"] == "ours":
        net = parts.model.eval()
        given: dict[str, Any] = {"c_noise": torch.zeros(batch)}
        label = "label"
    else:
        net = networks.theirs(asked["kind"], asked["config"])
        given = {"timestep": torch.zeros(batch, dtype=torch.int64)}
        label = "class_labels"
    if model["num_classes"]:
        given[label] = torch.zeros(batch, dtype=torch.int64)
    x = torch.zeros(batch, *model["shape"])

    def call() -> torch.Tensor:
        y = net(x, **given)
        return y if asked["side"] == "ours" else y.sample

    with torch.no_grad():
        gradient = torch.ones_like(call())
    step = networks.task(call, asked["work"], "fp32", gradient, net)
    for _ in range(3):
        step()
    return highest() - before


if __name__ == "__main__":
    print(rise(json.loads(sys.argv[1])))
