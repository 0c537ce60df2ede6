"""Whenever a run saves, the averaged and the raw weights in the file are the right ones, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import denoiselab
from denoiselab import checkpoint
from denoiselab.callbacks import EarlyStopping, LossBuckets
from denoiselab.compose import compose
from denoiselab.errors import Interrupted
from denoiselab.metrics.loss_by_t import held_out_losses
from denoiselab.module import Diffusion
from denoiselab.training import Job
from ledger import Faults
from runs import POINTS, trained

pytestmark = pytest.mark.faults

DECAY = 0.9
RUN = (
    *(*POINTS, "trainer.max_steps=13", "trainer.checkpoint_every=5", f"ema.decay={DECAY}", "optimizer.lr=0.01"),
    *("lr_schedule.warmup=0", "callbacks=default", "~callbacks.sample_grid", "~callbacks.guidance_sweep"),
    *("callbacks.buckets.every=6", "early_stopping.patience=50", "early_stopping.every=3"),
)
Weights = dict[str, Tensor]


class Reference:
    """The weights after each step, taken from the optimizer, and their average by its formula, made beside the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.raw: list[Weights] = []
        self.average: list[Weights] = []
        make, step = Diffusion.__init__, torch.optim.AdamW.step

        def started(module: Diffusion, **parts: Any) -> None:
            make(module, **parts)
            self.denoiser = module.denoiser
            self.raw, self.average = [state(module.denoiser)], [floats(state(module.denoiser))]

        def stepped(optimizer: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
            found = step(optimizer, *arguments, **named)
            n, before = len(self.raw), self.average[-1]
            self.raw.append(state(self.denoiser))
            pull = max(1 - DECAY, 9 / (10 + n))
            self.average.append({k: torch.lerp(before[k], v, pull) for k, v in floats(self.raw[-1]).items()})
            return found

        monkeypatch.setattr(Diffusion, "__init__", started)
        monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


def state(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def floats(weights: Weights) -> Weights:
    return {name: value.float() for name, value in weights.items()}


def same(a: Weights, b: Weights) -> bool:
    assert a.keys() == b.keys()
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Reference:
    return Reference(monkeypatch)


def check(path: Path, step: int, reference: Reference) -> None:
    """A file has the weights of its step, and the average of these, not those of the step before, nor one for the
    other."""
    content = checkpoint.load(path)
    raw, average = (
        {name.removeprefix(prefix): value for name, value in content["state_dict"].items() if name.startswith(prefix)}
        for prefix in ("denoiser.", "ema.model.")
    )
    assert content["global_step"] == int(content["state_dict"]["ema.updates"]) == step
    assert same(raw, reference.raw[step])
    assert same(average, reference.average[step])
    for other in (floats(reference.raw[step]), reference.average[step - 1]):
        assert not same(average, other)


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, act: Callable[[], None]) -> None:
    """Something happens after the n-th call of a method."""
    function, calls = getattr(owner, name), []

    def trapped(*arguments: Any, **named: Any) -> Any:
        found = function(*arguments, **named)
        calls.append(1)
        if len(calls) == call:
            act()
        return found

    monkeypatch.setattr(owner, name, trapped)


def broken() -> None:
    raise ArithmeticError("injected")


def told() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


MOMENTS: dict[str, tuple[tuple[Any, str, int, Callable[[], None]] | None, type[BaseException] | None, int, str]] = {
    "after a training step": ((Diffusion, "optimizer_step", 7, broken), ArithmeticError, 5, "last"),
    "after a held-out evaluation": ((EarlyStopping, "run", 1, broken), ArithmeticError, 3, "best"),
    "on an exception in a step": ((Diffusion, "training_step", 11, broken), ArithmeticError, 10, "last"),
    "on an exception in an evaluation": ((LossBuckets, "run", 2, broken), ArithmeticError, 10, "last"),
    "on a signal in a step": ((Diffusion, "training_step", 7, told), Interrupted, 7, "last"),
    "on a signal in an evaluation": ((LossBuckets, "run", 1, told), Interrupted, 6, "last"),
    "after training": (None, None, 13, "last"),
}
"""What happens, after which call of what; how the run ends; and a file that is left, with its step."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_file_holds_the_weights_of_its_step(
    moment: str, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
):
    trap, ends, step, name = MOMENTS[moment]
    job = Job(compose("train", [*RUN, f"output_dir={tmp_path}"]))
    with monkeypatch.context() as patch:
        if trap is None or ends is None:
            job.run()
        else:
            failing(patch, *trap)
            with pytest.raises(ends):
                job.run()
            faults.injected("call")
    check(job.path / "checkpoints" / f"{name}.ckpt", step, reference)
    for file in (job.path / "checkpoints").glob("*.ckpt"):
        check(file, checkpoint.load(file)["global_step"], reference)


def test_the_check_notices_weights_that_were_swapped(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As where averages take the place of the weights while they are measured, and a file is written then."""
    save = checkpoint.save

    def swapped(content: dict[str, Any], path: Path) -> None:
        found = content["state_dict"]
        other = {"denoiser.": "ema.model.", "ema.model.": "denoiser."}
        content["state_dict"] = dict(found)
        for mine, theirs in other.items():
            content["state_dict"] |= {theirs + k.removeprefix(mine): v for k, v in found.items() if k.startswith(mine)}
        save(content, path)

    monkeypatch.setattr("denoiselab.trainer._save", swapped)
    run = trained(tmp_path, *RUN)
    with pytest.raises(AssertionError):
        check(run / "checkpoints" / "last.ckpt", 13, reference)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_averages_are_float32_under_bfloat16(precision: str, reference: Reference, tmp_path: Path):
    """And are the averages of the weights that bfloat16 left."""
    run = trained(tmp_path, *RUN, f"trainer.precision={precision}")
    check(run / "checkpoints" / "last.ckpt", 13, reference)
    kinds = {value.dtype for value in reference.raw[13].values() if value.is_floating_point()}
    assert kinds == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert {value.dtype for value in reference.average[13].values()} == {torch.float32}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), *RUN)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_samples_are_of_the_averages_unless_told(weights: str, run: Path, tmp_path: Path, called):
    asked = ["weights=raw"] if weights == "raw" else []
    result = called("sample", f"ckpt={run}", "n=8", "sampler.steps=2", f"output={tmp_path / 'out'}", *asked)
    assert result.returncode == 0, result.stderr
    step = denoiselab.load(run).step
    assert f"8 samples of the {weights} weights of step {step}" in result.stderr
    made = np.load(tmp_path / "out" / "samples.npy")
    for name in ("ema", "raw"):
        expected = denoiselab.load(run, weights=name).sample(n=8, steps=2).numpy()
        assert np.array_equal(made, expected) == (name == weights)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_evaluations_are_of_the_averages_unless_told(weights: str, run: Path, called):
    asked = ["evaluation.weights=raw"] if weights == "raw" else []
    result = called("evaluate", f"ckpt={run}", "evaluation.n=2", "sampler.steps=2", *asked)
    assert result.returncode == 0, result.stderr
    assert f"evaluation of the {weights} weights of step {denoiselab.load(run).step}" in result.stderr
    found = json.loads((Path(result.stdout.strip()) / "evaluation.json").read_text())
    assert found["protocol"]["weights"] == weights
    (loss,) = [record["value"] for record in found["records"] if record["name"] == "held_out_loss"]
    for name in ("ema", "raw"):
        own = denoiselab.load(run, weights=name)
        held_out = own.parts.data.held_out
        _, total = held_out_losses(own.denoiser, own.schedule, held_out, loss=own.loss, repeats=10)
        assert (loss == float(total[0] / total[1])) == (name == weights)


@pytest.mark.parametrize(("command", "option"), [("sample", "weights"), ("evaluate", "evaluation.weights")])
def test_a_file_without_averages_is_refused_unless_raw_weights_are_asked_for(
    command: str, option: str, run: Path, tmp_path: Path, called
):
    content = checkpoint.load(run / "checkpoints" / "last.ckpt")
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not k.startswith("ema.")}
    file = tmp_path / "without.ckpt"
    checkpoint.save(content, file)
    words = [command, f"ckpt={file}", "sampler.steps=1", *(["n=2"] if command == "sample" else ["evaluation.n=2"])]
    result = called(*words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{file}: holds no ema weights; weights=raw takes" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {file.name, f"{file.name}.sha256"}
    assert called(*words, f"{option}=raw").returncode == 0
