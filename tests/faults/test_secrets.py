"""Keys and passwords: what the environment holds is in no file of a run, and none is taken in plain text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from denoiselab.compose import compose
from denoiselab.confidential import refuse_secrets
from denoiselab.errors import UserError
from denoiselab.launcher import Slurm
from denoiselab.training import Job
from runs import POINTS
from slurm_stub import stubbed
from warm import Warm

pytestmark = pytest.mark.faults

CANARY = "canary"
CANARIES = {
    "WANDB_API_KEY": f"{'w' * 33}{CANARY}1",
    "HF_TOKEN": f"hf_{CANARY}2",
    "AWS_ACCESS_KEY_ID": f"{CANARY}3",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}4",
    "MY_PASSWORD": f"{CANARY}5-given",
}
OWN = """\
import lightning.pytorch as pl
class Quiet(pl.Callback):
    def __init__(self, password, where): assert password == "canary5-given" and password in where
"""
NODE = """\
quiet:
  _target_: quiet.Quiet
  password: ${oc.env:MY_PASSWORD}
  where: https://me:${oc.env:MY_PASSWORD}@host/
"""


def holding(folder: Path) -> list[str]:
    """The files with a canary in them, or in their name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    (folder / "callbacks").mkdir(parents=True)
    (folder / "quiet.py").write_text(OWN)
    (folder / "callbacks" / "quiet.yaml").write_text(NODE)
    return folder


def test_no_file_of_a_sweep_a_report_or_an_export_holds_one(own: Path, tmp_path: Path):
    """Runs with a password out of the environment, wandb offline beside them, and all that is made of them."""
    lab = tmp_path / "lab"
    options = [line for line in POINTS if not line.startswith("callbacks=")]
    train = ("train", "-m", "--config-dir", str(own), *options, "callbacks=quiet", "logger=wandb", "output_dir=runs")
    commands = (
        (*train, "seed=0,1"),
        ("report", "runs"),
        ("export", "ckpt=RUN", "format=safetensors"),
        ("status", "runs"),
    )
    for command in commands:
        runs = [str(path.parent) for path in (lab / "runs").glob("*/*/identity.json")]
        words = [word.replace("RUN", runs[0]) if "RUN" in word else word for word in command]
        begun = Warm(lab, *words, variables={**CANARIES, "WANDB_MODE": "offline"})
        assert begun.wait(300) == 0, begun.said
    assert [*(lab / "runs").rglob("*.ckpt")]
    assert [*(lab / "runs").rglob("*.wandb")]
    assert [*(lab / "runs").rglob("*.safetensors")]
    assert holding(tmp_path) == [str(own / "quiet.py")]  # which the test wrote there: the search finds what is there


def test_no_file_that_slurm_is_given_holds_one(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The batch script, the pickles and the job's configuration."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", [*sys.path])
    stubbed(tmp_path / "stub", monkeypatch)
    options = [line for line in POINTS if not line.startswith("callbacks=")]
    asked = (*options, "callbacks=quiet", "launcher=slurm", "logger=wandb", f"output_dir={tmp_path / 'runs'}")
    job, launcher = Job(compose("train", [*asked], own), here=False), Slurm()
    task = job.task("1/1")
    launcher.check(task)
    launcher.start([task])
    for kind in ("*.json", "*.pkl", "*.sh"):
        assert [*tmp_path.rglob(kind)], kind
    assert holding(tmp_path) == [str(own / "quiet.py")]


PLAIN = {
    "own.password": {"own": {"password": "x"}},
    "logger.wandb.api_key": {"logger": {"wandb": {"api_key": "x"}}},
    "a.APIKEY": {"a": {"APIKEY": "x"}},
    "hf_token": {"hf_token": "x"},
    "client_secret": {"client_secret": "x"},
    "passwd": {"passwd": "x"},
    "data.root": {"data": {"root": "s3://me:word@bucket/x"}},
    "data.roots": {"data": {"roots": ["https://me:word@host"]}},
    "url": {"url": "redis://:word@host"},
}
FINE = (
    *({"password": ""}, {"password": None}, {"api_key": "${oc.env:KEY}"}, {"max_tokens": 5}, {"tokenizer": "bert"}),
    *({"url": "https://host/a:b@c"}, {"url": "ssh://git@host/x"}, {"url": "https://me:${oc.env:WORD}@host"}),
)


@pytest.mark.parametrize("where", PLAIN)
def test_plain_text_is_refused_and_not_repeated(where: str):
    with pytest.raises(UserError, match="environment") as error:
        refuse_secrets(PLAIN[where])
    assert str(error.value).startswith(f"{where}: ")
    assert "word@" not in str(error.value)


@pytest.mark.parametrize("node", FINE, ids=repr)
def test_what_is_no_secret_is_taken(node):
    refuse_secrets(node)


def test_one_that_is_given_leaves_nothing(own: Path, called, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", CANARIES["MY_PASSWORD"])
    given = f"callbacks.quiet.password={CANARY}-plain"
    options = [line for line in POINTS if not line.startswith("callbacks=")]
    said = called("train", "--config-dir", str(own), *options, "callbacks=quiet", given, "output_dir=runs")
    assert (said.returncode, said.stdout, said.stderr.count("\n")) == (2, "", 1)
    assert "callbacks.quiet.password: " in said.stderr
    assert CANARY not in said.stderr
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match=r"callbacks\.quiet\.password"):
        compose("train", [*options, "callbacks=quiet", given], own)
