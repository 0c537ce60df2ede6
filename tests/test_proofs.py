"""What takes minutes: runs killed at random instants, each compared bit for bit (`make proofs`)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import differences, last

pytestmark = pytest.mark.slow

COMMAND = [
    *(sys.executable, "-m", "denoiselab", "train", "metrics=none", "trainer.threads=1", "data.batch_size=16"),
    *("trainer.max_steps=60", "trainer.checkpoint_every=5", "trainer.log_every=5", "sampler.steps=1", "evaluation.n=1"),
    *("callbacks.buckets.every=10", "callbacks.sample_grid.n=4", "callbacks.guidance_sweep.n=2", "ema.decay=0.99"),
]
KILLS = 5


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/dev/shm"}
    return subprocess.Popen([*COMMAND, *overrides], cwd=folder, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("data.workers=2",),
        ("trainer.accumulate=2",),
        ("trainer.precision=bf16-mixed",),
        ("lr_schedule=inverse_sqrt",),
    ],
    ids=lambda o: " ".join(o) or "plain",
)
def test_a_run_killed_again_and_again_ends_like_one_that_was_left_alone(options, tmp_path: Path):
    """SIGKILL at random instants, some inside a checkpoint's writing, five times in one run."""
    rng, folders = random.Random(repr(options)), [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    assert start(folders[0], *options).wait(timeout=300) == 0
    for _ in range(KILLS):
        process = start(folders[1], *options)
        before = time.perf_counter()
        while not list(folders[1].glob("outputs/runs/*/checkpoints/*.ckpt")) and time.perf_counter() - before < 60:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(folders[1], *options).wait(timeout=300) == 0
    whole, killed = (next(folder.glob("outputs/runs/[!.]*")) for folder in folders)
    assert differences(last(whole), last(killed)) == []
