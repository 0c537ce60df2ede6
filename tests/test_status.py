"""How runs stand, read off their folders while they run, and after they ended in every way."""

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from denoiselab.report.runs import find
from denoiselab.status import TAIL, Standing, standing, table
from test_report import make_run, write


def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def running(folder: Path, steps: int = 500, **status: Any) -> Path:
    run = make_run(folder, state="running", steps=steps)
    written = json.loads((run / "status.json").read_text())
    here = {"host": socket.gethostname(), "pid": os.getpid(), "step": 0}
    write(run / "status.json", {**written, **here, **status})
    return run


def found(root: Path) -> dict[str, Standing]:
    return {one.name: one for one in (standing(run, root) for run in find(root))}


def test_every_way_to_stand(tmp_path: Path):
    make_run(tmp_path / "done")
    make_run(tmp_path / "failed", state="failed", steps=300, error="NonFiniteLoss: at step 300\nlr 1")
    running(tmp_path / "running")
    running(tmp_path / "died", pid=dead())
    elsewhere = running(tmp_path / "elsewhere", host="another")
    silent = running(tmp_path / "silent", host="another")
    for path in silent.iterdir():
        os.utime(path, (1, 1))
    write(tmp_path / "empty" / "identity.json", "{}")
    write(tmp_path / "torn" / "identity.json", "{}")
    write(tmp_path / "torn" / "status.json", '{"state"')
    write(tmp_path / "torn" / "metrics.jsonl", '[]\n3\n{"step": 7, "train/loss": NaN}\n{"st')
    stands = found(tmp_path)
    states = {name: one.state for name, one in stands.items()}
    named = {name: name for name in ("done", "failed", "running", "died", "silent")}
    assert states == {**named, "elsewhere": "running", "empty": "unknown", "torn": "unknown"}
    assert stands["torn"].step == 7
    assert stands["torn"].loss is None
    text = table([*stands.values()])
    assert "1 died, 1 done, 1 failed, 2 running, 1 silent, 2 unknown" in text
    lines = text.splitlines()
    (number,) = [k for k, line in enumerate(lines) if line.startswith("failed")]
    assert lines[number + 1] == "  NonFiniteLoss: at step 300 lr 1"
    assert elsewhere.name in text


def test_a_running_one_says_what_is_left(tmp_path: Path):
    """500 of 2,000 steps at 40 steps/s leave 37.5 s."""
    one = found(running(tmp_path / "run").parent)["run"]
    assert (one.step, one.max_steps, one.rate, one.left) == (500, 2000, 40.0, pytest.approx(37.5))
    assert "500/2000" in table([one])
    assert "38 s" in table([one])


def test_the_rate_is_estimated_until_one_is_logged(tmp_path: Path):
    """Continued at step 100 a minute ago, now at 400: 5 steps/s."""
    started = (datetime.now(UTC) - timedelta(seconds=60)).isoformat()
    run = running(tmp_path / "run", step=100, started=started)
    write(run / "metrics.jsonl", '{"step": 400, "train/loss": 0.5}\n')
    one = standing(run, run)
    assert one.rate == pytest.approx(5, rel=0.05)
    assert one.left == pytest.approx(320, rel=0.05)
    assert one.name == "run"


def test_long_runs_are_read_from_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = running(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in range(501, 200_000))
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "{}")  # nothing is read whole but status.json
    assert (run / "metrics.jsonl").stat().st_size > 50 * TAIL
    assert standing(run, tmp_path).step == 199_999


def test_the_command(tmp_path: Path, command):
    make_run(tmp_path / "runs" / "a")
    done = command("status", "runs")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "1 done"
    watched = command("status", "runs", "watch=0.1")  # nothing goes on, so it ends
    assert (watched.returncode, watched.stdout) == (0, done.stdout)
    for arguments, says in {
        (): "need one run directory or folder",
        ("nowhere",): "nowhere: no such folder",
        ("runs", "watch=x"): "watch=x: need seconds from 0.1 to 3600",
        ("runs/a/pictures",): "no run here",
    }.items():
        wrong = command("status", *arguments)
        assert wrong.returncode == 2
        assert says in wrong.stderr
        assert len(wrong.stderr.splitlines()) == 1


def test_it_watches_until_the_last_has_ended(tmp_path: Path):
    run = running(tmp_path / "run")
    watching = subprocess.Popen(
        [sys.executable, "-m", "denoiselab", "status", str(tmp_path), "watch=0.2"], stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None
    seen = ""
    while "1 running" not in seen:
        seen = watching.stdout.readline()
    written = json.loads((run / "status.json").read_text())
    write(run / "status.json", {**written, "state": "done", "step": 2000})
    rest, _ = watching.communicate(timeout=20)
    assert watching.returncode == 0
    assert rest.splitlines()[-1] == "1 done"
