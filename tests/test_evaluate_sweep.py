"""Evaluations as sweeps: planned before the first starts, made once each, reported as arms."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from denoiselab import measuring
from denoiselab.cli import run as command_line
from denoiselab.cli.evaluate import _quoted, spread_out
from denoiselab.compose import compose, plain, sweep, value_of
from denoiselab.errors import UserError
from denoiselab.evaluation import folder_of
from denoiselab.launcher import Local
from denoiselab.outline import outline
from denoiselab.report.arms import tabulate
from denoiselab.report.runs import find, read
from denoiselab.run import load
from runs import trained

FEW = ("evaluation.n=20", "sampler.steps=2", "device=cpu", "lint.level=none")

MINE = """
import os
from denoiselab.guidance import CFG

class Mine(CFG):
    def outputs(self, x_t, alpha_t, sigma_t, **cond):
        if self.scale == 3 and os.environ.get("FAILS"):
            if os.environ["FAILS"] == "hard":
                os.kill(os.getpid(), 9)
            raise RuntimeError("no more memory")
        return super().outputs(x_t, alpha_t, sigma_t, **cond)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A study of two seeds, measured after training with metrics of its own."""
    folder = tmp_path_factory.mktemp("made")
    for seed in (0, 1):
        trained(folder, f"seed={seed}", "metrics=points", "evaluation.n=20")
    return folder / "runs"


@pytest.fixture
def study(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, and an option of one's own beside it."""
    (tmp_path / "mine" / "guidance").mkdir(parents=True)
    (tmp_path / "mine" / "guided_by_me.py").write_text(MINE)
    option = "_target_: guided_by_me.Mine\n_partial_: true\nscale: 1.0\n"
    (tmp_path / "mine" / "guidance" / "mine.yaml").write_text(option)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return Path(shutil.copytree(made, tmp_path / "study"))


@pytest.fixture
def inside(monkeypatch) -> list[list[str]]:
    """Tasks are done in this process, which is sooner; their arguments."""
    started = []

    def start(self, tasks):
        started.extend(task.arguments for task in tasks)
        return [command_line([*task.arguments]) for task in tasks]

    monkeypatch.setattr(Local, "start", start)
    monkeypatch.setattr(Local, "poll", lambda self, handle: handle)
    return started


