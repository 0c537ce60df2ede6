"""Train on two processes and keep what each rank saw in its first step (started by test_training)."""

from __future__ import annotations

import sys
from pathlib import Path

import denoiselab  # isort: skip  # before anything that imports torchvision

import torch

from denoiselab.compose import compose
from denoiselab.module import Diffusion
from denoiselab.training import Job

assert denoiselab
OUTPUT = (
    Path(sys.argv[1])
    if len(sys.argv) == 2
    else Path(next(a for a in sys.argv if a.startswith("output_dir=")).partition("=")[2]).parent
)

step = Diffusion.training_step


def spy(self, batch, batch_idx):
    found = step(self, batch, batch_idx)
    file = OUTPUT / f"rank{self.global_rank}.pt"
    if not file.exists():
        state = torch.get_rng_state()
        torch.save(
            {
                "t": found["t"],
                "eps": torch.randn(4),
                "id": batch["id"],
                "weight": next(self.denoiser.parameters()).detach().clone(),
                "world": self.trainer.world_size,
            },
            file,
        )
        torch.set_rng_state(state)
    return found


Diffusion.training_step = spy
overrides = ["debug=quick", "metrics=none", "callbacks=none", "trainer=ddp_cpu", "data.batch_size=16"]
Job(compose("train", [*overrides, f"output_dir={OUTPUT / 'outputs'}"])).run()
