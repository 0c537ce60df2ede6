"""Runs of two ranks, one of which dies or hangs: all of it ends, in time and with a word; the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import POINTS, differences, last
from warm import Warm, said

pytestmark = pytest.mark.faults

SECONDS = 30.0
"""In which all of a run has ended after a rank died, or after the time in which one may hang."""

HANG = 6
OPTIONS = (
    *("train", *POINTS, "trainer=ddp_cpu", "trainer.max_steps=12", "trainer.checkpoint_every=2"),
    f"trainer.hang_seconds={HANG}",
)

FAULTY = """
import os, signal, sys, time
from pathlib import Path
import lightning.pytorch as pl
from denoiselab.callbacks import Evaluation

ACTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": lambda: 1 / 0,
    "exit": lambda: sys.exit(0),
    "leave": lambda: os._exit(0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
}

class Faulty(pl.Callback):
    def __init__(self, file, kind, rank, step=7):
        self.file, self.kind, self.rank, self.step = Path(file), kind, rank, step

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step == self.step and trainer.global_rank == self.rank and not self.file.exists():
            self.file.touch()
            ACTS[self.kind]()

class Slow(Evaluation):
    "Rank 1 compiles, rank 0 looks and saves, each for longer than a rank may hang."
    def __init__(self, seconds):
        super().__init__(every=5)
        self.seconds, self.begun, self.saved = seconds, False, False

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_rank == 1 and not self.begun:
            time.sleep(self.seconds)
        self.begun = True

    def run(self, trainer, module):
        if trainer.global_rank == 0:
            time.sleep(self.seconds)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if trainer.global_rank == 0 and not self.saved:
            self.saved = True
            time.sleep(self.seconds)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "callbacks").mkdir()
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "callbacks" / "faulty.yaml").write_text(
        "faulty:\n  _target_: faulty.Faulty\n  file: ???\n  kind: kill\n  rank: 0\n  step: 7\n"
    )
    (folder / "callbacks" / "slow.yaml").write_text("slow:\n  _target_: faulty.Slow\n  seconds: 0\n")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert Warm(folder, *OPTIONS).wait() == 0, said(folder).read_text()
    return the_run(folder)


def the_run(folder: Path) -> Path:
    (found,) = folder.glob("outputs/runs/*/identity.json")
    return found.parent


def faulty(folder: Path, lab: Path, kind: str, rank: int) -> tuple[tuple[str, ...], Path]:
    """Options by which a rank does something in its eighth step, once; and the file that says that it did."""
    hit = folder.with_name(folder.name + ".hit")
    options = ("--config-dir", str(lab), "callbacks=faulty", f"callbacks.faulty.file={hit}")
    return (*OPTIONS, *options, f"callbacks.faulty.kind={kind}", f"callbacks.faulty.rank={rank}"), hit


def session(leader: int) -> list[str]:
    """What is left of a session's processes."""
    listed = subprocess.run(["ps", "-ww", "-eo", "sess,stat,args"], capture_output=True, text=True, check=True).stdout
    found = [line.split(None, 2) for line in listed.splitlines()]
    return [words[-1] for words in found if words[0] == str(leader) and not words[1].startswith("Z")]


def ended(command: Warm, hit: Path) -> tuple[int, float]:
    """Its status, and the seconds from the fault until no process was left."""
    command.when(hit.exists)
    status = command.wait(SECONDS + HANG + 10)
    end = time.monotonic() + SECONDS
    while left := session(command.pid):
        assert time.monotonic() < end, f"left: {left}"
        time.sleep(0.05)
    return status, time.time() - hit.stat().st_mtime


SAID = {
    ("kill", 1): "rank 1 was killed by SIGKILL",
    ("raise", 1): "rank 1 ended with status 1",
    ("exit", 1): "rank 1 ended with status 1",
    ("leave", 1): "rank 1 ended with status 0",
    ("stop", 1): "rank 1 hung after step 7",
    ("sleep", 1): "rank 1 hung after step 7",
    ("kill", 0): "",  # nobody is left to say it
    ("raise", 0): "ZeroDivisionError",
    ("exit", 0): "sys.exit",
    ("stop", 0): "rank 0 hung after step 7",
    ("sleep", 0): "rank 0 hung after step 7",
}
QUICK = ("kill", 1)


