"""A training step never waits for the device: whatever is chosen, the host reads nothing of what it computes."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn import functional as F

from denoiselab.callbacks import Checkpoints, LossBuckets, Throughput, TrainingMetrics
from denoiselab.checks import check
from denoiselab.compose import compose
from denoiselab.errors import UserError
from denoiselab.experiment import Parts
from denoiselab.module import Diffusion
from denoiselab.training import Job
from exact import OPEN, OPTIONS, every, parts, parts_with
from host_sync import HostWaits, refused

SMALL = ("data=8gaussians", "data.n=64", "data.batch_size=8", "model=mlp", "model.width=8", "model.depth=1")
LEARNING = {"timesteps": {"history": 1, "points": 4}, "schedule": {"warm_up": 0, "every": 1}}
"""What makes options that learn begin with the first step."""


def chosen(loss: str, timesteps: str, schedule: str) -> Parts:
    """The parts of a training run on points; quickly, from compositions that are kept."""
    recipe, small = parts(f"loss={loss}").config, parts(*SMALL)
    if recipe["model"] != parts().config["model"]:  # which the loss has a network of its own for
        small = parts(f"loss={loss}", "data.batch_size=8", "model.channels=8")
    config = {**small.config, **{group: recipe[group] for group in ("loss", "target", "weighting")}}
    for group, name in (("timesteps", timesteps), ("schedule", schedule)):
        node = parts_with(group, name).config[group]
        config[group] = {key: LEARNING[group].get(key, value) for key, value in node.items()}
    made = Parts(config)
    made.data = small.data
    return made


def module_of(made: Parts, **changed: Any) -> Diffusion:
    return Diffusion(
        denoiser=made.denoiser,
        schedule=made.schedule,
        loss=made.loss,
        timesteps=made.timesteps,
        drop=made.drop,
        codec=made.codec,
        ema=made.make("ema", open=("model",)),
        optimizer=made.make("optimizer", open=("params",)),
        lr_schedule=made.make("lr_schedule"),
        seed=0,
        batch_size=made.data.batch_size,
        gradient_clip=0.1,
        **changed,
    )


class Steps:
    """The hooks of a training step and its callbacks in Lightning's order, without Lightning."""

    def __init__(self, module: Diffusion, made: Parts):
        loop = SimpleNamespace(global_step=0)
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            global_rank=0,
            world_size=1,
            accumulate_grad_batches=1,
            max_steps=1000,
            precision="32-true",
            precision_plugin=None,
            strategy=SingleDeviceStrategy(torch.device("cpu")),
            loop=loop,
        )
        self.module, self.made = module.train(), made
        module._trainer = self.trainer
        configured = module.configure_optimizers()
        self.optimizer, self.scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        self.callbacks = [TrainingMetrics(500), LossBuckets(made.data, every=500), Throughput(500)]

    def batch(self) -> dict[str, Any]:
        return self.made.data.train.batch(torch.arange(self.made.data.batch_size))

    def step(self, batch: dict[str, Any]) -> None:
        module, optimizer, found = self.module, self.optimizer, {}

        def closure() -> Tensor:
            found.update(module.training_step(batch, 0))
            optimizer.zero_grad()
            found["loss"].backward()
            module.configure_gradient_clipping(optimizer)
            return found["loss"]

        module.on_train_batch_start(batch, 0)
        module.optimizer_step(0, 0, optimizer, closure)
        self.scheduler.step()
        self.trainer.global_step += 1
        for callback in self.callbacks:
            callback.on_train_batch_end(self.trainer, module, found, batch, 0)


def waits(made: Parts) -> str | None:
    """Where a training step waits, from the second on; the first may look at the schedule's ends."""
    steps = Steps(module_of(made), made)
    steps.step(steps.batch())
    batches = [steps.batch() for _ in range(2)]
    try:
        with refused():
            for batch in batches:
                steps.step(batch)
    except HostWaits as error:
        return str(error)
    return None


