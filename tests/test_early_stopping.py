"""Training ends where the held-out loss of the averaged weights no longer falls, and keeps the best."""

import json
from pathlib import Path
from typing import Any

import pytest

from denoiselab import checkpoint, load
from denoiselab.compose import compose
from denoiselab.errors import UserError
from denoiselab.experiment import identity, resolve
from denoiselab.training import Job
from healthy import POINTS, trained
from runs import differences, last
from warm import Warm

WORSE = ("data.n=300", "data.batch_size=64", "model.width=16", "model.depth=1", "optimizer.lr=0.1", "ema.decay=0.5")
"""A network of few samples with large steps, which does not go on getting better."""
STOPPING = (*WORSE, "early_stopping.patience=2", "early_stopping.every=20", "trainer.checkpoint_every=30")


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "early_stopping/loss" in row]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("stopped"), *STOPPING)


def test_it_stops_after_so_many_losses_without_a_new_best(stopped: Path):
    losses = [row["early_stopping/loss"] for row in rows(stopped)]
    best = losses.index(min(losses))
    assert [row["step"] for row in rows(stopped)] == [20 * (k + 1) for k in range(len(losses))]
    assert len(losses) == best + 1 + 2 < 30
    assert [row["early_stopping/best"] for row in rows(stopped)] == [min(losses[: k + 1]) for k in range(len(losses))]
    assert last(stopped)["global_step"] == 20 * len(losses)


def test_the_run_stands_for_its_best_weights(stopped: Path):
    """best.ckpt is whole, is what loading and evaluating the folder means, and gives the best loss again."""
    losses = [row["early_stopping/loss"] for row in rows(stopped)]
    step = 20 * (losses.index(min(losses)) + 1)
    assert checkpoint.load(stopped / "checkpoints" / "best.ckpt")["global_step"] == step == load(stopped).step
    (file,) = stopped.glob("evaluations/*/evaluation.json")
    assert json.loads(file.read_text())["protocol"]["step"] == step


def test_the_loss_is_the_logged_held_out_loss(tmp_path: Path):
    """val/loss, of the EMA weights at fixed noise, where both are measured."""
    run = trained(tmp_path, *WORSE, "early_stopping.patience=9", "early_stopping.every=10", "trainer.max_steps=10",
                  "callbacks=points", "~callbacks.sample_grid", "~callbacks.guidance_sweep",
                  "callbacks.buckets.every=10")  # fmt: skip
    (row,) = rows(run)
    (buckets,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val/loss" in line]
    assert row["early_stopping/loss"] == pytest.approx(buckets["val/loss"], rel=1e-12)
    assert row["early_stopping/loss"] != pytest.approx(buckets["val/loss_raw"], rel=1e-6)


def test_a_stopped_run_is_not_trained_further(stopped: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in (stopped / "checkpoints").iterdir()}
    trained(stopped.parents[1], *STOPPING, "trainer.max_steps=900")
    assert "already done, and stopped early" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (stopped / "checkpoints").iterdir()} == before


def test_an_interrupted_run_stops_at_the_same_step_with_the_same_weights(stopped: Path, tmp_path: Path):
    for steps in (30, 50, 600):
        again = trained(tmp_path, *STOPPING, f"trainer.max_steps={steps}")
    assert again.name == stopped.name
    assert rows(again) == rows(stopped)
    assert not [d for d in differences(last(again), last(stopped)) if d.startswith(".state_dict")]


def test_it_is_part_of_the_address_only_where_it_is_asked_for():
    config = resolve(compose("train", POINTS))
    assert "early_stopping" not in identity(config, None)
    asked = resolve(compose("train", [*POINTS, "early_stopping.patience=3"]))
    assert identity(asked, None)["early_stopping"] == {"patience": 3, "every": 500}


@pytest.mark.parametrize(
    ("line", "need"),
    [
        ("early_stopping.patience=0", "a whole number of at least 1"),
        ("early_stopping.patience=x", "a whole number or null"),
        ("early_stopping.every=0", "a whole number of at least 1"),
    ],
)
def test_a_wrong_value_is_refused(line: str, need: str):
    with pytest.raises(UserError, match=rf"{line}: need {need}"):
        Job(compose("train", [*POINTS, line]))


def test_two_ranks_measure_the_loss_of_one_and_stop_together(tmp_path: Path):
    """At a learning rate of zero the weights are those of the seed, whatever the number of ranks; an odd number of
    held-out samples."""
    options = [*POINTS, *WORSE, "data.n=335", "optimizer.lr=0", "early_stopping.patience=1", "early_stopping.every=2"]
    found = {}
    for name, devices in (("one", []), ("two", ["trainer=ddp_cpu", "trainer.threads=1"])):
        made = Warm(tmp_path / name, "train", *options, *devices)
        assert made.wait() == 0, made.said
        (run,) = tmp_path.glob(f"{name}/outputs/points/*/identity.json")
        found[name] = [row["early_stopping/loss"] for row in rows(run.parent)]
        assert last(run.parent)["global_step"] == 4
    assert found["one"] == pytest.approx(found["two"], rel=1e-6)
    assert len(found["one"]) == 2
