"""One job of a sweep fails, in every way there is: the others are made, it is said, and only it is made again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ranks_that_die import SECONDS, session

from ledger import Faults
from runs import POINTS, last
from test_sweep import content, runs, state

pytestmark = [pytest.mark.faults, pytest.mark.slow]

FAILING = """
import os, signal, sys, time
from pathlib import Path
import lightning.pytorch as pl

class Failing(pl.Callback):
    "Each seed in its own way, once."
    ACTS = {
        1: lambda: (_ for _ in ()).throw(OSError("the first line\\nthe last line")),
        2: lambda: sys.exit(7),
        3: lambda: os.kill(os.getpid(), signal.SIGKILL),
        4: lambda: os._exit(137),
        5: lambda: time.sleep(600),
    }

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, module, *args):
        hit = self.folder / f"hit{module.seed}"
        if trainer.global_step == 2 and module.seed in self.ACTS and not hit.exists():
            hit.touch()
            self.ACTS[module.seed]()
"""
MINUTES = 1.0
"""That a job may take."""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    folder = tmp_path / "lab"
    (folder / "callbacks").mkdir(parents=True)
    (folder / "failing.py").write_text(FAILING)
    (folder / "callbacks" / "failing.yaml").write_text("failing:\n  _target_: failing.Failing\n  folder: ???\n")
    return folder


def denoiselab(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "denoiselab", *arguments], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def finished(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def test_every_way_to_fail(lab: Path, tmp_path: Path, faults: Faults):
    """An error, sys.exit(7), SIGKILL, a process out of memory (137), and one that hangs past its time."""
    options = ("train", "-m", "--config-dir", str(lab), *POINTS, "trainer.checkpoint_every=1", "callbacks=failing")
    options += (f"callbacks.failing.folder={tmp_path}", "seed=0,1,2,3,4,5,6", "launcher.jobs=2")
    sweep = (*options, f"launcher.minutes={MINUTES}")
    first = denoiselab(tmp_path, *sweep)
    status, _, told = finished(first)
    assert status == 1
    assert session(first.pid) == []
    faults.injected("process", 5)
    found = runs(tmp_path)
    stands = ["done", "failed", "failed", "running", "running", "running", "done"]  # who is killed writes nothing
    assert [state(found[seed]) for seed in range(7)] == stands
    assert "2 of 7 runs done" in told
    expected = {
        1: "OSError: the first line the last line",
        2: "SystemExit: 7",
        3: "killed by signal 9",
        4: "ended with status 137",
        5: "killed by signal 9",
    }
    for seed, why in expected.items():
        assert f"failed: seed={seed}: {why}" in told

    status, table, _ = finished(denoiselab(tmp_path, "status", "outputs"))
    assert status == 0
    lines = table.splitlines()
    assert "3 died, 2 done, 2 failed" in lines[-1]
    for seed, run in found.items():
        (at,) = (k for k, line in enumerate(lines) if line.endswith(run.name))
        stands = "done" if seed in (0, 6) else "failed" if seed in (1, 2) else "died"
        assert lines[at].split()[0] == stands
        if stands == "failed":
            assert lines[at + 1] == f"  {expected[seed]}"
        if stands != "done":
            (log,) = (line.removeprefix("  log: ") for line in lines[at + 1 : at + 3] if line.startswith("  log: "))
            assert "training for 4 steps" in (tmp_path / log).read_text()

    before = {seed: content(found[seed]) for seed in (0, 6)}
    status, _, told = finished(denoiselab(tmp_path, *sweep, "sweep.retry=true"))
    assert status == 0
    assert "5 of 7 runs to make" in told
    assert len(re.findall("continuing at step 2 of 4", told)) == 5
    assert [state(runs(tmp_path)[seed]) for seed in range(7)] == ["done"] * 7
    assert {seed: content(found[seed]) for seed in (0, 6)} == before
    contents = [last(found[0])["global_step"], *(last(found[seed])["global_step"] for seed in expected)]
    assert contents == [4] * 6


def test_an_edited_value_is_a_new_job(tmp_path: Path, faults: Faults):
    """And so is the one that is missing; what is done is left alone, also after the launcher itself was killed."""
    options = ("train", "-m", *POINTS, "trainer.max_steps=200", "trainer.checkpoint_every=20")
    first = denoiselab(tmp_path, *options, "seed=0,1")
    end = time.monotonic() + 120
    while not any(run.joinpath("checkpoints", "last.ckpt").exists() for run in runs(tmp_path).values()):
        assert time.monotonic() < end
        time.sleep(0.02)
    first.kill()
    first.communicate()
    while session(first.pid) or any((run / "run.lock").exists() for run in runs(tmp_path).values()):
        assert time.monotonic() < end
        time.sleep(0.05)
    faults.injected("process")
    (begun,) = runs(tmp_path).values()
    step = last(begun)["global_step"]
    status, _, told = finished(denoiselab(tmp_path, *options, "seed=0,1"))
    assert status == 0
    assert f"continuing at step {step} of 200" in told or state(begun) == "done"
    before = {run.name: content(run) for run in runs(tmp_path).values()}
    status, _, told = finished(denoiselab(tmp_path, *options, "seed=0,1", "optimizer.lr=0.002,0.001"))
    assert status == 0
    assert "2 of 4 runs to make" in told
    made = [path.parent for path in tmp_path.glob("outputs/runs/*/identity.json")]
    assert len(made) == 4
    assert {run.name: content(run) for run in made if run.name in before} == before


def test_sweeps_of_ranks_leave_no_process(tmp_path: Path, faults: Faults):
    """Three jobs of two ranks; a rank of the second is killed, the launcher told to stop in the third."""
    options = ("train", "-m", *POINTS, "trainer=ddp_cpu", "trainer.max_steps=3000", "trainer.checkpoint_every=20")
    first = denoiselab(tmp_path, *options, "seed=0,1,2")
    seen: set[int] = set()

    def ranks(seed: int) -> dict[int, int]:
        end = time.monotonic() + 180
        while seed not in (found := runs(tmp_path)) or not (found[seed] / "checkpoints" / "last.ckpt").exists():
            assert time.monotonic() < end
            assert first.poll() is None, finished(first)
            time.sleep(0.02)
        pids = {rank: json.loads((found[seed] / ".ranks" / f"{rank}.json").read_text())["pid"] for rank in (0, 1)}
        seen.update(pids.values())
        return pids

    os.kill(ranks(0)[1], signal.SIGKILL)
    os.kill(ranks(1)[0], signal.SIGKILL)
    ranks(2)
    first.send_signal(signal.SIGTERM)
    status, _, told = finished(first, 100)
    assert status == 143
    assert "failed: seed=0" not in told  # a sweep that is stopped says only what it was told
    end = time.monotonic() + SECONDS
    while left := [pid for pid in seen if Path(f"/proc/{pid}/cmdline").exists()]:
        assert time.monotonic() < end, left
        time.sleep(0.1)
    faults.injected("process", 3)
    states = {seed: state(run) for seed, run in runs(tmp_path).items()}
    assert states == {0: "failed", 1: "running", 2: "preempted"}
    assert "rank 1 was killed by SIGKILL" in json.loads((runs(tmp_path)[0] / "status.json").read_text())["error"]
    steps = max(last(run)["global_step"] for run in runs(tmp_path).values()) + 5
    again = denoiselab(tmp_path, *options, "seed=0,1,2", f"trainer.max_steps={steps}", "sweep.retry=true")
    status, _, told = finished(again)
    assert status == 0, told
    assert [last(run)["global_step"] for run in runs(tmp_path).values()] == [steps] * 3
    assert session(again.pid) == []
