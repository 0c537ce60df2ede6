"""Commands and evaluations that meet on one run: none takes it from another, changes what it does, or speaks for it."""

import json
import os
import signal
from pathlib import Path

import pytest

from denoiselab import training
from denoiselab.compose import compose, read_job
from denoiselab.errors import Interrupted, RunHeld, UserError
from denoiselab.launcher import Launcher, Slurm, Task
from denoiselab.run_folder import RunFolder, queue
from denoiselab.training import Job
from slurm_stub import stubbed
from test_launcher_slurm import row, started, task
from test_optuna import BOWL, Stub, bowl, search
from test_sweep import TINY


def job(root: Path, *overrides: str) -> Job:
    return Job(compose("train", [*TINY, f"output_dir={root}", *overrides]))


@pytest.mark.faults
def test_an_evaluation_that_fails_is_not_the_failure_of_the_others(tmp_path: Path, monkeypatch, faults):
    """A search over samplers has one run with an evaluation per trial."""
    first, second, third = (job(tmp_path, f"sampler.steps={steps}") for steps in (1, 2, 3))
    assert first.path == second.path == third.path
    first.run()
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            second.run()
    assert json.loads((second.path / "status.json").read_text())["state"] == "failed"
    assert [one.finished for one in (first, second, third)] == [True, False, False]
    assert [bool(one.error) for one in (first, second, third)] == [False, True, False]
    third.run()
    assert [one.finished for one in (first, second, third)] == [True, False, True]
    longer = job(tmp_path, "sampler.steps=1", "trainer.max_steps=8")
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            longer.run()
    assert not any(one.finished for one in (first, second, third, longer))  # what was measured are other weights
    faults.injected("call", 2)


@pytest.mark.faults
def test_of_two_that_find_a_dead_lock_one_has_the_run(tmp_path: Path, monkeypatch, faults):
    """While one of them asks SLURM whether the holder is gone, the other has taken the run."""
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"host": os.uname().nodename, "pid": 1, "slurm": {"job": "7", "restart": 0}}))
    other = json.dumps({"host": os.uname().nodename, "pid": os.getppid(), "slurm": None})

    def over(start):
        if start is None:
            return False
        lock.unlink()
        lock.write_text(other)
        return True

    monkeypatch.setattr(queue, "over", over)
    with pytest.raises(RunHeld, match=str(os.getppid())), RunFolder(tmp_path, {}).locked():
        pass
    assert lock.read_text() == other
    lock.unlink()
    with RunFolder(tmp_path, {}).locked():
        lock.write_text(other)  # somebody was told to remove this one
    assert lock.read_text() == other
    faults.injected("call")


def test_a_run_that_goes_on_is_not_moved_away(tmp_path: Path):
    mine = job(tmp_path, "rerun=true")
    with mine.folder.locked(), pytest.raises(RunHeld):
        mine.run()
    with mine.folder.locked():
        assert [path.name for path in mine.path.parent.iterdir()] == [mine.path.name]
        with pytest.raises(RunHeld):
            mine.set_aside()


def test_a_command_leaves_alone_what_jobs_of_another_start_from(tmp_path: Path):
    """Options that are no part of a run's identity are still what its command asked for."""
    first = Path(job(tmp_path, "trainer.max_steps=8").task("1/1").arguments[-1])
    before = first.read_bytes()
    assert Path(job(tmp_path, "trainer.max_steps=2").task("1/1").arguments[-1]) != first
    assert first.read_bytes() == before
    assert read_job(first).config.trainer.max_steps == 8
    same = job(tmp_path, "trainer.max_steps=8", "launcher.jobs=2", "sweep.retry=true", "rerun=true").task("1/1")
    assert Path(same.arguments[-1]) == first  # so that what was submitted is found again


def test_a_job_is_refused_whose_first_weights_are_others_by_now(tmp_path: Path):
    """It would be another run than the one that was planned, in another folder."""
    source = job(tmp_path, "trainer.max_steps=1")
    source.run()
    planned = job(tmp_path, "seed=1", f"init_from={source.path}")
    file = Path(planned.task("1/1").arguments[-1])
    assert Job(read_job(file), file).path == planned.path
    job(tmp_path, "trainer.max_steps=2").run()
    with pytest.raises(UserError, match=r"^init_from=.*last\.ckpt was written anew since this run was planned"):
        Job(read_job(file), file)


def test_a_job_with_other_options_is_not_waited_for(tmp_path: Path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    slurm = stubbed(tmp_path / "stub", monkeypatch)
    (first,) = started(Slurm(), [task(tmp_path, "run")])
    slurm.queue(row(first, "RUNNING"))
    other = task(tmp_path, "run")
    other.arguments[-1] = other.arguments[-1].replace("run-0", "run-1")
    with pytest.raises(UserError, match="SLURM job 10, submitted before with other options, is running"):
        started(Slurm(), [other])
    assert len(slurm.calls("sbatch")) == 1
    slurm.queue(row(first, "FAILED"))
    assert [one.job for one in started(Slurm(), [other])] == ["20"]


class Nothing(Launcher):
    def start(self, tasks):
        raise AssertionError

    def stop(self, handles, signum):
        assert not handles


class Slow:
    """Is told to stop while it looks for what to do."""

    stopped = False

    def take(self, held: int) -> list[Task]:
        os.kill(os.getpid(), signal.SIGTERM)
        return [Task("late", [], Path("late"))]


def test_nothing_is_started_after_a_signal_that_came_before():
    with pytest.raises(Interrupted):
        Nothing().run(Slow())  # pyright: ignore[reportArgumentType]


def test_a_trial_whose_run_another_command_makes_is_taken_up_later(tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Stub, "poll", lambda self, handle: RunHeld.status)
        search(tmp_path, launcher=(held := Stub(tmp_path, bowl, 1)), trials=1)
        assert held.status == 1
    assert len(search(tmp_path, BOWL, trials=1)) == 1
