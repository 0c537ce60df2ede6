"""A loss, gradient or weight that is no number ends the run at its step, is told with its sample and its time, and is
never saved."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from denoiselab import checkpoint
from denoiselab.ema import EMA
from denoiselab.errors import NonFiniteLoss
from denoiselab.loss import WeightedLoss
from denoiselab.module import Diffusion
from runs import last

pytestmark = pytest.mark.faults

STEPS = (
    *("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1"),
    *("metrics=none", "callbacks=none", "trainer.threads=1", "evaluation.n=2", "sampler.steps=1", "lint.level=none"),
    *("trainer.max_steps=8", "trainer.checkpoint_every=3", "trainer.log_every=50", "timesteps=uniform"),
)
NAN, INF = float("nan"), float("inf")


class Poison:
    """What a test does to one step, and what the batch of that step was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int):
        self.step, self.patch = step, monkeypatch
        self.ids: list[int] = []
        self.times: list[float] = []
        self.hit: list[int] = []
        self.module: Diffusion | None = None
        begin = Diffusion.on_train_batch_start

        def noted(module: Diffusion, batch: Any, index: int) -> None:
            self.module = module
            if self.now:
                self.ids = batch["id"].tolist()
            begin(module, batch, index)

        monkeypatch.setattr(Diffusion, "on_train_batch_start", noted)

    @property
    def now(self) -> bool:
        return self.module is not None and self.module.global_step + 1 == self.step

    def loss(self, value: float, bucket: int | None = None) -> None:
        """The losses of all samples, or of those of a bucket of ten, are no numbers."""
        forward = WeightedLoss.forward

        def poisoned(loss: Any, denoiser: Any, schedule: Any, x_0: Any, eps: Any, t: torch.Tensor, **cond: Any) -> Any:
            losses, parts = forward(loss, denoiser, schedule, x_0, eps, t, **cond)
            if self.now:
                chosen = torch.ones(len(t), dtype=torch.bool)
                if bucket is not None:
                    chosen = (t.flatten() * 10).long() == bucket
                self.hit = [i for i, one in zip(self.ids, chosen.tolist(), strict=True) if one]
                self.times = t.flatten()[chosen].tolist()
                losses = torch.where(chosen, losses * value if math.isnan(value) else losses + value, losses)
            return losses, parts

        self.patch.setattr(WeightedLoss, "forward", poisoned)

    def gradient(self, value: float) -> None:
        """One number of the gradient alone."""
        clip = Diffusion.configure_gradient_clipping

        def poisoned(module: Diffusion, optimizer: Any, *more: Any, **named: Any) -> None:
            if self.now:
                next(p for p in module.denoiser.parameters() if p.grad is not None).grad.view(-1)[0] = value
            clip(module, optimizer, *more, **named)

        self.patch.setattr(Diffusion, "configure_gradient_clipping", poisoned)

    def average(self, value: float) -> None:
        """One number of the averages alone."""
        update = EMA.update

        def poisoned(ema: EMA, model: Any) -> None:
            update(ema, model)
            if self.now:
                with torch.no_grad():
                    next(ema.model.parameters()).view(-1)[0] = value

        self.patch.setattr(EMA, "update", poisoned)

    def moment(self, value: float) -> None:
        """One number of the optimizer's state alone."""
        update = EMA.update

        def poisoned(ema: EMA, model: Any) -> None:
            update(ema, model)
            if self.now:
                assert self.module is not None
                entry = next(iter(self.module.trainer.optimizers[0].state.values()))
                entry["exp_avg_sq"].view(-1)[0] = value

        self.patch.setattr(EMA, "update", poisoned)

    def data(self, value: float) -> None:
        """One pixel of one sample."""
        step = Diffusion.training_step

        def poisoned(module: Diffusion, batch: Any, index: int) -> Any:
            if self.now:
                batch = {**batch, "x_0": batch["x_0"].clone()}
                batch["x_0"][5, 0] = value
                self.hit = [self.ids[5]]
            return step(module, batch, index)

        self.patch.setattr(Diffusion, "training_step", poisoned)


