"""`denoiselab bench`: each part at a tiny size, and what is refused. No times are asserted."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pytest
import torch

from denoiselab.bench import PARTS, gpu, importance, launch, memory, networks, sampling, training
from denoiselab.bench.record import Record
from denoiselab.bench.refusal import Disagreement, Unavailable
from denoiselab.bench.timing import LEAST, Contender
from denoiselab.cli import run
from denoiselab.cli.bench import table
from denoiselab.compose import compose, plain
from denoiselab.errors import UserError
from denoiselab.training import Job

CPU = torch.device("cpu")
CONFIG = plain(compose("bench", []))


def sane(record: Record, *contenders: str) -> dict:
    """What every record holds; as it would be read from its file."""
    found = json.loads(json.dumps(record.as_dict()))
    assert list(found["times"]) == list(contenders)
    for time in found["times"].values():
        low, high = time["quartiles"]
        assert 0 < low <= time["ms"] <= high
    low, high = found["result"]["interval"]
    assert 0 < low <= found["result"]["median"] <= high
    assert found["rounds"] == 6
    assert table(record).startswith(f"{record.part}: {record.name}\n")
    return found


TINY_UNET = {
    "options": ["model=unet_digits", "embedding=ddpm", "schedule=linear"],
    "shape": [1, 8, 8],
    "num_classes": 3,
    "at_most": 10.0,
}


TINY_DIT = {"options": ["model=dit_digits", "embedding=ddpm", "schedule=linear"], "shape": [1, 8, 8], "num_classes": 3}


@pytest.fixture(scope="module")
def tiny_networks() -> list[Record]:
    return networks.measure({"rounds": 6, "batch": 2, "memory": False, "models": {"tiny": TINY_UNET}}, CPU)


def test_copies_in_each_block_of_a_dit_are_no_more_parameters():
    found = networks.Pair(TINY_DIT, 2).check()
    assert found["difference"] <= 1e-5
    assert found["parameters_with_copies"]["ours"] == found["parameters"]
    assert found["parameters_with_copies"]["diffusers"] > found["parameters"]


def test_the_networks_that_are_shipped_are_the_published_ones():
    """DiT-S/2 with 6 heads and 12 layers, and the configuration of DDPM's CIFAR-10 network as diffusers has it."""
    configs = {}
    for name, model in CONFIG["networks"]["models"].items():
        net = networks.ours_parts(model).model
        configs[name] = networks.exchange(net).to_diffusers(net, None)[0]
    dit, unet = configs["dit_s_2"], configs["unet_cifar10"]
    assert (dit["num_attention_heads"], dit["num_layers"], dit["patch_size"], dit["sample_size"]) == (6, 12, 2, 32)
    assert (unet["block_out_channels"], unet["layers_per_block"]) == ([128, 256, 256, 256], 2)
    assert unet["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    assert (unet["downsample_padding"], unet["freq_shift"], unet["flip_sin_to_cos"]) == (0, 1, False)


def test_networks_are_the_same_before_they_are_timed(tiny_networks):
    forward, both = tiny_networks
    assert [record.need for record in tiny_networks] == [{}, {"at_most": 10.0}]
    for record in (forward, both):
        found = sane(record, "ours", "diffusers")
        assert found["facts"]["difference"] <= 1e-5
        assert found["facts"]["parameters_with_copies"]["ours"] == found["facts"]["parameters"]
        assert found["times"]["ours"]["peak_mib"] is None


@pytest.fixture
def pair() -> networks.Pair:
    return networks.Pair(TINY_UNET, 2)


def test_a_pair_has_an_output_that_depends_on_every_weight(pair):
    (pair.call(pair.ours)() * pair.gradient).sum().backward()
    # An index that is not drawn has no part in an output.
    unused = {name for name, p in pair.ours.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused == set()


def test_a_weight_that_differs_is_refused(pair):
    with torch.no_grad():
        next(pair.theirs.parameters()).mul_(1.001)
    with pytest.raises(Disagreement, match=r"outputs are \S+ apart; nothing is reported"):
        pair.check()


def test_another_number_of_parameters_is_refused(pair):
    pair.theirs.extra = torch.nn.Linear(3, 3)
    with pytest.raises(Disagreement, match="parameters; nothing is reported"):
        pair.check()


def test_copies_of_a_parameter_count_once():
    net = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
    net[1].load_state_dict(net[0].state_dict())
    assert (networks.count(net), networks.distinct(net)) == (24, 16)


def test_tasks_do_what_they_are_called():
    net = torch.nn.Linear(2, 2)
    x, gradient = torch.ones(1, 2), torch.ones(1, 2)
    both = networks.task(lambda: net(x), "forward+backward", "fp32", gradient, net)
    both(), both()
    assert torch.equal(net.weight.grad, torch.ones(2, 2)), "gradients of one pass, not of two"
    net.zero_grad()
    y = networks.task(lambda: net(x), "forward", "fp32", gradient, net)()
    assert (y.requires_grad, y.dtype) == (False, torch.float32)
    y = networks.task(lambda: net(x), "forward", "bf16 compiled", gradient, net)()
    assert y.dtype == torch.bfloat16
    assert net.weight.grad is None


def test_memory_of_a_network_alone():
    """A step with a backward pass keeps weights, gradients and activations, as `denoiselab summary` counts them."""
    model, batch = {**TINY_UNET, "shape": [3, 32, 32]}, 8
    pair = networks.Pair(model, 2)
    contenders = [Contender(name, int) for name in ("ours", "diffusers")]
    found = memory.peaks(pair, contenders, model, "forward+backward", batch)
    assert list(found) == ["ours", "diffusers"]
    cost = gpu.cost_of(model)
    kept = (cost.activations * batch + cost.memory["weights"] + cost.memory["gradients"]) / 2**20
    assert all(0.8 * kept < peak < 3 * kept for peak in found.values()), (found, kept)


def test_the_highest_memory_of_this_process_rises():
    before = memory.highest()
    held = torch.ones(2**24 + int(2**18 * before))  # 64 MiB more than there ever was
    assert memory.highest() - before >= 64
    del held
    assert memory.highest() - before >= 64


def options(part: str, **changed) -> dict:
    return {**CONFIG[part], "rounds": 6, **changed}


def test_samplers_end_where_diffusers_do():
    found = sampling.measure(options("sampling", batch=2, shape=[1, 4, 4], steps=4), CPU)
    assert [record.name for record in found] == [f"{name}, 4 steps" for name in sampling.THEIRS]
    for record in found:
        assert sane(record, "ours", "diffusers")["facts"]["difference"] <= 1e-4
        assert record.need


def test_walks_that_end_elsewhere_are_refused(monkeypatch):
    monkeypatch.setitem(sampling.BETAS, "beta_end", 0.021)
    with pytest.raises(Disagreement, match="the walks end"):
        sampling.measure(options("sampling", batch=2, shape=[1, 4, 4], steps=4, samplers={"ddim": None}), CPU)


def test_the_history_is_the_loops():
    (record,) = importance.measure(options("importance", batch=256, block=4), CPU)
    found = sane(record, "ours", "loop")
    assert found["result"]["of"] == "loop / ours"
    assert found["facts"]["batch"] == 256


def test_another_history_is_refused(monkeypatch):
    update = importance.Importance.update
    monkeypatch.setattr(importance.Importance, "update", lambda self, t, losses: update(self, t, losses + 1e-9))
    with pytest.raises(Disagreement, match="the two histories differ"):
        importance.measure(options("importance", batch=256, block=4), CPU)


QUICK = ["debug=quick", "metrics=none", "logger=csv"]
BRIEF = ["~callbacks.guidance_sweep", "callbacks.sample_grid.n=4", "callbacks.buckets.repeats=1", "data.batch_size=16"]


def test_training_alternates_with_a_loop_that_learns_the_same():
    chosen = options("training", options=[*QUICK, *BRIEF, "lr_schedule=constant"], steps=4)
    record, accounting = training.measure(chosen, CPU)
    assert sane(accounting, "ours", "buckets")["result"]["of"] == "buckets / ours"
    assert accounting.need == {"at_most": 0.01}
    found = sane(record, "ours", "bare")
    assert found["result"]["of"] == "bare / ours"
    assert record.need == {"at_least": 0.97}
    losses = found["facts"]["mean_loss"]
    assert losses["bare"] == pytest.approx(losses["ours"], rel=0.2)
    assert 0 < found["facts"]["evaluation_share"] < 1


def test_throughput_counts_the_images_and_the_products():
    """What the gpu part does, on this machine."""
    model = {"options": [*QUICK, "callbacks=none"], "shape": [4, 8, 8], "num_classes": 3, "batch": 8, "at_least": 1}
    record = gpu.throughput("tiny", model, options("gpu", steps=2, product=32, repeats=2), CPU)
    found = sane(record, "ours", "product")
    facts = found["facts"]
    assert found["result"]["of"] == "images/s"
    step = found["times"]["ours"]["ms"] / 1e3
    assert found["result"]["median"] == pytest.approx(8 / step, rel=0.5)
    assert facts["teraflops"]["training"] * 1e12 == pytest.approx(8 * facts["flops_per_image"] / step, rel=0.5)
    assert facts["share_of_product_rate"]["median"] > 0
    assert "peak_mib" not in facts


def test_peaks_tell_training_from_what_follows_it(monkeypatch):
    """The allocator's peaks as a list: while compiling, while training, while sampling."""
    given = iter([900.0, 100.0, 107.0])
    monkeypatch.setattr(gpu, "gpu_peak", lambda: next(given))
    peaks = gpu.Peaks()
    for step in range(1, 5):
        peaks.on_train_batch_end(type("Trainer", (), {"global_step": step, "max_steps": 4}), None)
    peaks.on_train_end(None, None)
    assert (peaks.training, peaks.sampling) == (100.0, 107.0)


def test_noise_is_data():
    data = gpu.Noise(4, [4, 8, 8], 3, n=16)
    assert (data.shape, data.num_classes, len(data.train)) == ((4, 8, 8), 3, 16)
    assert data.codec.decode(data.train.x_0).shape == (16, 3, 8, 8)
    assert not set(data.held_out.ids.tolist()) & set(data.train.ids.tolist())


# The command.


TINY = ["rounds=6", "sampling.shape=[1,4,4]", "sampling.steps=4", "batch=256", "importance.block=2"]


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_the_command_writes_what_it_prints(two_threads, capsys, tmp_path: Path):
    file = tmp_path / "made" / "found.json"
    assert run(["bench", "part=[gpu,importance,sampling]", *TINY, f"output={file}"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(file.read_text())
    assert content["command"].startswith("denoiselab bench part=[gpu,importance,sampling]")
    assert content["records"][0]["part"] == "importance"
    assert {record["part"] for record in content["records"]} == {"importance", "sampling"}
    assert {record["facts"]["threads"] for record in content["records"]} == {1}
    assert {"torch", "diffusers", "denoiselab"} <= content["versions"].keys()
    assert content["hardware"]
    assert content["not_made"] == ["gpu: no GPU is present"]
    assert "gpu: no GPU is present\n" in err
    assert "importance: update with 256 losses" in out
    assert "95% interval" in out
    assert torch.get_num_threads() == 2


def test_nothing_but_a_missing_gpu_is_an_error(capsys):
    assert run(["bench", "part=gpu"]) == 2
    assert capsys.readouterr().err.endswith("nothing was measured: gpu: no GPU is present\n")


def test_without_diffusers_a_line_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.delitem(sys.modules, "diffusers")
    monkeypatch.setattr(builtins, "__import__", without)
    for part in (networks, sampling):
        with pytest.raises(Unavailable, match=r"^diffusers is not installed: pip install 'diffusers"):
            part.measure({}, CPU)


MISTAKES = {
    "part=network": "did you mean networks?",
    "part=[sampling,gpus]": "did you mean gpu?",
    "part=sampling rounds=3": "rounds=3: need at least 6",
    "part=sampling threads=0": "threads=0",
    "part=sampling device=gpu": "device=gpu: need auto or cpu",
    "part=networks networks.modles={}": "did you mean models?",
    "-m part=sampling": "part=[networks,sampling]",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(options, capsys):
    assert run(["bench", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert MISTAKES[options] in err.splitlines()[-1]


@pytest.mark.parametrize(("part", "key"), [(networks, "models"), (sampling, "samplers")])
def test_what_diffusers_has_not_is_refused(part, key):
    mine = {"models": {"options": ["model=mlp"], "shape": [2], "num_classes": 0}, "samplers": 1.0}[key]
    with pytest.raises(UserError, match=r"need (UNet or DiT|one of ddim)"):
        part.measure(options(part.__name__.rpartition(".")[2], batch=2, **{key: {"euler": mine}}), CPU)


def test_every_part_has_its_options():
    assert set(PARTS) < set(CONFIG)
    for part in PARTS:
        assert CONFIG[part]["rounds"] >= LEAST


def test_a_start_lasts_until_the_first_step_and_no_longer(monkeypatch, tmp_path: Path):
    """By a program that says its line at once and waits to be read to its end, and one that never says it."""
    waiting = "import sys; print('first step 0.1 s\\n' + 'x' * 200_000, file=sys.stderr, flush=True)"
    made = launch.Launch.__init__

    def stub(self, options, folder):
        made(self, options, folder)
        self.command = [sys.executable, "-c", waiting if "data=8gaussians" in options else "pass"]

    monkeypatch.setattr(launch.Launch, "__init__", stub)
    monkeypatch.setattr(launch, "IMPORTS", "pass")
    (record,) = launch.measure({"rounds": 6, "options": ["data=8gaussians"], "at_most": 60}, CPU)
    found = sane(record, "a run", "imports")
    assert found["verdict"] == "met"
    assert found["result"]["median"] == pytest.approx(found["times"]["a run"]["ms"] / 1e3)
    one = launch.Launch(["data=8gaussians"], str(tmp_path))
    one.until_first_step()
    assert one.process is not None
    assert one.process.poll() is None
    one.end()
    with pytest.raises(Unavailable, match="the run ended without a step"):
        launch.measure({"rounds": 6, "options": [], "at_most": 60}, CPU)


def test_the_run_whose_start_is_measured_can_be_made():
    options = CONFIG["launch"]["options"]
    assert Job(compose("train", [*options, "trainer.max_steps=1"])).config["trainer"]["max_steps"] == 1
