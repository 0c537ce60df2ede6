"""Ranking measurements: an order where protocols agree, and an error that says what differs where they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import denoiselab
from denoiselab.errors import UserError
from denoiselab.report.arms import tabulate
from denoiselab.report.ranking import Incomparable, rank
from denoiselab.report.runs import find, read

PROTOCOL = {
    "sampler": {"_target_": "x.DDIM", "steps": 50},
    "guidance": {"_target_": "x.CFG", "scale": 1.0},
    "seed": 0,
    "label_policy": "balanced",
    "n": 1000,
    "weights": "ema",
    "step": 100,
}
OWN = {"extractor": "net", "extractor_sha256": "ab", "preprocessing": "8x8", "reference": "held out", "dimensions": 64}


def written(folder: Path, seed: int, value: float, protocol: dict[str, Any], own: dict[str, Any], **identity: Any):
    """A run with one evaluation of two measurements."""
    path = folder / f"run{seed}"
    (path / "evaluations" / "x").mkdir(parents=True)
    data = {"_target_": "x.Digits", "batch_size": 64 * (seed + 1)}
    (path / "identity.json").write_text(json.dumps({"data": data, "seed": seed, "schedule": {"a": seed}, **identity}))
    (path / "status.json").write_text(json.dumps({"state": "done", "step": 100}))
    records = [
        {"name": "fd_net", "value": value, "better": own.pop("better", "lower"), "protocol": own},
        {"name": "class_accuracy", "value": 1 - value, "better": "higher", "protocol": {"classifier": "svm"}},
        {"name": "held_out_loss", "value": value, "better": "lower", "protocol": {"loss": "mse"}},
        {"name": "ratio", "value": value, "better": "none", "protocol": {}},
    ]
    (path / "evaluations" / "x" / "evaluation.json").write_text(json.dumps({"protocol": protocol, "records": records}))
    return path


def both(folder: Path, changed: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **identity: Any):
    """Two runs, the second measured under another protocol."""
    written(folder, 0, 0.5, dict(PROTOCOL), dict(OWN))
    second = {key: value for key, value in {**PROTOCOL, **(changed or {})}.items() if value is not None}
    written(folder, 1, 0.25, second, {**OWN, **(own or {})}, **identity)


def test_equal_protocols_are_put_in_order(tmp_path: Path):
    both(tmp_path, {"sampler": {"_target_": "x.Heun", "steps": 10}, "seed": 3, "step": 200})  # axes of a study
    assert [row.run.name for row in rank(tmp_path, metric="fd_net")] == ["run1", "run0"]
    assert [row.value for row in rank(tmp_path, metric="class_accuracy")] == [0.75, 0.5]
    assert denoiselab.rank is rank
    apart = rank(tmp_path / "run0", tmp_path / "run1", metric="fd_net")
    assert [row.protocol["sampler"]["steps"] for row in apart] == [10, 50]


DIFFERING = {
    "n": ({"n": 5000}, {}),
    "label_policy": ({"label_policy": "held-out"}, {}),
    "weights": ({"weights": "raw"}, {}),
    "extractor_sha256": ({}, {"extractor_sha256": "cd"}),
    "preprocessing": ({}, {"preprocessing": "299x299"}),
    "reference": ({}, {"reference": "train"}),
    "which direction is better": ({}, {"better": "higher"}),
}


@pytest.mark.parametrize("what", DIFFERING)
def test_other_protocols_raise_and_say_what_differs(what: str, tmp_path: Path):
    changed, own = DIFFERING[what]
    both(tmp_path, changed, own)
    with pytest.raises(Incomparable, match=f"^fd_net cannot be ranked: protocols differ in {what}$"):
        rank(tmp_path, metric="fd_net")
    notes = tabulate([read(path, tmp_path) for path in find(tmp_path)]).notes  # the page says the same
    assert any(note.startswith("fd_net is not ranked: arms differ in ") and what in note for note in notes)


def test_other_data_and_other_losses_raise(tmp_path: Path):
    both(tmp_path, data={"_target_": "x.Letters"})
    with pytest.raises(Incomparable, match="differ in data"):
        rank(tmp_path, metric="fd_net")
    with pytest.raises(Incomparable, match="differ in data, schedule"):
        rank(tmp_path, metric="held_out_loss")


@pytest.mark.parametrize(
    ("missing", "said"),
    [("n", "does not say n"), ("guidance", "does not say guidance scale"), ("sampler", "does not say sampler")],
)
def test_what_a_protocol_does_not_say_raises(missing: str, said: str, tmp_path: Path):
    both(tmp_path, {missing: None})
    with pytest.raises(Incomparable, match=said):
        rank(tmp_path, metric="fd_net")
    both(tmp_path / "alike", {missing: None})
    alone = [read(path, tmp_path) for path in find(tmp_path / "alike")]
    assert any(said in note or f"differ in {missing}" in note for note in tabulate(alone).notes)


def test_a_frechet_distance_with_a_singular_covariance_is_not_ranked(tmp_path: Path):
    for n, fine in ((2048, False), (2049, True)):
        folder = tmp_path / str(n)
        for seed in (0, 1):
            written(folder, seed, 0.5 - seed / 4, {**PROTOCOL, "n": n}, {**OWN, "dimensions": 2048})
        notes = tabulate([read(path, folder) for path in find(folder)]).notes
        said = "the covariance of n = 2048 samples in 2048 dimensions is singular"
        assert any(f"fd_net is not ranked: {said}" in note for note in notes) != fine
        if fine:
            assert len(rank(folder, metric="fd_net")) == 2
        else:
            with pytest.raises(Incomparable, match=said):
                rank(folder, metric="fd_net")
        assert len(rank(folder, metric="class_accuracy")) == 2


def test_what_cannot_be_ranked_at_all(tmp_path: Path):
    both(tmp_path)
    with pytest.raises(Incomparable, match="no direction of it is better"):
        rank(tmp_path, metric="ratio")
    with pytest.raises(
        UserError, match=r"^fid: not measured here; known: class_accuracy, fd_net, held_out_loss, ratio$"
    ):
        rank(tmp_path, metric="fid")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        rank(tmp_path / "nowhere", metric="fid")


def test_a_real_evaluation_can_be_ranked(example_run: Path):
    assert [row.value for row in rank(example_run, metric="class_accuracy")]
    with pytest.raises(Incomparable, match="n = 20 samples in 64 dimensions"):
        rank(example_run, metric="fd_digits")


def test_torch_is_not_imported():
    code = "import sys, denoiselab; denoiselab.rank; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
