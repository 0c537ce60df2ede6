"""Every call by which a command writes a file fails once, with each error that a disk has: nothing is lost, no file is
left half-written, and the same command then ends as if nothing had been."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

import denoiselab.cli
from denoiselab import checkpoint
from denoiselab.rows import rows
from failing import READING, WRITING, Calls
from runs import POINTS

pytestmark = pytest.mark.faults

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS)
TRAIN = (*POINTS, "trainer.checkpoint_every=2", "trainer.log_every=1")
PICTURES = (
    "callbacks=default",
    "callbacks.guidance_sweep=null",
    "callbacks.sample_grid.n=4",
    "callbacks.buckets.every=2",
)
CLEAN = {0: "done", 2: "a mistake in what was asked", 74: "a file cannot be read or written"}


class Said(NamedTuple):
    status: int
    lines: list[str]


class Bench:
    """Commands on one folder, run in this process; composing, which writes nothing, is done once for each."""

    def __init__(self, base: Path, capsys: pytest.CaptureFixture[str]):
        self.base, self.capsys = base, capsys
        self.output = base / "o"

    def __call__(self, command: str, *options: str) -> Said:
        self.capsys.readouterr()
        status = denoiselab.cli.run([command, *options])
        return Said(status, self.capsys.readouterr().err.splitlines())

    def train(self, *options: str) -> Said:
        return self("train", *TRAIN, f"output_dir={self.output}", *options)

    @property
    def run(self) -> Path:
        (folder,) = (path for path in self.output.glob("runs/*") if path.name != ".jobs")
        return folder

    def clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    import denoiselab.cli.evaluate
    import denoiselab.cli.sample
    import denoiselab.cli.train
    from denoiselab.compose import compose

    known: dict[Any, Any] = {}

    def once(app: str, overrides: list[str], *more: Any) -> Any:
        key = (app, *overrides)
        known[key] = known.get(key) or compose(app, overrides, *more)
        return copy.deepcopy(known[key])

    for module in (denoiselab.cli.train, denoiselab.cli.sample, denoiselab.cli.evaluate):
        monkeypatch.setattr(module, "compose", once)
    for module in ("denoiselab.evaluation", "denoiselab.callbacks.samples"):
        monkeypatch.setattr(f"{module}.panels", lambda *_, **__: Image.new("RGB", (64, 64)))
    monkeypatch.setattr("signal.signal", lambda *_: None)  # handlers stay those of pytest
    return Bench(tmp_path, capsys)


def whole_files(folder: Path) -> None:
    """Nothing under its final name is less than a whole file; what has a hidden name is not read by anybody."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix == ".ckpt":
            checkpoint.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines()[:-1])
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n")
        elif path.suffix == ".sha256":
            assert len(path.read_text().strip()) == 64


def clean(said: Said, calls: Calls, command: str) -> None:
    """It went on with a warning, or ended with a line and a status that is documented; both name the reason."""
    assert said.status in CLEAN, said
    reason = os.strerror(calls.number)
    assert not any("Traceback" in line for line in said.lines), said
    assert sum(line.startswith(f"denoiselab {command}: ") for line in said.lines) == (said.status != 0), said
    if said.status:
        assert said.lines[-1].startswith(f"denoiselab {command}: "), said
        assert reason in said.lines[-1], said
    else:
        assert any(reason in line for line in said.lines), said


def made(folder: Path) -> dict[str, Any]:
    """All that a run leaves which does not depend on the clock."""
    timed = ("speed/", "diagnostics/")
    numbers = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows(folder / "metrics.jsonl")]
    evaluations = [json.loads(file.read_text()) for file in sorted(folder.glob("evaluations/*/evaluation.json"))]
    status = json.loads((folder / "status.json").read_text())
    return {
        "rows": numbers,
        "evaluations": [{key: found[key] for key in ("protocol", "records", "buckets")} for found in evaluations],
        "status": {key: status[key] for key in ("state", "step", "max_steps", "error", "evaluated")},
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if _final(path)),
        "identity": (folder / "identity.json").read_text(),
    }