def evaluations(folder: Path) -> dict[Path, str]:
    """Every evaluation of the runs in a folder, and a hash of it."""
    files = folder.glob("*/evaluations/*/evaluation.json")
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def protocol(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["protocol"]


def test_a_folder_of_runs_is_measured_once_and_is_arms_of_the_report(study: Path, inside, called, monkeypatch):
    before = evaluations(study)
    asked = ("evaluate", "-m", "sampler=ddim,heun", "guidance.scale=2", *FEW, f"ckpt={study}")
    first = called(*asked)
    assert first.returncode == 0, first.stderr
    assert len(inside) == 4
    assert first.stderr.splitlines()[0] == "4 of 4 evaluations to make"
    assert first.stderr.splitlines()[-1] == "4 of 4 evaluations done"
    new = {file: content for file, content in evaluations(study).items() if file not in before}
    assert sorted(first.stdout.split()) == sorted(str(file.parent) for file in new)
    settings = [(protocol(f)["sampler"]["_target_"], protocol(f)["guidance"]["scale"]) for f in new]
    assert len(settings) == 2 * len({*settings}) == 4

    table = tabulate([read(run, study) for run in find(study)])
    assert table.axes == ["sampler", "spacing", "guidance.scale"]  # sampler=heun brings spacing=karras
    assert len(table.arms) == 3
    assert all(arm.seeds == 2 and arm.cells["mmd2"].mean is not None for arm in table.arms)
    told = sorted([*arm.axes.values()] for arm in table.arms)
    assert told == [["DDIM steps=1", "Trailing", "1"], ["DDIM steps=2", "Trailing", "2"], ["Heun", "Karras", "2"]]

    monkeypatch.setattr("denoiselab.run.load", lambda *a: pytest.fail("a network was loaded"))
    monkeypatch.setattr("denoiselab.outline.load", lambda *a: pytest.fail("a network was loaded"))
    times = {file: file.stat().st_mtime_ns for file in new}
    again = called(*asked)
    assert again.returncode == 0
    assert again.stdout.split() == first.stdout.split()
    assert again.stderr.count("measured before") == 4
    assert len(inside) == 4
    assert times == {file: file.stat().st_mtime_ns for file in new}


MISTAKES = {
    ("sampler.steps=2,0",): "sampler.steps=0: need at least 1",
    ("metrics.mmd.bandwidhts=[1],[2]",): "no option 'bandwidhts' here",
    ("guidance.scale=1,nan",): "guidance.scale=nan: need a finite number",
    ("evaluation.n=20,1",): "evaluation.n=1: metrics.mmd needs at least",
    ("device=cpu,gpu",): "device=gpu: need one of auto, cpu, cuda",
    ("device=auto,cpu",): "device=auto and device=cpu: this axis has no effect; both make ",
    ("sampler.steps=2,3", "schedule=linear", "lint.level=error"): "lint.schedule",
}


@pytest.mark.parametrize("options", MISTAKES, ids=" ".join)
def test_a_mistake_in_the_last_one_is_found_before_the_first_starts(options, study: Path, inside, called):
    files = sorted(study.rglob("*"))
    own = [line for line in FEW if not {line.partition("=")[0]} & {one.partition("=")[0] for one in options}]
    result = called("evaluate", "-m", f"ckpt={find(study)[0]}", *own, *options)
    assert result.returncode == 2
    assert MISTAKES[options] in result.stderr
    assert result.stderr.count("\n") == 1
    assert not inside
    assert sorted(study.rglob("*")) == files


def test_one_that_fails_stops_no_other_and_is_tried_again_when_asked(study: Path, inside, called, monkeypatch):
    options = ("guidance=mine", "guidance.scale=2,3,4", *FEW)
    asked = ("evaluate", "-m", "--config-dir", str(study.parent / "mine"), f"ckpt={find(study)[0]}", *options)
    before = evaluations(study)
    monkeypatch.setenv("FAILS", "softly")

    with pytest.raises(RuntimeError, match="no more memory"):
        called(*asked, "sweep.fail_fast=true")  # in this process an error that is not foreseen goes all the way
    monkeypatch.setattr(Local, "start", lambda self, tasks: [tried(task.arguments) for task in tasks])
    shutil.rmtree(find(study)[0] / "evaluations")
    result = called(*asked)
    assert result.returncode == 1
    assert "2 of 3 evaluations done" in result.stderr
    assert result.stderr.splitlines()[-1] == "failed: guidance.scale=3: RuntimeError: no more memory"
    kept = evaluations(study)
    assert len(kept.keys() - before.keys()) == 2
    again = called(*asked)
    assert again.returncode == 1
    assert "it failed before; sweep.retry=true tries again" in again.stderr.splitlines()[-1]
    monkeypatch.delenv("FAILS")
    assert called(*asked, "sweep.retry=true").returncode == 0
    assert len(evaluations(study).keys() - kept.keys()) == 1
    assert kept.items() <= evaluations(study).items()
    assert not [*study.glob("*/evaluations/*/failed.json")]


def tried(arguments: list[str]) -> int:
    try:
        return command_line([*arguments])
    except RuntimeError:
        return 1


def test_a_process_that_dies_hard_takes_nothing_with_it(study: Path, command):
    """Real processes, two at a time."""
    options = ("guidance=mine", "guidance.scale=2,3", "launcher.jobs=2", *FEW)
    asked = ("evaluate", "-m", "--config-dir", str(study.parent / "mine"), f"ckpt={find(study)[0]}", *options)
    before = evaluations(study)
    result = command(*asked, FAILS="hard", timeout=300)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"failed: guidance.scale=3: killed by signal {int(signal.SIGKILL)}"
    (new,) = evaluations(study).keys() - before.keys()
    assert protocol(new)["guidance"]["scale"] == 2
    assert result.stdout.split() == [str(new.parent)]


def test_measuring_again_is_done_once_and_the_old_result_stays_until_then(study: Path, inside, called, monkeypatch):
    run = find(study)[0]
    asked = ("evaluate", "-m", f"ckpt={run}", "guidance.scale=1,2", *FEW)
    assert called(*asked).returncode == 0
    files = [Path(line) / "evaluation.json" for line in called(*asked).stdout.split()]
    made: list[int] = []
    real = measuring.evaluate

    def evaluate(*arguments):
        assert all(file.is_file() for file in files)
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(measuring, "evaluate", evaluate)
    times = [file.stat().st_mtime_ns for file in files]
    result = called(*asked, "rerun=true")
    assert result.returncode == 0, result.stderr
    assert len(made) == 2
    assert all(file.stat().st_mtime_ns > before for file, before in zip(files, times, strict=True))


def test_runs_that_are_not_done_are_passed_over(study: Path, inside, called):
    one, other = find(study)
    status = json.loads((one / "status.json").read_text())
    (one / "status.json").write_text(json.dumps({**status, "state": "failed", "error": "OSError: disk full"}))
    asked = ("evaluate", "-m", f"ckpt={study}", "sampler.steps=3,4", *FEW[:1], *FEW[2:])
    result = called(*asked)
    assert result.returncode == 0, result.stderr
    assert f"passing over {one}: failed; ckpt={one} measures it as it stands" in result.stderr
    assert len(inside) == 2
    assert all(str(other) in arguments[-1] for arguments in inside)
    alone = called("evaluate", f"ckpt={study}", *FEW)
    assert alone.returncode == 2
    assert f"ckpt={study}: holds 2 runs; name one, or measure all of them with -m" in alone.stderr
    (other / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    nothing = called(*asked)
    assert nothing.returncode == 2
    assert "none of its 2 runs is done" in nothing.stderr


def test_a_path_of_any_name_reaches_the_process(study: Path, inside, called):
    run = find(study)[0]
    odd = study.parent / "a b=c,[d]" / "it's \\' so\\"
    odd.mkdir(parents=True)
    moved = run.rename(odd / run.name)
    lines = spread_out(["sampler.steps=2,3", f"ckpt={_quoted(str(odd))}"])
    assert [value_of(job[0]) for job in sweep(lines)] == [str(moved)] * 2
    result = called("evaluate", "-m", *lines, *FEW[:1], *FEW[2:])
    assert result.returncode == 0, result.stderr
    assert [json.loads(Path(one[-1]).read_text())["config"].count("ckpt:") for one in inside] == [1, 1]
    assert [Path(line).parent.parent for line in result.stdout.splitlines()] == [moved] * 2


def test_looks_are_swept_too(study: Path, inside, called):
    asked = ("evaluate", "-m", f"ckpt={find(study)[0]}", "diagnostics=forward", "evaluation.seed=1,2", *FEW)
    assert called(*asked).returncode == 0
    assert len(inside) == 2
    assert len([*study.glob("*/diagnostics/forward/*/finding.json")]) == 2
    assert called(*asked).stderr.count("measured before") == 2


def test_an_outline_says_what_the_run_says(study: Path, example_run: Path, tmp_path: Path):
    for path in (example_run, find(study)[0]):
        known, whole = outline(path), load(path)
        parts = [run.parts_for(configuration()) for run in (known, whole)]
        assert folder_of(known, parts[0]) == folder_of(whole, parts[1])
        assert (known.step, known.weights, known.record) == (whole.step, whole.weights, whole.record)
    other = outline(find(study)[1], like=known)
    assert other.parts.codec is known.parts.codec
    file = next(find(study)[0].glob("checkpoints/last.ckpt"))
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"the content does not match|truncated"):
        outline(file)


def configuration() -> dict[str, Any]:
    return plain(compose("evaluate", ["ckpt=none", "metrics=none", *FEW]))


def test_ranks_do_not_start_sweeps(study: Path, called, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    result = called("evaluate", "-m", f"ckpt={study}", "sampler.steps=2,3")
    assert result.returncode == 2
    assert "-m: was started as one of several ranks" in result.stderr
