"""FSDP2 on two processes of a CPU: the same numbers as without, and the ordinary checkpoint."""

from pathlib import Path

import pytest
import torch

import denoiselab
from denoiselab import checkpoint
from warm import Warm

OPTIONS = ["data=digits", "data.batch_size=16", "model=dit_digits", "model.depth=2", "model.width=32", "model.heads=2"]
OPTIONS += ["metrics=none", "callbacks=none", "trainer.threads=1", "trainer.gradient_clip=0.05"]
OPTIONS += ["trainer.checkpoint_every=2", "evaluation.n=4", "sampler.steps=2"]
TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]


def begin(output: Path, *options: str) -> Warm:
    return Warm(output, "train", *OPTIONS, f"output_dir={output}", *options)


def train(output: Path, *options: str) -> Path:
    """The directory of a finished run."""
    made = begin(output, *options)
    assert made.wait(240) == 0, made.said[-2000:]
    (run,) = output.glob("*/*/identity.json")
    return run.parent


def state(run: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.load(run / "checkpoints" / "last.ckpt")["state_dict"]
    return {key: value for key, value in content.items() if key.startswith(("denoiser.", "ema."))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Six steps by DDP, and by FSDP2 killed on the way."""
    folder = tmp_path_factory.mktemp("sharding")
    found = {"ddp": train(folder / "ddp", *TWO, "trainer.strategy=ddp", "trainer.max_steps=6")}
    sharded = ["trainer=fsdp", *TWO, "trainer.max_steps=6"]
    first = begin(folder / "fsdp", *sharded)
    first.when(lambda: [*(folder / "fsdp").rglob("last.ckpt.sha256")], 120)
    first.end()
    (saved,) = (folder / "fsdp").rglob("last.ckpt")
    found["killed_at"] = checkpoint.load(saved)["global_step"]
    found["fsdp"] = train(folder / "fsdp", *sharded)
    return found


def test_sharded_weights_and_averages_are_those_of_whole_ones(runs):
    assert runs["killed_at"] < 6
    theirs, ours = state(runs["ddp"]), state(runs["fsdp"])
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    start = next(key for key in theirs if key.endswith("blocks.0.mlp.0.weight"))
    assert (theirs[start] - state(runs["ddp"])[f"ema.model.{start.removeprefix('denoiser.')}"]).abs().max() > 1e-5


def test_the_checkpoint_is_the_ordinary_one(runs):
    theirs, ours = (checkpoint.load(runs[kind] / "checkpoints" / "last.ckpt") for kind in ("ddp", "fsdp"))
    assert theirs["global_step"] == ours["global_step"] == 6
    assert runs["ddp"].name == runs["fsdp"].name
    first, second = (content["optimizer_states"][0]["state"] for content in (theirs, ours))
    assert first.keys() == second.keys()
    for number in first:
        assert first[number]["exp_avg"].shape == second[number]["exp_avg"].shape
    image = denoiselab.load(runs["fsdp"]).sample(n=2, steps=2)
    torch.testing.assert_close(image, denoiselab.load(runs["ddp"]).sample(n=2, steps=2), rtol=0, atol=1e-4)


def test_a_sharded_run_goes_on_unsharded(runs, tmp_path):
    output = runs["fsdp"].parents[1]
    run = train(output, "trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_steps=8")
    assert run == runs["fsdp"]
    assert checkpoint.load(run / "checkpoints" / "last.ckpt")["global_step"] == 8