def _final(path: Path) -> bool:
    """Where a save was left out, the one before it may not be there."""
    return (
        path.is_file()
        and not path.name.startswith((".", "previous."))
        and path.parent.name not in ("pictures", "diagnostics")
    )


def plans(count: int, seed: int, n: int | None, always: bool = True) -> list[tuple[int, int, bool]]:
    """Which call fails, with what, and whether all that follow do: each call once, or a sample of them."""
    draw = random.Random(seed)
    found = [(at, ERRORS[(at + seed) % len(ERRORS)], always and draw.random() < 0.3) for at in range(count)]
    return found if n is None else sorted(draw.sample(found, min(n, count)))


def train_with_failing_calls(bench: Bench, faults: Any, n: int | None, *options: str, seed: int = 0) -> int:
    """Each call of a training fails in turn; how many did."""
    with Calls(bench.output).counted() as healthy:
        assert bench.train(*options).status == 0
    whole, expected = checkpoint.load(bench.run / "checkpoints" / "last.ckpt"), made(bench.run)
    chosen = plans(len(healthy.done), seed, n)
    for at, number, always in chosen:
        bench.clear()
        with Calls(bench.output, at=at, number=number, always=always).counted() as calls:
            said = bench.train(*options)
        assert calls.failed
        try:
            clean(said, calls, "train")
            whole_files(bench.output)
            assert bench.train(*options).status == 0
            faults.same(whole, checkpoint.load(bench.run / "checkpoints" / "last.ckpt"))
            assert made(bench.run) == expected
        except BaseException as error:
            error.add_note(
                f"call {at} {calls.failed[0]}, {errno.errorcode[number]}, {'and all after' * always}: {said}"
            )
            raise
    faults.injected("call", len(chosen))
    return len(chosen)


