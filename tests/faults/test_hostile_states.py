"""A checkpoint in a run's own folder whose weights are sound and whose state of training is not: fused optimizers would
read memory that is not theirs. Refused in a line, or passed over with a warning, before a step is made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from denoiselab import checkpoint
from denoiselab.compose import Composed, compose
from denoiselab.errors import CheckpointError
from denoiselab.training import Job
from runs import POINTS, last

pytestmark = pytest.mark.faults

Content = dict[str, Any]
OPTIMIZER = "optimizer_states"


def moment(content: Content, value: Any) -> None:
    content[OPTIMIZER][0]["state"][0]["exp_avg"] = value


def option(content: Content, name: str, value: Any) -> None:
    content[OPTIMIZER][0]["param_groups"][0][name] = value


FOREIGN: dict[str, Callable[[Content], object]] = {
    "no optimizer": lambda content: content.pop(OPTIMIZER),
    "a list of nothing": lambda content: content.update({OPTIMIZER: []}),
    "a list of a number": lambda content: content.update({OPTIMIZER: [3]}),
    "two optimizers": lambda content: content[OPTIMIZER].append(content[OPTIMIZER][0]),
    "no groups": lambda content: content[OPTIMIZER][0].pop("param_groups"),
    "no state": lambda content: content[OPTIMIZER][0].pop("state"),
    "a state that is a list": lambda content: content[OPTIMIZER][0].update(state=[1]),
    "state of a parameter too many": lambda content: content[OPTIMIZER][0]["state"].update({99: {}}),
    "a moment of three numbers": lambda content: moment(content, torch.zeros(3)),
    "a moment without numbers": lambda content: moment(content, torch.zeros(0)),
    "a moment of whole numbers": lambda content: moment(content, torch.zeros(8, 2, dtype=torch.int8)),
    "a moment that is a text": lambda content: moment(content, "x"),
    "no moment": lambda content: content[OPTIMIZER][0]["state"][0].pop("exp_avg"),
    "steps that are a text": lambda content: content[OPTIMIZER][0]["state"][0].update(step="x"),
    "steps of each value": lambda content: content[OPTIMIZER][0]["state"][0].update(step=torch.zeros(9)),
    "a rate that is a text": lambda content: option(content, "lr", "x"),
    "one beta": lambda content: option(content, "betas", [0.9]),
    "a group of no parameters": lambda content: option(content, "params", []),
    "no schedule": lambda content: content.pop("lr_schedulers"),
    "a schedule that is a text": lambda content: content["lr_schedulers"][0].update(last_epoch="x"),
    "no loops": lambda content: content.pop("loops"),
    "loops that are a text": lambda content: content.update(loops={"fit_loop": "x"}),
    "a count that is a text": lambda content: content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"].update(
        ready="x"
    ),
    "sums of another kind": lambda content: content["callbacks"]["TrainingMetrics"].update(sums=torch.zeros(2, 2, 2)),
}
PASSED_OVER: dict[str, Callable[[Content], object]] = {
    "callbacks are a list": lambda content: content.update(callbacks=[1]),
    "a version that is a list": lambda content: content.update({"pytorch-lightning_version": [3]}),
    "what is owed is a number": lambda content: content["denoiselab"].update(owed=3),
    "a step that is a text": lambda content: content.update(global_step="x"),
    "a step before the first": lambda content: content.update(global_step=-4),
}


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Composed, Content]:
    """A run that has two steps to go, and what its checkpoint holds."""
    options = (*POINTS, f"output_dir={tmp_path_factory.mktemp('state')}")
    job = Job(compose("train", [*options, "trainer.max_steps=2"]))
    job.run()
    return compose("train", [*options, "trainer.max_steps=4"]), last(job.path)


def goes_on(longer: tuple[Composed, Content], change: Callable[[Content], object]) -> Path:
    """From a checkpoint that was changed, without its sha256."""
    composed, content = longer
    job, content = Job(copy.deepcopy(composed)), copy.deepcopy(content)
    change(content)
    for file in (job.path / "checkpoints").iterdir():
        file.unlink()
    torch.save(content, job.path / "checkpoints" / "last.ckpt")
    job.run()
    return job.path


@pytest.mark.parametrize("name", FOREIGN)
def test_a_state_that_does_not_fit_is_refused_in_a_line(name: str, longer, faults, tmp_path: Path):
    with pytest.raises(CheckpointError) as error:
        goes_on(longer, FOREIGN[name])
    assert "\n" not in str(error.value)
    assert "state of training does not fit" in str(error.value) or name == "sums of another kind"
    faults.refused(tmp_path / "marker")


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_is_no_checkpoint_is_passed_over(name: str, longer, faults, capfd, tmp_path: Path):
    run = goes_on(longer, PASSED_OVER[name])
    assert "warning: passing over a bad checkpoint: " in capfd.readouterr().err
    assert last(run)["global_step"] == 4
    faults.refused(tmp_path / "marker")


def test_its_own_state_is_taken(longer):
    """Beside what a newer PyTorch may add to it."""
    run = goes_on(longer, lambda content: option(content, "of_a_newer_version", 1))
    assert last(run)["global_step"] == 4
    assert checkpoint.load(run / "checkpoints" / "last.ckpt")[OPTIMIZER][0]["state"][0]["step"] == 4
