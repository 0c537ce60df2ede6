"""Runs logged to TensorBoard, read back from its events; and the tables beside metrics.jsonl."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from denoiselab.callbacks import TrainingMetrics
from denoiselab.compose import compose
from denoiselab.rows import rows as all_rows
from denoiselab.training import Job

MODEL = ("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1")
QUICK = ("metrics=none", "trainer.threads=1", "evaluation.n=2", "sampler.steps=1", "trainer.checkpoint_every=4")
PICTURES = ("callbacks=points", "callbacks.sample_grid.n=8", "callbacks.guidance_sweep.n=4")
OFTEN = ("callbacks.buckets.every=5", "callbacks.sample_grid.every=5", "callbacks.guidance_sweep.every=10")
TINY = (*MODEL, *QUICK, *PICTURES, *OFTEN, "trainer.max_steps=10", "trainer.log_every=1", "logger=tensorboard")


def trained(root: Path, *overrides: str) -> Path:
    job = Job(compose("train", [*TINY, f"output_dir={root}", *overrides]))
    job.run()
    return job.folder.path


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()


def rows(folder: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in all_rows(folder / "metrics.jsonl") if name in row}


def scalars(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(name)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def found(run: Path) -> EventAccumulator:
    return events(run)


def test_scalars_are_those_of_the_run(run: Path, found: EventAccumulator):
    for name in ("train/loss", "val/loss", "speed/steps_per_second"):
        assert scalars(found, name) == [(step, pytest.approx(value)) for step, value in rows(run, name).items()]
    kept = rows(run, "buckets/val/eps")
    assert scalars(found, "buckets/val/eps/03") == [(step, pytest.approx(row[3])) for step, row in kept.items()]


def test_pictures_are_those_of_the_run(run: Path, found: EventAccumulator):
    assert {"pictures/sample_grid", "pictures/buckets", "pictures/guidance_sweep"} <= {*found.Tags()["images"]}
    for event in found.Images("pictures/sample_grid"):
        mine = Image.open(run / "pictures" / f"sample_grid_{event.step:08d}.png").convert("RGB")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), np.asarray(mine))
    assert [event.step for event in found.Images("pictures/sample_grid")] == [5, 10]


def test_errors_by_t_are_shown_together(found: EventAccumulator):
    content = found.SummaryMetadata("custom_scalars__config__")
    assert content.plugin_data.plugin_name == "custom_scalars"
    (event,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert [chart.title for chart in category.chart][:2] == ["val: x_0", "val: eps"]
    assert list(category.chart[1].multiline.tag) == [r"^buckets/val/eps/\d+$"]


def test_options_stand_with_what_was_measured(run: Path, found: EventAccumulator):
    (file,) = run.glob("evaluations/*/evaluation.json")
    (record,) = json.loads(file.read_text())["records"]
    assert scalars(found, "evaluation/held_out_loss") == [(10, pytest.approx(record["value"]))]
    begin = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(begin).session_start_info.hparams
    assert session["schedule"].string_value == "cosine"
    assert session["seed"].number_value == 0
    assert session["model.width"].string_value == "8"
    experiment = found.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["evaluation/held_out_loss"]


def test_a_run_that_goes_on_shows_every_step_once(tmp_path: Path, monkeypatch):
    log = TrainingMetrics.run

    def dies(self, trainer, pl_module):
        log(self, trainer, pl_module)
        if trainer.global_step == 7:  # rows 5, 6 and 7 are newer than the checkpoint
            raise RuntimeError("dead")

    monkeypatch.setattr(TrainingMetrics, "run", dies)
    with pytest.raises(RuntimeError, match="dead"):
        trained(tmp_path, "callbacks.buckets.every=1")
    (folder,) = tmp_path.glob("runs/*/")
    before = events(folder)
    assert [step for step, _ in scalars(before, "train/loss")] == [*range(1, 8)]
    monkeypatch.setattr(TrainingMetrics, "run", log)
    assert trained(tmp_path, "callbacks.buckets.every=1") == folder
    after = events(folder)
    for name in ("train/loss", "val/loss"):
        assert scalars(after, name) == [(step, pytest.approx(value)) for step, value in rows(folder, name).items()]
    assert [event.step for event in after.Images("pictures/buckets")] == [*range(1, 11)]
    assert [event.step for event in after.Images("pictures/sample_grid")] == [5, 10]


def test_a_run_that_was_begun_without_is_filled_in(run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(run, tmp_path / "runs" / run.name))
    shutil.rmtree(folder / "tensorboard")
    assert trained(tmp_path) == folder
    again = events(folder)
    for name in ("train/loss", "val/loss", "evaluation/held_out_loss"):
        assert scalars(again, name) == scalars(events(run), name)
    assert [event.step for event in again.Images("pictures/guidance_sweep")] == [10]
    before = sorted(folder.rglob("events.*"))
    assert trained(tmp_path) == folder
    assert sorted(folder.rglob("events.*")) == before


def test_tables_beside_the_rows_have_what_was_measured(run: Path):
    (file,) = run.glob("evaluations/*/evaluation.json")
    content = json.loads(file.read_text())
    (line,) = csv.DictReader((run / "evaluations.csv").read_text().splitlines())
    assert float(line["value"]) == content["records"][0]["value"]
    assert json.loads(line["protocol"])["spacing"] == content["protocol"]["spacing"]
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in table] == [*range(1, 11)]
    assert float(table[-1]["evaluation/held_out_loss"]) == content["records"][0]["value"]
    assert {int(row["step"]): float(row["train/loss"]) for row in table} == rows(run, "train/loss")
    assert table[0]["evaluation/held_out_loss"] == ""
