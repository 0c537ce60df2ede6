"""Folders of latents that are damaged, or were made to harm: each is named in one line, and nothing is run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from denoiselab.compose import compose
from denoiselab.data import Latents, autoencoders
from denoiselab.errors import CheckpointError, UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.models import VQ
from latents import autoencoder

pytestmark = pytest.mark.faults


def _truncate(folder: Path) -> None:
    file = folder / "train-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _reshape(folder: Path) -> None:
    file = folder / "train-00001.safetensors"
    save_file({name: value[:-1] for name, value in load_file(file).items()}, file)


def _edit(key: str, value: object):
    def edit(folder: Path) -> None:
        index = json.loads((folder / "latents.json").read_text())
        (folder / "latents.json").write_text(json.dumps({**index, key: value}))

    return edit


def _another_encoder(folder: Path) -> None:
    autoencoder(folder / "encoder", VQ)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"train-00001\.safetensors: missing, truncated, or not a shard"),
        (_reshape, r"train-00001\.safetensors: holds .* need 500 latents of shape \(2, 4, 4\)"),
        (lambda folder: (folder / "train-00002.safetensors").unlink(), r"train-00002\.safetensors: missing"),
        (lambda folder: (folder / "latents.json").unlink(), r"^data\.root=.*copy: no latents\.json is there"),
        (lambda folder: (folder / "latents.json").write_text("{"), r"latents\.json: cannot be read"),
        (lambda folder: (folder / "latents.json").write_text("[]"), r"latents\.json: not the index of latents"),
        (_edit("version", 2), r"latents\.json: has layout 2; this denoiselab reads 1"),
        (_edit("scale", "x"), r"latents\.json: says nothing usable of its scale"),
        (_edit("splits", {"train": [{"file": "../x", "n": 1}], "held_out": []}), r"its train shards"),
        (_another_encoder, r"encoder: holds another autoencoder than the latents were made with"),
        (lambda folder: shutil.rmtree(folder / "encoder"), r"encoder: no autoencoder is there"),
        (lambda folder: (folder / "encoder" / "config.json").write_text("{}"), r"encoder: no autoencoder is there"),
        (lambda folder: (folder / "encoder" / "config.json").write_text("{"), r"encoder: config\.json is not JSON"),
        (_edit("scale", -1.0), r"latents\.json: says nothing usable of its mean, scale or reconstruction"),
        (_edit("mean", [0.0]), r"latents\.json: says nothing usable of its mean, scale or reconstruction"),
        (_edit("reconstruction", {"psnr": "high"}), r"latents\.json: says nothing usable of its mean, scale"),
    ],
)
def test_what_is_damaged_is_named_in_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises((UserError, CheckpointError), match=message) as error:
        Latents(root=str(copy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [("os.system", "nothing was run"), ("denoiselab.models.UNet", "UNet is no autoencoder")],
)
def test_a_folder_cannot_name_what_is_no_autoencoder(encoder, tmp_path, target, message):
    folder = Path(shutil.copytree(encoder, tmp_path / "hostile"))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["_target_"] = target
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        autoencoders.read(folder)


def test_the_source_of_a_foreign_index_may_not_name_anything(copy):
    _edit("source", {"_target_": "os.system", "command": "true"})(copy)
    parts = Parts(resolve(compose("train", [f"data.root={copy}", "data=latents"])))
    with pytest.raises(UserError, match="nothing was run"):
        _ = parts.images
