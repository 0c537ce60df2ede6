"""Jobs of SLURM that are preempted or lose their node, with real runs in them: requeued once, and each goes on.

SLURM's commands are scripts; what a real cluster makes of it is in test_slurm.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from denoiselab.compose import compose
from denoiselab.launcher.slurm_task import Start
from denoiselab.training import Job
from ledger import Faults
from runs import POINTS, differences, last
from slurm_stub import Slurm, stubbed
from test_launcher import until
from test_status import standing
from traps import At, Hang
from warm import Warm

pytestmark = pytest.mark.faults

SECONDS = 10.0
"""In which a run has saved after it was told to stop."""

OPTIONS = ("trainer.max_steps=100000", "trainer.checkpoint_every=20")


@dataclass
class One:
    """A job of an array, whose run works in the same directory as those of the others.

    Args:
        slurm: its commands.
        root: the directory.
        index: in the array.
    """

    slurm: Slurm
    root: Path
    index: int
    restarts: int = 0

    def submit(self, minutes: int = 600, requeues: int = 2) -> None:
        seed = ("train", *POINTS, *OPTIONS, f"seed={self.index}")
        submission = DelayedSubmission(Start([sys.executable, "-m", "denoiselab", *seed]))
        submission.set_timeout(minutes, requeues)
        submission.dump(self.root / f"70_{self.index}_submitted.pkl")

    def begin(self) -> subprocess.Popen[bytes]:
        job = {"JOB_ID": str(71 + self.index), "ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": str(self.index)}
        job |= {"PROCID": "0", "CPUS_PER_TASK": "1", "RESTART_COUNT": str(self.restarts)}
        environment = {**os.environ, **{f"SLURM_{name}": value for name, value in job.items()}}
        environment |= {"SUBMITIT_EXECUTOR": "slurm", "OMP_NUM_THREADS": "1"}
        self.restarts += 1
        with (self.root / f"log{self.index}").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "submitit.core._submit", str(self.root)], cwd=self.root,
                                    env=environment, stdout=log, stderr=log)  # fmt: skip

    @property
    def run(self) -> Path:
        (found,) = self.root.glob(f"outputs/runs/*-s{self.index}-*")
        return found

    @property
    def log(self) -> str:
        return (self.root / f"log{self.index}").read_text()

    def saved(self, process: subprocess.Popen[bytes], times: int = 1) -> None:
        """Wait until it trains, and has written a checkpoint of its own."""

        def written() -> bool:
            assert process.poll() is None, self.log
            return self.log.count("first step") >= times and any(self.root.glob(f"*/*/*-s{self.index}-*/*/last.ckpt"))

        until(written, 180)

    def ends_like_one_that_was_left_alone(self, faults: Faults) -> None:
        """Continued by hand to some step more."""
        step = last(self.run)["global_step"] + 3
        contents = []
        for folder in (self.root / "outputs", self.root / f"alone{self.index}"):
            job = Job(compose("train", [*POINTS, f"trainer.max_steps={step}", f"seed={self.index}",
                                        f"output_dir={folder}", "trainer.checkpoint_every=1000000"]))  # fmt: skip
            job.run()
            contents.append(last(job.path))
        assert contents[0]["global_step"] == step
        faults.same(contents[1], contents[0])


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[One]:
    slurm = stubbed(tmp_path / "stub", monkeypatch)
    (tmp_path / "root").mkdir()
    return [One(slurm, tmp_path / "root", index) for index in (1, 2)]


@pytest.mark.parametrize(("grace", "said"), [(1, 1), (60, 0)])
def test_a_notice_that_is_short_for_what_must_be_done_in_it_is_told(grace: int, said: int, tmp_path: Path):
    """Once, though three checkpoints are written."""
    options = ("trainer.max_steps=6", "trainer.checkpoint_every=2", "launcher=slurm", f"launcher.grace={grace}")
    slow = At("denoiselab.callbacks.checkpoints:Checkpoints._write", 1, (Hang(0.6),), always=True)
    run = Warm(tmp_path / "run", "train", *POINTS, *options, traps=[slow])
    assert run.wait() == 0, run.said
    lines = [line for line in run.said.splitlines() if "launcher.grace" in line]
    assert len(lines) == said
    assert all(re.match(r"warning: launcher\.grace=1: saving took \d+\.\d s, .* need at least \d+$", s) for s in lines)


@pytest.mark.slow
def test_two_that_are_preempted_in_one_directory_go_on_each_from_its_own(jobs: list[One], faults: Faults):
    for one in jobs:
        one.submit()
    first = [one.begin() for one in jobs]
    for one, process in zip(jobs, first, strict=True):
        one.saved(process)
    began = time.time()
    for process in first:
        process.send_signal(signal.SIGUSR2)
    assert [process.wait(timeout=120) for process in first] == [255, 255]
    stopped = [last(one.run)["global_step"] for one in jobs]
    assert all((one.run / "checkpoints" / "last.ckpt").stat().st_mtime - began < SECONDS for one in jobs)
    assert sorted(jobs[0].slurm.calls("scontrol")) == [["requeue", "70_1"], ["requeue", "70_2"]]
    faults.injected("process", 2)
    second = [one.begin() for one in jobs]
    for one, process, step in zip(jobs, second, stopped, strict=True):
        one.saved(process, 2)
        assert f"continuing at step {step} of" in one.log
        process.send_signal(signal.SIGUSR2)
    assert [process.wait(timeout=120) for process in second] == [255, 255]
    assert len(jobs[0].slurm.calls("scontrol")) == 4
    faults.injected("process", 2)
    assert differences(last(jobs[0].run), last(jobs[1].run)) != []
    for one in jobs:
        assert pickle.loads((one.root / f"70_{one.index}_submitted.pkl").read_bytes())._timeout_countdown == 2
        one.ends_like_one_that_was_left_alone(faults)


@pytest.mark.slow
def test_a_job_whose_node_is_lost_goes_on_and_its_time_limits_are_counted(jobs: list[One], faults: Faults):
    """No signal before, a lock left behind; then at its limit, once more than it may be."""
    one, _ = jobs
    one.submit(minutes=1, requeues=1)
    lost = one.begin()
    one.saved(lost)
    held = (one.run / "run.lock").read_text()
    child = subprocess.run(["pgrep", "-P", str(lost.pid)], capture_output=True, text=True, check=True).stdout.split()
    for pid in (lost.pid, *map(int, child)):
        os.kill(pid, signal.SIGKILL)
    lost.wait()
    assert (one.run / "run.lock").read_text() == held
    step = last(one.run)["global_step"]
    limits = []
    for start in (2, 3):
        process = one.begin()
        one.saved(process, start)
        process.send_signal(signal.SIGUSR2)
        limits.append(process.wait(timeout=120))
    assert f"continuing at step {step} of" in one.log
    assert limits == [255, 1]
    assert "timed-out too many times" in one.log
    assert one.slurm.calls("scontrol") == [["requeue", "70_1"]]
    assert standing(one.run, one.root).state == "preempted"
    faults.injected("process", 3)
    one.ends_like_one_that_was_left_alone(faults)
