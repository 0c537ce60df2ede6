"""Training speed against a bare PyTorch loop: same network, batches, noise, EMA and optimizer flags, in one run.

The two alternate in blocks of steps inside one process, so that both meet the same machine. The bare loop is what a
researcher would write for this one configuration; ours runs with every per-step part on (Lightning, buckets, EMA,
metrics, progress, signal and finiteness checks), with its periodic evaluations (held-out loss, pictures) timed apart.

    python scripts/bench_overhead.py [--blocks 8] [--steps 50] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import denoiselab  # isort: skip  # before lightning: see denoiselab._torchvision

import lightning.pytorch as pl
import torch

from denoiselab.compose import compose
from denoiselab.data.stream import Stream
from denoiselab.run_folder import hardware, versions
from denoiselab.training import Job


class BareLoop:
    """v-prediction on the digits with a cosine schedule, written out."""

    def __init__(self, job: Job, module: Any):
        self.net = copy.deepcopy(module.denoiser.net)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            **{k: v for k, v in job.config["optimizer"].items() if not k.startswith("_")},
        )
        self.x_0, self.label = module.trainer.datamodule.data.train.x_0, module.trainer.datamodule.data.train.label
        self.batches = iter(Stream(len(self.x_0), module.batch_size, seed=0))
        self.log_snr = module.schedule.log_snr_table.float()
        self.sigma_data = module.denoiser.sigma_data
        self.clip = module.gradient_clip
        self.decay = module.ema.decay
        self.loss = torch.zeros(())

    def step(self) -> None:
        index = torch.tensor([i for _, i in next(self.batches)])
        x_0, label = self.x_0[index], self.label[index]
        label = torch.where(torch.rand(len(x_0)) < 0.1, -1, label)
        position = torch.rand(len(x_0)) * (len(self.log_snr) - 1)
        at = torch.lerp(self.log_snr[position.long()], self.log_snr[position.long() + 1], position.frac())
        alpha, sigma = (v.sqrt().view(-1, 1, 1, 1) for v in (at.sigmoid(), (-at).sigmoid()))
        eps = torch.randn_like(x_0)
        c_in = (alpha**2 * self.sigma_data**2 + sigma**2).rsqrt()
        v_hat = self.net(c_in * (alpha * x_0 + sigma * eps), at / -8, label)
        loss = (v_hat - (alpha * eps - sigma * x_0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.ema.parameters()], [*self.net.parameters()], 1 - self.decay)
        self.loss += loss.detach()


class Alternate(pl.Callback):
    """After each block of ours, a block of the bare loop."""

    def __init__(self, job: Job, blocks: int, steps: int):
        self.job, self.blocks, self.steps = job, blocks, steps
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.wall = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.loop = BareLoop(self.job, pl_module)
        for _ in range(10):
            self.loop.step()
        self.begin = pl_module.clock.seconds()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % self.steps:
            return
        self.ours.append((pl_module.clock.seconds() - self.begin) / self.steps)
        with pl_module.clock.paused():
            begin = time.perf_counter()
            for _ in range(self.steps):
                self.loop.step()
            self.bare.append((time.perf_counter() - begin) / self.steps)
        self.begin = pl_module.clock.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each, after one that is not counted")
    parser.add_argument("--steps", type=int, default=50, help="steps per block")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    steps = (options.blocks + 1) * options.steps
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["experiment=digits", "lr_schedule=constant", f"trainer.max_steps={steps}"]
        job = Job(compose("train", [*overrides, f"output_dir={folder}"]))
        alternate = Alternate(job, options.blocks, options.steps)
        make = job.make_trainer
        job.make_trainer = lambda callbacks, loggers: make([*callbacks, alternate], loggers)
        with job.folder.locked():
            job.fit()
        paused = json.loads((job.folder.path / "metrics.jsonl").read_text().splitlines()[-1])

    ours, bare = alternate.ours[1:], alternate.bare[1:]
    ratios = sorted(b / o for o, b in zip(ours, bare, strict=True))
    result = {
        "steps": options.steps * options.blocks,
        "ours_ms": 1e3 * statistics.median(ours),
        "bare_ms": 1e3 * statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [statistics.quantiles(ratios, n=4)[0], statistics.quantiles(ratios, n=4)[2]],
        "evaluation_share": paused.get("speed/evaluation_share"),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions() | {"denoiselab": denoiselab.__version__},
    }
    print(f"{result['steps']} steps each: ours {result['ours_ms']:.1f} ms/step, bare {result['bare_ms']:.1f} ms/step")
    low, high = result["ratio_quartiles"]
    print(f"steps/s of the bare loop kept: {result['ratio']:.3f} (quartiles {low:.3f} to {high:.3f})")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
