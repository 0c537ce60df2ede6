"""What `denoiselab import` makes of somebody else's files is their network on their schedule."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import denoiselab
from denoiselab import checkpoint
from denoiselab.cli import run as command_line
from denoiselab.cli.import_ import by_name
from denoiselab.errors import UserError
from denoiselab.exchange.dit import PUBLISHED, PUBLISHED_BLOCK
from denoiselab.exchange.schedules import from_scheduler, levels, made, times, to_scheduler
from denoiselab.experiment import Parts
from denoiselab.models import DiT
from denoiselab.run import Run
from exact import make, relative
from test_exchange_adm import SETTINGS, of_adm

diffusers = pytest.importorskip("diffusers")

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DDPMS = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None}
LINEAR = torch.linspace(1e-3, 0.05, 200).tolist()

PIPELINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear, eps": ({}, {"beta_schedule": "linear"}),
    "DDPM's features, cosine, x0": (DDPMS, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
    "classes, scaled linear, v, zero SNR at the end": (
        {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    "a table of 200, trailing": (DDPMS, {"trained_betas": LINEAR, "num_train_timesteps": 200}),
    "sigmoid, three channels, a variance": (
        {"in_channels": 3, "out_channels": 6},
        {"beta_schedule": "sigmoid", "variance_type": "learned_range", "timestep_spacing": "trailing"},
    ),
}


def moved(net: nn.Module, seed: int = 0) -> Any:
    """With weights none of which is where it began."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    return net.eval()


def pipeline(name: str) -> Any:
    """A pipeline of diffusers, with one thing of each kind that a configuration can say."""
    unet, scheduler = PIPELINES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = moved(diffusers.UNet2DModel(**{**UNET, **unet}))
    return diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**scheduler))


def imported(source: Path, *options: str, capsys: Any) -> Run:
    """The run that the command makes, loaded as any other."""
    capsys.readouterr()
    status = command_line(["import", f"source={source}", f"output_dir={source.parent / 'runs'}", *options])
    said = capsys.readouterr()
    assert status == 0, said.err
    return denoiselab.load(said.out.strip())


def ddim(pipeline: Any, steps: int) -> Any:
    """diffusers' scheduler on the table of another, which knows more names of tables."""
    said, betas = pipeline.scheduler.config, pipeline.scheduler.betas.tolist()
    kept = {key: said[key] for key in ("num_train_timesteps", "prediction_type", "timestep_spacing")}
    scheduler = diffusers.DDIMScheduler(trained_betas=betas, clip_sample=False, **kept)
    scheduler.set_timesteps(steps)
    return scheduler


