"""The history of importance sampling: our update against the loop over samples that is commonly taught.

Both take in the same batches of 4,096 times and losses at T = 1000 and make the new probabilities, alternating in
blocks of ten batches (with --block 1 each of our updates starts with the caches that the loop left). The loop reads
one number and writes one cell per sample; ours makes a fixed number of tensor operations, and must end with the same
history, in the same order, where cells occur several times in a batch.

    python scripts/bench_importance.py [--rounds 30] [--block 10] [--device cpu] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import denoiselab  # isort: skip  # before anything that imports torchvision

import torch
from torch import Tensor

from denoiselab.run_folder import hardware, versions
from denoiselab.schedule import Linear
from denoiselab.timesteps import Importance

CELLS, HISTORY, FLOOR = 1000, 10, 0.001


class Loop:
    """The loop over samples, with a ring per cell."""

    def __init__(self, device: torch.device):
        self.losses = torch.zeros(CELLS, HISTORY, dtype=torch.float64, device=device)
        self.count = [0] * CELLS
        self.p = torch.full((CELLS,), 1 / CELLS, dtype=torch.float64, device=device)

    @property
    def oldest_first(self) -> Tensor:
        turn = torch.tensor(self.count, device=self.losses.device)[:, None]
        return self.losses.gather(1, (turn + torch.arange(HISTORY, device=turn.device)) % HISTORY)

    def update(self, t: Tensor, losses: Tensor) -> None:
        index = (t * CELLS).long().clamp(0, CELLS - 1)
        for i in range(len(t)):
            cell = int(index[i].item())
            self.losses[cell, self.count[cell] % HISTORY] = losses[i].item()
            self.count[cell] += 1
        if min(self.count) >= HISTORY:
            size = self.losses.square().mean(1).sqrt()
            self.p = (1 - FLOOR) * size / size.sum() + FLOOR / CELLS


def seconds(update: Callable[[Tensor, Tensor], None], block: list[tuple[Tensor, Tensor]]) -> float:
    """Per update."""
    synchronise = torch.cuda.synchronize if block[0][0].is_cuda else lambda: None
    synchronise()
    begin = time.perf_counter()
    for t, losses in block:
        update(t, losses)
    synchronise()
    return (time.perf_counter() - begin) / len(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each, after three that are not counted")
    parser.add_argument("--block", type=int, default=10, help="updates per block")
    parser.add_argument("--batch", type=int, default=4096, help="losses per update")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    ours, loop = Importance(Linear(CELLS), history=HISTORY, floor=FLOOR).to(device), Loop(device)
    g = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    for _ in range(3 + options.rounds):
        # small t often, some cells more than HISTORY times in a batch
        draws = [torch.rand(2, options.batch, generator=g) for _ in range(options.block)]
        block = [(u[0].square().to(device), u[1].to(device)) for u in draws]
        times["ours"].append(seconds(ours.update, block))
        times["loop"].append(seconds(loop.update, block))
    if not torch.equal(ours.losses, loop.oldest_first) or not torch.allclose(ours.p, loop.p, rtol=1e-12, atol=0):
        raise SystemExit("the two histories differ")

    counted = {name: values[3:] for name, values in times.items()}
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in counted.items()}
    ratios = [a / b for a, b in zip(counted["loop"], counted["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "batch": options.batch,
        "rounds": options.rounds,
        "block": options.block,
        **{f"{name}_ms": 1e3 * median for name, (_, median, _) in quartiles.items()},
        **{f"{name}_ms_quartiles": [1e3 * first, 1e3 * third] for name, (first, _, third) in quartiles.items()},
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "device": options.device,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions() | {"denoiselab": denoiselab.__version__},
    }
    print(f"{options.batch} losses: ours {result['ours_ms']:.3f} ms, loop {result['loop_ms']:.1f} ms; same history")
    print(f"ours is {middle:.0f} times faster (quartiles {low:.0f} to {high:.0f})")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
