"""A run that is killed while it writes its files: nothing is torn, nothing half done is read, nothing is lost."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from boundaries import Boundary
from continued import FULL, at, done, killed, newest, run_in, same
from denoiselab import checkpoint, load, trainer
from ledger import Faults
from runs import POINTS, differences, last
from traps import Changed
from warm import Warm

pytestmark = pytest.mark.faults

SAVING = (
    *(*FULL, "lr_schedule=constant", "lr_schedule.warmup=10", "trainer.checkpoint_every=9", "trainer.log_every=9"),
    "callbacks.buckets.every=9",
)
FIRST, KILLED, LAST = 18, 27, 36
"""Steps: to where all that a run keeps is there, whose save a kill is in, and at the end."""
UNSAFE = {"chmod", "close", "create", "fsync", "open", "replace", "write"}
"""Kinds of calls of a save."""


def to(steps: int) -> tuple[str, ...]:
    return (*SAVING, f"trainer.max_steps={steps}")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has last.ckpt, previous.ckpt and best.ckpt."""
    folder = tmp_path_factory.mktemp("base") / "run"
    killed(Faults(), folder, *to(LAST), traps=[at("denoiselab.module:Diffusion.training_step", FIRST + 1)])
    return folder


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return done(tmp_path_factory.mktemp("whole") / "run", *to(LAST))


