"""A run whose loss leaves where it was is ended, where that was asked for; one that is well is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from denoiselab.callbacks import Divergence
from denoiselab.errors import Diverged
from denoiselab.module import Diffusion
from denoiselab.rows import rows
from runs import POINTS, differences, last

pytestmark = pytest.mark.faults

OPTIONS = [line for line in POINTS if not line.startswith("callbacks=")]
STEPS = (*OPTIONS, "trainer.max_steps=30", "trainer.log_every=1", "trainer.checkpoint_every=5")
WATCHED = (*STEPS, "callbacks=divergence")
BAD = 21


def watching(factor: float = 3.0, patience: int = 3) -> Divergence:
    return Divergence(Path(), factor, patience)


def told(values: list[float], **options: Any) -> list[int]:
    """The rows at which it says stop."""
    watch = watching(**options)
    return [step for step, value in enumerate(values, 1) if watch.judge(value, step)]


def test_when_it_says_stop():
    steady = [1.0 + 0.1 * (k % 7) for k in range(40)]
    assert told(steady) == []
    assert told([*steady, 50.0, 50.0, 1.0, 50.0, 50.0, 1.0]) == []  # it comes back
    assert told([*steady, *[50.0] * 4]) == [43, 44]
    assert told([*steady, *[3.5] * 4]) == []  # 2.7 times the median
    assert told([*steady, *[3.5] * 4], factor=2.5, patience=1) == [41, 42, 43, 44]
    assert told([*([1.0] * 5), *[50.0] * 5]) == []  # the first rows are no measure
    assert told([100 * 0.8**k for k in range(60)]) == []  # descent


@pytest.mark.parametrize("options", [{"factor": 1.0}, {"factor": float("nan")}, {"patience": 0}])
def test_what_makes_no_sense_is_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match="need a number"):
        watching(**options)


def test_healthy_runs_are_left_alone(healthy: list[Path]):
    for run in healthy:
        values = [row["train/mse"] for row in rows(run / "metrics.jsonl") if "train/mse" in row]
        assert len(values) >= 60
        assert told(values) == []


@pytest.fixture
def blown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step, all weights are a hundred times what they were."""
    begin = Diffusion.on_train_batch_start

    def larger(module: Diffusion, batch: Any, index: int) -> None:
        if module.global_step + 1 == BAD:
            with torch.no_grad():
                for parameter in module.denoiser.parameters():
                    parameter.mul_(100)
        begin(module, batch, index)

    monkeypatch.setattr(Diffusion, "on_train_batch_start", larger)


@pytest.mark.usefixtures("blown")
def test_a_run_that_diverges_ends_with_a_line_and_again(train, tmp_path: Path, faults):
    ends = []
    for _ in range(2):
        with pytest.raises(Diverged) as error:
            train(*WATCHED, quick=())
        ends.append(str(error.value))
    (run,) = (tmp_path / "outputs").glob("runs/[!.]*")
    assert ends[0] == ends[1]  # its state is in checkpoints
    assert f" at step {BAD + 2}, and has been over 3 times its median before (" in ends[0]
    assert (
        f") since step {BAD - 1}; init_from={run}/checkpoints/last.ckpt starts from before, step {BAD - 1}; try"
        in ends[0]
    )
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], Diverged.status) == ("failed", 3)
    assert last(run)["global_step"] == BAD - 1
    faults.injected("call", 2)


@pytest.mark.usefixtures("blown")
def test_without_it_training_goes_on(train):
    assert last(train(*STEPS, "callbacks=none", quick=()))["global_step"] == 30


def test_it_changes_nothing_of_a_run_that_is_well(train, tmp_path: Path):
    with_it = train(*WATCHED, quick=())
    without = train(*STEPS, "callbacks=none", f"output_dir={tmp_path / 'other'}", quick=())
    contents = [last(with_it), last(without)]
    contents[0]["callbacks"].pop("Divergence")
    for content in contents:
        content["denoiselab"].pop("config")
        content["denoiselab"].pop("choices")
    assert differences(*contents) == []
