"""Low precision is the network's alone: levels, losses, averages and the bound on the gradient keep float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from denoiselab.compose import compose
from denoiselab.denoiser import Denoiser
from denoiselab.ema import EMA
from denoiselab.module import Diffusion
from denoiselab.rows import rows
from denoiselab.training import Job
from exact import OPEN, OPTIONS, parts_with
from test_host_sync import SMALL, Steps, chosen, module_of

MIXED = 0.002
"""Measured: bf16-mixed 0.0007; levels, x_t and x_0_hat in bfloat16 0.004; bf16-true 0.013."""

POINTS = (
    *("metrics=none", "callbacks=none", "trainer.threads=1", "data=8gaussians", "model=mlp", "model.depth=2"),
    *("model.width=64", "trainer.max_steps=200", "trainer.log_every=50", "optimizer.lr=0.002"),
)


@pytest.fixture
def curve(tmp_path):
    """The training losses of a run on points, a mean per 50 steps."""

    def run(precision: str, name: str) -> list[float]:
        overrides = [*POINTS, f"trainer.precision={precision}", f"output_dir={tmp_path / name}"]
        job = Job(compose("train", overrides))
        with job.folder.locked():
            job.fit()
        return [row["train/loss"] for row in rows(job.folder.path / "metrics.jsonl") if "train/loss" in row]

    return run


def test_mixed_precision_learns_what_float32_does(curve, monkeypatch):
    """Curves within 0.2%, which a step that computes everything in bfloat16 exceeds."""
    exact = torch.tensor(curve("32-true", "exact"))
    assert len(exact) == 4
    assert exact[-1] < exact[0] / 2
    assert (torch.tensor(curve("bf16-mixed", "mixed")) / exact - 1).abs().max() < MIXED
    outputs = Denoiser.outputs

    def narrow(self, x_t, alpha_t, sigma_t, **cond):
        return outputs(self, x_t.bfloat16(), alpha_t.bfloat16(), sigma_t.bfloat16(), **cond)

    monkeypatch.setattr(Denoiser, "outputs", narrow)
    assert (torch.tensor(curve("bf16-mixed", "narrow")) / exact - 1).abs().max() > MIXED


class Widths(TorchDispatchMode):
    """The types that operations give, inside the network and outside it."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.inside, self.seen = False, {True: set(), False: set()}
        net.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        net.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.seen[self.inside] |= {x.dtype for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found


@pytest.mark.parametrize("loss", [loss for loss in OPTIONS["loss"] if loss not in OPEN])
@pytest.mark.parametrize("weighting", ["unit", "uncertainty"])
def test_outside_the_network_nothing_is_narrow(loss, weighting):
    """Under autocast no operation of a training step but the network's gives bfloat16; gradients, averages and the
    optimizer's state are float32."""
    made = chosen(loss, "importance", "cosine")
    made.config["weighting"] = parts_with("weighting", weighting).config["weighting"]
    module = module_of(made)
    steps, widths = Steps(module, made), Widths(module.denoiser.net)
    whole = module.training_step

    def step(batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16), widths:
            return whole(batch, batch_idx)

    module.training_step = step
    for _ in range(2):
        steps.step(steps.batch())
    assert torch.bfloat16 in widths.seen[True]
    assert widths.seen[False] <= {torch.float32, torch.float64, torch.int64, torch.bool}
    state = [value for entry in steps.optimizer.state.values() for value in entry.values()]
    kept = [*module.parameters(), *(p.grad for p in module.denoiser.parameters()), *state]
    assert {x.dtype for x in kept if x is not None} == {torch.float32}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_is_clipped_in_every_precision(precision, fused, tmp_path, monkeypatch):
    """What the optimizer is given is no longer than the bound, and shorter than it was."""
    bound, seen = 0.01, []
    fit = Diffusion.configure_optimizers

    def spied(self):
        found = fit(self)

        def norm(optimizer, *_):  # after the step, since a closure computes the gradient inside it
            grads = [p.grad.double() for group in optimizer.param_groups for p in group["params"]]
            seen.append((self.gradient_norm.item(), torch.stack([g.norm() for g in grads]).norm().item()))

        found["optimizer"].register_step_post_hook(norm)
        return found

    monkeypatch.setattr(Diffusion, "configure_optimizers", spied)
    overrides = [*SMALL, "metrics=none", "callbacks=none", "trainer.threads=1", "trainer.max_steps=3"]
    overrides += [f"trainer.precision={precision}", f"trainer.gradient_clip={bound}", f"optimizer.fused={fused}"]
    job = Job(compose("train", [*overrides, f"output_dir={tmp_path}"]))
    with job.folder.locked():
        job.fit()
    clipped = [after for before, after in seen if before > bound]
    assert len(clipped) >= 2
    assert max(clipped) < bound * 1.02
    assert min(clipped) > bound * 0.9


def test_a_scaled_gradient_is_clipped_by_its_own_norm():
    """As on a GPU in float16 (on a CPU nothing is scaled): a fused optimizer undoes the scale only in its step. SGD,
    since Adam's steps hide a gradient's length."""

    def trained(scaler: torch.amp.GradScaler | None) -> tuple[list[torch.Tensor], float]:
        torch.manual_seed(0)
        made = chosen("v", "stratified", "cosine")
        made.config["optimizer"] = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 1.0, "fused": True}
        module = module_of(made)
        steps, batch = Steps(module, made), made.data.train.batch(torch.arange(8))
        steps.trainer.precision_plugin = SimpleNamespace(scaler=scaler)
        module.on_train_batch_start(batch, 0)
        loss = module.training_step(batch, 0)["loss"]
        (loss if scaler is None else scaler.scale(loss)).backward()
        module.configure_gradient_clipping(steps.optimizer)
        steps.optimizer.step() if scaler is None else scaler.step(steps.optimizer)
        return [p.detach() for p in module.denoiser.parameters()], float(module.gradient_norm)

    plain, norm = trained(None)
    scaled, same = trained(torch.amp.GradScaler("cpu", init_scale=2.0**16))
    assert norm > 0.1  # the bound of module_of
    assert same == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_an_average_of_bfloat16_weights_follows_the_recursion(decay):
    """1,000 updates, to 1e-5 of float64; an average in bfloat16 does not move at all."""
    live = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    ema = EMA(live, decay, warmup=False)
    start = live.weight.detach().double()
    expected, narrow = start.clone(), live.weight.detach().clone()
    with torch.no_grad():
        for _ in range(1000):
            live.weight.add_(torch.full_like(live.weight, 0.01))
            ema.update(live)
            expected += (1 - decay) * (live.weight.double() - expected)
            narrow.lerp_(live.weight, 1 - decay)
    assert ema.model.weight.dtype == torch.float32
    assert (ema.model.weight.double() - expected).abs().max() < 1e-5
    assert (expected - start).abs().min() > 1e-3
    assert (narrow.double() - expected).abs().max() > 1e-3
