"""A run that is stopped anywhere and continued ends bit for bit like one that was not."""

from __future__ import annotations

import signal
import time

import pytest

from denoiselab import checkpoint
from denoiselab.callbacks import Checkpoints
from denoiselab.data import Stream
from denoiselab.errors import Interrupted
from denoiselab.rows import rows
from exact import parts
from ledger import Faults
from runs import SMALL, STEPS, differences, last

pytestmark = pytest.mark.faults


class Stop(Checkpoints):
    """Stops as a signal would, after the micro-batch that completes a step."""

    at = 5

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.at:
            self.signum = signal.SIGTERM
        super().on_train_batch_end(trainer, pl_module, *args)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("trainer.accumulate=2",),
        ("data.workers=2",),
        ("trainer.precision=bf16-mixed",),
        ("timesteps=uniform", "loss=min_snr"),
        ("timesteps=importance", "timesteps.points=8", "timesteps.history=2"),
        ("schedule=adaptive", "schedule.warm_up=2", "schedule.every=2"),
        ("weighting=uncertainty", "timesteps=curriculum", "timesteps.budget=48"),
        ("loss=learned_hybrid", "schedule=zero_terminal", "target=v"),
        ("loss=mixed",),
        ("loss=consistency",),
        (
            "callbacks=default",
            "callbacks.buckets.every=5",
            "callbacks.sample_grid.every=6",
            "callbacks.sample_grid.n=4",
        ),
    ],
    ids=lambda o: " ".join(o[:1]) or "plain",
)
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(options, train, monkeypatch, faults: Faults):
    overrides = (*SMALL, *STEPS, *options)
    whole = train(*overrides, "name=whole", quick=())
    with monkeypatch.context() as patch:
        patch.setattr("denoiselab.training.Checkpoints", Stop)
        for at in (5, 7):
            patch.setattr(Stop, "at", at)
            with pytest.raises(Interrupted) as stop:
                train(*overrides, "name=parts", quick=())
            assert stop.value.status == 143
            faults.injected("call")
    parts = train(*overrides, "name=parts", quick=())
    faults.same(last(whole), last(parts))
    steps = [
        [row["step"] for row in rows(folder / "metrics.jsonl") if "train/loss" in row] for folder in (whole, parts)
    ]
    assert steps[0] == steps[1] == [3, 6, 9, 12]


def _forget_position(monkeypatch):
    make = Stream.__init__
    monkeypatch.setattr(Stream, "__init__", lambda self, *a, **k: make(self, *a[:6], **k))  # without start


def _forget_seed(monkeypatch):
    monkeypatch.setattr("denoiselab.module.mix", lambda *address: time.time_ns())


def _forget_ema(monkeypatch):
    load = checkpoint.load

    def without(path):
        content = load(path)
        state = content["state_dict"]
        state.update({k: state[k.replace("ema.model.", "denoiser.")] for k in state if k.startswith("ema.model.")})
        return content

    monkeypatch.setattr(checkpoint, "load", without)


def _forget_what_was_learned(monkeypatch):
    load = checkpoint.load

    def without(path):
        content = load(path)
        state = content["state_dict"]
        fresh = parts("timesteps=importance", "timesteps.points=8", "timesteps.history=2").timesteps.state_dict()
        state.update({f"timesteps.{key}": value for key, value in fresh.items()})
        return content

    monkeypatch.setattr(checkpoint, "load", without)


@pytest.mark.parametrize("fault", [_forget_position, _forget_seed, _forget_ema, _forget_what_was_learned])
def test_the_comparison_notices_what_a_checkpoint_could_forget(fault, train, monkeypatch):
    overrides = (*SMALL, *STEPS, "timesteps=importance", "timesteps.points=8", "timesteps.history=2")
    whole = train(*overrides, "name=whole", quick=())
    with monkeypatch.context() as patch:
        patch.setattr("denoiselab.training.Checkpoints", Stop)
        with pytest.raises(Interrupted):
            train(*overrides, "name=parts", quick=())
    with monkeypatch.context() as patch:
        fault(patch)
        parts = train(*overrides, "name=parts", quick=())
    assert differences(last(whole), last(parts))