@pytest.mark.parametrize(
    ("kind", "rank"), [pytest.param(*case, marks=[pytest.mark.slow] if case != QUICK else []) for case in SAID]
)
def test_a_run_ends_with_its_rank_and_goes_on(kind: str, rank: int, lab: Path, whole: Path, tmp_path: Path, faults):
    folder = tmp_path / "run"
    options, hit = faulty(folder, lab, kind, rank)
    first = Warm(folder, *options)
    status, seconds = ended(first, hit)
    assert status != 0
    assert seconds < SECONDS + (HANG if kind in ("stop", "sleep") else 0)
    assert SAID[kind, rank] in first.said
    assert "\nTraceback" not in first.said or kind in ("raise", "exit")
    run = the_run(folder)
    if rank == 1 or kind not in ("kill", "stop"):  # rank 0 could still write
        written = json.loads((run / "status.json").read_text())
        assert (written["state"], written["step"]) == ("failed", 7)
        assert SAID[kind, rank] in written["error"]
        assert not (run / "run.lock").exists()
    assert last(run)["global_step"] == 6
    assert Warm(folder, *options).wait() == 0, first.said
    assert "continuing at step 6 of 12" in first.said
    faults.injected("process")
    found = last(run)
    assert differences(last(whole), checkpoint_before(run)) != []
    for one in (whole_content := last(whole), found):
        one["denoiselab"]["choices"].pop("callbacks")
        one["callbacks"].pop("Faulty", None)
    faults.same(whole_content, found)


def checkpoint_before(run: Path):
    from denoiselab import checkpoint

    return checkpoint.load(run / "checkpoints" / "previous.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_frozen_is_not_waited_for_as_long_as_one_may_hang(
    rank: int, lab: Path, tmp_path: Path, faults
):
    options, hit = faulty(tmp_path / "run", lab, "stop", rank)
    command = Warm(tmp_path / "run", *options, "trainer.hang_seconds=300")
    status, seconds = ended(command, hit)
    assert status != 0
    assert seconds < SECONDS
    assert SAID["stop", rank] in command.said
    assert "s without a sign of life" in command.said
    faults.injected("process")


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_is_busy_are_left_alone(lab: Path, whole: Path, tmp_path: Path, faults):
    """A first step, an evaluation and a checkpoint that each take longer than a rank may hang."""
    options = ("--config-dir", str(lab), "callbacks=slow", f"callbacks.slow.seconds={2 * HANG}")
    command = Warm(tmp_path / "run", *OPTIONS, *options)
    assert command.wait(240) == 0, command.said
    assert "hung" not in command.said
    contents = last(whole), last(the_run(tmp_path / "run"))
    for one in contents:
        one["denoiselab"]["choices"].pop("callbacks")
        one["callbacks"].pop("Slow", None)
    faults.same(*contents)


@pytest.mark.slow
def test_without_the_watch_a_rank_that_hangs_is_waited_for(lab: Path, tmp_path: Path):
    """So it is the watch that ended the others."""
    options, hit = faulty(tmp_path / "run", lab, "sleep", 1)
    command = Warm(tmp_path / "run", *options, "trainer.hang_seconds=100000")
    command.when(hit.exists)
    time.sleep(3 * HANG)
    assert command.process.is_alive()
    command.end()


def torchrun(folder: Path, *options: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "denoiselab", *options]
    return subprocess.Popen([sys.executable, *words], cwd=folder, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("kill", 0), ("stop", 0), ("stop", 1)])
def test_under_torchrun(kind: str, rank: int, lab: Path, whole: Path, tmp_path: Path, faults):
    folder = tmp_path / "run"
    options, hit = faulty(folder, lab, kind, rank)
    first = torchrun(folder, *options)
    _, told = first.communicate(timeout=120)
    seconds = time.time() - hit.stat().st_mtime
    assert first.returncode != 0
    assert seconds < SECONDS + (HANG if kind == "stop" else 0)
    assert f"rank {rank} hung after step 7" in told or (kind == "kill" and "Signal 9 (SIGKILL)" in told)
    assert session(first.pid) == []
    again = torchrun(folder, *options)
    _, told = again.communicate(timeout=120)
    assert again.returncode == 0, told
    faults.injected("process")
    contents = last(whole), last(the_run(folder))
    for one in contents:
        one["denoiselab"]["choices"].pop("callbacks")
        one["callbacks"].pop("Faulty", None)
    faults.same(*contents)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both(number: int, rank: int, whole: Path, tmp_path: Path, faults):
    folder = tmp_path / "run"
    more = ("trainer.max_steps=100000",)
    command = Warm(folder, *OPTIONS, *more)
    command.when(lambda: [*folder.glob("outputs/runs/*/checkpoints/last.ckpt")])
    pid = json.loads((the_run(folder) / ".ranks" / "1.json").read_text())["pid"] if rank else command.pid
    began = time.monotonic()
    os.kill(pid, number)
    assert command.wait() == 128 + number
    assert time.monotonic() - began < 10
    assert session(command.pid) == []
    faults.injected("process")
    step = last(the_run(folder))["global_step"]
    one, other = (tmp_path / name for name in ("run", "other"))
    for where in (one, other):
        again = Warm(where, *OPTIONS, f"trainer.max_steps={step + 3}")
        assert again.wait() == 0, again.said
    faults.same(last(the_run(other)), last(the_run(one)))
