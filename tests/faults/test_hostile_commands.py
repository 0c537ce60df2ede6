"""Files made to harm, given to every command that takes a path."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hostile
from denoiselab import checkpoint
from denoiselab.compose import compose, write_job
from runs import POINTS, trained

pytestmark = pytest.mark.faults

FEW = ("sampler.steps=1", "device=cpu")
COMMANDS: dict[str, Callable[[Path, Path], tuple[str, ...]]] = {
    "sample": lambda file, good: ("sample", f"ckpt='{file}'", "n=1", *FEW),
    "evaluate": lambda file, good: ("evaluate", f"ckpt='{file}'", "metrics=none", "evaluation.n=1", *FEW),
    "export": lambda file, good: ("export", f"ckpt='{file}'", "format=safetensors"),
    "preference": lambda file, good: ("preference", "part=make", f"a='{file}'", f"b='{good}'", "n=1", "repeats=0"),
    "encode": lambda file, good: ("encode", "data=digits", "data.size=32", f"encoder='{file}'", "output=latents"),
    "import": lambda file, good: ("import", f"source='{file}'", "output_dir=runs"),
    "a guide": lambda file, good: (
        *("sample", f"ckpt='{good}'", "guidance=autoguidance", f"guidance.bad.ckpt='{file}'", "n=1", *FEW),
    ),
    "report": lambda file, good: ("report", str(file)),
    "status": lambda file, good: ("status", str(file)),
    "wandb-report": lambda file, good: ("wandb-report", str(file)),
}
"""What opens a file as a run, a checkpoint, an autoencoder, weights, or a folder of runs."""

TRAIN = ("train", *POINTS, "output_dir=runs")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("good")) / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def files(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of file once; of the bits that were flipped two."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantize", UserWarning)
        found = hostile.everything(tmp_path_factory.mktemp("hostile") / "files", good)
        return {name: file for name, file, _ in found if not name.endswith(tuple("23456789"))}


def refused(said) -> bool:
    """One line, status 2, and nothing on stdout."""
    return (said.returncode, said.stdout, said.stderr.count("\n")) == (2, "", 1) and "Traceback" not in said.stderr


def wrong(called, command: str, name: str, file: Path, good: Path) -> str | None:
    said = called(*COMMANDS[command](file, good))
    if refused(said):
        return None
    return f"{command}, {name}: {said.returncode} {said.stdout[:80]}{said.stderr[-300:]}"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_command_refuses_them(called, files, good: Path, tmp_path: Path, faults):
    """Each file by one command after the other, so that every command meets every kind of them."""
    commands = [*COMMANDS]
    asked = [(commands[(k // 2) % len(commands)], *item) for k, item in enumerate(files.items()) if k % 2 == 0]
    assert len(asked) >= 40
    found = [what for command, name, file in asked if (what := wrong(called, command, name, file, good))]
    assert found == []
    assert left(tmp_path) == []
    faults.refused(next(iter(files.values())).with_name("marker"), len(asked))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_every_one_of_them(command: str, called, files, good: Path, tmp_path: Path, faults):
    found = [what for name, file in files.items() if (what := wrong(called, command, name, file, good))]
    assert found == []
    assert left(tmp_path) == []
    faults.refused(next(iter(files.values())).with_name("marker"), len(files))


def test_training_starts_from_none_of_them(called, files, good: Path, tmp_path: Path, faults):
    """init_from takes weights alone: what else a file says of its network is not read."""
    asked = [(name, file) for k, (name, file) in enumerate(files.items()) if name not in hostile.INSIDE and k % 4 == 0]
    assert len(asked) >= 12
    said = {name: called(*TRAIN, f"init_from='{file}'") for name, file in asked}
    assert {name: one.stderr[-300:] for name, one in said.items() if not refused(one)} == {}
    assert left(tmp_path) == []
    faults.refused(next(iter(files.values())).with_name("marker"), len(asked))


def test_a_good_file_is_taken(called, good: Path):
    """The negative control: with a file that is what it says, the same commands work."""
    for command in ("sample", "evaluate", "export"):
        assert called(*COMMANDS[command](good, good)).returncode == 0, command
    assert not refused(called(*COMMANDS["a guide"](good, good)))


def test_as_a_process(command, files, faults):
    """Once without anything of this process in the way."""
    file = files["inside os.system"]
    said = command("sample", f"ckpt='{file}'")
    assert refused(said)
    assert str(file) in said.stderr
    faults.refused(file.with_name("marker"))


def test_folders_of_runs_are_read_without_their_checkpoints(called, good: Path, tmp_path: Path, faults):
    """A report opens none."""
    runs = tmp_path / "runs"
    shutil.copytree(good.parents[1], runs / "run")
    last = runs / "run" / "checkpoints" / "last.ckpt"
    marker = tmp_path / "marker"
    torch.save({**checkpoint.load(last), "call": hostile.calls(marker)["os.system"]}, last)
    for arguments in (("report", "runs"), ("status", "runs"), ("wandb-report", "runs", "output=page.json")):
        said = called(*arguments)
        assert said.returncode in (0, 2), said.stderr
        assert "Traceback" not in said.stderr
    faults.refused(marker)


def jobs(folder: Path, marker: Path) -> dict[str, Path]:
    """Files that are no jobs, and jobs where somebody else can write."""
    whole = json.loads(written(folder / "whole").read_text())
    contents = {
        "empty": "",
        "a list": "[]",
        "a number": "3",
        "deep": "[" * 100_000,
        "no configuration": json.dumps({**whole, "config": None}),
        "code": json.dumps({**whole, "config": f"a: !!python/object/apply:os.system ['touch {marker}']"}),
        "half a mapping": json.dumps({**whole, "config": "a: {"}),
        "choices of numbers": json.dumps({**whole, "choices": 3}),
        "no options": json.dumps({**whole, "overrides": None}),
        "a pickle": pickle.dumps(hostile.calls(marker)["os.system"], 0).decode("latin1"),
    }
    found = {}
    for name, content in contents.items():
        found[name] = written(folder / name)
        found[name].write_text(content)
    found["nothing"] = folder / "nothing" / "job.json"
    found["a folder"] = folder / "whole"
    for name, mode in (("a folder of the group", 0o770), ("a folder of everybody", 0o707)):
        found[name] = written(folder / name)
        found[name].parent.chmod(mode)
    found["a file of everybody"] = written(folder / "a file of everybody")
    found["a file of everybody"].chmod(0o666)
    for name, to in (("a link to a folder", "a folder of everybody"), ("a link to a file", "a folder of the group")):
        (folder / name).mkdir(mode=0o700)
        target = folder / to / "job.json"
        link = folder / name / ("jobs" if name == "a link to a folder" else "job.json")
        link.symlink_to(target.parent if name == "a link to a folder" else target)
        found[name] = link / "job.json" if name == "a link to a folder" else link
    return found


def written(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    write_job(compose("train", [*POINTS, "output_dir=runs"]), folder / "job.json")
    return folder / "job.json"


def test_jobs_are_taken_from_where_nobody_else_can_write(called, tmp_path: Path, faults):
    folder, marker = tmp_path / "jobs", tmp_path / "marker"
    folder.mkdir()
    found = jobs(folder, marker)
    said = {name: called("train", "--job", str(file)) for name, file in found.items()}
    assert {name: one.stderr for name, one in said.items() if not refused(one)} == {}
    assert all("--job" in one.stderr for one in said.values())
    for name in [name for name in said if name.startswith(("a folder of", "a file of", "a link"))]:
        assert "others can write to" in said[name].stderr, name
    assert not (tmp_path / "runs").exists()
    assert called("train", "--job", str(folder / "whole" / "job.json")).returncode == 0  # and a good one is
    faults.refused(marker, len(found))


OPTIONS = {
    "code": "_target_: denoiselab.target.V\nmore: !!python/object/apply:os.system ['touch MARKER']\n",
    "a name of Python": "_target_: !!python/name:os.system\n",
    "half a mapping": "_target_: {\n",
    "bytes": "\x00\x01",
    "deep": "a: " + "[" * 3000,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_files_cannot_hold_code(name: str, called, tmp_path: Path, faults):
    """Of a folder of one's own: it may name anything, and yet YAML itself runs nothing."""
    (tmp_path / "own" / "target").mkdir(parents=True)
    marker = tmp_path / "marker"
    (tmp_path / "own" / "target" / "mine.yaml").write_text(OPTIONS[name].replace("MARKER", str(marker)))
    said = called("train", "--config-dir", str(tmp_path / "own"), *POINTS, "target=mine", "output_dir=runs")
    assert refused(said), said.stderr
    assert left(tmp_path) == ["own"]
    faults.refused(marker)


