"""The training step, as a LightningModule that owns the parts and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from denoiselab import sharding, speed
from denoiselab.conditioning import Drop
from denoiselab.data.base import Batch, Data
from denoiselab.data.codec import Codec
from denoiselab.data.loader import Loader, begin
from denoiselab.data.stream import Stream
from denoiselab.denoiser import Denoiser
from denoiselab.ema import EMA
from denoiselab.loss import Loss
from denoiselab.rng import mix
from denoiselab.schedule import Schedule
from denoiselab.timesteps import Place, Timesteps


class Clock:
    """Seconds spent on training itself: evaluations pause it.

    Args:
        evaluating: what holds while it stands still.
    """

    def __init__(self, evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.started, self.paused_for = time.perf_counter(), 0.0
        self.evaluating, self.busy = evaluating, False

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused_for

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """While something is done that is no training and may take long, for which other ranks wait."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            with self.occupied(), self.evaluating():
                yield
        finally:
            self.paused_for += time.perf_counter() - begin


class Bad(NamedTuple):
    """The first step at which something was not finite, or the present one where all was; on the device."""

    step: Tensor
    """From 1; -1 if there was none."""
    norm: Tensor
    """Of its gradient."""
    samples: Tensor
    """Time, loss and id of each of this rank's, (n, 3)."""


