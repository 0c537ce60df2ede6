"""Train on two processes and keep what each rank saw in its first step (started by test_training)."""

from __future__ import annotations

import sys
from pathlib import Path

import denoiselab  # isort: skip  # before anything that imports torchvision

import torch

from denoiselab.compose import compose
from denoiselab.module import Diffusion
from denoiselab.ranks import Ranks
from denoiselab.training import Job

assert denoiselab
# This script is given a folder; the other rank is given the job's file, which lies in FOLDER/outputs/runs/.jobs.
Ranks.program = (sys.executable, __file__)
OUTPUT = Path(sys.argv[1]) if len(sys.argv) == 2 else Path(sys.argv[-1]).parents[3]

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


def teach(self, losses_of_all=Diffusion._teach):
    """What each rank's learners are told at the first step, beside what the rank saw itself."""
    own, update = [torch.cat(values) for values in zip(*self.seen, strict=True)], self.timesteps.update

    def told(t, losses):
        file = OUTPUT / f"told{self.global_rank}.pt"
        if not file.exists():
            torch.save({"own": own[:2], "told": [t, losses]}, file)
        update(t, losses)

    self.timesteps.update = told
    losses_of_all(self)
    del self.timesteps.update


def keep(self):
    learned = {**self.timesteps.state_dict(prefix="timesteps."), **self.schedule.state_dict(prefix="schedule.")}
    torch.save(learned, OUTPUT / f"learned{self.global_rank}.pt")


Diffusion.training_step = spy
Diffusion._teach = teach
Diffusion.on_train_end = keep
overrides = ["debug=quick", "metrics=none", "callbacks=none", "trainer=ddp_cpu", "data.batch_size=16"]
overrides += ["model.channels=8", "model.head_channels=8"]
overrides += ["timesteps=importance", "timesteps.points=8", "timesteps.history=2"]
overrides += ["schedule=adaptive", "schedule.warm_up=1", "schedule.every=1"]
Job(compose("train", [*overrides, f"output_dir={OUTPUT / 'outputs'}"])).run()