@pytest.fixture(scope="module")
def calls(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The calls of a run's first save after the base, of best.ckpt and last.ckpt, and the first of the next save."""
    folder = tmp_path_factory.mktemp("calls")
    copy = shutil.copytree(base, folder / "run")
    done(copy, *to(LAST), traps=[Boundary("checkpoints", listed=folder / "calls")])
    found = (folder / "calls").read_text().splitlines()
    return found[: found.index("replace /new.ckpt.sha256") + 2]


def goes_on(faults: Faults, whole: Path, folder: Path, *options: str) -> None:
    """What a kill left is whole, is of before or after the save, and is gone on from."""
    run = run_in(folder)
    assert newest(run)["global_step"] in (FIRST, KILLED)
    assert checkpoint.load(run / "checkpoints" / "best.ckpt")["global_step"] in (FIRST, KILLED)
    assert load(run).step in (FIRST, KILLED)
    same(faults, whole, done(folder, *options))


def test_a_save_is_what_it_is_thought_to_be(calls: list[str]):
    """The calls, so that none is passed over by the kills that are numbered after them."""
    kinds = [call.partition(" ")[0] for call in calls]
    assert set(kinds) == UNSAFE
    for name in ("best.ckpt", "new.ckpt"):
        for file in (name, f"{name}.sha256"):
            mine = re.compile(rf"(\w+) /\.{file}\.(\w*\.tmp)?$")
            own = [found[1] for call in calls[:-1] if (found := mine.match(call))]
            writes = ["write"] * (len(own) - 5)
            assert own == ["create", "open", *writes, "fsync", "chmod", "replace"]
            assert len(writes) >= (1 if file.endswith("sha256") else 3)
    moves = [call for call in calls if call.startswith(("replace /last", "replace /new"))]
    assert moves == [f"replace /{name}.ckpt{end}" for name in ("last", "new") for end in ("", ".sha256")]


MOST, PARTS = 100, 14
"""Calls of a save, at most, and tests that they are shared out to."""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_kill_before_every_call_of_a_save(
    part: int, calls: list[str], base: Path, whole: Path, tmp_path: Path, faults: Faults
):
    """Each of so many parts of them; in writes, also when half is written."""
    assert len(calls) < MOST
    for number in range(part + 1, len(calls) + 1, PARTS):
        for half in (False, True)[: 1 + calls[number - 1].startswith("write")]:
            folder = tmp_path / f"{number}{'half' if half else ''}"
            shutil.copytree(base, folder)
            killed(faults, folder, *to(LAST), traps=[Boundary("checkpoints", number, half)])
            goes_on(faults, whole, folder, *to(LAST))


TELLING = ("write /.new.ckpt.", "replace /.best.ckpt.", "replace /new.ckpt")
"""A torn file; the best weights kept, but not the run; the last checkpoint gone."""


@pytest.mark.parametrize("call", TELLING)
def test_a_kill_in_a_save(call: str, calls: list[str], base: Path, whole: Path, tmp_path: Path, faults: Faults):
    folder = tmp_path / "run"
    shutil.copytree(base, folder)
    number = next(k for k, found in enumerate(calls, 1) if found.startswith(call))
    killed(faults, folder, *to(LAST), traps=[Boundary("checkpoints", number, half=call.startswith("write"))])
    left = {path.name for path in run_in(folder).glob("checkpoints/.*.tmp")}
    assert bool(left) == ("/." in call)
    goes_on(faults, whole, folder, *to(LAST))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_a_kill_in_the_moves_of_the_last_save(
    number: int, base: Path, whole: Path, calls: list[str], tmp_path: Path, faults: Faults
):
    """No other save follows, that would finish them: the command finds training done, and finishes them."""
    folder = tmp_path / "run"
    shutil.copytree(base, folder)
    moves = [k for k, call in enumerate(calls, 1) if call.startswith(("replace /last", "replace /new"))]
    killed(faults, folder, *to(KILLED), traps=[Boundary("checkpoints", moves[number])])
    run = done(folder, *to(KILLED))
    assert last(run)["global_step"] == KILLED
    stamps = {path.name: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
    assert set(stamps) == {f"{name}.ckpt{end}" for name in ("last", "previous", "best") for end in ("", ".sha256")}
    assert all(stamps[f"{name}.sha256"] >= stamps[name] for name in stamps if name.endswith(".ckpt"))
    faults.same(last(whole), last(done(folder, *to(LAST))))


def test_a_leftover_is_removed_and_never_read(base: Path, whole: Path, tmp_path: Path):
    """Not even one that is a whole checkpoint, of a later step."""
    folder = tmp_path / "run"
    shutil.copytree(base, folder)
    left = run_in(folder) / "checkpoints" / ".new.ckpt.abc.tmp"
    content = last(whole)
    content["state_dict"] = {key: value + 1 for key, value in content["state_dict"].items()}
    torch.save(content, left)
    (run_in(folder) / ".status.json.abc.tmp").write_text("{")
    process = Warm(folder, "train", *to(LAST))
    assert process.wait() == 0
    assert f"continuing at step {FIRST} of" in process.said
    same(Faults(), whole, run_in(folder))


def test_a_file_that_another_rank_renames_is_looked_for_again(base: Path, tmp_path: Path, monkeypatch):
    """Ranks that torchrun starts look for the newest file while rank 0 may finish moves that a kill left half done."""
    folder = Path(shutil.copytree(run_in(base) / "checkpoints", tmp_path / "checkpoints"))
    for end in ("", ".sha256"):
        (folder / f"last.ckpt{end}").rename(folder / f"new.ckpt{end}")
    (folder / "broken.ckpt").symlink_to("nowhere")  # is there, and stays
    read, warnings = checkpoint.load, []

    def moved(path: Path):
        if path.name == "new.ckpt":
            checkpoint.rotate(folder)
        return read(path)

    monkeypatch.setattr(checkpoint, "load", moved)
    (folder / "best.ckpt").unlink()
    found = checkpoint.newest(folder, warnings.append)
    assert found is not None
    assert (found[0].name, found[1]["global_step"]) == ("last.ckpt", FIRST)
    assert {warning.partition(":")[2].split(":")[0].rpartition("/")[2] for warning in warnings} == {"broken.ckpt"}


def _torn(write):
    """A write of which half arrives, and no more happens."""

    def torn(self, text):
        write(self, text[: len(text) // 2])
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return torn


class _Torn:
    """A file whose fifth line is torn."""

    def __init__(self, file):
        self.file, self.lines = file, 0

    def write(self, text):
        self.lines += 1
        if self.lines == 5:
            _torn(type(self.file).write)(self.file, text)
        return self.file.write(text)

    def __getattr__(self, name):
        return getattr(self.file, name)


def _torn_rows(make):
    """The property of JsonLines that gives the file."""
    wrapped = cache(_Torn)
    return property(lambda self: wrapped(make.fget(self)))


PICTURES = (
    *(option for option in SAVING if option != "~callbacks.sample_grid"),
    *(f"trainer.max_steps={LAST}", "callbacks.sample_grid.n=8", f"callbacks.sample_grid.every={FIRST}"),
)

OTHERS: dict[str, Boundary | Changed] = {
    "a line of metrics.jsonl": Changed("denoiselab.loggers.json_lines:JsonLines.experiment", _torn_rows),
    **{
        f"{name}, {when}": Boundary(f"/.{name}.", call, half)
        for name in ("status.json", "record.json", "identity.json", "config.yaml", "metrics.jsonl", "metrics.csv")
        for when, call, half in (("not begun", 1, False), ("torn", 2, True), ("not renamed", 5, False))
    },
    **{
        f"{name}, {when}": Boundary(f"/.{name}.", call, half)
        for name in ("evaluation.json", "evaluations.csv", f"sample_grid_{FIRST:08d}.png", "samples.png")
        for when, call, half in (("torn", 2, True), ("not renamed", 5, False))
    },
}
QUICK = ("a line of metrics.jsonl", "status.json, torn")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return done(tmp_path_factory.mktemp("pictured") / "run", *PICTURES)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_a_kill_while_another_file_is_written(name: str, pictured: Path, tmp_path: Path, faults: Faults):
    killed(faults, tmp_path / "run", *PICTURES, traps=[OTHERS[name]])
    same(faults, pictured, done(tmp_path / "run", *PICTURES))


LARGE = (
    *("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=640", "model.depth=3"),
    *(*POINTS[6:9], "evaluation.n=2", "sampler.steps=1", "lint.level=none", "data.workers=0"),
)
ELSEWHERE = Path("/dev/shm")
"""Another file system, for temporary files."""


@dataclass(frozen=True)
class Within:
    """A kill in the second save of a process, at a time that is a part of what the first took."""

    part: float

    def set(self) -> None:
        save, took = trainer._save, list[float]()

        def timed(content: dict[str, Any], path: Path) -> None:
            if took:
                threading.Timer(self.part * took[0], os.kill, (os.getpid(), signal.SIGKILL)).start()
            begin = time.monotonic()
            save(content, path)
            took.append(time.monotonic() - begin)

        trainer._save = timed


@pytest.mark.slow
@pytest.mark.skipif(not ELSEWHERE.is_dir(), reason="needs a second file system, /dev/shm")
def test_thirty_kills_while_a_large_checkpoint_is_written(tmp_path: Path, faults: Faults):
    """At random instants of one run that saves after each step."""
    assert tmp_path.stat().st_dev != ELSEWHERE.stat().st_dev
    rng, folder, before, writing = random.Random(5), tmp_path / "run", 0, 0
    every = (*LARGE, "trainer.checkpoint_every=1", "trainer.max_steps=100000")
    for _ in range(30):
        killed(faults, folder, *every, traps=[Within(rng.uniform(0, 1.2))], variables={"TMPDIR": str(ELSEWHERE)})
        run = run_in(folder)
        writing += bool([*run.glob("checkpoints/.*.tmp")])
        assert max(path.stat().st_size for path in run.glob("checkpoints/*.ckpt")) > 30_000_000
        step = newest(run)["global_step"]
        assert before < step <= before + 3
        before = step
    assert writing >= 5  # a torn file was there, and the one before was taken
    end = (*LARGE, f"trainer.max_steps={before + 1}")
    run, whole = done(folder, *end), done(tmp_path / "whole", *end)
    faults.same(last(whole), last(run))
    assert differences(last(whole), checkpoint.load(run / "checkpoints" / "previous.ckpt"))
    assert not [*run.glob("checkpoints/.*.tmp")]
