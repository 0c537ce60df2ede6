"""A run that is killed anywhere, and issued again, ends bit for bit like one that was left alone."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import forgetful
from continued import EPOCH, EVERY, FULL, STEPS, at, done, killed, newest, run_in, same
from ledger import Faults
from runs import differences, last
from traps import At, Changed
from warm import Warm

pytestmark = pytest.mark.faults

STEP = "denoiselab.module:Diffusion.training_step"
SAVE = "denoiselab.callbacks.checkpoints:Checkpoints.run"
ROTATE = "denoiselab.checkpoint:rotate"
SAVES = -(-STEPS // EVERY)

FORCED = {
    "at the first step": at(STEP, 1),
    "at a checkpoint": at(ROTATE, 2),
    "at an epoch's first step": at(STEP, 2 * EPOCH + 1),
    "at the last step": at(STEP, STEPS),
    "in the last checkpoint": at(ROTATE, SAVES),
    "before a checkpoint": at(SAVE, 2),
    "after a checkpoint": at(SAVE, 2, after=True),
    "after the last checkpoint": at(SAVE, SAVES, after=True),
    "after training": at("denoiselab.loggers.json_lines:JsonLines.finalize", 1),
    "in the evaluation": at("denoiselab.evaluation:sample", 1, after=True),
    "before it is said to be done": at("denoiselab.run_folder:RunFolder.status", 2),
}

ANYWHERE = {
    STEP: STEPS,
    "denoiselab.module:Diffusion.optimizer_step": STEPS,
    "denoiselab.module:Diffusion.configure_gradient_clipping": STEPS,
    "denoiselab.ema:EMA.update": STEPS,
    "denoiselab.timesteps.importance:Importance.update": STEPS,
    "denoiselab.callbacks.metrics:TrainingMetrics.run": STEPS // 3,
    "denoiselab.callbacks.buckets:LossBuckets.run": STEPS // 10,
    "denoiselab.callbacks.early_stopping:EarlyStopping.run": STEPS // 9,
    SAVE: SAVES,
}
"""Functions, and how often a run calls them."""


def anywhere(n: int) -> dict[str, At]:
    rng = random.Random(1)
    found: dict[str, At] = {}
    while len(found) < n:
        of = rng.choice(list(ANYWHERE))
        call, after = rng.randint(1, ANYWHERE[of]), rng.random() < 0.5
        found[f"{'after' if after else 'at'} {of.rpartition('.')[2]} {call}"] = at(of, call, after)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return done(tmp_path_factory.mktemp("whole") / "run", *FULL)


def some(points: dict[str, At], quick: int) -> list[object]:
    """The points as cases, all but the first ones slow."""
    return [
        pytest.param(point, id=name, marks=[pytest.mark.slow] if i >= quick else [])
        for i, (name, point) in enumerate(points.items())
    ]


@pytest.mark.parametrize("point", [*some(FORCED, 5), *some(anywhere(12), 2)])
def test_a_kill_at_a_call(point: At, whole: Path, tmp_path: Path, faults: Faults):
    killed(faults, tmp_path / "run", *FULL, traps=[point])
    same(faults, whole, done(tmp_path / "run", *FULL))


def killed_at_random(faults: Faults, folder: Path, rng: random.Random, seconds: float, *options: str) -> None:
    """From outside, at some time after its folder appeared; ``seconds`` is about how long it takes from there."""
    while True:
        process = Warm(folder, "train", *options)
        process.when(lambda: list(folder.glob("outputs/*/*/status.json")))
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        if process.process.exitcode == -signal.SIGKILL:
            faults.injected("process")
            return
        shutil.rmtree(folder)  # it had ended


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))])
def test_a_kill_at_a_random_time(number: int, whole: Path, tmp_path: Path, faults: Faults):
    killed_at_random(faults, tmp_path / "run", random.Random(number), 1.0, *FULL)
    same(faults, whole, done(tmp_path / "run", *FULL))


@pytest.mark.slow
def test_five_kills_in_one_run(whole: Path, tmp_path: Path, faults: Faults):
    """Each start counts its steps from the checkpoint that it goes on from; the first two end in the same epoch."""
    start, ends = 0, []
    for steps in (13, 9, 14, 2, 16):
        killed(faults, tmp_path / "run", *FULL, traps=[at(STEP, steps)])
        ends.append(start + steps - 1)
        start = newest(run_in(tmp_path / "run"))["global_step"]
    assert ends[0] // EPOCH == ends[1] // EPOCH
    assert ends[-1] < STEPS
    same(faults, whole, done(tmp_path / "run", *FULL))


def test_a_finished_command_changes_nothing(whole: Path, tmp_path: Path):
    copy = Path(shutil.copytree(whole.parents[2], tmp_path / "run"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    process = Warm(copy, "train", *FULL)
    assert process.wait() == 0
    assert f"{STEPS} steps already done" in process.said
    assert "already evaluated" in process.said
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


FORGOTTEN = {
    "the place in the data": (forgetful.POSITION, "state_dict.denoiser"),
    "the averages": (forgetful.AVERAGES, "state_dict.ema"),
    "the optimizer's moments": (forgetful.MOMENTS, "optimizer_states"),
    "what timesteps have learned": (forgetful.LEARNED, "state_dict.timesteps"),
}


@pytest.mark.parametrize(
    "name", [name if i == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(FORGOTTEN)]
)
def test_the_comparison_notices_what_is_forgotten(name: str, whole: Path, tmp_path: Path, faults: Faults):
    trap, where = FORGOTTEN[name]
    killed(faults, tmp_path / "run", *FULL, traps=[at(STEP, 30)])
    run = done(tmp_path / "run", *FULL, traps=[trap])
    assert any(f".{where}" in found for found in differences(last(whole), last(run)))
    with pytest.raises(AssertionError):
        same(Faults(), whole, run)


@pytest.mark.slow
def test_the_comparison_notices_that_steps_have_no_seeds(tmp_path: Path, faults: Faults):
    """Two runs that draw their noise from wherever the generators stand are the same until one is interrupted."""
    traps: list[Changed] = [forgetful.SEEDS]
    first, second = (done(tmp_path / name, *FULL, traps=traps) for name in ("first", "second"))
    same(Faults(), first, second)
    killed(faults, tmp_path / "killed", *FULL, traps=[*traps, at(STEP, 30)])
    run = done(tmp_path / "killed", *FULL, traps=traps)
    assert any(".state_dict.denoiser" in found for found in differences(last(first), last(run)))


DIGITS = (
    *("metrics=none", "trainer.threads=1", "data.batch_size=16", "trainer.max_steps=60", "trainer.checkpoint_every=5"),
    *("trainer.log_every=5", "sampler.steps=1", "evaluation.n=1", "callbacks.buckets.every=10", "ema.decay=0.99"),
    *("callbacks.sample_grid.n=4", "callbacks.sample_grid.every=20", "callbacks.guidance_sweep.n=2"),
    *("callbacks.guidance_sweep.every=30", "model.channels=8", "model.head_channels=8", "lint.level=none"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("data.workers=2", "trainer.accumulate=2"), ("lr_schedule=inverse_sqrt", "trainer.precision=bf16-mixed")],
    ids=["plain", "workers", "bf16"],
)
def test_a_run_with_pictures_killed_again_and_again(options: tuple[str, ...], tmp_path: Path, faults: Faults):
    """Five times at random: in training, in pictures and looks, in a checkpoint's writing."""
    whole, rng = done(tmp_path / "whole", *DIGITS, *options), random.Random(repr(options))
    for _ in range(5):
        killed_at_random(faults, tmp_path / "run", rng, 2.5, *DIGITS, *options)
    same(faults, whole, done(tmp_path / "run", *DIGITS, *options))
