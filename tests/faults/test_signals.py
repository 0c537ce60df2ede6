"""A run that is told to stop, wherever it is: it saves in time, says so with its status, and goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from denoiselab.rows import rows
from ledger import Faults
from runs import POINTS, differences, last
from traps import At, Changed, Note, Signal
from warm import Trap, Warm

pytestmark = pytest.mark.faults

SECONDS = 10.0
"""From a signal to the end of a run."""

OPTIONS = (
    *("train", *POINTS, "trainer.max_steps=12", "trainer.checkpoint_every=5", "trainer.log_every=3"),
    *("callbacks=default", "callbacks.buckets.every=4", "callbacks.sample_grid.every=4", "callbacks.sample_grid.n=4"),
    *("callbacks.guidance_sweep.every=4", "callbacks.guidance_sweep.n=2", "callbacks.guidance_sweep.scales=[1,2]"),
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def endless(number: int, file: Path, function: Any) -> Any:
    """Of an evaluation: told to stop while it lasts, and lasts until it is left."""

    def lasting(*arguments: Any, **named: Any) -> Any:
        file.touch()
        os.kill(os.getpid(), number)
        while True:
            function(*arguments, **named)

    return lasting


def trap(place: str, number: int, file: Path) -> Trap:
    acts = (Note(file), Signal(number))
    match place:
        case "a step":
            return At("denoiselab.module:Diffusion.training_step", 7, acts)
        case "held-out losses":
            return Changed("denoiselab.callbacks.buckets:held_out_losses", partial(endless, number, file))
        case "a sample grid":
            return Changed("denoiselab.callbacks.samples:SampleGrid.draw", partial(endless, number, file))
        case "a diagnostic":
            return Changed("denoiselab.training:inspect", partial(endless, number, file))
        case "a checkpoint":
            return At("torch:save", 1, acts)
        case "the last checkpoint":
            return At("torch:save", 3, acts)
        case "setup":
            return At("denoiselab.module:Diffusion.configure_optimizers", 1, acts)
        case "the start":
            return At("denoiselab.training:Job.__init__", 1, acts)
        case _:
            return At("denoiselab.evaluation:sample", 1, acts)


STEP = {"a step": 7, "held-out losses": 4, "a sample grid": 4, "a diagnostic": 4, "a checkpoint": 6}
STEP |= {"the last checkpoint": 12, "setup": 7, "the start": 7, "the evaluation": 12}
"""That is saved."""

GRID = ("a step", "held-out losses", "a checkpoint", "setup")
BESIDE = ("a sample grid", "a diagnostic", "the last checkpoint", "the start", "the evaluation")
CASES = [(number, place) for place in GRID for number in SIGNALS]
CASES += [(SIGNALS[k % 4], place) for k, place in enumerate(BESIDE)]
QUICK = [*zip(SIGNALS, GRID, strict=True), (signal.SIGUSR1, "a diagnostic")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    command = Warm(folder, *OPTIONS)
    assert command.wait() == 0, command.said
    return the_run(folder)


def the_run(folder: Path) -> Path:
    (found,) = folder.glob("outputs/runs/*/identity.json")
    return found.parent


def measured(run: Path) -> list[tuple[int, Any]]:
    """What was measured at which step; not the rows that say how fast it was."""
    found = []
    for row in rows(run / "metrics.jsonl"):
        kept = {key: value for key, value in row.items() if not key.startswith("speed/") and "seconds" not in key}
        found += [(row["step"], kept)] if len(kept) > 1 else []
    return sorted(found, key=lambda one: (one[0], sorted(one[1])))


def pictures(run: Path) -> dict[str, bytes]:
    found = [*run.glob("pictures/*.png"), *run.glob("diagnostics/*/*/picture.png")]
    return {str(file.relative_to(run)): file.read_bytes() for file in found}


def goes_on(folder: Path, whole: Path, faults: Faults) -> None:
    """The same command, to the same end."""
    again = Warm(folder, *OPTIONS)
    assert again.wait() == 0, again.said
    assert "Traceback" not in again.said
    run = the_run(folder)
    faults.same(last(whole), last(run))
    assert measured(run) == measured(whole)
    assert pictures(run) == pictures(whole)


@pytest.mark.parametrize(
    ("number", "place"),
    [
        pytest.param(*case, id=f"{case[0].name} in {case[1]}", marks=[] if case in QUICK else [pytest.mark.slow])
        for case in dict.fromkeys([*CASES, *QUICK])
    ],
)
def test_a_run_told_to_stop_saves_and_goes_on(number: int, place: str, whole: Path, tmp_path: Path, faults: Faults):
    folder, file = tmp_path / "run", tmp_path / "told"
    if place in ("setup", "the start"):  # of a run that was told to stop before
        before = Warm(folder, *OPTIONS, traps=[trap("a step", signal.SIGTERM, tmp_path / "before")])
        assert before.wait() == 128 + signal.SIGTERM, before.said
        faults.injected("process")
    command = Warm(folder, *OPTIONS, traps=[trap(place, number, file)])
    status = command.wait()
    assert time.time() - file.stat().st_mtime < SECONDS
    assert status == 128 + number, command.said
    assert "Traceback" not in command.said
    assert f"stopped by signal {int(number)}; issue the same command to continue" in command.said
    run = the_run(folder)
    assert last(run)["global_step"] == STEP[place]
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    assert not (run / "run.lock").exists()
    faults.injected("process")
    goes_on(folder, whole, faults)


def test_the_comparison_notices_a_measurement_that_is_missing(whole: Path):
    found = measured(whole)
    assert [step for step, row in found if "val/loss" in row] == [4, 8, 12]
    assert len(pictures(whole)) == 6
    assert measured(whole) != [one for one in found if "val/loss" not in one[1]]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a step", "a checkpoint", "held-out losses"])
def test_told_again_and_again(place: str, whole: Path, tmp_path: Path, faults: Faults):
    """By whoever tells all processes of a job, while it saves and while it ends."""
    folder, file = tmp_path / "run", tmp_path / "told"
    saving = 1 if place == "held-out losses" else 2
    again = At("torch:save", saving, (Signal(signal.SIGUSR2), Signal(signal.SIGTERM)))
    end = At("denoiselab.run_folder:RunFolder.status", 2, (Signal(signal.SIGTERM),), after=True)
    command = Warm(folder, *OPTIONS, traps=[trap(place, signal.SIGTERM, file), again, end])
    assert command.wait() == 128 + signal.SIGTERM, command.said
    assert time.time() - file.stat().st_mtime < SECONDS
    assert last(the_run(folder))["global_step"] == STEP[place]
    faults.injected("process", 3)
    goes_on(folder, whole, faults)


def test_a_second_ctrl_c_ends_it_at_once(whole: Path, tmp_path: Path, faults: Faults):
    folder, file = tmp_path / "run", tmp_path / "told"
    twice = At("denoiselab.module:Diffusion.training_step", 7, (Note(file), *[Signal(signal.SIGINT)] * 2))
    command = Warm(folder, *OPTIONS, traps=[twice])
    assert command.wait() == -signal.SIGINT
    assert last(the_run(folder))["global_step"] == 5
    assert differences(last(whole), last(the_run(folder))) != []
    faults.injected("process")
    goes_on(folder, whole, faults)


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n == signal.SIGTERM else [pytest.mark.slow]) for n in SIGNALS]
)
def test_loader_processes_serve_until_it_is_saved(number: int, whole: Path, tmp_path: Path, faults: Faults):
    """The whole group is told, as a scheduler does, and Ctrl-C in a terminal."""
    folder, file = tmp_path / "run", tmp_path / "told"
    group = At("denoiselab.module:Diffusion.training_step", 7, (Note(file), Group(number)))
    command = Warm(folder, *OPTIONS, "data.workers=2", traps=[group])
    assert command.wait() == 128 + number, command.said
    assert time.time() - file.stat().st_mtime < SECONDS
    assert "Traceback" not in command.said
    assert "loader process" not in command.said
    assert last(the_run(folder))["global_step"] == 7
    faults.injected("process")
    goes_on(folder, whole, faults)


class Group(Signal):
    """All processes of the session get it; what follows has time to hear of their ends."""

    def __call__(self) -> None:
        os.killpg(0, self.number)
        time.sleep(0.5)
