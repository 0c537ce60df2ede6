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
SWEEP = ("train", "-m", *TINY, "seed=0,1,2,3,4,5")


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
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, tuple[int, str]]]]:
    """Where a sweep of six was killed when its first two runs were done; and what these had written."""
    root = tmp_path_factory.mktemp("sweep")
    process = subprocess.Popen([sys.executable, "-m", "denoiselab", *SWEEP], cwd=root, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    end = time.monotonic() + 120
    while [state(run) for run in runs(root).values()].count("done") < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    while any((run / "run.lock").exists() for run in runs(root).values()):  # a third one may have begun, and stops
        assert time.monotonic() < end
        time.sleep(0.02)
    return root, {seed: content(runs(root)[seed]) for seed in (0, 1)}


@pytest.mark.faults
def test_a_killed_sweep_goes_on_and_leaves_what_is_done_alone(killed, monkeypatch, called, capsys, faults):
    """Exactly the four that are missing are made; the file of every job keeps what it was started from."""
    root, before = killed
    assert sorted(seed for seed, run in runs(root).items() if state(run) == "done") == [0, 1]
    called("--version")  # which goes to a folder of its own
    monkeypatch.chdir(root)
    from denoiselab.cli import run

    capsys.readouterr()
    assert run([*SWEEP]) == 0
    told = capsys.readouterr().err.splitlines()
    assert "4 of 6 runs to make" in told
    assert sorted(line for line in told if line.startswith("[")) == [
        *("[1/6] done and evaluated before", "[2/6] done and evaluated before"),
        *(f"[{number}/6] seed={number - 1}" for number in (3, 4, 5, 6)),
    ]
    assert "6 of 6 runs done" in told
    assert {seed: content(runs(root)[seed]) for seed in (0, 1)} == before
    assert [state(folder) for folder in runs(root).values()] == ["done"] * 6
    faults.injected("process")


def test_one_that_failed_is_made_again_when_that_is_asked(killed, monkeypatch, called, capsys):
    root, _ = killed
    called("--version")
    monkeypatch.chdir(root)
    from denoiselab.cli import run

    assert run([*SWEEP]) == 0
    kept = {seed: content(runs(root)[seed]) for seed in (0, 2, 3, 4, 5)}
    file = runs(root)[1] / "status.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": "failed", "error": "OSError: disk full"}))
    capsys.readouterr()
    assert run([*SWEEP]) == 1
    out, err = capsys.readouterr()
    assert "5 of 6 runs done" in err
    assert "seed=1: OSError: disk full (it failed before; sweep.retry=true tries again)" in err.splitlines()[-1]
    assert sorted(out.split()) == sorted(str(runs(Path())[seed]) for seed in kept)
    assert run([*SWEEP, "sweep.retry=true"]) == 0
    assert state(runs(root)[1]) == "done"
    assert {seed: content(runs(root)[seed]) for seed in kept} == kept


def test_a_sweep_runs_so_many_at_a_time(called):
    result = called(*SWEEP, "launcher.jobs=0")
    assert result.returncode == 2
    assert "launcher.jobs=0: need at least 1" in result.stderr
