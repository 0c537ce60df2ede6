"""What a run leaves in the process that made it: nothing, or a notebook that makes a thousand runs ends in a full
memory."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest

from denoiselab import trainer
from denoiselab.callbacks import Checkpoints
from runs import trained

pytestmark = pytest.mark.faults


def left(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[str]:
    """What a run leaves that was not there after an earlier one."""
    made: list[weakref.ref[pl.Trainer]] = []
    make = trainer.make

    def noted(*arguments, **named):
        new = make(*arguments, **named)
        made.append(weakref.ref(new))
        return new

    trained(folder, *options, "seed=1")  # what libraries load once
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads, files = threading.enumerate(), len([*Path("/proc/self/fd").iterdir()])
    monkeypatch.setattr(trainer, "make", noted)
    trained(folder, *options, "seed=2")
    gc.collect()
    assert len(made) >= 2
    changed = [number for number, handler in handlers.items() if signal.getsignal(number) != handler]
    found = {
        "trainer": [one for one in made if one() is not None],
        "handler": changed,
        "thread": [one for one in threading.enumerate() if one not in threads],
        "file": range(len([*Path("/proc/self/fd").iterdir()]) - files),
    }
    for number in changed:
        signal.signal(number, handlers[number])
    return [name for name, several in found.items() for _ in several]


WATCHED = ("callbacks=points", "callbacks.sample_grid.n=4", "callbacks.guidance_sweep.n=4", "logger=tensorboard")


@pytest.mark.parametrize("options", [(), WATCHED], ids=["bare", "watched"])
def test_a_run_leaves_nothing_in_its_process(options, tmp_path: Path, monkeypatch):
    assert left(tmp_path, monkeypatch, *options) == []


def test_a_handler_that_is_left_is_seen(tmp_path: Path, monkeypatch):
    """It is a method, and so holds its trainer."""

    def keep(self, trainer, pl_module, stage):
        signal.signal(signal.SIGUSR2, self._flag)
        self.trainer = trainer

    before = signal.getsignal(signal.SIGUSR2)
    monkeypatch.setattr(Checkpoints, "teardown", keep)
    assert {"handler", "trainer"} <= {*left(tmp_path, monkeypatch)}
    signal.signal(signal.SIGUSR2, before)
