"""Sweeps that are interrupted, issued again, and hold runs that failed."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = (
    *("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1"),
    *(
        "metrics=none",
        "callbacks=none",
        "trainer.threads=1",
        "trainer.max_steps=4",
        "evaluation.n=2",
        "sampler.steps=1",
    ),
)
SWEEP = ("train", "-m", *TINY, "seed=0,1,2")


def content(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file with the time of its last change and its hash."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def runs(root: Path) -> dict[int, Path]:
    """Run directories by their seed."""
    found = root.glob("outputs/runs/*/identity.json")
    return {json.loads(path.read_text())["seed"]: path.parent for path in found}


def state(run: Path) -> str:
    file = run / "status.json"
    return json.loads(file.read_text())["state"] if file.is_file() else ""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """Where a sweep of three was killed when its first run was done; and what that run had written."""
    root = tmp_path_factory.mktemp("sweep")
    process = subprocess.Popen([sys.executable, "-m", "denoiselab", *SWEEP], cwd=root, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    end = time.monotonic() + 120
    while not any(state(run) == "done" for run in runs(root).values()):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    while any((run / "run.lock").exists() for run in runs(root).values()):  # a second one may have begun, and stops
        assert time.monotonic() < end
        time.sleep(0.02)
    return root, content(runs(root)[0])


def test_a_killed_sweep_goes_on_and_leaves_what_is_done_alone(killed, monkeypatch, called):
    root, before = killed
    assert state(runs(root)[0]) == "done"
    assert state(runs(root).get(2, root)) != "done"
    called("--version")  # which goes to a folder of its own
    monkeypatch.chdir(root)
    from denoiselab.cli import run

    assert run([*SWEEP]) == 0
    assert content(runs(root)[0]) == before
    assert [state(folder) for folder in runs(root).values()] == ["done"] * 3


def test_one_that_failed_is_made_again_when_that_is_asked(killed, monkeypatch, called, capsys):
    root, _ = killed
    called("--version")
    monkeypatch.chdir(root)
    from denoiselab.cli import run

    assert run([*SWEEP]) == 0
    kept = {seed: content(runs(root)[seed]) for seed in (0, 2)}
    file = runs(root)[1] / "status.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": "failed", "error": "OSError: disk full"}))
    capsys.readouterr()
    assert run([*SWEEP]) == 1
    out, err = capsys.readouterr()
    assert "2 of 3 runs done" in err
    assert "seed=1: OSError: disk full (it failed before; sweep.retry=true tries again)" in err.splitlines()[-1]
    assert sorted(out.split()) == sorted(str(runs(Path())[seed]) for seed in (0, 2))
    assert run([*SWEEP, "sweep.retry=true"]) == 0
    assert state(runs(root)[1]) == "done"
    assert {seed: content(runs(root)[seed]) for seed in (0, 2)} == kept


def test_ranks_do_not_start_sweeps(called, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = called(*SWEEP)
    assert result.returncode == 2
    assert "-m: was started as one of several ranks" in result.stderr


def test_a_sweep_runs_so_many_at_a_time(called):
    result = called(*SWEEP, "launcher.jobs=0")
    assert result.returncode == 2
    assert "launcher.jobs=0: need at least 1" in result.stderr