def theirs(pipeline: Any, x_t: Tensor, steps: int, **cond: Tensor) -> Tensor:
    """DDIM as diffusers walks."""
    scheduler = ddim(pipeline, steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            y = pipeline.unet(x_t, t, **cond).sample[:, : x_t.shape[1]]
            x_t = scheduler.step(y, t, x_t).prev_sample
    return x_t


def ours(run: Run, x_t: Tensor, pipeline: Any, steps: int, **cond: Tensor) -> Tensor:
    """The same from the run's denoiser and schedule, on the levels of the same indices."""
    last = pipeline.scheduler.config.num_train_timesteps - 1
    t = ddim(pipeline, steps).timesteps.double() / last
    sampler = make("sampler", "ddim", steps=steps, spacing=lambda schedule, n: t)
    return sampler(run.denoiser, run.schedule, x_t / sampler.levels(run.schedule)[0].sigma, **cond)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_becomes_a_run_that_draws_the_same_samples(name: str, tmp_path: Path, capsys):
    given = pipeline(name)
    given.save_pretrained(tmp_path / "given")
    run = imported(tmp_path / "given", capsys=capsys)
    config, label = given.unet.config, torch.arange(4)
    told = {"label": label} if config.num_class_embeds else {}
    cond = {"class_labels": label} if config.num_class_embeds else {}
    x_t = torch.randn(4, config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    last = given.scheduler.config.num_train_timesteps - 1
    c_noise = run.schedule.log_snr(torch.linspace(0, 1, last + 1, dtype=torch.float64)) / -8
    for n in (0, 1, last // 2, last):
        with torch.no_grad():
            expected = given.unet(x_t, n, **cond).sample
            found = run.denoiser.net(x_t, c_noise[n].float().expand(4), **told)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert relative(ours(run, x_t, given, 10, **told), theirs(given, x_t, 10, **cond)) < 1e-4
    assert run.parts.interface["shape"] == [config.in_channels, 8, 8]
    assert run.denoiser.has_variance == (config.out_channels == 6)
    assert run.denoiser.sigma_data == 1
    assert run.step == 0
    raw = denoiselab.load(run.folder, weights="raw").denoiser.state_dict()
    assert all(torch.equal(value, raw[key]) for key, value in run.denoiser.state_dict().items())


LAYOUTS = {
    "a pipeline whose weights are a pickle": (
        lambda given, folder: given.save_pretrained(folder, safe_serialization=False),
        [],
    ),
    "everything in one folder, as it once was": (
        lambda given, folder: [part.save_pretrained(folder) for part in (given.unet, given.scheduler, given)],
        [],
    ),
    "a model alone": (lambda given, folder: given.unet.save_pretrained(folder), ["schedule=linear", "target=eps"]),
    "half precision": (lambda given, folder: given.to(torch.float16).save_pretrained(folder), []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_found_however_it_lies(layout: str, tmp_path: Path, capsys):
    save, options = LAYOUTS[layout]
    given, folder = pipeline("linear, eps"), tmp_path / "given"
    save(given, folder)
    if "one folder" in layout:
        for part in ("unet", "scheduler"):
            for file in (folder / part).iterdir():
                file.unlink()
            (folder / part).rmdir()
    run = imported(folder, *options, capsys=capsys)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    c_noise = run.schedule.log_snr(torch.tensor(500 / 999, dtype=torch.float64)) / -8
    with torch.no_grad():
        expected = given.unet.float()(x, 500).sample
        found = run.denoiser.net(x, c_noise.float().expand(2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_the_command_says_goes_before_what_the_source_says(tmp_path: Path, capsys):
    pipeline("linear, eps").save_pretrained(tmp_path / "given")
    run = imported(
        tmp_path / "given", "schedule=cosine", "data=digits", "seed=5", "name=mine", "step=70", capsys=capsys
    )
    assert run.schedule.fingerprint == make("schedule", "cosine").fingerprint
    assert run.folder.parent.name == "mine"
    assert run.step == 70
    assert run.parts.num_classes == 0
    assert type(run.parts.data).__name__ == "Digits"
    again = imported(tmp_path / "given", capsys=capsys)
    assert again.schedule.fingerprint == make("schedule", "linear").fingerprint
    assert again.parts.config["schedule"] == denoiselab.build("schedule=linear").config["schedule"]


def test_every_command_takes_an_imported_run(tmp_path: Path, capsys):
    pipeline("linear, eps").save_pretrained(tmp_path / "given")
    run = f"ckpt={imported(tmp_path / 'given', 'data=digits', capsys=capsys).folder}"
    few = ["sampler.steps=2", "metrics=none", "evaluation.n=4"]
    assert (
        command_line(["sample", run, "sampler=dpmpp_2m", "sampler.steps=3", "n=4", f"output={tmp_path / 'drawn'}"]) == 0
    )
    assert command_line(["evaluate", run, *few]) == 0
    assert command_line(["report", run.removeprefix("ckpt="), f"output={tmp_path / 'page.html'}"]) == 0
    assert "held_out_loss" in (tmp_path / "page.html").read_text()
    model = ["model.channels=16", "model.blocks=1", "model.attention=[4]", "model.head_channels=8", "model.groups=8"]
    model += ["+model.scale_shift=false", "model.dropout=0"]
    start = [
        f"init_from={run.removeprefix('ckpt=')}",
        "embedding=adm",
        "sigma_data=1",
        "loss=simple",
        "schedule=linear",
    ]
    quick = [
        "debug=quick",
        "callbacks=none",
        "trainer.max_steps=1",
        "trainer.threads=1",
        f"output_dir={tmp_path / 'on'}",
    ]
    capsys.readouterr()
    assert command_line(["train", *few, *quick, *start, *model, "init_mismatch=allow"]) == 0
    said = capsys.readouterr().err
    assert "starting from the ema weights" in said
    assert "not matched, left at their initial values: net.condition.label.weight\n" in said


@pytest.mark.parametrize("kind", ["diffusers", "safetensors"])
def test_what_we_export_comes_back_as_it_was(kind: str, example_run: Path, tmp_path: Path, capsys):
    """Even through diffusers, where features of the log-SNR are a table; its schedule is known again."""
    content = checkpoint.load(example_run / "checkpoints" / "last.ckpt")
    for value in content["state_dict"].values():
        value += 0.05 * torch.randn(value.shape) if value.is_floating_point() else 0
    text = content["denoiselab"]["config"].replace("sigma_data: null", "sigma_data: 1")
    content["denoiselab"]["config"] = text
    checkpoint.save(content, tmp_path / "moved.ckpt")
    given = denoiselab.load(tmp_path / "moved.ckpt")
    options = [f"ckpt={tmp_path / 'moved.ckpt'}", f"format={kind}", f"output={tmp_path / 'given'}"]
    assert command_line(["export", *options]) == 0
    run = imported(tmp_path / "given", "data=digits", capsys=capsys)
    for group in ("schedule", "target", "embedding", "data"):
        assert run.parts.config[group] == given.parts.config[group]
    assert run.schedule.fingerprint == given.schedule.fingerprint
    assert run.parts.interface == given.parts.interface
    state = run.denoiser.state_dict()
    assert all(torch.equal(state[key], value) for key, value in given.denoiser.state_dict().items())
    assert torch.equal(run.sample(n=3, steps=2), given.sample(n=3, steps=2))
    assert run.step == (given.step if kind == "safetensors" else 0)


@pytest.mark.parametrize("name", ["labels", "halved"])
def test_a_checkpoint_of_guided_diffusion_becomes_a_run(name: str, tmp_path: Path, capsys):
    """Of its architecture the command says what weights do not; outputs are those that the original code gave."""
    state, given = of_adm(name)
    torch.save(state, tmp_path / "model.pt")
    settings = {"channels": 64, "blocks": 1, **SETTINGS[name]}
    shape = f"data.shape={list(given['x'].shape[1:])}"
    model = [f"model.{key}={value}" for key, value in settings.items()]
    options = ["model=unet_adm64", *model, shape, "schedule=linear"]
    run = imported(tmp_path / "model.pt", *options, capsys=capsys)
    c_noise = (run.schedule.log_snr(given["t"].double() / 999) / -8).float()
    label = {"label": given["y"]} if "y" in given else {}
    with torch.no_grad():
        found = run.denoiser.net(given["x"], c_noise, **label)
    torch.testing.assert_close(found, given["out"], rtol=1e-4, atol=1e-4)
    assert run.denoiser.has_variance == (given["out"].shape[1] == 2 * given["x"].shape[1])
    assert run.parts.num_classes == len(state.get("label_emb.weight", ()))
    with pytest.raises(UserError, match="p_null=0" if label else "unconditional"):
        run.sample(n=1, steps=1, scale=2.0)


DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2}
DIT |= {"sample_size": 8, "num_embeds_ada_norm": 5}


def test_a_dit_of_diffusers_becomes_a_run_of_latents(tmp_path: Path, capsys):
    """Whose values are not bounded as an image's are."""
    given = moved(diffusers.DiTTransformer2DModel(**DIT))
    for block in given.transformer_blocks[1:]:  # a DiT has one embedder
        block.norm1.emb.load_state_dict(given.transformer_blocks[0].norm1.emb.state_dict())
    given.save_pretrained(tmp_path / "given" / "transformer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "given" / "scheduler")
    run = imported(tmp_path / "given", capsys=capsys)
    x_t, label = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    t = torch.tensor([0, 100, 500, 999])
    c_noise = (run.schedule.log_snr(t.double() / 999) / -8).float()
    with torch.no_grad():
        expected = given(x_t, t, class_labels=label).sample
        found = run.denoiser.net(x_t, c_noise, label=label)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert run.denoiser.has_variance
    assert run.parts.interface == {**run.parts.interface, "shape": [4, 8, 8], "num_classes": 5, "low_res": 0}
    assert run.sample(n=5, steps=2).abs().max() > 1


def test_a_training_checkpoint_of_dit_has_raw_weights_and_their_average(tmp_path: Path, capsys):
    """Of the published code's names, which are made here from our own by the inverse of what is tested elsewhere."""
    settings = {"shape": (4, 8, 8), "num_classes": 5, "width": 48, "depth": 2, "heads": 3, "outputs": 2}
    nets = [moved(DiT(**settings), seed) for seed in (0, 1)]
    model, ema = ({published(name): value for name, value in net.state_dict().items()} for net in nets)
    for state in (model, ema):
        state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].unflatten(1, (4, 2, 2))
        state["pos_embed"] = nets[0].positions[None]
    content = {"model": model, "ema": ema, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)}
    torch.save(content, tmp_path / "0050000.pt")
    options = ["schedule=linear", "model=dit_digits", "model.heads=3", "step=50000"]
    run = imported(tmp_path / "0050000.pt", *options, capsys=capsys)
    raw = denoiselab.load(run.folder, weights="raw")
    for found, net in ((raw, nets[0]), (run, nets[1])):
        state = found.denoiser.net.state_dict()
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert run.step == 50000
    assert run.parts.config["embedding"]["_target_"].endswith("ADM")


def published(name: str) -> str:
    """The name of one of our tensors in DiT's own code."""
    for ours, theirs in PUBLISHED.items():
        if name.startswith(f"{ours}."):
            return f"{theirs[0]}.{name.removeprefix(f'{ours}.')}"
    _, i, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blocks.{i}.{PUBLISHED_BLOCK[module][0]}.{kind}"


def test_what_a_file_of_weights_does_not_say_must_be_named(tmp_path: Path, capsys):
    torch.save(of_adm("labels")[0], tmp_path / "model.pt")
    said = []
    for options in ([], ["model=unet_adm64"], ["model=unet_adm64", "data.shape=[3,16,16]"], ["format=diffusers"]):
        assert command_line(["import", f"source={tmp_path / 'model.pt'}", *options]) == 2
        said.append(capsys.readouterr().err)
    for message, reason in zip(said, ["its model;", "its data;", "model.pt: ", "is a folder"], strict=True):
        assert reason in message
        assert message.count("\n") == 1
    content = {"denoiselab": {}, "state_dict": {}}
    torch.save(content, tmp_path / "last.ckpt")
    assert command_line(["import", f"source={tmp_path / 'last.ckpt'}"]) == 2
    assert "needs no import" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid", "zero_terminal", "vp"])
def test_a_table_is_known_again_as_the_option_that_it_is(schedule: str):
    path = make("schedule", schedule)
    node, target = from_scheduler(to_scheduler(levels(path)[0].tolist(), "sample", "leading", False), "file")
    assert target == "x0"
    found = by_name(node)
    assert (found == denoiselab.build(f"schedule={schedule}").config["schedule"]) == (path.points is not None)
    again, expected = Parts({"schedule": found}).schedule, path.log_snr(times(path))
    torch.testing.assert_close(
        again.log_snr(torch.linspace(0, 1, 1000, dtype=torch.float64)), expected, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("points", [1000, 200])
def test_schedules_that_diffusers_names_are_ours(name: str, zero: bool, points: int):
    """To what float32 keeps of its tables, near alpha = 0 relative to it."""
    said = {"beta_schedule": name, "rescale_betas_zero_snr": zero, "num_train_timesteps": points, "beta_end": 0.05}
    theirs = diffusers.DDPMScheduler(**said)
    node, _ = from_scheduler({**theirs.config, "_class_name": "DDPMScheduler"}, "file")
    alpha_t, _ = made(node)(torch.linspace(0, 1, points, dtype=torch.float64))
    torch.testing.assert_close(alpha_t**2, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)
    assert (alpha_t[-1] == 0) == zero
    old = {key: value for key, value in said.items() if value is not False}
    assert from_scheduler({**old, "_class_name": "DDPMScheduler"}, "file") == (node, "eps")
