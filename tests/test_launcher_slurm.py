"""What is submitted to SLURM, what its answers mean, and what is never done twice; SLURM's commands are scripts."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from submitit.core.utils import cloudpickle_dump

from denoiselab.compose import compose
from denoiselab.errors import RunHeld, UserError
from denoiselab.launcher import Slurm, Task
from denoiselab.launcher.queue import read_submission
from denoiselab.run_folder import RunFolder
from denoiselab.status import standings, table
from denoiselab.training import Job
from slurm_stub import Slurm as Stub
from slurm_stub import stubbed
from test_launcher import Listed
from test_sweep import TINY


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    for name in ("SLURM_JOB_ID", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    return stubbed(tmp_path / "stub", monkeypatch)


def task(root: Path, name: str, ranks: int = 1, nodes: int = 1, gpus: int | None = 1) -> Task:
    jobs = root / "outputs" / ".jobs"
    return Task(name, ["train", "--job", str(jobs / f"{name}-0.json")], root / "outputs" / name, ranks, nodes, gpus)


def tasks(root: Path, count: int) -> list[Task]:
    return [task(root, f"run{k}") for k in range(count)]


def started(launcher: Slurm, given: list[Task]) -> list:
    for one in given:
        launcher.check(one)
    return launcher.start(given)


def row(handle, state: str, status: int = 0, restarts: int = 0, reason: str = "None"):
    array, _, index = handle.job.partition("_")
    return array, index or "N/A", state, str(status), str(restarts), reason, handle.submission.token


@pytest.mark.parametrize(("nodes", "devices"), [(1, 1), (1, 8), (2, 4)])
def test_a_job_has_the_shape_of_its_trainer(nodes: int, devices: int, slurm: Stub, tmp_path: Path):
    """One task per device, so that Lightning's ranks are SLURM's tasks; the preset does not say it again."""
    options = (*TINY, f"trainer.nodes={nodes}", f"trainer.devices={devices}", f"output_dir={tmp_path}")
    job = Job(compose("train", [*options, "trainer.accelerator=gpu"]), here=False)
    started(Slurm(), [job.task("1/1")])
    asked = slurm.directives(1)
    trainer = job.config["trainer"]
    assert asked["nodes"] == str(trainer["nodes"])
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == str(trainer["devices"])


def test_what_the_options_ask_for(slurm: Stub, tmp_path: Path):
    options = {"partition": "gpu", "account": "lab", "qos": "low", "minutes": 90, "grace": 60, "memory": 1.5}
    launcher = Slurm(**options, cpus_per_task=3, setup=["module load cuda"], extra={"constraint": "a100"})
    started(launcher, [task(tmp_path, "run", gpus=0)])
    asked = slurm.directives(1)
    assert {key: asked[key] for key in ("partition", "account", "qos", "time", "signal", "mem", "constraint")} == {
        **dict(zip(("partition", "account", "qos", "constraint"), ("gpu", "lab", "low", "a100"), strict=True)),
        **dict(zip(("time", "signal", "mem"), ("90", "USR2@60", "1536M"), strict=True)),
    }
    assert "requeue" in asked
    assert not {"gpus-per-node", "wckey", "array"} & asked.keys()
    text = (slurm.folder / "submitted1.sh").read_text()
    assert "\nexport SLURM_KILL_BAD_EXIT=1\nmodule load cuda\n" in text
    assert re.search(r"\nsrun .* --cpus-per-task=3 ", text)


def test_runs_of_a_shape_are_an_array(slurm: Stub, tmp_path: Path, capsys):
    given = [*tasks(tmp_path, 3), task(tmp_path, "two", ranks=2, gpus=2)]
    handles = started(Slurm(jobs=2), given)
    assert len(slurm.calls("sbatch")) == 2
    assert (slurm.directives(1)["array"], "array" in slurm.directives(2)) == ("0-2%2", False)
    assert [one.job for one in handles] == ["10_0", "10_1", "10_2", "20"]
    assert "submitted as SLURM job 10_[0,1,2]; logs in " in capsys.readouterr().err
    folder = tmp_path / "outputs" / ".jobs" / "slurm"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.glob("10_*_submitted.pkl")) == [
        f"10_{k}_submitted.pkl" for k in range(3)
    ]


def test_without_a_bound_all_may_run(slurm: Stub, tmp_path: Path):
    started(Slurm(), tasks(tmp_path, 3))
    assert slurm.directives(1)["array"] == "0-2%3"


def test_what_was_submitted_is_not_submitted_again(slurm: Stub, tmp_path: Path, capsys):
    first = started(Slurm(), tasks(tmp_path, 3))
    slurm.queue(
        row(first[0], "PENDING", reason="Priority"), row(first[1], "RUNNING", restarts=1), row(first[2], "FAILED")
    )
    again = started(Slurm(), tasks(tmp_path, 3))
    assert len(slurm.calls("sbatch")) == 2
    assert [one.job for one in again] == ["10_0", "10_1", "20"]
    assert "[run0] SLURM job 10_0, submitted before, is pending; waiting for it" in capsys.readouterr().err


def test_one_whose_id_was_never_noted_is_found(slurm: Stub, tmp_path: Path):
    """The command was killed just after sbatch: what was written before says enough."""
    (first,) = started(Slurm(), tasks(tmp_path, 1))
    content = json.loads(first.file.read_text())
    first.file.write_text(json.dumps({**content, "job": ""}))
    slurm.queue(row(first, "PENDING"))
    (again,) = started(Slurm(), tasks(tmp_path, 1))
    assert (again.job, len(slurm.calls("sbatch"))) == ("10", 1)


def test_nothing_is_submitted_where_it_is_not_known_what_was(slurm: Stub, tmp_path: Path):
    started(Slurm(), tasks(tmp_path, 1))
    slurm.silent()
    with pytest.raises(UserError, match="squeue does not answer"):
        started(Slurm(), tasks(tmp_path, 1))
    assert len(slurm.calls("sbatch")) == 1


def polled(launcher: Slurm, handle) -> int | None:
    launcher.next = 0.0
    return launcher.poll(handle)


@pytest.mark.parametrize(
    ("state", "waited", "status"),
    [
        ("PENDING", 0, None),
        ("RUNNING", 0, None),
        ("COMPLETING", 3 << 8, None),
        ("REQUEUE_HOLD", 0, None),
        ("COMPLETED", 0, 0),
        ("FAILED", 3 << 8, 3),
        ("FAILED", 137 << 8, -9),
        ("OUT_OF_MEMORY", 9, -9),
        ("CANCELLED", 0, -signal.SIGTERM),
        ("TIMEOUT", 0, 1),
        ("NODE_FAIL", 0, 1),
    ],
)
def test_what_a_state_means(state: str, waited: int, status: int | None, slurm: Stub, tmp_path: Path, capsys):
    launcher = Slurm()
    (handle,) = started(launcher, tasks(tmp_path, 1))
    slurm.queue(row(handle, state, waited, reason="Because"))
    assert polled(launcher, handle) == status
    out, err = capsys.readouterr()
    assert out == (f"{handle.task.folder}\n" if status == 0 else "")
    assert (f"[run0] SLURM job 10: {state} (Because); its log: " in err) == bool(status)


def test_one_that_vanished_is_not_waited_for(slurm: Stub, tmp_path: Path, monkeypatch):
    """Without accounting, what became of it is what it left: nothing, or its result. Some queues are copies."""
    launcher = Slurm()
    lost, done = started(launcher, tasks(tmp_path, 2))
    slurm.silent()
    assert polled(launcher, lost) is None  # nobody knows
    slurm.queue()
    assert polled(launcher, lost) is None
    slurm.queue(row(lost, "RUNNING"))
    assert polled(launcher, lost) is None
    slurm.queue()
    assert polled(launcher, lost) is None
    monkeypatch.setattr("denoiselab.launcher.slurm.LOST", 0)
    cloudpickle_dump(("success", None), done.folder / f"{done.job}_0_result.pkl")
    assert [polled(launcher, one) for one in (lost, done)] == [1, 0]
    assert read_submission(done.file) is None


def test_one_that_was_just_submitted_is_not_missed(slurm: Stub, tmp_path: Path, monkeypatch):
    """What SLURM said before knows nothing of it."""
    monkeypatch.setattr("denoiselab.launcher.slurm.LOST", 0)
    launcher = Slurm()
    first, second = tasks(tmp_path, 2)
    (one,) = started(launcher, [first])
    slurm.queue(row(one, "RUNNING"))
    assert launcher.poll(one) is None
    (other,) = started(launcher, [second])
    slurm.queue(row(one, "RUNNING"), row(other, "PENDING"))
    assert launcher.poll(other) is None


def test_those_that_wait_are_taken_back_where_nothing_further_is_to_start(slurm: Stub, tmp_path: Path, monkeypatch):
    """One failed, one runs, one waits, and one waits to go on."""
    monkeypatch.setattr(Slurm, "poll_seconds", 0.01)
    launcher = Slurm()
    source = Listed(tasks(tmp_path, 4), go_on=False)

    def started(handles: list) -> list:
        failed, runs, waits, goes_on = handles
        slurm.queue(
            row(failed, "FAILED", 256), row(runs, "RUNNING"), row(waits, "PENDING"), row(goes_on, "PENDING", 0, 1)
        )
        over = (row(runs, "COMPLETED"), row(waits, "CANCELLED"), row(goes_on, "COMPLETED"))
        slurm.after_scancel(row(failed, "FAILED", 256), *over)
        return handles

    monkeypatch.setattr(launcher, "start", lambda given, start=launcher.start: started(start(given)))
    launcher.run(source)
    assert source.statuses == {0: 1, 1: 0, 3: 0}
    assert slurm.calls("scancel") == [["--state=PENDING", "10_2"]]


def test_ctrl_c_leaves_them_and_says_how_to_end_them(slurm: Stub, tmp_path: Path, capsys):
    launcher = Slurm()
    handles = started(launcher, tasks(tmp_path, 2))
    capsys.readouterr()
    launcher.stop(handles, signal.SIGINT)
    assert capsys.readouterr().err.splitlines()[-1] == "scancel 10"
    assert not slurm.calls("scancel")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"minutes": 2}, "launcher.minutes=2: need more than launcher.grace=120 seconds"),
        ({"requeues": -1}, "launcher.requeues=-1: need at least 0"),
        ({"cpus_per_task": 0}, "launcher.cpus_per_task=0: need at least 1"),
        ({"memory": 0}, "launcher.memory=0: need a number of GB > 0"),
        ({"jobs": 0}, "launcher.jobs=0: need at least 1"),
        ({"extra": {"ntasks-per-node": 2}}, "launcher.extra.ntasks_per_node=2: follows from the run's trainer"),
    ],
)
def test_options_that_cannot_work(options: dict, said: str, slurm: Stub):
    with pytest.raises(UserError, match=re.escape(said)):
        Slurm(**options)


def test_what_can_never_start_is_refused(slurm: Stub, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"trainer\.devices: launcher=slurm needs a number of devices"):
        Slurm().check(task(tmp_path, "run", gpus=None))
    Slurm().check(task(tmp_path, "run"))
    (tmp_path / "outputs" / ".jobs" / "slurm").chmod(0o770)
    with pytest.raises(UserError, match="others can write to this folder"):
        Slurm().check(task(tmp_path, "run"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="launcher=slurm: no sbatch here"):
        Slurm()


def test_what_sbatch_refuses_is_one_line(slurm: Stub, tmp_path: Path):
    sbatch = slurm.folder / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    with pytest.raises(UserError, match="launcher=slurm: sbatch: error: invalid partition specified: gpu"):
        started(Slurm(partition="gpu"), tasks(tmp_path, 1))


def test_a_job_in_which_the_command_is_given_does_not_shape_those_it_submits(slurm: Stub, tmp_path: Path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    started(Slurm(), tasks(tmp_path, 1))
    assert json.loads((slurm.folder / "inherited.json").read_text()) == ["SLURM_CONF"]


def test_status_tells_what_waits_runs_and_died(slurm: Stub, tmp_path: Path):
    handles = started(Slurm(), tasks(tmp_path, 5))
    for handle, state in zip(handles[1:], ("preempted", "running", "running", "failed"), strict=True):
        handle.task.folder.mkdir(parents=True)
        (handle.task.folder / "identity.json").write_text("{}")
        status = {"state": state, "step": 3, "max_steps": 9, "host": "elsewhere", "error": "OSError: full"}
        (handle.task.folder / "status.json").write_text(json.dumps(status))
    states = [("PENDING", 0, "Priority"), ("PENDING", 1, "Resources"), ("RUNNING", 0, ""), ("CANCELLED", 0, "")]
    slurm.queue(*(row(one, state, 0, n, why) for one, (state, n, why) in zip(handles, states, strict=False)))
    found = standings(tmp_path / "outputs")
    assert [one.state for one in found] == ["queued", "requeued", "running", "died", "failed"]
    lines = table(found).splitlines()
    assert [line.strip() for line in lines if line.startswith("  ")] == [
        "SLURM job 10_0: Priority",
        "SLURM job 10_1: Resources",
        "SLURM job 10_3 is CANCELLED",
        "OSError: full",
    ]
    slurm.silent()
    assert [one.state for one in standings(tmp_path / "outputs")] == ["preempted", "running", "running", "failed"]
    assert standings(handles[3].task.folder)[0].state == "running"


def test_a_run_that_goes_on_here_after_its_job_was_lost_has_not_died(slurm: Stub, tmp_path: Path):
    (handle,) = started(Slurm(), tasks(tmp_path, 1))
    handle.task.folder.mkdir(parents=True)
    (handle.task.folder / "identity.json").write_text("{}")
    here = {"state": "running", "step": 3, "max_steps": 9, "host": os.uname().nodename, "pid": os.getpid()}
    (handle.task.folder / "status.json").write_text(json.dumps(here))
    slurm.queue(row(handle, "FAILED"))
    assert [one.state for one in standings(tmp_path / "outputs")] == ["running"]
    (handle.task.folder / "status.json").write_text(json.dumps({**here, "pid": 2**22 + 1}))
    assert [one.state for one in standings(tmp_path / "outputs")] == ["died"]


@pytest.mark.parametrize(
    ("mine", "holder", "queue", "free"),
    [
        ({"restart": "1"}, {"job": "70_1", "restart": 0}, None, True),  # requeued on another node
        ({"restart": "1"}, {"job": "70_1", "restart": 1}, None, False),  # twice in one start of a job
        ({"restart": "0"}, {"job": "60_1", "restart": 0}, "RUNNING", False),
        ({"restart": "0"}, {"job": "60_1", "restart": 0}, "FAILED", True),
        ({}, {"job": "60_1", "restart": 3}, "PENDING", False),  # waits to go on
        ({}, {"job": "60_1", "restart": 3}, "", True),  # gone
        ({}, {"job": "60_1", "restart": 3}, None, False),  # nobody answers
        ({}, None, "", False),  # a process of another machine, without SLURM
    ],
)
def test_a_run_is_held_as_long_as_its_job(mine, holder, queue, free: bool, slurm: Stub, tmp_path: Path, monkeypatch):
    if mine:
        for name, value in {"JOB_ID": "75", "ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "1"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("SLURM_RESTART_COUNT", mine["restart"])
    slurm.silent() if queue is None else slurm.queue(*[("60", "1", queue, "0", "0", "", "")] if queue else [])
    (tmp_path / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "slurm": holder}))
    with nullcontext() if free else pytest.raises(RunHeld, match="process 1 on elsewhere works on this run"):  # noqa: SIM117
        with RunFolder(tmp_path, {}).locked():
            held = json.loads((tmp_path / "run.lock").read_text())["slurm"]
            assert held == ({"job": "70_1", "restart": int(mine["restart"])} if mine else None)
