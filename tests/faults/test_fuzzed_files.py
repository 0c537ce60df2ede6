"""Readers of files that were changed at random: they read, or say in a line why not; no other error comes out."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import denoiselab
import mutants
from denoiselab import checkpoint
from denoiselab.compose import compose, read_job, write_job
from denoiselab.errors import CheckpointError, UserError
from denoiselab.exchange.files import read_tensors
from denoiselab.launcher.queue import read_submission
from denoiselab.report import write_report
from denoiselab.rows import rows
from denoiselab.run_folder import RunFolder
from denoiselab.status import standings, table
from runs import POINTS, trained
from test_report import make_run

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("good")) / "checkpoints" / "last.ckpt"


def outcome(read: Callable[[], object]) -> str:
    """read, refused, or what else happened."""
    try:
        read()
    except UserError as error:
        return "refused" if "\n" not in str(error) and str(error) else "refused, but not in a line"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "read"


def only(found: Counter[str], *allowed: str) -> None:
    assert {what: n for what, n in found.items() if what not in allowed} == {}
    assert all(found[what] for what in allowed), found


def test_a_checkpoint_of_changed_bytes(good: Path, tmp_path: Path, faults):
    """A thousand: with the sha256 of what was written none is read; without it, some are, whose tensors differ."""
    whole, rng = good.read_bytes(), random.Random(0)
    path = tmp_path / "last.ckpt"
    shutil.copy(good, path)
    sums = path.with_name("last.ckpt.sha256")
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for k in range(1000):
        while (mutant := mutants.of_bytes(whole, rng)) == whole:
            pass
        path.write_bytes(mutant)
        verified = k % 2 == 0
        if verified:
            shutil.copyfile(good.with_name("last.ckpt.sha256"), sums)
        else:
            sums.unlink(missing_ok=True)
        found[verified][outcome(lambda: checkpoint.load(path))] += 1
    only(found[True], "refused")
    only(found[False], "refused", "read")
    faults.injected("file", 1000)


def repacked(good: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    with zipfile.ZipFile(good) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    yield next(name for name in parts if name.endswith("/data.pkl")), parts


def test_a_pickle_of_changed_bytes_in_a_whole_archive(good: Path, tmp_path: Path, faults):
    """Which the sums of the archive do not tell: what the pickle says is up to whoever wrote it."""
    ((inside, parts),) = repacked(good)
    rng, path, found = random.Random(1), tmp_path / "last.ckpt", Counter()
    for _ in range(400):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, mutants.of_bytes(content, rng) if name == inside else content)
        found[outcome(lambda: checkpoint.load(path))] += 1
        found[outcome(lambda: read_tensors(path))] += 1
    only(found, "refused", "read")
    faults.injected("file", 400)


def written(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path


def test_what_a_checkpoint_says_of_itself(good: Path, tmp_path: Path, faults):
    """Values of its configuration, its interface and the rest of its record."""
    whole, rng, found = checkpoint.load(good), random.Random(2), Counter()
    config = yaml.safe_load(whole["denoiselab"]["config"])
    for group in ("callbacks", "diagnostics", "metrics", "logger", "launcher", "sweeper", "trainer", "optimizer"):
        config.pop(group)  # of which nothing is read here
    for k in range(200):
        content = {**whole, "denoiselab": dict(whole["denoiselab"])}
        if k % 2:
            told = yaml.dump(mutants.of_values(config, rng), allow_unicode=True)
            content["denoiselab"]["config"] = told.encode(errors="replace").decode()
        else:
            told = {name: value for name, value in whole["denoiselab"].items() if name != "config"}
            changed = mutants.of_values(told, rng)
            content["denoiselab"] = {**changed, "config": whole["denoiselab"]["config"]}
        file = written(tmp_path / "last.ckpt", content)
        found[outcome(lambda file=file: denoiselab.load(file))] += 1
    only(found, "refused", "read")
    faults.injected("file", 200)


def test_an_export_of_changed_values(good: Path, tmp_path: Path, called, faults):
    assert called("export", f"ckpt={good}", "format=safetensors", f"output={tmp_path / 'net'}").returncode == 0
    file, weights = tmp_path / "net" / "config.json", tmp_path / "net" / "model.safetensors"
    whole, bytes_, rng, found = json.loads(file.read_text()), weights.read_bytes(), random.Random(3), Counter()
    for k in range(150):
        file.write_text(json.dumps(mutants.of_values(whole, rng) if k % 3 else whole))
        weights.write_bytes(bytes_ if k % 3 else mutants.of_bytes(bytes_, rng))
        found[outcome(lambda: denoiselab.load(tmp_path / "net"))] += 1
    only(found, "refused", "read")
    faults.injected("file", 150)


def job_file(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    write_job(compose("train", POINTS), folder / "job.json")
    return folder / "job.json"


def test_small_files_of_a_run(tmp_path: Path, faults):
    """Jobs, locks, records, what was submitted: read where a command goes on with what another one left."""
    rng, found = random.Random(4), Counter()
    job = job_file(tmp_path / "jobs")
    run = RunFolder(make_run(tmp_path / "run"), {})
    submission = tmp_path / "job.slurm"
    submission.write_text(json.dumps({"run": "a", "token": "b", "index": 0, "job": "1"}))
    (run.path / "run.lock").write_text(json.dumps({"host": "here", "pid": 1, "slurm": {"job": "1", "restart": 0}}))
    readers = {
        job: lambda: read_job(job),
        submission: lambda: read_submission(submission),
        run.path / "status.json": run.read_status,
        run.path / "record.json": run.revision,
        run.path / "metrics.jsonl": lambda: rows(run.path / "metrics.jsonl"),
        run.path / "run.lock": lambda: queue_over(run.path / "run.lock"),
    }
    for file, read in readers.items():
        whole = file.read_bytes()
        for k in range(60):
            if k % 2 and file.suffix != ".jsonl":
                file.write_text(json.dumps(mutants.of_values(json.loads(whole), rng)))
            else:
                file.write_bytes(mutants.of_bytes(whole, rng))
            found[outcome(read)] += 1
    only(found, "refused", "read")
    faults.injected("file", 60 * len(readers))


def queue_over(lock: Path) -> None:
    """A lock is taken over, or its holder named."""
    from denoiselab.errors import RunHeld

    folder = RunFolder(lock.parent, {})
    try:
        folder._take_over(lock)
    except RunHeld as error:
        raise UserError(str(error)) from None


def changed_run(run: Path, rng: random.Random) -> int:
    """Of every second file of a run; how many."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and rng.random() < 0.5]
    for path in files:
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(mutants.of_values(json.loads(path.read_text()), rng)))
        else:
            path.write_bytes(mutants.of_bytes(path.read_bytes(), rng))
    return len(files)


