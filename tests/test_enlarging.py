"""Runs that are told more than a class: what their samples are made of, measured, shown, and given by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import denoiselab
from denoiselab.callbacks import SampleGrid
from denoiselab.cli import import_
from denoiselab.cli import sample as sample_command
from denoiselab.compose import compose
from denoiselab.data import Data, Digits, Samples, SuperResolution
from denoiselab.data.base import Batch
from denoiselab.data.codec import Identity
from denoiselab.data.super_resolution import bicubic
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.evaluation import evaluate
from denoiselab.experiment import Parts, resolve
from denoiselab.metrics import Fidelity
from denoiselab.metrics.pairs import fidelity
from denoiselab.pictures import enlargements, tiles
from denoiselab.run import Run
from exact import normals
from test_exchange_adm import SETTINGS, of_adm

PAIRS = ("data=super_resolution", "metrics=super_resolution", "model.channels=16", "trainer.threads=1")
SHORT = ("trainer.max_steps=2", "sampler=ddim", "sampler.steps=1", "evaluation.n=1000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two steps on pairs of digits with their labels, with pictures, measured on every held-out pair."""
    from denoiselab.training import Job

    out = tmp_path_factory.mktemp("pairs")
    shown = ("callbacks.sample_grid.n=12", "callbacks.sample_grid.every=2", "callbacks.guidance_sweep.n=3")
    made = Job(compose("train", ["debug=quick", *PAIRS, *SHORT, *shown, f"output_dir={out}"]))
    made.run()
    return made.folder.path


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return denoiselab.load(folder)


@pytest.fixture(scope="module")
def small() -> Tensor:
    """Four digits, 4 x 4."""
    return SuperResolution(Digits, factor=2).held_out.draw(4)["cond"]["low_res"]


def test_an_evaluation_pairs_each_sample_with_the_image_it_was_made_of(folder: Path, run: Run):
    """And takes labels from it too; no more samples than held-out images."""
    (file,) = folder.glob("evaluations/*/evaluation.json")
    found = json.loads(file.read_text())
    protocol, records = found["protocol"], {record["name"]: record for record in found["records"]}
    assert (protocol["n"], protocol["label_policy"], protocol["made_of"]) == (360, "held-out", ["held-out low_res"])
    real = Digits().held_out.draw(360)
    made = run.sample(360, real["cond"]["label"].tolist(), steps=1)
    for name, value in fidelity(made, real["x_0"]).items():
        assert records[name]["value"] == pytest.approx(value, rel=1e-4)
    assert torch.equal(made, run.sample(360, steps=1))  # the same labels
    control = bicubic(run.held_out(360)["cond"]["low_res"], (8, 8))
    assert records["psnr"]["controls"]["bicubic"] == pytest.approx(fidelity(control, real["x_0"])["psnr"], rel=1e-6)
    assert records.keys() >= {"psnr", "ssim", "mse", "consistency", "held_out_loss"}
    other = fidelity(made.roll(1, 0), real["x_0"])["psnr"]
    assert other != pytest.approx(records["psnr"]["value"], rel=1e-3)


def test_pictures_show_small_bicubic_sample_and_real(folder: Path, run: Run):
    column = tiles(torch.zeros(10, 1, 8, 8), 10)
    with Image.open(next(folder.glob("pictures/sample_grid_*2.png"))) as grid:
        assert grid.size == (90 + column.width, 8 * column.height)  # 12 images: two blocks of four rows
    assert list(folder.glob("diagnostics/guidance_sweep/*/picture.png"))
    low_res, real = normals(3, 1, 4, 4).tanh(), normals(3, 1, 8, 8, seed=1).tanh()
    samples = normals(6, 1, 8, 8, seed=2).tanh()
    page = np.asarray(enlargements(low_res, samples, real))
    rows = [
        low_res.repeat_interleave(2, -1).repeat_interleave(2, -2),
        bicubic(low_res, (8, 8)),
        *samples.split(3),
        real,
    ]
    height = page.shape[0] // 5
    for k, images in enumerate(rows):
        assert np.array_equal(page[k * height : (k + 1) * height, 90:], np.asarray(tiles(images, 3)))


