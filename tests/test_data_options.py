"""Every data option that reads files: composed, checked and trained on, as a command would."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
import yaml

from data_files import overrides
from denoiselab import data
from denoiselab.checks import check
from denoiselab.compose import compose, conf_dir
from denoiselab.data import Digits, EightGaussians
from denoiselab.data.images import InMemory, ReadFromDisk
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve

ROOT = Path(__file__).parents[1]
FILES = ["cifar10", "cifar100", "fashion_mnist", "huggingface", "image_folder", "mnist", "shards"]
SMALL = ["metrics=none", "callbacks=none", "model.channels=32"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", FILES)
def test_an_option_composes_and_its_objects_are_made(name, tmp_path, monkeypatch):
    parts = Parts(resolve(compose("train", [*overrides(name, tmp_path / "set", monkeypatch), *SMALL])))
    check(parts)
    made = parts.data
    assert isinstance(made, InMemory | ReadFromDisk)
    assert parts.shape == made.train.batch(slice(0, 1))["x_0"].shape[1:] == made.held_out.x_0.shape[1:]
    assert parts.num_classes == made.num_classes > int(made.train.label.max())
    assert parts.bins == 256
    ids = [*made.train.ids.tolist(), *made.held_out.ids.tolist()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", FILES)
def test_every_option_can_be_wrapped_in_pairs(name, tmp_path, monkeypatch):
    named = {f"data={name}": f"data@data.images={name}", "data.batch_size=8": "data.batch_size=8"}
    lines = overrides(name, tmp_path / "set", monkeypatch)
    lines = [named.get(line, line.replace("data.", "data.images.", 1)) for line in lines]
    parts = Parts(resolve(compose("train", ["data=super_resolution", *lines, *SMALL])))
    check(parts)
    made, alone = parts.data, parts.data.images
    assert isinstance(alone, InMemory | ReadFromDisk)
    assert (made.batch_size, alone.batch_size, made.workers) == (8, 8, alone.workers)
    for part in (made.train, made.held_out):
        batch = part.draw(3)
        assert batch["cond"]["low_res"].shape == (3, made.shape[0], made.shape[1] // 2, made.shape[2] // 2)
    assert "batch_size" not in made.by_content(parts.config["data"])["images"]


@pytest.mark.parametrize("name", ["cifar10", "shards"])
def test_a_run_trains_and_is_evaluated_on_it(name, train, tmp_path, monkeypatch):
    lines = [*overrides(name, tmp_path / "set", monkeypatch), *SMALL, "data.flip=true", "data.held_out=4"]
    run = train(*lines, "trainer.max_steps=2", "evaluation.n=2", "sampler.steps=1")
    assert "held_out_loss" in next(run.rglob("evaluations/**/*.json")).read_text()


@pytest.mark.parametrize("name", ["huggingface", "image_folder", "shards"])
def test_where_the_files_lie_must_be_said(name):
    with pytest.raises(UserError, match=r"^data\.root=\?\?\?: this option must be given$"):
        resolve(compose("train", [f"data={name}"]))


def test_no_option_is_forgotten():
    files = sorted(conf_dir().glob("data/*.yaml"))
    classes = {file.stem: yaml.safe_load(file.read_text())["_target_"].rpartition(".")[2] for file in files}
    reading = [
        name for name, made in classes.items() if issubclass(getattr(data, made, object), InMemory | ReadFromDisk)
    ]
    assert sorted(reading) == FILES


def test_the_set_of_ones_own_on_the_page_works(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "data.md").read_text(), re.M | re.S)
    (block,) = (block for block in blocks if "class Slides" in block)
    for i in range(40):
        (tmp_path / f"{i:02d}.slide").write_bytes(bytes([i]) * 12)

    def read_slide(file: Path) -> torch.Tensor:
        return torch.tensor([*file.read_bytes()], dtype=torch.uint8).view(3, 2, 2)

    names = {"Source": data.Source, "ReadFromDisk": data.ReadFromDisk, "Path": Path, "Tensor": torch.Tensor}
    scope = {**names, "hashlib": hashlib, "read_slide": read_slide}
    exec(block, scope)
    made = scope["MySlides"](str(tmp_path))
    batch = made.train.batch(slice(None))
    assert torch.equal(((batch["x_0"][:, 0, 0, 0] + 1) * 127.5).round().long(), batch["id"])
    assert (len(made.train), len(made.held_out), made.num_classes) == (36, 4, 0)
    assert made.by_content({"root": "a"}).keys() == {"content"}
    (tmp_path / "39.slide").write_bytes(bytes(11))
    with pytest.raises(data.BadSample, match=r"/39\.slide \(index 39\): shape"):
        scope["MySlides"](str(tmp_path))


@pytest.mark.parametrize("train", [Digits().train, EightGaussians(n=100).train])
def test_samples_drawn_for_a_measurement_are_different_and_fixed_by_the_seed(train):
    batch, again, other = train.draw(30), train.draw(30), train.draw(30, seed=1)
    ids = batch["id"].tolist()
    assert len(set(ids)) == 30
    assert ids == sorted(ids) == again["id"].tolist() != other["id"].tolist()
    assert (batch["x_0"] == train.batch((train.ids[:, None] == batch["id"]).any(1))["x_0"]).all()
    assert len(train.draw(10**6)["id"]) == len(train)
