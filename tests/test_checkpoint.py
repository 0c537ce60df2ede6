"""Checkpoint files: atomic, verified, and unable to run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from denoiselab import checkpoint
from denoiselab.errors import CheckpointError

pytestmark = pytest.mark.faults

RECORD = {"config": "", "identity": {}, "interface": {}, "choices": {}, "fingerprint": ""}


def content(step: int = 1, **more) -> dict:
    return {
        "state_dict": {"denoiser.w": torch.arange(4.0)},
        "global_step": step,
        "denoiselab": {"version": 1, **RECORD},
        **more,
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    checkpoint.save(content(), path)
    return path


def test_what_is_saved_is_loaded(file: Path):
    loaded = checkpoint.load(file)
    assert torch.equal(loaded["state_dict"]["denoiser.w"], torch.arange(4.0))
    assert sorted(p.name for p in file.parent.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]
    assert file.stat().st_mode & 0o777 == 0o640


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {Path.cwd() / 'marker'}",)


def damaged(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    sidecar = path.with_name(path.name + ".sha256")
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        sidecar.unlink()
        path.write_text("not a checkpoint")
    elif kind == "truncated":
        sidecar.unlink()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "one flipped bit":
        middle = whole.index(torch.arange(4.0).numpy().tobytes())
        stamp = path.stat()
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif kind == "pickle":
        sidecar.unlink()
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch pickle":
        torch.save({**content(), "evil": Bomb()}, path)
        sidecar.unlink()
    elif kind == "foreign":
        checkpoint.save({"model": torch.zeros(2)}, path)
    elif kind == "newer":
        checkpoint.save(content(denoiselab={"version": 99}), path)
    elif kind == "silent":
        checkpoint.save(content(denoiselab={"version": 1, **RECORD, "interface": None}), path)
    elif kind == "nan":
        checkpoint.save(content(state_dict={"w": torch.tensor([float("nan")])}), path)
    elif kind == "missing":
        path.unlink()
    elif kind == "directory":
        path.unlink()
        path.mkdir()


KINDS = {
    "truncated": "truncated, or not a checkpoint",
    **dict.fromkeys(["pickle", "torch pickle", "text"], "nothing was executed"),
    "empty": "empty",
    "one flipped bit": "damaged",
    "foreign": "not a denoiselab checkpoint",
    "newer": "upgrade",
    "nan": "not finite",
    "silent": "says nothing usable of its interface",
    "missing": "no such",
    "directory": "no such",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_refused_in_one_line_and_nothing_runs(kind: str, file: Path, monkeypatch):
    monkeypatch.chdir(file.parent)
    damaged(file, kind)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(file)
    assert KINDS[kind] in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (file.parent / "marker").exists()


def test_no_mutation_of_the_bytes_is_an_uncaught_error_or_a_silent_load(file: Path):
    whole, rng = file.read_bytes(), random.Random(0)
    sidecar = file.with_name(file.name + ".sha256")
    for _ in range(200):
        mutant = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        if bytes(mutant) == whole:
            continue
        file.write_bytes(bytes(mutant))
        os.utime(sidecar)
        with pytest.raises(CheckpointError):
            checkpoint.load(file)
        sidecar_text = sidecar.read_text()
        sidecar.unlink()  # without the hash a mutant may load, or be refused; nothing else may happen
        with contextlib.suppress(CheckpointError):
            checkpoint.load(file)
        sidecar.write_text(sidecar_text)


def test_the_newest_good_checkpoint_is_found_and_bad_ones_are_warned_about(tmp_path: Path):
    for name, step in {"previous": 3, "last": 7}.items():
        checkpoint.save(content(step), tmp_path / f"{name}.ckpt")
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None
    assert (found[0].name, found[1]["global_step"], warnings) == ("last.ckpt", 7, [])
    damaged(tmp_path / "last.ckpt", "truncated")
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None
    assert found[0].name == "previous.ckpt"
    assert len(warnings) == 1
    assert "last.ckpt" in warnings[0]
    assert checkpoint.newest(tmp_path / "nowhere", warnings.append) is None


WRITER = """
import sys, torch
from pathlib import Path
from denoiselab import checkpoint
path = Path(sys.argv[1])
for step in range(1, 10_000):
    state = {"denoiser.w": torch.full((2_000_000,), float(step))}
    record = {"version": 1, "config": "", "identity": {}, "interface": {}, "choices": {}, "fingerprint": ""}
    checkpoint.save({"state_dict": state, "global_step": step, "denoiselab": record}, path)
    print(step, flush=True)
"""


def test_a_kill_while_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    path, rng = tmp_path / "last.ckpt", random.Random(1)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": "/dev/shm", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        written = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        written = int(rest[-1]) if rest else written
        loaded = checkpoint.load(path)
        assert loaded["global_step"] in (written, written + 1)
        assert bool((loaded["state_dict"]["denoiser.w"] == loaded["global_step"]).all())


def test_a_failed_write_leaves_the_old_file_and_no_other(file: Path):
    before = file.read_bytes()

    def fail(handle):
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomic(file, fail)
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 2
