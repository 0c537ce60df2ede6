"""A run is held by one process, whoever else starts, and by nobody that is gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from denoiselab import run_folder
from denoiselab.compose import compose
from denoiselab.errors import RunHeld
from denoiselab.run_folder import GONE, RunFolder
from denoiselab.training import Job
from ledger import Faults
from runs import POINTS, last
from traps import At, Note
from warm import Warm, _forks

pytestmark = pytest.mark.faults


@dataclass(frozen=True)
class Gate:
    """Waits for a file, by which many go on at once."""

    file: Path

    def __call__(self) -> None:
        while not self.file.exists():
            time.sleep(0.0005)


@pytest.mark.parametrize("racing", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_of_many_starts_at_once_one_works(racing: int, tmp_path: Path, faults: Faults):
    folder, gate = tmp_path / "run", tmp_path / "gate"
    options = ("train", *POINTS, "trainer.max_steps=1000000", "trainer.checkpoint_every=100")
    ready = [tmp_path / f"ready{k}" for k in range(racing)]
    locked = "denoiselab.run_folder:RunFolder.locked"
    starts = [Warm(folder, *options, traps=[At(locked, 1, (Note(file), Gate(gate)))]) for file in ready]
    try:
        end = time.monotonic() + 240
        while not all(file.exists() for file in ready):
            assert time.monotonic() < end
            time.sleep(0.02)
        gate.touch()
        while sum(one.process.is_alive() for one in starts) > 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        (winner,) = (one for one in starts if one.process.is_alive())
        assert [one.process.exitcode for one in starts if one is not winner] == [75] * (racing - 1)
        # Counted, as lines that are written at once may share one.
        assert winner.said.count(" works on this run") == racing - 1
        assert winner.said.count(f"process {winner.pid} on {socket.gethostname()} works on this run") == racing - 1
        winner.when(lambda: [*folder.glob("outputs/runs/*/checkpoints/last.ckpt")])
        (run,) = (file.parent for file in folder.glob("outputs/runs/*/identity.json"))
        winner.tell(signal.SIGTERM)
        assert winner.wait() == 143
    finally:
        for one in starts:
            one.end()
    assert last(run)["global_step"] > 0
    assert not (run / "run.lock").exists()
    faults.injected("process", racing)


def hold(folder: Path, gate: Path, out: Path, outs: list[Path]) -> None:
    """Until all others know whether they do."""
    Gate(gate)()
    try:
        with RunFolder(folder, {}).locked():
            out.write_text("held")
            end = time.monotonic() + 100
            while not all(other.exists() for other in outs) and time.monotonic() < end:
                time.sleep(0.01)
    except RunHeld as error:
        out.write_text(str(error))


@pytest.mark.parametrize("left", ["nothing", "a dead process", "nobody"])
def test_of_many_that_find_a_lock_left_behind_one_has_it(left: str, tmp_path: Path, faults: Faults):
    """Twenty at a time, on a folder that is free, or held by what is gone or was torn."""
    lock, gate = tmp_path / "run" / "run.lock", tmp_path / "gate"
    lock.parent.mkdir()
    if left != "nothing":
        gone = {"host": socket.gethostname(), "pid": dead(), "slurm": None}
        lock.write_text(json.dumps(gone) if left == "a dead process" else "")
        os.utime(lock, (time.time() - 60,) * 2)
    outs = [tmp_path / f"out{k}" for k in range(20)]
    racing = [_forks.Process(target=hold, args=(lock.parent, gate, out, outs)) for out in outs]
    for one in racing:
        one.start()
    gate.touch()
    for one in racing:
        one.join(120)
    told = [out.read_text() for out in outs]
    assert told.count("held") == 1
    assert sum("works on this run" in text for text in told) == 19
    faults.injected("call", 20)


def dead() -> int:
    process = _forks.Process(target=multiprocessing.process.current_process)
    process.start()
    process.join()
    assert process.pid is not None
    return process.pid


def elsewhere(lock: Path, age: float) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"host": "another", "pid": os.getpid(), "slurm": None}))
    os.utime(lock, (time.time() - age,) * 2)


def test_a_host_without_a_sign_of_life_holds_nothing(tmp_path: Path, faults: Faults):
    job = Job(compose("train", [*POINTS, f"output_dir={tmp_path}"]))
    lock = job.path / "run.lock"
    elsewhere(lock, GONE - 60)
    with pytest.raises(
        RunHeld, match=r"process .* on another works on this run, and gave a sign of life 5[0-9]{2} s ago"
    ):
        job.run()
    assert "another" in lock.read_text()
    elsewhere(lock, GONE + 1)
    job.run()
    assert job.finished
    assert not lock.exists()
    faults.injected("call", 2)


def test_signs_of_life_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.05)
    lock = tmp_path / "run.lock"
    with RunFolder(tmp_path, {}).locked():
        os.utime(lock, (1, 1))
        end = time.monotonic() + 20
        while time.time() - lock.stat().st_mtime > 60:
            assert time.monotonic() < end
            time.sleep(0.01)


def held_for_long(folder: Path, out: Path) -> None:
    run_folder.BEAT = 0.1
    with RunFolder(folder, {}).locked():
        out.touch()
        time.sleep(60)
    out.with_suffix(".ended").touch()


def test_one_whose_run_was_taken_over_ends(tmp_path: Path, faults: Faults):
    """It stood still for so long that another took the run, and wakes."""
    process = _forks.Process(target=held_for_long, args=(tmp_path / "run", tmp_path / "out"))
    process.start()
    end = time.monotonic() + 60
    while not (tmp_path / "out").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    elsewhere(tmp_path / "run" / "run.lock", 0)
    process.join(30)
    assert process.exitcode == 75
    assert "another" in (tmp_path / "run" / "run.lock").read_text()
    faults.injected("process")
