"""A run on two ranks, one of which is killed; and a run that goes on with another number of ranks."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only

from continued import EPOCH, FULL, STEPS, at, run_in, same
from ledger import Faults
from runs import differences, last
from traps import Changed
from warm import Trap, Warm

pytestmark = pytest.mark.faults

STEP = "denoiselab.module:Diffusion.training_step"
BATCH = 16


@dataclass(frozen=True)
class Rank:
    """The number that a process has from the start, which Lightning reads where it is imported."""

    number: int

    def set(self) -> None:
        rank_zero_only.rank = self.number


def _noting(step: Callable[..., Any]) -> Callable[..., Any]:
    """Each rank writes down which samples it sees at which step, of every attempt at it."""

    def noted(module: Any, batch: Any, index: int) -> Any:
        row = {"step": module.global_step, "world": module.trainer.world_size, "ids": batch["id"].tolist()}
        with Path(f"seen{module.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return step(module, batch, index)

    return noted


NOTING = Changed(STEP, _noting)


def issued(folder: Path, world: int, traps: dict[int, Sequence[Trap]] | None = None) -> list[int]:
    """A command as so many ranks, which end by themselves; their exit statuses."""
    if world == 1:
        return [Warm(folder, "train", *FULL, traps=[NOTING]).wait()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    ranks = [
        Warm(folder, "train", *FULL, "trainer=ddp_cpu", "trainer.threads=1",
             traps=[NOTING, Rank(k), *(traps or {}).get(k, ())],
             variables={**shared, "RANK": str(k), "LOCAL_RANK": str(k)})
        for k in range(world)
    ]  # fmt: skip
    return [rank.wait() for rank in ranks]


def seen(folder: Path) -> dict[int, list[int]]:
    """The samples of each step, by the last attempt at it."""
    latest: list[dict[int, dict[str, Any]]] = [{}, {}]
    for rank, rows in enumerate(latest):
        file = folder / f"seen{rank}.jsonl"
        for line in file.read_text().splitlines() if file.is_file() else ():
            row = json.loads(line)
            rows[row["step"]] = row
    return {step: row["ids"] + (latest[1][step]["ids"] if row["world"] == 2 else []) for step, row in latest[0].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert issued(folder, 2) == [0, 0]
    return folder


POINTS = {
    "rank 0 in an epoch": (0, at(STEP, 25)),
    "rank 0 at a checkpoint": (0, at("denoiselab.checkpoint:rotate", 3)),
    "rank 0 at the first step": (0, at(STEP, 1)),
    "rank 1 in an epoch": (1, at(STEP, 25)),
}


@pytest.mark.parametrize(
    "name", [name if i == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(POINTS)]
)
def test_a_rank_is_killed(name: str, whole: Path, tmp_path: Path, faults: Faults):
    rank, point = POINTS[name]
    found = issued(tmp_path / "run", 2, {rank: [point]})
    faults.injected("process")
    assert found[rank] == -signal.SIGKILL
    assert found[1 - rank] != 0
    assert issued(tmp_path / "run", 2) == [0, 0]
    same(faults, run_in(whole), run_in(tmp_path / "run"))
    assert seen(tmp_path / "run") == seen(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_samples(
    before: int, after: int, whole: Path, tmp_path: Path, faults: Faults
):
    """In the same order, none twice in an epoch and none left out; the noise is another, which is said."""
    folder, point = tmp_path / "run", at(STEP, 25)
    if before == 2:
        assert issued(folder, 2, {0: [point]})[0] == -signal.SIGKILL
    else:
        assert Warm(folder, "train", *FULL, traps=[NOTING, point]).wait() == -signal.SIGKILL
    faults.injected("process")
    assert issued(folder, after) == [0] * after
    text = (folder.with_name("run.err")).read_text()
    assert text.count(f"note: trained to step 21 with ranks {before}, goes on with ranks {after}: the same") == 1
    found, expected = seen(folder), seen(whole)
    assert found.keys() == expected.keys() == set(range(STEPS))
    for step in range(STEPS):
        assert sorted(found[step]) == sorted(expected[step])
        assert len(found[step]) == BATCH
    for epoch in range(STEPS // EPOCH):
        samples = [sample for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for sample in found[step]]
        assert len(samples) == len(set(samples)) == EPOCH * BATCH
    assert any(".state_dict.denoiser" in name for name in differences(last(run_in(whole)), last(run_in(folder))))


def test_ranks_see_different_samples(whole: Path):
    """Which the comparisons above rest on: each rank wrote down its own."""
    files = [(whole / f"seen{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert [len(lines) for lines in files] == [STEPS, STEPS]
    for mine, theirs in zip(*files, strict=True):
        assert not set(json.loads(mine)["ids"]) & set(json.loads(theirs)["ids"])
