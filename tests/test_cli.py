"""The command line as people meet it: exit statuses, one line on stderr; as processes where these matter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import denoiselab
from denoiselab.cli import COMMANDS

QUICK = ["debug=quick", "metrics=none", "callbacks=none", "model.channels=8", "model.head_channels=8"]
TINY = [
    "metrics=none",
    "callbacks=none",
    "model.channels=8",
    "model.head_channels=8",
    "trainer.threads=1",
    "data.batch_size=16",
    "sampler.steps=1",
    "evaluation.n=1",
]


def test_help_and_version(command, called):
    for start, *arguments in (
        (command, "--help"),
        (called, "--help"),
        (called, "train", "--help"),
        (called, "sample", "--help"),
        (called, "evaluate", "--help"),
        (called, "report", "--help"),
    ):
        result = start(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert "usage: denoiselab" in result.stdout
    assert command("--version").stdout == f"denoiselab {denoiselab.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_its_options_are(name: str, called):
    for flag in ("--help", "-h"):
        result = called(name, flag)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"usage: denoiselab {name}")


MISTAKES = {
    ("tran",): "did you mean train?",
    ("train", "schedule=cosin"): "did you mean cosine?",
    ("train", "trainer.max_step=3"): "did you mean max_steps?",
    ("train", "--multi"): "no such flag",
    ("train", "--config-dir", "nowhere"): "--config-dir=nowhere",
    ("train", "-m", "schedule=linear,cosin"): "did you mean cosine?",
    ("train", "p_null=1.5"): "p_null=1.5",
    ("train", "init_from=nowhere"): "nowhere: no such run directory",
    ("sample",): "ckpt=???",
    ("sample", "ckpt=nowhere"): "nowhere: no such run directory",
    ("sample", "ckpt=nowhere", "sampler.steps=0"): "nowhere",
    ("sample", "ckpt=nowhere", "n=0"): "n=0",
    ("sample", "-m", "ckpt=nowhere"): "evaluate -m",
    ("evaluate", "ckpt=nowhere.ckpt"): "nowhere.ckpt: no such",
    ("report", "nowhere"): "nowhere",
    ("report",): "need one run directory",
}


AS_PROCESSES = {("tran",), ("train", "p_null=1.5"), ("sample", "ckpt=nowhere"), ("report", "nowhere")}
"""Mistakes that are found after importing different things, each of which could say something."""


@pytest.mark.faults
@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_status_2_and_writes_nothing(arguments, command, called, faults, tmp_path: Path):
    faults.injected("option")
    result = (command if arguments in AS_PROCESSES else called)(*arguments)
    assert result.returncode == 2, result.stderr
    assert MISTAKES[arguments] in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "trainer.max_step=3"]], ids=" ".join)
def test_answers_do_not_wait_for_torch(arguments, tmp_path: Path):
    """What takes the time is importing torch (2 s) and lightning (3 s); neither may be needed."""
    program = (
        "import sys\nfrom denoiselab.cli import run\n"
        f"try: run({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_one_run_two_samplers_train_once_and_evaluate_twice(tmp_path: Path, called):
    result = called("train", "-m", *QUICK, "sampler=ddim,heun")
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("outputs/runs/[!.]*")
    assert len(list(folder.glob("evaluations/*/evaluation.json"))) == 2
    assert result.stderr.count("training for") == 1
    again = called("train", "-m", *QUICK, "sampler=ddim,heun")
    assert again.stderr.count("done and evaluated before") == 2


def test_a_failing_job_does_not_stop_the_others(tmp_path: Path, called):
    (tmp_path / "mine" / "schedule").mkdir(parents=True)
    (tmp_path / "mine" / "broken.py").write_text(
        "from denoiselab.schedule import Cosine\n\nclass Broken(Cosine):\n"
        "    def rate(self, t):\n        raise RuntimeError('a fault in step one')\n"
    )
    (tmp_path / "mine" / "schedule" / "broken.yaml").write_text("_target_: broken.Broken\n")
    result = called("train", "-m", "--config-dir", "mine", *QUICK, "schedule=cosine,broken,linear")
    assert result.returncode == 1
    assert "2 of 3 runs done" in result.stderr
    assert "a fault in step one" in result.stderr.splitlines()[-1]
    states = sorted(json.loads(p.read_text())["state"] for p in tmp_path.glob("outputs/runs/*/status.json"))
    assert states == ["done", "done", "failed"]


def test_sample_evaluate_and_report(example_run: Path, command, called, tmp_path: Path):
    ckpt = f"ckpt={example_run}"
    result = command("sample", ckpt, "sampler=ddim", "sampler.steps=2", "guidance.scale=2", "n=20", "output=drawn")
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["samples.npy", "samples.png"]
    small = ["metrics=digits", "evaluation.n=20", "sampler.steps=2"]
    result = called("evaluate", "-m", ckpt, *small, "guidance.scale=1,2", "evaluation.seed=1")
    assert result.returncode == 0, result.stderr
    result = called("evaluate", ckpt, "~metrics.frechet", "evaluation.n=20", "sampler.steps=2")
    assert result.returncode == 0, result.stderr
    assert "class_accuracy" in result.stderr
    assert "fd_digits" not in result.stderr
    result = called("report", str(example_run), "output=page.html")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "page.html").read_text()
    assert "fd_digits" in page
    assert "data:image/png" in page


def test_a_truncated_checkpoint_is_refused_by_every_command(example_run: Path, called, tmp_path: Path):
    whole = (example_run / "checkpoints" / "last.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(whole[:5000])
    for arguments in (["sample", f"ckpt={bad}"], ["evaluate", f"ckpt={bad}"], ["train", f"init_from={bad}"]):
        result = called(*arguments)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "bad.ckpt" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ckpt"]
