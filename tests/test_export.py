"""What `denoiselab export` writes is the run's own denoiser, in diffusers' hands and in ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import denoiselab
from denoiselab import checkpoint
from denoiselab.cli import run as command_line
from denoiselab.cli.export import diffusers as files_for
from denoiselab.compose import compose
from denoiselab.errors import UserError
from denoiselab.exchange import pipeline
from denoiselab.exchange.schedules import levels, times, to_scheduler
from denoiselab.run import PREFIX, Run
from denoiselab.training import Job
from exact import every, make, relative

diffusers = pytest.importorskip("diffusers")

TINY = (
    *("debug=quick", "metrics=none", "callbacks=none"),
    *("trainer.threads=1", "trainer.max_steps=1", "data.batch_size=16"),
)
RUNS = {
    "eps": "loss=simple schedule=linear",
    "x0": "loss=simple target=x0 schedule=cosine embedding=ddpm",
    "v": "loss=v schedule=zero_terminal embedding=adm",
    "v in continuous time": "loss=v schedule=vp data.size=16",
    "v of a fractional index": "loss=v schedule=gvp embedding=adm",
    "edm": "loss=edm schedule=edm",
    "v on straight lines": "loss=v schedule=flow",
    "a learned variance": "loss=learned_hybrid schedule=cosine embedding=ddpm",
}
DITS = {
    "a DiT": "loss=v schedule=cosine model=dit_digits embedding=ddpm",
    "edm of a DiT": "loss=edm schedule=linear model=dit_digits embedding=ddpm",
}
RUNS |= DITS
LABEL = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of some options: one step, then weights that are all moved, the EMA's to another place."""

    @cache
    def run(options: str) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        job = Job(compose("train", [*TINY, "sigma_data=1", f"output_dir={folder}", *options.split()]))
        job.fit()
        file = job.folder.path / "checkpoints" / "last.ckpt"
        content = {**checkpoint.load(file), "optimizer_states": []}
        g = torch.Generator().manual_seed(0)
        for name, value in content["state_dict"].items():
            if name.startswith(tuple(PREFIX.values())):
                value += 0.05 * torch.randn(value.shape, generator=g)
        checkpoint.save(content, file)
        return job.folder.path

    return run


def export(folder: Path, run: Path, *options: str) -> Path:
    assert command_line(["export", f"ckpt={run}", f"output={folder}", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Run, Path]]:
    """A run, and the folder that it was exported to."""

    @cache
    def made(name: str, *options: str) -> tuple[Run, Path]:
        folder = tmp_path_factory.mktemp("exported") / "out"
        return denoiselab.load(trained(RUNS[name])), export(folder, trained(RUNS[name]), *options)

    return made