class Diffusion(pl.LightningModule):
    """One training step, its randomness addressed by (seed, rank, samples seen).

    Args:
        denoiser, schedule, loss, timesteps, drop, codec: the parts.
        ema: makes the averaged copy, ``ema(model=denoiser)``.
        optimizer: ``optimizer(parameter_groups)``.
        lr_schedule: the factor on the learning rate at a step.
        seed: the run's.
        batch_size: the global batch.
        gradient_clip: bound on the gradient's norm; None for none.
        compiled, recomputed: whether the network's units are, in training (speed.py).
    """

    def __init__(
        self,
        *,
        denoiser: Denoiser,
        schedule: Schedule,
        loss: Loss,
        timesteps: Timesteps,
        drop: Drop,
        codec: Codec,
        ema: Callable[..., EMA],
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: Callable[[int], float],
        seed: int,
        batch_size: int,
        gradient_clip: float | None,
        compiled: bool = False,
        recomputed: bool = False,
    ):
        super().__init__()
        self.denoiser, self.schedule, self.loss, self.codec = denoiser, schedule, loss, codec
        self.timesteps, self.drop = timesteps, drop
        self.ema = ema(model=denoiser)
        self.make_optimizer, self.lr_schedule = optimizer, lr_schedule
        self.seed, self.batch_size = seed, batch_size
        self.gradient_clip = gradient_clip or math.inf
        self.compiled, self.recomputed, self.configured = compiled, recomputed, False
        self.clock = Clock(self._evaluating)
        self.stepped, self.micro = False, 0
        self.told: Callable[[], bool] = lambda: False  # whether the run was told to stop
        self.owed: list[str] = []  # evaluations that were left since it was
        self.seen: list[tuple[Tensor, ...]] = []  # what the micro-batches of this step tell those who learn from them
        self.gradient_norm: Tensor | None = None
        self.watched: list[Tensor] = []  # times, losses and ids of the micro-batches of this step
        self.bad: Bad | None = None

    def configure_model(self) -> None:
        """Prepare the network for training, once: the averages are copies already, and stay as they are."""
        if self.configured:
            return
        self.configured = True
        if self.recomputed:
            speed.recompute(self.denoiser.net)
        if self.device_mesh is not None:
            sharding.shard(self, self.device_mesh["data_parallel"])
        if self.compiled:
            speed.compile(self.denoiser.net)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Whole weights, for one rank may ask a network alone; and nothing compiled, since shapes differ there."""
        with ExitStack() as stack:
            if self.device_mesh is not None:
                stack.enter_context(sharding.whole(self))
            if self.compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def place(self) -> Place:
        """Where in the run the present micro-batch is."""
        return Place(
            self.seed,
            self.global_step * self.batch_size,
            self.global_rank,
            self.trainer.world_size,
            self.micro,
            self.trainer.accumulate_grad_batches,
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.micro = 0 if self.stepped else self.micro
        self.stepped = False
        place = self.place()
        if self.micro == 0:
            self.timesteps.advance(place.samples_seen)
            self.loss.advance(place.samples_seen)
        self._reseed(mix(self.seed, "step", place.rank, place.samples_seen, place.micro))

    def _reseed(self, seed: int) -> None:
        """The generators that this step can draw from; torch.manual_seed asks after every kind of device there is."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        x_0 = batch["x_0"]
        cond, dropped = self.drop.draw(batch["cond"])
        t, w = self.timesteps(len(x_0), self.schedule, self.place())  # (B,), (B,)
        t = t.to(torch.promote_types(x_0.dtype, torch.float32)).view(-1, *[1] * (x_0.ndim - 1))
        losses, parts = self.loss(self.denoiser, self.schedule, x_0, torch.randn_like(x_0), t, **cond)
        weighted = w * losses
        loss = weighted.mean()
        told = (parts.get("t", t.flatten()), weighted.detach(), batch["id"])
        self.watched.append(torch.stack([value.double() for value in told], 1))
        if self.timesteps.learns or self.schedule.learns:
            self.seen.append((parts.get("t", t.flatten()), losses.detach(), parts["mse"]))
        self.micro += 1
        return {"loss": loss, "t": parts.get("t", t.flatten()), "parts": parts, "dropped": dropped}

    def _watch(self, norm: Tensor) -> None:
        """Remember, on the device, the first step at which a loss or the gradient was not finite on any rank."""
        samples = torch.cat(self.watched)
        self.watched.clear()
        # A scaler meets gradients that are not finite on purpose, and skips their steps.
        gradient = torch.ones_like(norm, dtype=torch.bool) if self.trainer.precision == "16-mixed" else norm.isfinite()
        ill = (~(gradient & samples[:, 1].mean().isfinite())).double()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(ill, op=torch.distributed.ReduceOp.MAX)
        now = Bad(torch.where(ill > 0, self.global_step + 1, -1), norm.double(), samples)
        before = self.bad or Bad(torch.full_like(now.step, -1), now.norm, samples)
        seen = before.step >= 0
        self.bad = Bad(*(torch.where(seen, old, new) for old, new in zip(before, now, strict=True)))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.denoiser)
        self.loss.after_step(self.denoiser)
        self._teach()
        self.stepped = True

    def _teach(self) -> None:
        """Tell those who learn from losses of the whole global batch, in rank order."""
        if self.seen:
            own = torch.stack([torch.cat(values) for values in zip(*self.seen, strict=True)], dim=1).float()  # (n, 3)
            t, losses, mse = self.all_gather(own).reshape(-1, 3).unbind(1)  # pyright: ignore[reportAttributeAccessIssue]
            self.timesteps.update(t, losses)
            self.schedule.update(t, losses, mse)
            self.seen.clear()

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip by the norm, which is kept for the log."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimizer would do it in its step, and the scaled norm be clipped
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradient_norm = sharding.full(nn.utils.clip_grad_norm_(parameters, self.gradient_clip))
        self._watch(self.gradient_norm)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and kernels, and those that weight decay must leave alone:
    biases, norms and embeddings."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed, kept = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Feed(pl.LightningDataModule):
    """The training stream from a given optimizer step on, sliced for this rank.

    Args:
        data: the data set.
        seed: the run's.
        start: optimizer steps already taken.
    """

    def __init__(self, data: Data, seed: int, start: int = 0):
        super().__init__()
        self.data, self.seed, self.start = data, seed, start
        self.loader: Loader | None = None

    def train_dataloader(self) -> Loader:
        trainer = self.trainer
        assert trainer is not None
        stream = Stream(
            len(self.data.train),
            self.data.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            trainer.accumulate_grad_batches,
            self.start,
            self.data.block,
        )
        self.loader = Loader(
            self.data.train,
            batch_sampler=stream,
            collate_fn=_whole,  # pyright: ignore[reportArgumentType]
            num_workers=self.data.workers,
            persistent_workers=self.data.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=begin,
        )
        return self.loader


def _whole(batch: Batch) -> Batch:
    """A batch that was fetched whole needs no collating."""
    return batch
