"""Compiled and recomputed networks: the same gradients, names and checkpoints, and one address for all of them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chain
import denoiselab
from denoiselab import checkpoint, speed
from denoiselab.checks import check, without_weights
from denoiselab.compose import compose
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.training import Job
from networks import NETWORKS, natural_shape

STEPS = ("trainer.max_steps=4", "trainer.checkpoint_every=2", "sampler.steps=1", "evaluation.n=1")
OFF = {"compile": False, "recompute": False, "strategy": "auto"}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Nothing compiled is kept from test to test, and a run may name the network of these tests."""
    monkeypatch.setenv("DENOISELAB_ALLOW_TARGETS", "chain.Chain")
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture
def graphs(monkeypatch) -> list[bool]:
    """A backend that runs graphs as they are; for each that was compiled, whether gradients were wanted."""
    seen: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(speed, "BACKEND", backend)
    return seen


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, *overrides: str) -> Path:
        job = Job(compose("train", [*chain.OPTIONS, *STEPS, *overrides, f"output_dir={tmp_path / name}"]))
        with job.folder.locked():
            job.fit()
        return job.folder.path

    return run


def gradients(net: nn.Module, autocast: bool = False) -> list[Tensor]:
    """The output and its gradients, with dropout, from one place of the generator."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net.train()(*chain.inputs())
    net.zero_grad()
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def kept(net: nn.Module) -> int:
    """Numbers kept for the backward pass outside of recomputed units, and the inputs of those."""
    counted = [0]

    def pack(x: Tensor) -> Tensor:
        counted[0] += x.numel()
        return x

    def count(unit: nn.Module, given: tuple[Tensor, ...]) -> None:
        pack(given[0])

    hooks = [unit.register_forward_pre_hook(count) for unit in speed.units(net)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net.train()(*chain.inputs(64))
    for hook in hooks:
        hook.remove()
    return counted[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_units_give_the_same_gradients_from_less_memory(autocast):
    torch.manual_seed(0)
    net = chain.Chain((2,), depth=6)
    recomputed = copy.deepcopy(net)
    speed.recompute(recomputed)
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(net, autocast), gradients(recomputed, autocast), strict=True)
    )
    assert len(gradients(net, autocast)) == 1 + len([*net.parameters()])
    assert kept(recomputed) < 0.6 * kept(net)
    assert recomputed.state_dict().keys() == net.state_dict().keys()


def test_dropout_would_betray_a_recomputation_that_draws_anew(monkeypatch):
    from functools import partial

    monkeypatch.setattr(speed, "checkpoint", partial(speed.checkpoint, preserve_rng_state=False))
    net = chain.Chain((2,))
    recomputed = copy.deepcopy(net)
    speed.recompute(recomputed)
    assert not all(torch.equal(a, b) for a, b in zip(gradients(net), gradients(recomputed), strict=True))


@pytest.mark.parametrize("prepare", [speed.recompute, speed.compile])
def test_a_copy_is_a_network_of_its_own(prepare, graphs):
    net = chain.Chain((2,))
    prepare(net)
    before = gradients(net)
    other = copy.deepcopy(net)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(other), strict=True))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not gradients(other)[0].any()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(net), strict=True))


def test_compiled_by_inductor_a_network_gives_the_same_gradients():
    """Once with the real compiler; dropout included, which draws what it draws uncompiled."""
    torch.manual_seed(0)
    net = chain.Chain((2,), depth=2)
    expected = gradients(net)
    speed.compile(net)
    assert list(net.state_dict()) == list(chain.Chain((2,), depth=2).state_dict())
    torch.testing.assert_close(gradients(net), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_and_eager_runs_load_and_continue_each_other(recompute, run, graphs, tmp_path):
    """Saved compiled or not, resumed compiled or not: the same names, the same weights, EMA and raw."""
    both = [f"trainer.recompute={str(recompute).lower()}"]
    modes = {"eager": [*both], "compiled": [*both, "trainer.compile=true"]}
    whole = checkpoint.load(run("whole", "trainer.max_steps=8") / "checkpoints" / "last.ckpt")["state_dict"]
    for saved, options in modes.items():
        folder, before = run(saved, *options), len(graphs)
        assert (before > 0) == (saved == "compiled")
        state = checkpoint.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
        assert state.keys() == whole.keys()
        for weights in ("ema", "raw"):
            prefix = {"ema": "ema.model.", "raw": "denoiser."}[weights]
            loaded = denoiselab.load(folder, weights).denoiser.state_dict()
            assert all(torch.equal(loaded[key], state[prefix + key]) for key in loaded)
        for resumed, others in modes.items():
            torch._dynamo.reset()
            shutil.copytree(tmp_path / saved, tmp_path / f"{saved}_{resumed}")
            graphs.clear()
            end = run(f"{saved}_{resumed}", *others, "trainer.max_steps=8") / "checkpoints" / "last.ckpt"
            assert bool(graphs) == (resumed == "compiled")
            torch.testing.assert_close(checkpoint.load(end)["state_dict"], whole, rtol=1e-5, atol=1e-6)


def test_only_training_is_compiled(run, graphs):
    """Evaluations ask the same network for other shapes without gradients."""
    callbacks = ["callbacks=points", "callbacks.buckets.every=2", "callbacks.sample_grid.n=2"]
    run("compiled", "trainer.compile=true", *callbacks, "callbacks.guidance_sweep.n=2")
    assert graphs == [True]  # three equal units share one


def test_a_network_without_units_is_compiled_whole(graphs):
    class Whole(chain.Chain):
        units = ()

    net = Whole((2,))
    speed.compile(net)
    net(*chain.inputs()).sum().backward()
    assert graphs == [True]


def test_units_of_many_shapes_are_all_compiled(graphs):
    """More kinds of a class than PyTorch's limit of 8 for one function."""
    net = nn.Module()
    net.units = [chain.Unit(4 * width, 0.0) for width in range(1, 21)]
    speed.compile(net)
    for unit in net.units:
        unit(torch.ones(2, unit.first.in_features), torch.zeros(2, unit.first.in_features)).sum().backward()
    assert len(graphs) == 20


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_checked_without_its_weights_and_its_units_are_its_own(name):
    """On the meta device, whatever its size; and nothing of it is kept."""
    data = ["data=unknown", f"data.shape={[*natural_shape(name)]}", "metrics=none"]
    made = Parts(resolve(compose("train", [f"model={name}", *data])))
    net = without_weights(made)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    units, modules = speed.units(net), {id(m) for m in net.modules()}
    assert {id(unit) for unit in units} <= modules
    parameters = [id(p) for unit in units for p in unit.parameters()]
    assert len(parameters) == len(set(parameters))