def loop(folder: Path, part: Any, steps: int, x_t: Tensor, **cond: Tensor) -> Tensor:
    """diffusers' network and scheduler, without a pipeline's rounding."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_t = scheduler.step(part(x_t, t.expand(len(x_t)), **cond).sample, t, x_t).prev_sample
    return x_t


def walk(run: Run, noise: Tensor, steps: int, sampler: str = "ddim", **cond: Tensor) -> list[Tensor]:
    """The states of our walk along the levels of a table of the run's schedule, from x_T = noise on the path that has
    alpha^2 + sigma^2 = 1."""
    t = times(run.schedule).flip(0)[:: len(times(run.schedule)) // steps]
    found = make("sampler", sampler, steps=steps, spacing=lambda schedule, n: t)
    first = found.levels(run.schedule)[0]
    start = noise * (first.alpha**2 + first.sigma**2) ** 0.5 / first.sigma
    return [state.x_t for state in found.walk(run.denoiser, run.schedule, start, **cond)]


def normals(run: Run, seed: int, n: int = 4) -> Tensor:
    """As pipelines draw them."""
    return torch.randn(n, *run.parts.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", RUNS)
def test_diffusers_has_the_same_network_and_draws_the_same_samples(name: str, exported):
    run, folder = exported(name)
    if name in DITS:
        part = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    else:
        part = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    noise, label = normals(run, 1), torch.arange(4)
    c_noise = run.schedule.log_snr(times(run.schedule)) / -8
    sign = -1 if "edm" in name else 1  # its target is -v
    for n in (0, 1, 499, 998, 999):
        with torch.no_grad():
            theirs = part(noise, torch.tensor([n] * 4), class_labels=label).sample
            ours = run.denoiser.net(noise, c_noise[n].float().expand(4), label=label)
        assert ours.std() > 0.01
        torch.testing.assert_close(theirs, sign * ours, rtol=1e-5, atol=1e-5)
    if name != "a learned variance":
        theirs, ours = loop(folder, part, 10, noise, class_labels=label), walk(run, noise, 10, label=label)[-1]
        assert relative(theirs, ours) < 1e-4


@pytest.mark.parametrize(("name", "label"), [("eps", LABEL), ("x0", LABEL), ("x0", -1), ("v", LABEL)])
def test_a_pipeline_draws_one_class_or_none_without_our_code(name: str, label: int, exported):
    run, folder = exported(name, f"label={label}")
    made = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(made).__name__ == "DDIMPipeline"
    made.set_progress_bar_config(disable=True)
    images = made(4, torch.Generator().manual_seed(2), num_inference_steps=10, output_type="pt").images
    x_0 = walk(run, normals(run, 2), 10, label=torch.full((4,), label))[-1]
    assert name == "eps" or (x_0.abs() < 1).float().mean() > 0.1  # what is white or black looks alike
    torch.testing.assert_close(images, (x_0 / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_pipeline_for_latents_draws_with_a_dit_and_a_vae(exported):
    run, folder = exported("a DiT")
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"block_out_channels": (8,), "latent_channels": 1, "norm_num_groups": 4}
        vae = diffusers.AutoencoderKL(3, 3, **sizes, **blocks).eval()
    made = diffusers.DiffusionPipeline.from_pretrained(folder, vae=vae)
    assert type(made).__name__ == "DiTPipeline"
    made.set_progress_bar_config(disable=True)
    drawn = {"generator": torch.Generator().manual_seed(2), "num_inference_steps": 10, "output_type": "pt"}
    images = made([3, 1, 4, 1], guidance_scale=1.0, **drawn).images
    x_0 = walk(run, normals(run, 2), 10, label=torch.tensor([3, 1, 4, 1]))[-1]
    with torch.no_grad():
        expected = vae.decode(x_0 / vae.config.scaling_factor).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_pipeline_takes_steps_of_the_learned_variance(exported):
    """But for the last, to which diffusers adds noise."""
    run, folder = exported("a learned variance", f"label={LABEL}")
    made = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(made).__name__ == "DDPMPipeline"
    assert type(made.scheduler).__name__ == "DDPMScheduler"
    made.scheduler.set_timesteps(10)
    x_t, drawn = normals(run, 0), [normals(run, 0)]
    with torch.no_grad():
        for t in made.scheduler.timesteps[:-1]:
            g = torch.Generator().manual_seed(int(t))
            x_t = made.scheduler.step(made.unet(x_t, t).sample, t, x_t, g).prev_sample
            drawn.append(normals(run, int(t)))
    sampler = make("sampler", "ddpm_learned", steps=10, spacing=make("spacing", "trailing"))
    given = iter(drawn)
    states = sampler.walk(run.denoiser, run.schedule, lambda: next(given), label=torch.full((4,), LABEL))
    ours = [state.x_t for state, _ in zip(states, drawn, strict=False)]
    assert relative(x_t, ours[-1]) < 1e-4


def test_another_scheduler_takes_the_table_even_where_it_ends_in_pure_noise(exported):
    """Euler's method in sigma is DDIM; its first sigma is 4,096 for the infinite one."""
    run, folder = exported("v", f"label={LABEL}")
    made = diffusers.DDPMPipeline.from_pretrained(folder)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(made.scheduler.config)
    scheduler.set_timesteps(10)
    x_t = normals(run, 0) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            y = made.unet(scheduler.scale_model_input(x_t, t), t).sample
            x_t = scheduler.step(y, t, x_t).prev_sample
    assert relative(x_t, walk(run, normals(run, 0), 10, label=torch.full((4,), LABEL))[-1]) < 2e-3


@every("schedule")
def test_betas_are_exact_and_diffusers_keeps_them_in_float32(schedule: str):
    path = make("schedule", schedule)
    betas, c_noise = levels(path)
    assert len(betas) == (path.points or 1000)
    assert (betas[:-1] < 1).all()
    log_snr = path.log_snr(times(path))
    abar = (1 - betas).cumprod(0)
    torch.testing.assert_close(abar[:-1], log_snr[:-1].sigmoid(), rtol=1e-11, atol=0)
    torch.testing.assert_close(betas[0], (-log_snr[0]).sigmoid(), rtol=1e-11, atol=0)
    assert abar[-1] == pytest.approx(0 if path(torch.ones(()))[0] == 0 else log_snr[-1].sigmoid().item(), rel=1e-11)
    torch.testing.assert_close(c_noise, -log_snr / 8, rtol=0, atol=1e-12)
    theirs = diffusers.DDIMScheduler.from_config(to_scheduler(betas.tolist(), "epsilon", "trailing", False))
    torch.testing.assert_close(theirs.alphas_cumprod, abar.float(), rtol=5e-5, atol=0)


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_evenly_trailing_levels_of_a_continuous_path_are_points_of_its_table(steps: int):
    path = make("schedule", "vp")
    theirs = diffusers.DDIMScheduler.from_config(to_scheduler(levels(path)[0].tolist(), "epsilon", "trailing", False))
    theirs.set_timesteps(steps)
    torch.testing.assert_close(times(path)[theirs.timesteps], make("spacing", "trailing")(path, steps))