def ends(train: Callable[..., Path], outputs: Path, poison: Poison, *options: str) -> tuple[str, dict[str, Any] | None]:
    """The run ends with status 3 in that step, and nothing of it is saved; what it says and reports."""
    with pytest.raises(NonFiniteLoss) as error:
        train(*STEPS, *options, quick=())
    assert error.value.status == 3
    assert poison.module is not None
    assert poison.module.trainer.global_step in (poison.step, -(-poison.step // 3) * 3)
    (folder,) = (path for path in (outputs / "outputs" / "runs").iterdir() if path.name != ".jobs")
    saved = (poison.step - 1) // 3 * 3
    files = sorted(folder.glob("checkpoints/*.ckpt"))
    assert bool(files) == (saved > 0)
    assert max((checkpoint.load(file)["global_step"] for file in files), default=0) == saved  # loading refuses NaN
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    report = folder / "crash.json"
    return str(error.value), json.loads(report.read_text()) if report.is_file() else None


def told(message: str, report: dict[str, Any] | None, poison: Poison) -> None:
    """Step, sample, time, bucket, rate and norm are those of the fault."""
    assert report is not None
    assert message.startswith(f"non-finite loss or gradient at step {poison.step}: ")
    assert report["step"] == poison.step
    assert f"lr {report['lr']:.3g}" in message
    assert "gradient norm " in message
    assert "\n" not in message
    assert sorted(row["id"] for row in report["samples"]) == sorted(poison.ids)
    assert "batch of samples " in message
    if poison.hit:
        ill = [row for row in report["samples"] if isinstance(row["loss"], str)]
        assert sorted(row["id"] for row in ill) == sorted(poison.hit)
        first = report["samples"][0]
        bucket = min(int(first["t"] * 10), 9)
        assert f"of sample {first['id']} at t={first['t']:.4g} (bucket {bucket} of 0-9)" in message
        assert not poison.times or sorted(row["t"] for row in ill) == pytest.approx(sorted(poison.times))
    else:
        assert "all losses finite, at t from " in message


def cases(*values: Any) -> list[Any]:
    """The first of them in the quick half, all in the slow one."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


@pytest.mark.parametrize("step", cases(3, 1, 4, 8))  # at a checkpoint; the first, the one after it, the last
@pytest.mark.parametrize("value", cases(NAN, INF))
def test_losses_end_the_run_in_their_step(step: int, value: float, train, tmp_path: Path, monkeypatch, faults):
    poison = Poison(monkeypatch, step)
    poison.loss(value)
    message, report = ends(train, tmp_path, poison)
    told(message, report, poison)
    assert f"loss {value} of sample" in message
    assert len(poison.hit) == 16
    faults.injected("call")


@pytest.mark.parametrize("bucket", cases(*range(10)))
def test_a_loss_is_told_with_the_bucket_of_its_time(bucket: int, train, tmp_path: Path, monkeypatch, faults):
    poison = Poison(monkeypatch, 5)
    poison.loss(NAN if bucket % 2 else INF, bucket)
    message, report = ends(train, tmp_path, poison, "timesteps=stratified")  # 16 strata: each bucket has one
    assert 0 < len(poison.hit) < 16
    told(message, report, poison)
    assert f"(bucket {bucket} of 0-9)" in message
    faults.injected("call")


@pytest.mark.parametrize("step", cases(1, 3, 8))
@pytest.mark.parametrize("value", cases(NAN, -INF))
def test_gradients_end_the_run_in_their_step(step: int, value: float, train, tmp_path: Path, monkeypatch, faults):
    poison = Poison(monkeypatch, step)
    poison.gradient(value)
    told(*ends(train, tmp_path, poison), poison)
    faults.injected("call")


@pytest.mark.parametrize("value", cases(NAN, INF))
def test_data_end_the_run_with_the_sample(value: float, train, tmp_path: Path, monkeypatch, faults):
    poison = Poison(monkeypatch, 4)
    poison.data(value)
    told(*ends(train, tmp_path, poison), poison)
    faults.injected("call")


@pytest.mark.parametrize("step", cases(8, 1, 3))
@pytest.mark.parametrize("where", ["average", "moment"])
def test_what_training_does_not_meet_is_not_saved(step: int, where: str, train, tmp_path: Path, monkeypatch, faults):
    """An average or a moment that is no number is found before the next checkpoint, and named."""
    poison = Poison(monkeypatch, step)
    getattr(poison, where)(INF)
    message, report = ends(train, tmp_path, poison)
    at = min(-(-step // 3) * 3, 8)
    name = "ema.model." if where == "average" else "exp_avg_sq of denoiser."
    assert message.startswith(f"non-finite values in {name}")
    assert f" at step {at}; it was not saved" in message
    assert report is None
    faults.injected("call")


def test_parts_of_a_step_are_told_together(train, tmp_path: Path, monkeypatch, faults):
    """With accumulation, the sample is found in whichever part it was; the report has all of the step's."""
    poison = Poison(monkeypatch, 5)
    poison.loss(NAN)
    message, report = ends(train, tmp_path, poison, "trainer.accumulate=4")
    assert report is not None
    assert len(report["samples"]) == 16
    assert message.startswith("non-finite loss or gradient at step 5: loss nan of sample ")
    faults.injected("call")


def test_after_it_the_same_command_ends_as_if_nothing_had_been(train, tmp_path: Path, monkeypatch, faults):
    """A fault of the machine that is gone: the steps since the last checkpoint are made again."""
    whole = train(*STEPS, "name=whole", quick=())
    with monkeypatch.context() as patch:
        poison = Poison(patch, 5)
        poison.loss(NAN)
        with pytest.raises(NonFiniteLoss):
            train(*STEPS, "name=parts", quick=())
    parts = train(*STEPS, "name=parts", quick=())
    faults.same(last(whole), last(parts))
    faults.injected("call")


def test_a_gradient_that_a_scaler_skips_does_not_end_the_run(train, monkeypatch, faults):
    """As in float16 on a GPU: the overflow is found, the step skipped and the scale halved; and training goes on."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    from denoiselab import trainer

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    make = trainer.pl.Trainer

    def scaled(*arguments: Any, **options: Any) -> Any:
        options.pop("precision")
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return make(*arguments, **{**options, "plugins": [*options["plugins"], plugin]})

    monkeypatch.setattr(trainer.pl, "Trainer", scaled)
    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", lambda self: torch.autocast("cpu", torch.bfloat16))
    poison = Poison(monkeypatch, 4)
    unscale = torch.amp.GradScaler.unscale_

    def overflown(self: Any, optimizer: Any) -> None:
        if poison.now:
            next(p for group in optimizer.param_groups for p in group["params"]).grad.view(-1)[0] = INF
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflown)
    folder = train(*STEPS, quick=())
    assert last(folder)["global_step"] == 8
    assert scaler.get_scale() < 2.0**10
    faults.injected("call")


@pytest.mark.slow
def test_losses_and_weights_that_are_finite_end_nothing(train, monkeypatch):
    """The control: the same poison of 1 changes what is learned, and ends no run."""
    clean = train(*STEPS, "name=clean", quick=())
    poison = Poison(monkeypatch, 4)
    poison.loss(1.0)
    poison.gradient(1.0)
    poison.average(1.0)
    other = train(*STEPS, "name=other", quick=())
    assert last(other)["global_step"] == 8
    with pytest.raises(AssertionError):
        torch.testing.assert_close(last(clean)["state_dict"], last(other)["state_dict"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_when_one_has_a_loss_that_is_no_number(rank: int, tmp_path: Path, faults):
    """Only one rank's loss, and no gradient: all end with its line, and its batch is told."""
    program = f"""
import sys, os
import denoiselab, torch
from denoiselab.loss import WeightedLoss
forward = WeightedLoss.forward
calls = []
def poisoned(self, *a, **k):
    losses, parts = forward(self, *a, **k)
    calls.append(1)
    if len(calls) == 5 and os.environ.get("LOCAL_RANK", "0") == "{rank}":
        losses = losses + torch.full_like(losses, float("inf"))
    return losses, parts
WeightedLoss.forward = poisoned
from denoiselab.ranks import Ranks
Ranks.program = (sys.executable, __file__)
from denoiselab.cli import main
main(sys.argv[1:])
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    options = [*STEPS, "trainer.devices=2", "trainer.accelerator=cpu", f"output_dir={tmp_path / 'outputs'}"]
    ended = subprocess.run([sys.executable, file, "train", *options], capture_output=True, text=True, timeout=240)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("denoiselab train: non-finite")]
    assert ended.returncode == 3, ended.stderr[-3000:]
    assert len(set(lines)) == 1, ended.stderr[-3000:]  # the other rank may be ended before it says the same
    assert "loss inf of sample " in lines[0]
    (report,) = tmp_path.glob("outputs/runs/*/crash.json")
    assert len(json.loads(report.read_text())["samples"]) == 16
    (saved,) = tmp_path.glob("outputs/runs/*/checkpoints/last.ckpt")
    assert checkpoint.load(saved)["global_step"] == 3
    faults.injected("process")