def test_a_check_keeps_nothing_without_weights_and_notices_a_mistake(monkeypatch):
    made = Parts(resolve(compose("train", [*chain.OPTIONS])))
    seen: list[nn.Module] = []
    monkeypatch.setattr(speed, "check", lambda net, trainer: seen.append(net))
    check(made)
    assert {p.device.type for p in seen[0].parameters()} == {"meta"}
    assert {p.device.type for p in made.denoiser.parameters()} == {"cpu"}
    assert {x.device.type for x in made.data.train.batch(torch.arange(2))["cond"].values()} == {"cpu"}
    with pytest.raises(UserError, match=r"^model\.width=4: need at least 8$"):
        check(Parts(resolve(compose("train", ["data=8gaussians", "model=mlp", "model.width=4"]))))


def test_a_network_that_needs_values_is_checked_as_it_is(monkeypatch):
    class Needy(chain.Chain):
        def __init__(self, shape, num_classes=0, outputs=1, width=16, depth=3):
            super().__init__(shape, num_classes, outputs, width, depth)
            assert self.first.weight.sum().item() != 0

    monkeypatch.setattr(chain, "Chain", Needy)
    made = Parts(resolve(compose("train", [*chain.OPTIONS])))
    assert {p.device.type for p in without_weights(made).parameters()} == {"cpu"}
    check(made)


def test_speed_is_no_part_of_what_a_run_is(graphs):
    faster = ("trainer.compile=true", "trainer.recompute=true", "trainer.strategy=ddp", "trainer.devices=1")
    folders = {
        Job(compose("train", [*chain.OPTIONS, option])).folder.path for option in ("trainer.compile=false", *faster)
    }
    assert len(folders) == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["trainer.precision=bf17"], r"trainer\.precision=bf17: need one of 32-true, bf16-mixed, .*"),
        (["trainer.strategy=fsbp"], r"trainer\.strategy=fsbp: need one of auto, ddp, .*, fsdp"),
        (["trainer=fsdp", "trainer.devices=1"], r"trainer\.strategy=fsdp: .* need trainer\.devices=2 or more, .*"),
        (["trainer=fsdp", "trainer.precision=16-mixed"], r"trainer\.precision=16-mixed: need one of 32-true, .*"),
        (["trainer=fsdp", "diagnostics=interference"], r"diagnostics\.interference: takes gradients of a copy .*"),
        (["trainer.compile=maybe"], r"trainer\.compile=maybe: need true or false, .*"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(options, line, tmp_path):
    with pytest.raises(UserError, match=rf"^{line}$"):
        Job(compose("train", [*chain.OPTIONS, *options, f"output_dir={tmp_path}"]))
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"^trainer\.recompute=true: Linear names no units[^\n]*$"):
        speed.check(nn.Linear(2, 2), {**OFF, "recompute": True})
    net = chain.Chain((2,))
    speed.check(net, {**OFF, "recompute": True, "strategy": "fsdp"})
    net.gain = nn.Parameter(torch.zeros(()))
    with pytest.raises(UserError, match=r"^trainer\.strategy=fsdp: gain of Chain has no axis[^\n]*$"):
        speed.check(net, {**OFF, "strategy": "fsdp"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the compiler is Triton")
def test_a_machine_without_a_compiler_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no_such_compiler"))
    with pytest.raises(UserError, match=r"^trainer\.compile=true: need a C\+\+ compiler[^\n]*$"):
        Job(compose("train", [*chain.OPTIONS, "trainer.compile=true", f"output_dir={tmp_path / 'runs'}"]))
    assert not (tmp_path / "runs").exists()


def test_what_the_compiler_cannot_do_is_a_line(run, monkeypatch):
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(speed, "BACKEND", broken)
    with pytest.raises(
        UserError, match=r"^trainer\.compile=true: [^\n]*no such instruction[^\n]*trainer\.compile=false"
    ):
        run("broken", "trainer.compile=true")