def test_an_export_stays_in_its_folder_and_leaves_others_alone(called, good: Path, tmp_path: Path, faults):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "export.json").write_text(json.dumps({"files": 3}))
    (tmp_path / "listed" / "thesis.txt").write_text("years of work")
    for output in ("mine", "link", "mine/thesis.txt", "mine/thesis.txt/deeper", "listed"):
        said = called("export", f"ckpt='{good}'", "format=safetensors", f"output={tmp_path / output}")
        assert refused(said), (output, said.stderr)
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert left(mine) == ["thesis.txt"]
    assert left(tmp_path / "listed") == ["export.json", "thesis.txt"]
    faults.injected("option", 5)


def test_who_may_read_what_a_run_writes(good: Path, tmp_path: Path):
    """Whatever umask: a run's folder is its owner's and group's, and jobs are its owner's alone."""
    before = os.umask(0)
    try:
        run = trained(tmp_path / "open")
        job = tmp_path / "jobs" / ".jobs" / "job.json"
        write_job(compose("train", POINTS), job)
    finally:
        os.umask(before)
    assert run.stat().st_mode & 0o777 == 0o750
    assert job.parent.stat().st_mode & 0o777 == 0o700
    assert job.stat().st_mode & 0o777 == 0o640
    checkpoints = [*run.glob("checkpoints/*.ckpt*")]
    assert checkpoints
    assert {path.stat().st_mode & 0o777 for path in checkpoints} == {0o640}