@pytest.mark.parametrize("loss", [loss for loss in OPTIONS["loss"] if loss not in OPEN])
def test_no_combination_waits(loss):
    """Every loss with every distribution of times, and schedules in turn."""
    schedules, found = OPTIONS["schedule"], {}
    for i, timesteps in enumerate(OPTIONS["timesteps"]):
        for shift in range(len(schedules)):
            schedule = schedules[(i + OPTIONS["loss"].index(loss) + shift) % len(schedules)]
            made = chosen(loss, timesteps, schedule)
            try:
                check(made)
            except UserError:
                continue  # no run; the next schedule
            found[timesteps, schedule] = waits(made)
            break
    assert {where: wait for where, wait in found.items() if wait} == {}
    assert len(found) == len(OPTIONS["timesteps"])
    assert len({schedule for _, schedule in found}) >= 3


@every("weighting", "ema")
def test_nor_does_a_weighting_or_an_average(weighting, ema):
    config = {**chosen("v", "stratified", "linear").config}
    config |= {group: parts_with(group, name).config[group] for group, name in (("weighting", weighting), ("ema", ema))}
    assert waits(Parts(config)) is None


class Enter(pl.Callback):
    """Refuses to wait from the second step to the last but one, where neither a row nor a checkpoint is due."""

    def __init__(self) -> None:
        self.refusing, self.steps = ExitStack(), 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if 0 < trainer.global_step < trainer.max_steps - 1:
            self.refusing.enter_context(refused())
            self.steps += 1


class Leave(pl.Callback):
    """After all other callbacks."""

    def __init__(self, enter: Enter) -> None:
        self.enter = enter

    def on_train_batch_end(self, *_: Any) -> None:
        self.enter.refusing.close()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("trainer.precision=bf16-mixed", "trainer.accumulate=2"),
        ("weighting=uncertainty", "timesteps=importance", "schedule=adaptive", "trainer.recompute=true"),
    ],
)
def test_nor_does_lightning_around_it(options, tmp_path, monkeypatch):
    """A whole training step on images: fetching aside, all hooks, the schedule of the learning rate, every callback.
    As on one GPU: a CPU is asked after each step whether its numbers are finite."""
    monkeypatch.setattr(Checkpoints, "reads_each_step", staticmethod(lambda trainer, module: False))
    overrides = [
        "metrics=none",
        "trainer.threads=1",
        "data.batch_size=8",
        "trainer.max_steps=5",
        "trainer.log_every=100",
    ]
    overrides += ["trainer.checkpoint_every=100", "callbacks.sample_grid.n=1", "callbacks.guidance_sweep.n=1"]
    overrides += ["sampler.steps=1", "callbacks.buckets.repeats=1", "model.channels=32", f"output_dir={tmp_path}"]
    job, enter = Job(compose("train", [*overrides, *options])), Enter()
    make = job.make_trainer
    job.make_trainer = lambda callbacks, loggers: make([enter, *callbacks, Leave(enter)], loggers)
    with enter.refusing, job.folder.locked():
        job.fit()
    assert job.step == 5
    assert enter.steps >= 3


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[torch.zeros((), dtype=torch.int64)],
        lambda x: torch.masked_select(x, x > 0),
        lambda x: F.one_hot(x.long()),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.where(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.index_put((x > 0,), x),
        lambda x: range(10)[x.long().sum()],
    ],
)
def test_what_waits_is_noticed(read):
    x = torch.ones(3)
    with refused():
        torch.where(x > 0, x, 0.0)
        x[torch.zeros(2, dtype=torch.int64)]
        with pytest.raises(HostWaits):
            read(x)


def test_a_step_that_waits_is_noticed(monkeypatch):
    """Each place in a step where a reading could hide."""
    made = chosen("v", "stratified", "cosine")
    for owner, name in (
        (Diffusion, "training_step"),
        (Diffusion, "configure_gradient_clipping"),
        (Diffusion, "_teach"),
        (type(made.denoiser), "forward"),
        (TrainingMetrics, "on_train_batch_end"),
    ):
        with monkeypatch.context() as patch:
            whole = getattr(owner, name)

            def reading(self, *args, whole=whole, **kwargs):
                float(torch.zeros(()))
                return whole(self, *args, **kwargs)

            patch.setattr(owner, name, reading)
            assert waits(chosen("v", "stratified", "cosine")) == "_local_scalar_dense"