def test_the_condition_reaches_the_network_and_each_sample_its_own(run: Run, small: Tensor):
    made = run.sample(4, steps=2, label=3, given={"low_res": small})
    assert torch.allclose(made[2:3], run.sample(4, steps=2, label=3, given={"low_res": small[2:3]})[2:3], atol=1e-5)
    assert (made - run.sample(4, steps=2, label=3, given={"low_res": small.flip(0)})).abs().max() > 1e-3
    again = run.sample(6, steps=2, label=3, given={"low_res": small})  # in turn
    assert torch.allclose(again[4:], run.sample(6, steps=2, label=3, given={"low_res": small[[0, 1, 2, 3, 0, 1]]})[4:])
    assert run.cond(3, given={"low_res": small})["label"].tolist() == [-1, -1, -1]
    assert run.cond(3)["label"].tolist() == run.held_out(3)["cond"]["label"].tolist()
    assert run.cond(3, 7)["label"].tolist() == [7, 7, 7]
    guided = run.sample(4, steps=2, label=3, scale=3.0, given={"low_res": small})
    assert (guided - made).abs().max() > 1e-3


def levels(images: Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().byte().numpy()


def shown(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def test_what_is_held_out_is_asked_for_in_its_order(run: Run):
    """In evaluations, in Python, and in pictures during training."""
    real = Digits().held_out.draw(5)
    small = real["x_0"].unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3))
    asked = []

    def denoiser(x_t: Tensor, *level: Tensor, **cond: Tensor) -> Tensor:
        asked.append(cond)
        return x_t

    module: Any = SimpleNamespace(device=torch.device("cpu"), schedule=run.schedule, codec=run.codec)
    grid = SampleGrid(SuperResolution(Digits), run.parts.sampler, lambda made: made, Path(), n=5)
    _, shown = grid.draw(module, denoiser, grid.ids)
    for cond in (run.held_out(5)["cond"], run.cond(5), shown, asked[0]):
        assert (cond["low_res"] - small).abs().max() < 1e-6
        assert torch.equal(cond["label"], real["cond"]["label"])
        assert cond.keys() == {"label", "low_res"}
    assert len(SampleGrid(SuperResolution(Digits), run.parts.sampler, lambda made: made, Path(), n=1000).ids) == 360


def test_own_pictures_are_enlarged(folder: Path, run: Run, small: Tensor, tmp_path: Path):
    given = torch.from_numpy(levels(small)).float() / 127.5 - 1
    (tmp_path / "mine").mkdir()
    for name, image in zip("dcba", given, strict=True):
        Image.fromarray(levels(image[0])).save(tmp_path / "mine" / f"{name}.png")
    np.save(tmp_path / "mine" / "e.npy", given[0, 0].numpy())
    common = [f"ckpt={folder}", "sampler.steps=2", f"output={tmp_path / 'out'}"]
    assert sample_command.main([*common, f"low_res={tmp_path / 'mine'}", "n=10", "label=2"]) == 0
    made = torch.from_numpy(np.load(tmp_path / "out" / "samples.npy"))
    in_order = torch.cat([given.flip(0), given[:1]])
    expected = run.sample(10, 2, steps=2, given={"low_res": in_order})
    assert torch.allclose(made, expected, atol=1e-6)
    files = sorted(file.name for file in (tmp_path / "out").glob("0*.png"))
    assert (files[0], files[5], len(files)) == ("0000_a.png", "0005_a.png", 10)
    assert np.array_equal(shown(tmp_path / "out" / files[1]), levels(made[1, 0]))
    assert np.array_equal(shown(tmp_path / "out" / "samples.png"), np.asarray(enlargements(in_order, made)))
    assert sample_command.main([*common, f"low_res={tmp_path / 'mine' / 'a.png'}"]) == 0
    assert np.load(tmp_path / "out" / "samples.npy").shape == (1, 1, 8, 8)