@pytest.mark.parametrize("kind", ["diffusers", "safetensors"])
def test_the_averaged_or_the_raw_weights_are_chosen(kind: str, trained, tmp_path: Path):
    path = trained(RUNS["v"])
    state = checkpoint.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    name, key = {"diffusers": ("unet/diffusion_pytorch_model", "conv_in"), "safetensors": ("model", "net.first")}[kind]
    seen = []
    for weights, prefix in PREFIX.items():
        folder = export(tmp_path / weights, path, f"weights={weights}", f"format={kind}")
        found = load_file(folder / f"{name}.safetensors")[f"{key}.weight"]
        assert torch.equal(found, state[f"{prefix}net.first.weight"])
        assert json.loads((folder / "export.json").read_text())["weights"] == weights
        seen.append(found)
    assert not torch.allclose(*seen)


@pytest.mark.parametrize(
    "options",
    [
        "loss=learned_hybrid schedule=cosine embedding=ddpm",
        "loss=mixed model=mlp data=8gaussians data.n=100",
        "weighting=uncertainty schedule=adaptive",
    ],
)
def test_safetensors_hold_everything_and_load_bit_for_bit(options: str, trained, tmp_path: Path):
    """Any network, loss and data set; what the schedule and the loss have learned goes along."""
    path = trained(options)
    folder = export(tmp_path / "out", path, "format=safetensors")
    content = checkpoint.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    prefixes = (PREFIX["ema"], "schedule.", "loss.")
    expected = {k.removeprefix(PREFIX["ema"]): v for k, v in content.items() if k.startswith(prefixes)}
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[k], v) and stored[k].dtype == v.dtype for k, v in expected.items())
    run, again = denoiselab.load(path), denoiselab.load(folder)
    assert torch.equal(run.sample(n=2, steps=2), again.sample(n=2, steps=2))
    assert again.step == run.step
    assert again.loss.state_dict().keys() == run.loss.state_dict().keys()
    with pytest.raises(UserError, match="holds no raw weights"):
        denoiselab.load(folder, weights="raw")


def test_levels_are_placed_as_the_run_places_them(trained):
    run = denoiselab.load(trained(RUNS["v"]))
    for spacing, expected in (("linspace", "linspace"), ("leading", "leading"), ("karras", "trailing")):
        run.parts.config["spacing"] = denoiselab.build(f"spacing={spacing}").config["spacing"]
        said = files_for(run, None)[0]["scheduler/scheduler_config.json"]
        assert (said["timestep_spacing"], said["clip_sample"]) == (expected, False)


UNKNOWN = {
    "sigma_data=0.5": "sigma_data=0.5; train with sigma_data=1",
    "loss=edm sigma_data=null": "sigma_data=0.847; train with sigma_data=1",
    "loss=flow schedule=flow sigma_data=1": "the target is Flow",
    "loss=consistency schedule=edm sigma_data=1": "the target is Consistency",
    "loss=mixed sigma_data=1": "nothing there is a ThreeHeads",
    "model=mlp data=8gaussians data.n=100": "model=MLP",
    "model=dit_digits sigma_data=1": "embedding=LogSNR: need embedding=ddpm",
    "model=dit_digits_modern embedding=ddpm sigma_data=1": "DiTTransformer2DModel has no such thing",
}


@pytest.mark.parametrize("options", UNKNOWN)
def test_what_diffusers_has_no_way_to_call_is_refused(options: str):
    parts = denoiselab.build("metrics=none", "callbacks=none", *options.split())
    with pytest.raises(UserError, match=f"^format=diffusers: .*{UNKNOWN[options]}.*; {pipeline.OTHERWISE}$"):
        pipeline.diffusers(parts.denoiser, parts.schedule)


MISTAKES = {
    "label=10": "label=10: need a class in 0..9, or -1 for none",
    "label=-2": "label=-2: need a class in 0..9, or -1 for none",
    "label=3 format=safetensors": "label=3: only format=diffusers",
    "format=onnx": "format=onnx: need one of diffusers, safetensors",
    "weights=best": "weights=best: need ema or raw",
    "formt=diffusers": "did you mean format?",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(options: str, trained, tmp_path: Path, capsys):
    path = trained(RUNS["v"])
    capsys.readouterr()
    status = command_line(["export", f"ckpt={path}", f"output={tmp_path / 'out'}", *options.split()])
    said = capsys.readouterr().err
    assert status == 2
    assert MISTAKES[options] in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_and_nothing_else_is(trained, tmp_path: Path, capsys, monkeypatch):
    out, path = tmp_path / "out", trained(RUNS["v"])
    out.mkdir()
    export(out, path, "format=safetensors")
    export(out, path)
    assert sorted(file.name for file in out.iterdir()) == ["export.json", "scheduler", "unet"]
    before = (out / "export.json").read_bytes()

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    assert command_line(["export", f"ckpt={path}", f"output={out}", "weights=raw"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (out / "export.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]

    (out / "unet" / "notes.txt").write_text("mine")
    assert command_line(["export", f"ckpt={path}", f"output={out}"]) == 2
    assert "holds unet/notes.txt, which no export wrote" in capsys.readouterr().err
    assert (out / "unet" / "notes.txt").read_text() == "mine"


def fails(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")
