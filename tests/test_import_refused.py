"""Sources that `denoiselab import` cannot use: one line, status 2, and nothing is written or run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import denoiselab
from denoiselab.cli import run as command_line
from denoiselab.data.unknown import NO_SAMPLES
from denoiselab.errors import UserError
from test_import import imported, pipeline

pytest.importorskip("diffusers")

pytestmark = pytest.mark.faults


@cache
def files() -> dict[str, bytes]:
    """A pipeline's, by path."""
    with TemporaryDirectory() as folder:
        pipeline("linear, eps").save_pretrained(folder)
        return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*.*")}


def written(folder: Path) -> Path:
    for name, content in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def breaking(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A pipeline's folder, then damaged."""

    def made(folder: Path) -> Path:
        change(written(folder / "given"))
        return folder / "given"

    return made


def edited(name: str, **values: Any) -> Callable[[Path], Path]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return breaking(change)


def reweighted(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Path]:
    def changed(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return breaking(changed)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Trap()}, (folder / WEIGHTS).with_suffix(".bin"))


class Trap:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"

HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda folder: folder / "nowhere", "no such file"),
    "an empty folder": (lambda folder: folder, "no network lies there"),
    "code in a pickle": (breaking(pickled), "nothing was executed"),
    "a truncated file": (breaking(lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-99])), "truncated"),
    "no weights": (breaking(lambda f: (f / WEIGHTS).unlink()), "no diffusion_pytorch_model.safetensors"),
    "a configuration that is no JSON": (breaking(lambda f: (f / "unet/config.json").write_text("{")), "not JSON"),
    "a configuration that is a list": (
        breaking(lambda f: (f / "unet/config.json").write_text("[]")),
        "not a JSON object",
    ),
    "a pipeline of something else": (
        breaking(lambda f: [(f / "unet").rename(f / "prior"), (f / "model_index.json").write_text('{"prior": []}')]),
        "neither a unet nor a transformer",
    ),
    "a network of something else": (edited("unet/config.json", _class_name="UNet3DModel"), "_class_name='UNet3DModel'"),
    "a key of something else": (edited("unet/config.json", tea="Earl Grey"), "tea"),
    "a width of something else": (edited("unet/config.json", block_out_channels="wide"), "unet/config.json"),
    "another width": (edited("unet/config.json", block_out_channels=[16, 64]), "config.json"),
    "a schedule of something else": (edited(SCHEDULER, beta_schedule="laplace"), "beta_schedule='laplace'"),
    "a table of words": (edited(SCHEDULER, trained_betas=["a", "b"]), "trained_betas"),
    "a table beyond 1": (edited(SCHEDULER, trained_betas=[0.1, 1.5]), "trained_betas"),
    "an endless table": (edited(SCHEDULER, num_train_timesteps=10**9), "num_train_timesteps='1000000000'"),
    "a scheduler of straight paths": (edited(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "_class_name"),
    "a prediction of something else": (edited(SCHEDULER, prediction_type="flow_prediction"), "prediction_type"),
    "eps where there is no data left": (
        edited(SCHEDULER, rescale_betas_zero_snr=True),
        "Eps says nothing of x_0 at t = 1",
    ),
    "a missing tensor": (reweighted(lambda s: s.pop("conv_in.bias")), "conv_in.bias"),
    "another tensor": (reweighted(lambda s: s.update(tea=torch.zeros(1))), "tea"),
    "another shape": (reweighted(lambda s: s.update({"conv_in.bias": torch.zeros(7)})), "conv_in.bias"),
    "a value that is not finite": (reweighted(lambda s: s["conv_in.bias"].fill_(torch.nan)), "not finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_source_that_cannot_be_used_is_one_line_and_leaves_nothing(name: str, tmp_path: Path, monkeypatch, capsys):
    make_source, reason = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    source = make_source(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert command_line(["import", f"source={source}", "output_dir=runs"]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


MISTAKES = {
    "format=onnx": "format=onnx: need one of",
    "model=unet_digits": "model=unet_digits: the source says what its network is",
    "sigma_data=0.5": "sigma_data=0.5: the source says",
    "data=8gaussians": "the network has shape (1, 8, 8) and data=8gaussians (2,)",
    "data=digits data.size=16": "the network has shape (1, 8, 8) and data=digits (1, 16, 16)",
    "schedul=linear": "did you mean schedule?",
    "loss=learned_hybrid": "do not fit",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_in_the_command_is_one_line_and_leaves_nothing(options: str, tmp_path: Path, capsys):
    written(tmp_path / "given")
    capsys.readouterr()
    asked = [f"source={tmp_path / 'given'}", f"output_dir={tmp_path / 'runs'}", *options.split()]
    assert command_line(["import", *asked]) == 2
    said = capsys.readouterr().err
    assert MISTAKES[options] in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_data_that_are_unknown_have_no_samples(tmp_path: Path, capsys):
    written(tmp_path / "given")
    run = imported(tmp_path / "given", capsys=capsys)
    assert run.parts.shape == (1, 8, 8)
    assert run.parts.num_classes == 0
    capsys.readouterr()
    few = ["sampler.steps=1", "evaluation.n=1", "metrics=none"]
    assert command_line(["evaluate", f"ckpt={run.folder}", *few]) == 2
    assert capsys.readouterr().err == f"denoiselab evaluate: {NO_SAMPLES}\n"


@pytest.fixture(scope="module")
def given(example_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with format=safetensors."""
    folder = tmp_path_factory.mktemp("given") / "net"
    assert command_line(["export", f"ckpt={example_run}", "format=safetensors", f"output={folder}"]) == 0
    return folder


def renamed(config: dict[str, Any], group: str, target: str) -> dict[str, Any]:
    return {**config, "config": {**config["config"], group: {"_target_": target}}}


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "code": (lambda c: renamed(c, "target", "os.system"), "nothing was run"),
    "code in the codec": (
        lambda c: {**c, "interface": {**c["interface"], "codec": {"_target_": "os.getcwd"}}},
        "nothing",
    ),
    "a later version": (lambda c: {**c, "version": 99}, "reads up to"),
    "no step": (lambda c: {**c, "step": "many"}, "nothing usable of its step"),
    "no loss": (lambda c: {**c, "config": {k: v for k, v in c["config"].items() if k != "loss"}}, "of its loss"),
    "weights of a new kind": (lambda c: {**c, "weights": "best"}, "nothing usable of its weights"),
    "another schedule": (lambda c: renamed(c, "schedule", "denoiselab.schedule.Linear"), "was trained along"),
    "another network": (lambda c: renamed(c, "embedding", "denoiselab.models.MLP"), "embedding"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_export_that_was_tampered_with_is_refused(name: str, given: Path, tmp_path: Path, monkeypatch, capsys):
    change, reason = DAMAGED[name]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "net"
    folder.mkdir()
    for file in given.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(content)))
    capsys.readouterr()
    assert command_line(["import", f"source={folder}", "output_dir=runs"]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    with pytest.raises(UserError, match=reason):
        denoiselab.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