def test_without_a_picture_held_out_ones_are_enlarged(folder: Path, run: Run, tmp_path: Path):
    common = [f"ckpt={folder}", "sampler.steps=1", f"output={tmp_path}"]
    assert sample_command.main([*common, "n=5"]) == 0
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "samples.npy")), run.sample(5, steps=1), atol=1e-6)
    batch = run.held_out(5)
    expected = enlargements(batch["cond"]["low_res"], run.sample(5, steps=1), batch["x_0"])
    assert np.array_equal(shown(tmp_path / "samples.png"), np.asarray(expected))


def test_what_cannot_be_enlarged_is_refused_in_one_line(
    folder: Path, example_run: Path, tmp_path: Path, run: Run, monkeypatch
):
    loaded = {str(folder): run, str(example_run): denoiselab.load(example_run)}
    monkeypatch.setattr("denoiselab.run.load", lambda ckpt, weights: loaded[ckpt])

    def refused(expected: str, *options: str, ckpt: Path = folder) -> None:
        with pytest.raises(UserError, match=expected) as error:
            sample_command.main([f"ckpt={ckpt}", f"output={tmp_path / 'out'}", "sampler.steps=1", *options])
        assert "\n" not in str(error.value)

    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "wrong.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "right.png")
    np.save(tmp_path / "bytes.npy", np.full((4, 4), 200.0))
    (tmp_path / "no.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    refused(
        r"wrong\.png: is 1 x 5 x 4; need 1 x 4 x 4, which become 8 x 8 pixels$", f"low_res={tmp_path / 'wrong.png'}"
    )
    refused(r"bytes\.npy: has values from 200 to 200; need numbers in \[-1, 1\]$", f"low_res={tmp_path / 'bytes.npy'}")
    refused(r"no\.png: not an image that Pillow can read$", f"low_res={tmp_path / 'no.png'}")
    refused(r"low_res=.*empty: need a picture, or a folder of pictures$", f"low_res={tmp_path / 'empty'}")
    refused(r"low_res=nowhere: need a picture", "low_res=nowhere")
    refused(
        r"enlarges no images; that wants a run with data=super", f"low_res={tmp_path / 'right.png'}", ckpt=example_run
    )
    refused(r"n=two: need at least 1", "n=two")
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.png").write_bytes((tmp_path / "right.png").read_bytes())
    refused(r"n=3: need as many samples of each of the 2 pictures, as in n=2$", f"low_res={tmp_path / 'two'}", "n=3")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"^n=361: samples are made of held-out ones, and there are 360$"):
        run.sample(361)
    with pytest.raises(UserError, match=r"^vector: this model was trained without it$"):
        run.sample(2, given={"vector": torch.zeros(2, 3)})


def test_without_the_data_only_given_images_are_enlarged(run: Run, small: Tensor, monkeypatch):
    def gone(self):
        raise UserError("data.root=nowhere: no such folder")

    monkeypatch.setattr(Digits, "held_out", property(gone), raising=False)
    monkeypatch.setattr(SuperResolution, "held_out", property(gone))
    assert run.sample(2, steps=1, given={"low_res": small}).shape == (2, 1, 8, 8)
    with pytest.raises(
        UserError, match=r"^low_res: not given, and the held-out ones cannot be had: data\.root=nowhere"
    ):
        run.sample(2, steps=1)


