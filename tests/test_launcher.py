"""Processes of a sweep, as small programs that write down when they ran, and with what."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from denoiselab.errors import UserError
from denoiselab.launcher import Local, Task, local

PROGRAM = """
import json, os, signal, sys, time
folder, seconds, status = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def stop(signum, frame):
    open(os.path.join(folder, f"stopped{os.getpid()}"), "w").write(str(signum))
    sys.exit(128 + signum)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
os.makedirs(folder, exist_ok=True)
facts = {"from": time.time(), "pid": os.getpid()}
facts |= {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
file = os.path.join(folder, f"{os.getpid()}.json")
json.dump(facts, open(file + ".part", "w"))
os.replace(file + ".part", file)
print(folder)
print("a line", file=sys.stderr)
time.sleep(seconds)
json.dump({**facts, "to": time.time()}, open(file, "w"))
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""


DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
LEADER = """
import json, os, subprocess, sys, time
os.makedirs(sys.argv[1])
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
json.dump({"from": 0, "pid": other.pid}, open(os.path.join(sys.argv[1], "other.json"), "w"))
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    monkeypatch.setattr(Local, "program", (sys.executable, str(file)))
    return file


def task(folder: Path, seconds: float = 0.3, status: int = 0, gpus: int | None = 0) -> Task:
    return Task(folder.name, [str(folder), str(seconds), str(status)], folder, gpus=gpus)


def told(folder: Path) -> list[dict[str, Any]]:
    """What the programs wrote, in the order of their starts."""
    found = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
    return sorted(found, key=lambda facts: facts["from"])


class Listed:
    """A list of tasks, given out at once."""

    def __init__(self, tasks: list[Task], go_on: bool = True):
        self.tasks, self.go_on = tasks, go_on
        self.waiting, self.statuses = [*tasks], {}

    @property
    def stopped(self) -> bool:
        return not self.go_on and any(self.statuses.values())

    def take(self, held: int) -> list[Task]:
        given, self.waiting = self.waiting, []
        return given

    def started(self, task: Task) -> None:
        pass

    def ended(self, task: Task, status: int) -> None:
        self.statuses[self.tasks.index(task)] = status


def run(local: Local, tasks: list[Task], go_on: bool = True) -> dict[int, int]:
    source = Listed(tasks, go_on)
    local.run(source)
    return source.statuses


def at_once(facts: list[dict[str, Any]]) -> int:
    return max(sum(other["from"] <= one["from"] < other["to"] for other in facts) for one in facts)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_run_at_a_time_with_their_share_of_the_cores(jobs: int, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert run(Local(jobs), [task(tmp_path / f"r{k}") for k in range(5)]) == dict.fromkeys(range(5), 0)
    facts = told(tmp_path)
    assert at_once(facts) == jobs
    assert {one["OMP_NUM_THREADS"] for one in facts} == {str(7 // jobs)}
    out, err = capfd.readouterr()
    assert sorted(out.split()) == [str(tmp_path / f"r{k}") for k in range(5)]
    prefixes = [f"[r{k}] " for k in range(5)] if jobs > 1 else [""] * 5
    assert sorted(err.splitlines()) == [f"{prefix}a line" for prefix in prefixes]


@pytest.mark.usefixtures("program")
def test_a_number_of_threads_that_is_set_stays(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run(Local(2), [task(tmp_path / "r", 0)])
    assert told(tmp_path)[0]["OMP_NUM_THREADS"] == "5"


@pytest.mark.usefixtures("program")
def test_a_folder_is_worked_on_by_one_process(tmp_path: Path):
    """The third task need not wait for the first two, which share a folder."""
    run(Local(3), [task(tmp_path / "a"), task(tmp_path / "a"), task(tmp_path / "b")])
    assert at_once(told(tmp_path / "a")) == 1
    assert told(tmp_path / "b")[0]["from"] < told(tmp_path / "a")[1]["from"]


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize(("need", "jobs", "each"), [(1, 4, 1), (2, 4, 2), (None, 2, 2), (None, 8, 1), (0, 2, 0)])
def test_no_two_share_a_gpu(need: int | None, jobs: int, each: int, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    run(Local(jobs), [task(tmp_path / f"r{k}", gpus=need) for k in range(5)])
    facts = told(tmp_path)
    for one in facts:
        mine = set(one["CUDA_VISIBLE_DEVICES"].split(",")) if each else set()
        assert len(mine) == each
        assert mine <= {"4", "5", "6", "7"}
        others = [o for o in facts if o is not one and o["from"] <= one["from"] < o["to"]]
        assert not each or not any(mine & set(o["CUDA_VISIBLE_DEVICES"].split(",")) for o in others)


@pytest.mark.usefixtures("program")
def test_more_gpus_than_there_are_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"trainer\.devices=3: a run needs so many GPUs, and 2 can be used"):
        run(Local(1), [task(tmp_path / "r", gpus=3)])
    assert not told(tmp_path)


@pytest.mark.usefixtures("program")
@pytest.mark.faults
def test_one_that_dies_hard_takes_nothing_with_it(tmp_path: Path, faults):
    tasks = [task(tmp_path / f"r{k}", 0.1, status) for k, status in enumerate([0, -9, 3, 0])]
    assert run(Local(2), tasks) == {0: 0, 1: -9, 2: 3, 3: 0}
    faults.injected("call", 2)


@pytest.mark.usefixtures("program")
@pytest.mark.faults
def test_one_that_takes_too_long_is_told_to_stop(tmp_path: Path, monkeypatch, faults):
    """And killed if it does not; the others go on."""
    monkeypatch.setattr(local, "GRACE", 1.0)
    slow, deaf, quick = (task(tmp_path / name, seconds) for name, seconds in (("slow", 60), ("deaf", 60), ("quick", 0)))
    deaf.arguments = ["-c", DEAF, str(tmp_path / "deaf")]
    monkeypatch.setattr(Local, "program", (sys.executable,))
    for one in (slow, quick):
        one.arguments = [str(tmp_path / "program.py"), *one.arguments]
    assert run(Local(3, minutes=3 / 60), [slow, deaf, quick]) == {0: 128 + signal.SIGTERM, 1: -signal.SIGKILL, 2: 0}
    faults.injected("call", 2)


@pytest.mark.usefixtures("program")
@pytest.mark.faults
def test_what_is_left_of_a_run_that_died_is_ended(tmp_path: Path, monkeypatch, faults):
    """Its other ranks, which wait for the one that is gone."""
    monkeypatch.setattr(Local, "program", (sys.executable, "-c", LEADER))
    run(Local(1), [task(tmp_path / "r")])
    (other,) = told(tmp_path)
    until(lambda: gone(other["pid"]))
    faults.injected("call")


@pytest.mark.usefixtures("program")
def test_no_further_one_is_started_where_that_is_asked(tmp_path: Path):
    tasks = [task(tmp_path / f"r{k}", 0.1, status) for k, status in enumerate([0, 1, 0, 0])]
    assert run(Local(1), tasks, go_on=False) == {0: 0, 1: 1}


def test_jobs_are_at_least_one():
    with pytest.raises(UserError, match=r"launcher\.jobs=0: need at least 1"):
        Local(0)


LAUNCHING = """
import sys
from pathlib import Path
from denoiselab.errors import Interrupted
from denoiselab.launcher import Local, Task
sys.path.insert(0, sys.argv[3])
from test_launcher import run
Local.program = (sys.executable, sys.argv[1])
tasks = [Task(str(k), [f"{sys.argv[2]}/r{k}", "30", "0"], Path(f"r{k}")) for k in range(3)]
try:
    run(Local(2), tasks)
except Interrupted as stop:
    sys.exit(stop.status)
"""


def launched(program: Path, folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A launching process, and the two that it has started."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHING, str(program), str(folder), str(Path(__file__).parent)])
    until(lambda: len(told(folder)) == 2)
    return process, [facts["pid"] for facts in told(folder)]


def until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.faults
def test_a_signal_reaches_every_run_and_is_waited_for(signum: int, program: Path, tmp_path: Path, faults):
    process, children = launched(program, tmp_path / "runs")
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum
    assert all(map(gone, children))
    assert sorted(path.read_text() for path in (tmp_path / "runs").rglob("stopped*")) == [str(int(signum))] * 2
    assert not (tmp_path / "runs" / "r2").exists()
    faults.injected("call")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word of a parent's death is Linux's own")
@pytest.mark.faults
def test_runs_stop_when_the_launching_process_is_killed(program: Path, tmp_path: Path, faults):
    process, children = launched(program, tmp_path / "runs")
    process.kill()
    process.wait()
    until(lambda: all(map(gone, children)))
    assert len(list((tmp_path / "runs").rglob("stopped*"))) == 2
    faults.injected("call")
