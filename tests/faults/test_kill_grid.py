"""Kills under every combination of what the loop of training may do otherwise: loaders, accumulation, precision,
measuring."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from continued import at, done, killed, same
from ledger import Faults
from runs import POINTS

pytestmark = pytest.mark.faults

RUN = (
    *(*POINTS[:-1], "lint.level=none", "data.n=96", "data.batch_size=12", "trainer.max_steps=24"),
    *("trainer.checkpoint_every=5", "trainer.log_every=3", "timesteps=importance", "timesteps.points=8"),
    *("timesteps.history=2", "ema.decay=0.99", "lr_schedule=cosine", "lr_schedule.warmup=4"),
)
MEASURING = (
    *("callbacks=default", "~callbacks.sample_grid", "~callbacks.guidance_sweep", "callbacks.buckets.every=6"),
    *("early_stopping.patience=50", "early_stopping.every=4"),
)

Cell = tuple[int, int, str, bool]
GRID: list[Cell] = list(product((0, 2), (1, 3), ("32-true", "bf16-mixed"), (False, True)))
SOME: list[Cell] = [(0, 1, "32-true", True), (0, 3, "bf16-mixed", False), (2, 3, "32-true", True)]
"""Where each value of each option is once."""
STEP = "denoiselab.module:Diffusion.training_step"


def options(cell: Cell) -> tuple[str, ...]:
    workers, accumulate, precision, measuring = cell
    asked = (f"data.workers={workers}", f"trainer.accumulate={accumulate}", f"trainer.precision={precision}")
    return (*RUN, *asked, *(MEASURING if measuring else ()))


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """The run of a cell without loader processes, which make no difference."""
    made: dict[Cell, Path] = {}

    def run(cell: Cell) -> Path:
        alone = (0, *cell[1:])
        if alone not in made:
            made[alone] = done(tmp_path_factory.mktemp("whole") / "run", *options(alone))
        return made[alone]

    return run


def continued(cell: Cell, kills: list[int], folder: Path, faults: Faults) -> Path:
    """A run of a cell that is killed in the micro-batches with these numbers, counted anew by each start."""
    for call in kills:
        killed(faults, folder, *options(cell), traps=[at(STEP, call)])
    return done(folder, *options(cell))


@pytest.mark.parametrize("cell", SOME, ids=str)
def test_a_kill(cell: Cell, left_alone: Callable[[Cell], Path], tmp_path: Path, faults: Faults):
    call = random.Random(repr(cell)).randint(2, 24 * cell[1])
    same(faults, left_alone(cell), continued(cell, [call], tmp_path / "run", faults))


@pytest.mark.slow
@pytest.mark.parametrize("cell", GRID, ids=str)
def test_three_kills(cell: Cell, left_alone: Callable[[Cell], Path], tmp_path: Path, faults: Faults):
    """In the middle of accumulation, too: what was accumulated is lost, and made again."""
    rng, accumulate = random.Random(repr(cell)), cell[1]
    kills = [rng.randint(low * accumulate + 1, high * accumulate) for low, high in ((6, 11), (0, 5), (3, 9))]
    same(faults, left_alone(cell), continued(cell, kills, tmp_path / "run", faults))


@pytest.mark.slow
@pytest.mark.parametrize("changed", [(0, 3, "32-true", True), (0, 1, "bf16-mixed", True)], ids=str)
def test_other_cells_are_other_runs(changed: Cell, left_alone: Callable[[Cell], Path]):
    """The comparison would notice if accumulation or precision were ignored."""
    first = left_alone((0, 1, "32-true", True))
    with pytest.raises(AssertionError):
        same(Faults(), first, left_alone(changed))