def test_an_imported_network_enlarges_without_its_data(tmp_path: Path):
    """One of guided-diffusion's, 3 x 8 x 8 to 3 x 16 x 16."""
    state, _ = of_adm("low_res")
    torch.save(state, tmp_path / "model.pt")
    settings = {"channels": 64, "blocks": 1, **SETTINGS["low_res"]}
    data = ["data=super_resolution", "data@data.images=unknown", "data.images.shape=[3,16,16]", "data.factor=2"]
    options = [*data, f"data.images.num_classes={len(state['label_emb.weight'])}", "p_null=0", "schedule=linear"]
    model = ["model=unet_sr64_256", *(f"model.{name}={value}" for name, value in settings.items())]
    import_.main([f"source={tmp_path / 'model.pt'}", *model, *options, f"output_dir={tmp_path}"])
    run = denoiselab.load(next(tmp_path.glob("*/*/checkpoints/last.ckpt")).parents[1])
    one, other = (normals(1, 3, 8, 8, seed=seed).tanh().float() for seed in (0, 1))
    made = run.sample(1, 2, steps=2, given={"low_res": one})
    assert made.shape == (1, 3, 16, 16)
    assert (made - run.sample(1, 2, steps=2, given={"low_res": other})).abs().max() > 0.1
    with pytest.raises(
        UserError, match=r"^low_res: not given, and the held-out ones cannot be had: data=unknown: it has"
    ):
        run.sample(1, 2, steps=2)


def test_a_model_never_trained_without_a_class_must_be_told_one(run: Run, small: Tensor, monkeypatch):
    monkeypatch.setitem(run.parts.config, "p_null", 0)
    with pytest.raises(UserError, match=r"^label=null: this model was trained with p_null=0, never without a class"):
        run.sample(2, given={"low_res": small})
    assert run.cond(2, 5, {"low_res": small})["label"].tolist() == [5, 5]


class Told(Samples):
    """With a vector beside each."""

    def batch(self, index) -> Batch:
        found = super().batch(index)
        return {**found, "cond": {**found["cond"], "vector": found["x_0"].flatten(1)[:, 20:23]}}


class Vectors(Data):
    """Digits of which three pixels are told."""

    shape, num_classes, vector = (1, 8, 8), 10, 3

    def __init__(self):
        super().__init__(16)
        parts = [Digits().held_out.batch(slice(k, k + 50)) for k in (0, 50)]
        self.codec = Identity(0.7)
        self.train, self.held_out = (Told(part["x_0"], part["cond"]["label"], part["id"]) for part in parts)


def test_vectors_come_from_the_held_out_set_too(tmp_path: Path):
    parts = Parts(
        resolve(compose("train", ["model.channels=16", "sampler.steps=1", "evaluation.n=40", "metrics=none"]))
    )
    parts.data = Vectors()
    parts.metrics = {"pairs": Fidelity()}
    torch.manual_seed(0)
    denoiser: Denoiser = parts.denoiser
    with torch.no_grad():
        for p in denoiser.parameters():
            p += 0.05 * torch.randn_like(p)  # what starts at zero listens to nothing
    run = Run(parts, denoiser, 0, "ema", tmp_path, {}, {})
    assert run.made_of == ["vector"]
    batch = parts.data.held_out.draw(40)
    assert torch.equal(run.cond(40)["vector"], batch["cond"]["vector"])
    assert torch.equal(run.cond(40)["label"], batch["cond"]["label"])
    found = json.loads((evaluate(run, parts) / "evaluation.json").read_text())
    made = run.draw(parts, batch["cond"], range(40))[0]
    value = next(record["value"] for record in found["records"] if record["name"] == "psnr")
    assert value == pytest.approx(fidelity(made, batch["x_0"])["psnr"], rel=1e-6)
    assert found["protocol"]["made_of"] == ["held-out vector"]
    with pytest.raises(UserError, match=r"^vector: has shape \(2, 4\); need 3 numbers in each row$"):
        run.cond(2, given={"vector": torch.zeros(2, 4)})


def test_inpainting_on_the_page_keeps_what_is_known_and_fills_in_the_rest(example_run: Path):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "replacement" in b)
    run, image = denoiselab.load(example_run), Digits().held_out.draw(4)["x_0"]
    scope = {"torch": torch, "run": run, "image": image}
    exec(block, scope)
    filled = scope["filled"]
    assert torch.equal(filled[..., :4], image[..., :4])
    assert (filled[..., 4:] - image[..., 4:]).abs().max() > 0.1
    unaware = run.sample(4, 3)
    assert (filled - unaware)[..., 4:].abs().max() > 1e-3  # the rest is not what it would have been