def test_calls_of_a_training_that_fail_lose_nothing(bench: Bench, faults: Any):
    train_with_failing_calls(bench, faults, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_every_call_of_a_training_that_fails_loses_nothing(bench: Bench, faults: Any, seed: int):
    assert train_with_failing_calls(bench, faults, None, f"seed={seed}", seed=seed) > 100


@pytest.mark.slow
def test_every_call_of_a_training_with_pictures_that_fails_loses_nothing(bench: Bench, faults: Any):
    train_with_failing_calls(bench, faults, 60, *PICTURES, seed=3)


def test_the_comparison_sees_a_row_and_a_file_that_are_lost(bench: Bench):
    assert bench.train().status == 0
    expected = made(bench.run)
    metrics = bench.run / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text("".join(text.splitlines(keepends=True)[1:]))
    assert made(bench.run) != expected
    metrics.write_text(text)
    assert made(bench.run) == expected
    (bench.run / "evaluations.csv").unlink()
    assert made(bench.run) != expected
    last = bench.run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(denoiselab.errors.CheckpointError):
        whole_files(bench.output)


def test_an_error_that_nobody_handles_would_be_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """A plain write in the place of the atomic one leaves half a file; and an error of another kind is a traceback."""
    monkeypatch.setattr(
        "denoiselab.run_folder.write_text", lambda path, text: Path(path).write_text(text[: len(text) // 2])
    )
    bench.train()
    with pytest.raises((ValueError, AssertionError)):
        whole_files(bench.output)
    monkeypatch.setattr("denoiselab.run_folder.write_text", lambda path, text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.train("seed=5")


def others(bench: Bench) -> dict[str, tuple[tuple[str, ...], Callable[[], Any]]]:
    """Commands on a trained run: what is asked, and what must be the same in the end."""
    run, out = bench.run, bench.output / "made"

    def evaluation() -> Any:
        return [
            {key: json.loads(file.read_text())[key] for key in ("protocol", "records")}
            for file in sorted(run.glob("evaluations/*/evaluation.json"))
        ]

    def files(*names: str) -> Callable[[], Any]:
        return lambda: {name: (out / name).read_bytes() for name in names}

    point = ("device=cpu", f"ckpt={run}")
    return {
        "evaluate": ((*point, "evaluation.seed=7", "metrics=none"), evaluation),
        "sample": ((*point, "n=4", "sampler.steps=1", f"output={out}"), files("samples.npy")),
        "export": (
            (f"ckpt={run}", "format=safetensors", f"output={out}"),
            lambda: sorted(path.name for path in out.iterdir()),
        ),
        "report": ((str(run), f"output={out / 'report.html'}"), files("report.csv", "report.md", "report.tex")),
    }


def fail_in(bench: Bench, faults: Any, n: int | None, command: str, kinds: tuple[str, ...] = WRITING) -> None:
    assert bench.train().status == 0
    kept = bench.base / "kept"
    shutil.copytree(bench.output, kept)

    def fresh() -> None:
        bench.clear()
        shutil.copytree(kept, bench.output)

    options, result = others(bench)[command]
    with Calls(bench.output, kinds).counted() as healthy:
        assert bench(command, *options).status == 0
    expected, chosen = result(), plans(len(healthy.done), 4, n)
    assert chosen
    for at, number, always in chosen:
        fresh()
        with Calls(bench.output, kinds, at, number, always).counted() as calls:
            said = bench(command, *options)
        assert calls.failed
        try:
            clean(said, calls, command)
            whole_files(bench.output)
            assert bench(command, *options).status == 0
            assert result() == expected
        except BaseException as error:
            error.add_note(
                f"call {at} {calls.failed[0]}, {errno.errorcode[number]}, {'and all after' * always}: {said}"
            )
            raise
    faults.injected("call", len(chosen))


@pytest.mark.parametrize("command", ["evaluate", "sample", "export", "report"])
def test_calls_of_other_commands_that_fail_leave_no_half_file(bench: Bench, faults: Any, command: str):
    fail_in(bench, faults, 3, command)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "sample", "export", "report"])
def test_every_call_of_other_commands_that_fails_leaves_no_half_file(bench: Bench, faults: Any, command: str):
    fail_in(bench, faults, None, command)


def read_with_failing_calls(bench: Bench, faults: Any, n: int) -> None:
    """A run that goes on reads what it left; each read fails in turn."""
    assert bench.train("trainer.max_steps=2").status == 0
    kept = bench.base / "kept"
    shutil.copytree(bench.output, kept)
    with Calls(bench.output, READING).counted() as healthy:
        assert bench.train().status == 0
    whole, expected = checkpoint.load(bench.run / "checkpoints" / "last.ckpt"), made(bench.run)
    first = [next(i for i, call in enumerate(healthy.done) if call == one) for one in dict.fromkeys(healthy.done)]
    draw = random.Random(6)
    chosen = sorted({*first[:n], *draw.sample(range(len(healthy.done)), min(n, len(healthy.done)))})[: 2 * n]
    for at, number in zip(chosen, itertools.cycle((errno.EIO, errno.EACCES, errno.ESTALE))):
        bench.clear()
        shutil.copytree(kept, bench.output)
        with Calls(bench.output, READING, at, number).counted() as calls:
            said = bench.train()
        assert calls.failed
        try:
            assert said.status in CLEAN
            assert not any("Traceback" in line for line in said.lines)
            whole_files(bench.output)
            assert bench.train().status == 0
            faults.same(whole, checkpoint.load(bench.run / "checkpoints" / "last.ckpt"))
            found = made(bench.run)
            assert {k: v for k, v in found.items() if k != "rows"} == {k: v for k, v in expected.items() if k != "rows"}
            assert found["rows"] == expected["rows"]
        except BaseException as error:
            error.add_note(f"call {at} {calls.failed[0]}, {errno.errorcode[number]}: {said}")
            raise
    faults.injected("call", len(chosen))


def test_reading_what_a_run_left_may_fail(bench: Bench, faults: Any):
    read_with_failing_calls(bench, faults, 6)


@pytest.mark.slow
def test_reading_what_a_run_left_may_fail_anywhere(bench: Bench, faults: Any):
    read_with_failing_calls(bench, faults, 40)