def look_at(tmp_path: Path, seeds: range) -> tuple[int, Counter[str]]:
    """Status and report of three runs, the files of two of them changed."""
    runs, changed, found = tmp_path / "runs", 0, Counter()
    for seed in seeds:
        shutil.rmtree(runs, ignore_errors=True)
        for k, schedule in enumerate(("Cosine", "Linear", "Linear")):
            make_run(runs / f"{schedule}{k}", k % 2, schedule, {1.0: 2.0 + k, 3.0: 1.0 + k}, steps=500)
        for run in [*runs.iterdir()][:2]:
            changed += changed_run(run, random.Random(seed))
        found[outcome(lambda: table(standings(runs)))] += 1
        page = tmp_path / "page.html"
        told = outcome(lambda page=page: write_report(runs, page))
        found[told if told == "read" else f"seed {seed}: {told}"] += 1
        assert told != "read" or page.read_text().rstrip().endswith("</html>")
        page.unlink(missing_ok=True)
    return changed, found


def test_a_report_of_changed_files(tmp_path: Path, faults):
    changed, found = look_at(tmp_path, range(12))
    assert set(found) == {"read"}
    faults.injected("file", changed)


@pytest.mark.slow
def test_reports_of_many_changed_files(tmp_path: Path, faults):
    changed, found = look_at(tmp_path, range(100, 220))
    assert set(found) == {"read"}
    faults.injected("file", changed)


def test_an_error_of_another_kind_is_seen():
    """The negative control: what a reader must not let out is told apart from what it may say."""

    def reads() -> None:
        raise KeyError("shape")

    def says() -> None:
        raise CheckpointError("two\nlines")

    assert outcome(reads).startswith("KeyError")
    assert outcome(says) == "refused, but not in a line"
    with pytest.raises(AssertionError):
        only(Counter({"refused": 3, outcome(reads): 1}), "refused")
