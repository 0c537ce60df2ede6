"""What runs in a task of SLURM: the run's status is the task's, and a requeue is asked for once, by rank 0."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from denoiselab.launcher.slurm_task import Start
from slurm_stub import Slurm, stubbed

PROGRAM = """
import os, signal, sys, time
def stop(signum, frame):
    time.sleep(0.3)
    open(sys.argv[1] + ".saved", "a").write(f"{signum} ")
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1], "a").write(f"{os.environ['OMP_NUM_THREADS']} ")
time.sleep(60)
"""
"""A run that saves when it is told to stop."""

ENVIRONMENT = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "71",
    "SLURM_ARRAY_JOB_ID": "70",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_PROCID": "0",
}


@dataclass
class Place:
    """Of a job's files, and of the commands that it finds."""

    slurm: Slurm
    folder: Path

    @property
    def pickle(self) -> Path:
        return self.folder / "70_1_submitted.pkl"

    def submit(self, *command: str, requeues: int = 2, minutes: int = 1) -> None:
        submission = DelayedSubmission(Start([sys.executable, "-c", *command]))
        submission.set_timeout(minutes, requeues)
        submission.dump(self.pickle)

    def begin(self, rank: int = 0) -> subprocess.Popen[bytes]:
        """What srun starts."""
        environment = {**os.environ, **ENVIRONMENT, "SLURM_PROCID": str(rank)}
        environment.pop("OMP_NUM_THREADS", None)
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "submitit.core._submit", str(self.folder)],
                                    env=environment, stdout=log, stderr=log)  # fmt: skip

    def running(self, rank: int = 0, status: int = 143, **options: int) -> subprocess.Popen[bytes]:
        """A task whose run has begun."""
        self.submit(PROGRAM, str(self.folder / "run"), str(status), **options)
        (self.folder / "run").unlink(missing_ok=True)
        process = self.begin(rank)
        end = time.monotonic() + 60
        while not ((self.folder / "run").exists() and (self.folder / "run").read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)
        return process

    @property
    def saved(self) -> str:
        return (self.folder / "run.saved").read_text()

    def state(self, state: str) -> None:
        """What squeue says of the job."""
        self.slurm.queue(("70", "1", state, "0", "0", "None", "token"))

    @property
    def requeued(self) -> list[list[str]]:
        return self.slurm.calls("scontrol")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "files").mkdir()
    return Place(stubbed(tmp_path / "stub", monkeypatch), tmp_path / "files")


@pytest.mark.parametrize(
    ("program", "status"),
    [("", 0), ("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("1 / 0", 1)],
)
def test_the_status_of_the_run_is_the_tasks(program: str, status: int, place: Place):
    place.submit(program)
    assert place.begin().wait(timeout=60) == status
    assert (place.folder / "70_1_0_result.pkl").exists() == (status == 0)
    assert not place.requeued


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.faults
def test_a_requeue_is_asked_for_once_and_after_the_run_has_saved(torn: bool, place: Place, faults):
    """Told twice, as clusters do; beside what a task left that was killed while it wrote."""
    process = place.running()
    if torn:
        place.pickle.with_suffix(".pkl.save_tmp").write_bytes(b"torn")
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 255
    assert place.saved == f"{int(signal.SIGTERM)} "
    assert place.requeued == [["requeue", "70_1"]]
    assert (place.folder / "run").read_text() == "3 "  # its threads
    submission = pickle.loads(place.pickle.read_bytes())
    assert submission.function.command[-2:] == [str(place.folder / "run"), "143"]
    assert submission._timeout_countdown == 1
    faults.injected("call", 2)


@pytest.mark.faults
def test_the_run_may_be_told_by_slurm_as_well(place: Place, faults):
    """Some clusters signal the whole tree of processes: the run has ended when its parent hears of it."""
    process = place.running()
    place.state("RUNNING")
    subprocess.run(["pkill", "-TERM", "-P", str(process.pid)], check=True)
    assert process.wait(timeout=60) == 255
    assert place.requeued == [["requeue", "70_1"]]
    faults.injected("call")


@pytest.mark.faults
def test_time_limits_are_counted(place: Place, faults):
    process = place.running(requeues=0)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 1
    assert place.saved
    assert not place.requeued
    assert "timed-out too many times" in (place.folder / "log").read_text()
    faults.injected("call")


@pytest.mark.faults
def test_preemptions_are_not(place: Place, faults):
    process = place.running(requeues=0, minutes=600)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 255
    assert len(place.requeued) == 1
    faults.injected("call")


@pytest.mark.faults
def test_one_that_fails_while_it_is_told_to_stop_has_failed(place: Place, faults):
    process = place.running(status=3)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 1
    assert not place.requeued
    faults.injected("call")


def test_other_ranks_ask_for_nothing_and_do_not_end_the_job(place: Place):
    """rank 0 is still at it, and SLURM ends all where one ends with a status."""
    process = place.running(rank=1)
    process.send_signal(signal.SIGUSR2)  # of which submitit does nothing on this rank
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not place.requeued


@pytest.mark.parametrize(
    ("state", "status", "requeues"), [("RUNNING", 255, 1), ("CANCELLED", 143, 0), ("PENDING", 143, 0)]
)
@pytest.mark.faults
def test_sigterm_is_a_preemption_unless_slurm_ends_the_job_itself(
    state: str, status: int, requeues: int, place: Place, faults
):
    process = place.running()
    place.state(state)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == status
    assert place.saved == f"{int(signal.SIGTERM)} "
    assert len(place.requeued) == requeues
    faults.injected("call")


@pytest.mark.faults
def test_after_a_node_failed_the_same_file_begins_again(place: Place, faults):
    """No signal came: nothing of it was written."""
    process = place.running()
    before = place.pickle.read_bytes()
    process.kill()
    process.wait()
    assert place.pickle.read_bytes() == before
    (place.folder / "run").unlink()
    again = place.begin()
    end = time.monotonic() + 60
    while not (place.folder / "run").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    again.send_signal(signal.SIGUSR2)
    again.wait(timeout=60)
    assert place.requeued == [["requeue", "70_1"]]
    faults.injected("call")
