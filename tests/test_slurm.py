"""Studies through a SLURM cluster of one node (`make slurm`): killed, requeued, at their limit, issued again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import PATIENCE, TINY, Command, Hit, Sweep, hit, kill, status, until, view
from denoiselab.launcher import Slurm, Task
from denoiselab.launcher.slurm import Waited
from runs import differences, last
from test_sweep import content

pytestmark = pytest.mark.slurm

SECONDS = 10.0
"""In which a run has saved after it was told to stop."""


@dataclass
class Story:
    """What happened to a study of four."""

    sweep: Sweep
    runs: list[Path]
    jobs: list[str]
    left: Command
    told: str
    waited: Command
    hits: dict[int, Hit]
    after: dict[int, dict[str, tuple[int, str]]]
    views: list[dict[str, str]]
    again: Command


NEVER_DONE = """
import signal, sys, time
file = sys.argv[sys.argv.index("--job") + 1] + ".told"
def stop(signum, frame):
    open(file, "a").write(f"saved {time.time()}\\n")
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, stop)
open(file, "a").write(f"began {time.time()}\\n")
time.sleep(600)
"""
"""A run that saves when it is told to stop, and otherwise goes on."""


@pytest.fixture(scope="module", autouse=True)
def limited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Slurm, Waited]:
    """A job that will reach its limit of a minute, while the study goes on; and reach it again."""
    assert "SLURM_CONF" in os.environ, "needs a cluster, which `make slurm` starts"
    root = tmp_path_factory.mktemp("limited")
    launcher = Slurm(minutes=1, grace=20, requeues=1, cpus_per_task=1, memory=0.1)
    task = Task("limited", ["--job", str(root / ".jobs" / "run.json")], root / "run")
    launcher.check(task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slurm, "program", (sys.executable, "-c", NEVER_DONE))
        (waited,) = launcher.start([task])
    return launcher, waited


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Ctrl-C once it is submitted; the same again; one run killed, two requeued in two ways; and what is missing.

    Jobs begin some seconds after they were submitted, so that both commands see them wait."""
    axes = ("schedule=linear,cosine", "seed=0,1", "launcher.jobs=3", "launcher.extra={begin: now+10}")
    sweep = Sweep(tmp_path_factory.mktemp("study"), axes)
    left = sweep.command()
    left.until("submitted as")
    left.process.send_signal(signal.SIGINT)
    left.wait()
    submitted = sweep.submissions()
    runs, jobs = [sweep.run(one) for one in submitted], [one["job"] for one in submitted]
    asked = subprocess.run([sys.executable, "-m", "denoiselab", "status", "outputs"], cwd=sweep.root, text=True,
                           capture_output=True, check=True)  # fmt: skip
    waited = sweep.command()
    waited.until("submitted before", 4)
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(kill, runs[0])
        told = {
            1: pool.submit(hit, runs[1], "scancel", "--signal=USR2", jobs[1]),
            2: pool.submit(hit, runs[2], "scontrol", "requeue", jobs[2]),
        }
        killed.result()
        hits = {number: one.result() for number, one in told.items()}
    waited.wait()
    views = [view(job) for job in jobs]
    after = {number: content(run) for number, run in enumerate(runs)}
    again = sweep.command("sweep.retry=true")
    again.wait()
    return Story(sweep, runs, jobs, left, asked.stdout, waited, hits, after, views, again)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those that were hit, not interrupted and not on a cluster."""
    from denoiselab.compose import compose
    from denoiselab.training import Job

    folder = tmp_path_factory.mktemp("whole")
    made = []
    for schedule, seed in (("linear", 0), ("linear", 1), ("cosine", 0)):
        job = Job(compose("train", [*TINY, f"schedule={schedule}", f"seed={seed}", f"output_dir={folder}"]))
        job.run()
        made.append(job.folder.path)
    return made


def test_jobs_outlive_the_command(story: Story):
    assert story.left.process.returncode == 128 + signal.SIGINT
    array = story.jobs[0].partition("_")[0]
    assert story.jobs == [f"{array}_{index}" for index in range(4)]
    assert f"SLURM job {array}_[0,1,2,3] goes on; the same command waits for it again" in story.left.said
    assert f"scancel {array}\n" in story.left.said


def test_status_tells_of_jobs_that_wait(story: Story):
    lines = story.told.splitlines()
    (number,) = [k for k, line in enumerate(lines) if line.endswith(story.runs[3].name)]
    assert lines[number].startswith("queued")
    assert re.fullmatch(f"  SLURM job {story.jobs[3]}: (BeginTime|JobArrayTaskLimit)", lines[number + 1])


def test_the_same_command_waits_for_them_again(story: Story):
    for number, job in enumerate(story.jobs, 1):
        assert f"[{number}/4] SLURM job {job}, submitted before, is" in story.waited.said
    assert "submitted as" not in story.waited.said
    assert "3 of 4 runs done" in story.waited.said


def test_one_that_was_killed_has_failed_for_all(story: Story):
    assert story.waited.process.returncode == 1
    assert story.waited.said.splitlines()[-1] == "failed: schedule=linear seed=0: killed by signal 9"
    assert [one["JobState"] for one in story.views] == ["FAILED", "COMPLETED", "COMPLETED", "COMPLETED"]
    assert story.views[0]["ExitCode"] == "137:0"


def test_one_that_was_told_to_stop_has_saved_in_time_and_is_requeued_once(story: Story):
    for number, found in story.hits.items():
        print(f"saved {found.seconds:.2f} s after the signal, at step {found.step}")
        assert 0 <= found.seconds < SECONDS
        assert 0 < found.step < 1000
        assert story.views[number]["Restarts"] == "1"
        assert f"continuing at step {found.step} of 1000" in story.sweep.log(story.jobs[number])
    log = story.sweep.log(story.jobs[1])
    assert log.count("Requeued job") == 1
    assert f"Requeued job {story.jobs[1]} (20 remaining timeouts)" in log  # hours before its limit, so this was none
    assert "Requeued job" not in story.sweep.log(story.jobs[2])  # SLURM did, and nobody else


def test_the_command_makes_what_is_missing(story: Story):
    assert story.again.process.returncode == 0
    assert "1 of 4 runs to make" in story.again.said
    assert "4 of 4 runs done" in story.again.said
    assert [status(run)["state"] for run in story.runs] == ["done"] * 4
    for number in (1, 2, 3):
        assert content(story.runs[number]) == story.after[number]
    assert sorted(story.runs) == sorted(story.runs[0].parent.glob("[!.]*"))


def apart(one: Path, other: Path) -> list[str]:
    """Where the last checkpoints of two runs differ, beside the options that say where they ran."""
    return [where for where in differences(last(one), last(other)) if not where.startswith(".denoiselab.choices")]


def test_interrupted_runs_end_bit_for_bit_like_uninterrupted_ones(story: Story, whole: list[Path]):
    """Each goes on from its own checkpoint, though all work in one directory."""
    for interrupted, one in zip(story.runs[:3], whole, strict=True):
        assert interrupted.name == one.name
        assert last(interrupted)["global_step"] == 1000
        assert apart(one, interrupted) == []


def test_the_folder_of_what_runs_there_is_for_its_user_alone(story: Story):
    assert [folder.stat().st_mode & 0o777 for folder in (story.sweep.jobs, story.sweep.jobs / "slurm")] == [0o700] * 2


def test_a_job_at_its_limit_goes_on_until_it_was_there_too_often(limited: tuple[Slurm, Waited]):
    """SLURM itself sends the signal; the command has waited long enough, and counts it as failed."""
    launcher, waited = limited
    end = time.monotonic() + PATIENCE
    while (ended := launcher.poll(waited)) is None:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert ended == 1
    assert (view(waited.job)["JobState"], view(waited.job)["Restarts"]) == ("FAILED", "1")
    told = (waited.folder.parent / "run.json.told").read_text().split()
    assert told[::2] == ["began", "saved"] * 2
    log = (waited.folder / f"{waited.job}_0_log.out").read_text()
    assert log.count("Requeued job") == 1
    assert f"Requeued job {waited.job} (0 remaining timeouts)" in log
    assert "timed-out too many times" in log


def test_ranks_are_tasks_and_go_on_together(tmp_path: Path):
    """Two ranks of one run, requeued in its middle, under one wandb id; beside one without SLURM."""
    sweep = Sweep(tmp_path, ("seed=3,4", "trainer=ddp_cpu", "logger=wandb", "launcher.jobs=1", "trainer.max_steps=600"))
    command = sweep.command()
    command.until("submitted as")
    one, other = sweep.submissions()
    run = sweep.run(one)
    found = hit(run, "scancel", "--signal=USR2", one["job"])
    until(lambda: view(one["job"])["Restarts"] == "1", "the requeue")
    subprocess.run(["scancel", other["job"]], check=True)
    assert command.wait() == 1
    assert "1 of 2 runs done" in command.said
    assert f"SLURM job {other['job']}: CANCELLED" in command.said
    assert found.seconds < SECONDS
    known = view(one["job"])
    assert (known["JobState"], known["NumTasks"], known["NumNodes"]) == ("COMPLETED", "2", "1")
    assert sweep.log(one["job"]).count("Requeued job") == 1
    assert f"continuing at step {found.step} of 600" in sweep.log(one["job"])
    ids = [path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")]
    assert ids == [run.name.rpartition("-")[2]] * 2
    alone = Command(
        ("train", *TINY, "trainer=ddp_cpu", "trainer.max_steps=600", "seed=3", "output_dir=alone"), tmp_path
    )
    assert alone.wait() == 0
    assert apart(tmp_path / "alone" / "runs" / run.name, run) == []
