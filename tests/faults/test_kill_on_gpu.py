"""Kills of a run on a GPU: the same bits under deterministic algorithms, and nearly the same weights without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from continued import FULL, STEPS, at, killed, run_in, same
from ledger import Faults
from runs import last
from traps import At
from warm import Warm

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

ON_GPU = (*FULL, "trainer.accelerator=gpu")
EXACT = (*ON_GPU, "trainer.deterministic=true")
WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
POINTS = [
    *(at("denoiselab.module:Diffusion.training_step", call) for call in (1, 21, 38)),
    at("denoiselab.checkpoint:rotate", 2),
    at("denoiselab.module:Diffusion.optimizer_step", STEPS),
]


def done(folder: Path, *options: str) -> Path:
    process = Warm(folder, "train", *options, variables=WORKSPACE)
    assert process.wait(300) == 0, process.said
    return run_in(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return done(tmp_path_factory.mktemp("whole") / "run", *EXACT)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.of.rpartition('.')[2]} {point.call}")
def test_a_kill_under_deterministic_algorithms(point: At, whole: Path, tmp_path: Path, faults: Faults):
    killed(faults, tmp_path / "run", *EXACT, traps=[point], variables=WORKSPACE)
    same(faults, whole, done(tmp_path / "run", *EXACT))
    assert last(whole)["denoiselab"]["made_on"]["device"] == torch.cuda.get_device_name(0)


def test_a_kill_without_them(tmp_path: Path, faults: Faults):
    """The same samples, and averages that differ by no more than the order of additions."""
    whole = last(done(tmp_path / "whole", *ON_GPU))
    killed(faults, tmp_path / "run", *ON_GPU, traps=[POINTS[2]])
    run = last(done(tmp_path / "run", *ON_GPU))
    assert run["denoiselab"]["samples_seen"] == whole["denoiselab"]["samples_seen"]
    averages = [
        torch.cat([v.flatten() for k, v in found["state_dict"].items() if k.startswith("ema.model.")]).double()
        for found in (whole, run)
    ]
    assert (averages[0] - averages[1]).norm() <= 1e-3 * averages[0].norm()
