"""Trainings that get no more disk, files or memory: what was saved stays, and the same command goes on."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from denoiselab import checkpoint
from denoiselab.rows import rows
from runs import POINTS
from traps import At, Fail, Limit
from warm import Trap, Warm

pytestmark = pytest.mark.faults

STEPS, EVERY = 12, 2
OPTIONS = (*POINTS, f"trainer.max_steps={STEPS}", f"trainer.checkpoint_every={EVERY}", "trainer.log_every=1")
STEP = "denoiselab.module:Diffusion.on_train_batch_start"
SAVE = "denoiselab.trainer:_save"


@dataclass(frozen=True)
class Allow:
    """From now on a resource has another limit."""

    resource: str
    amount: int

    def __call__(self) -> None:
        Limit(self.resource, self.amount).set()


@dataclass(frozen=True)
class Remove:
    """The run's folder is gone."""

    base: str

    def __call__(self) -> None:
        (run,) = (path.parent for path in Path(self.base).glob("outputs/*/*/checkpoints"))
        shutil.rmtree(run)


@dataclass(frozen=True)
class Forbid:
    """The run's folders are read-only, for root as well."""

    base: str

    def __call__(self) -> None:
        without_privileges()
        for path in Path(self.base).glob("outputs/*/*/"):
            for folder in (path / "checkpoints", path / "pictures", path):
                if folder.is_dir():
                    folder.chmod(0o550)


@dataclass(frozen=True)
class Memory:
    """No more memory than is used now, but for some bytes."""

    more: int

    def set(self) -> None:
        self()

    def __call__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        Limit("AS", pages * resource.getpagesize() + self.more).set()


def without_privileges() -> None:
    """Root is refused by a folder's mode, as everybody else: it gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, then high ones
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


UNLIMITED = resource.RLIM_INFINITY
SIZE = 49_000
"""Bytes of a checkpoint here, about."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    return finished(tmp_path_factory.mktemp("whole") / "w")


def finished(folder: Path, *options: str) -> Path:
    process = Warm(folder, "train", *OPTIONS, *options)
    assert process.wait() == 0, process.said
    return run_in(folder)


def run_in(folder: Path) -> Path:
    (run,) = (path.parent for path in folder.glob("outputs/*/*/checkpoints"))
    return run


def starved(folder: Path, *traps: Trap) -> tuple[int, str]:
    """The exit status of a training, and what it said."""
    process = Warm(folder, "train", *OPTIONS, traps=traps)
    return process.wait(), process.said


def sound(folder: Path) -> int:
    """Every file under a checkpoint's name can be loaded; the last step that was saved."""
    files = [*folder.glob("outputs/*/*/checkpoints/*.ckpt")]
    return max((checkpoint.load(file)["global_step"] for file in files), default=0)


def ended(said: str) -> str:
    """The line that a command ended with, the only one of its kind."""
    assert "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("denoiselab train: "))
    return line


def goes_on(folder: Path, whole: Path, faults: Any) -> None:
    """The same command, left alone, ends as if nothing had been: state and rows."""
    run = finished(folder)
    faults.same(*(checkpoint.load(path / "checkpoints" / "last.ckpt") for path in (whole, run)))
    assert [numbers(path) for path in (run,)] == [numbers(whole)]


def numbers(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("speed/")}
        for row in rows(run / "metrics.jsonl")
    ]


LINE = re.compile(
    r"cannot save (\S+/checkpoints/new\.ckpt): (File too large|No space left on device); "
    r"it takes about ([\d,]+) bytes, ([\d,]+) are free"
)


def gives_up(folder: Path, whole: Path, faults: Any, limit: int, step: int) -> None:
    """No file may be larger than a limit from a step on: three failures, status 74, and it goes on with space."""
    status, said = starved(folder, At(STEP, step, (Allow("FSIZE", limit),)))
    assert status == 74
    assert LINE.search(ended(said)), said
    saved = sound(folder)
    assert saved == (step - 1) // EVERY * EVERY
    failures = min(3, (STEPS - saved) // EVERY)
    assert len(LINE.findall(said)) == failures
    assert said.count("training goes on and tries again") == failures - 1
    if failures == 3:
        assert "gave up after 3 failures" in ended(said)
    faults.injected("process")
    goes_on(folder, whole, faults)


def test_a_file_that_may_not_grow_ends_the_run_in_a_line_after_three_failures(tmp_path: Path, whole: Path, faults: Any):
    gives_up(tmp_path / "a", whole, faults, SIZE // 2, 5)
    assert LINE.search(all_said(tmp_path / "a"))[3].replace(",", "") >= str(SIZE // 2)


def all_said(folder: Path) -> str:
    return folder.with_name(folder.name + ".err").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4000, 17_000, 33_333, SIZE - 3000])
@pytest.mark.parametrize("step", [1, 4, 8, 12])
def test_files_that_may_not_grow_end_the_run_in_a_line(limit: int, step: int, tmp_path: Path, whole: Path, faults: Any):
    gives_up(tmp_path / "a", whole, faults, limit, step)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_has_space_again_is_used_at_the_next_interval(
    failing: int, tmp_path: Path, whole: Path, faults: Any
):
    space = At(STEP, 5 + failing * EVERY, (Allow("FSIZE", UNLIMITED),))
    status, said = starved(tmp_path / "a", At(STEP, 5, (Allow("FSIZE", 9000),)), space)
    assert status == 0, said
    assert said.count("training goes on and tries again") == failing
    run = run_in(tmp_path / "a")
    faults.same(*(checkpoint.load(path / "checkpoints" / "last.ckpt") for path in (whole, run)))
    assert numbers(run) == numbers(whole)
    faults.injected("process")


def test_rows_that_could_not_be_written_are_written_later_each_once(tmp_path: Path, whole: Path, faults: Any):
    """From step 3 to 6 not even a row fits; nor what the process would say of it, whose stderr is a file."""
    limits = At(STEP, 3, (Allow("FSIZE", 100),)), At(STEP, 7, (Allow("FSIZE", UNLIMITED),))
    status, said = starved(tmp_path / "a", *limits)
    assert status == 0, said
    assert numbers(run_in(tmp_path / "a")) == numbers(whole)
    faults.injected("process")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("save", [1, 3, 6])
def test_a_save_that_fails_for_good_stops_the_run(number: int, save: int, tmp_path: Path, whole: Path, faults: Any):
    """The last save has no later one to wait for: a run is never said to be done without its weights."""
    status, said = starved(tmp_path / "a", At(SAVE, save, (Fail(number),), always=True))
    assert status == 74
    assert os.strerror(number) in ended(said)
    assert sound(tmp_path / "a") == (save - 1) * EVERY
    faults.injected("process")
    goes_on(tmp_path / "a", whole, faults)


def test_a_run_whose_last_save_failed_is_not_done(tmp_path: Path, whole: Path, faults: Any):
    status, said = starved(tmp_path / "a", At(SAVE, STEPS // EVERY, (Fail(errno.ENOSPC),)))
    assert status == 74
    assert "training goes on" not in said
    assert '"state": "failed"' in (run_in(tmp_path / "a") / "status.json").read_text()
    faults.injected("process")
    goes_on(tmp_path / "a", whole, faults)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.slow)])
def test_a_folder_that_becomes_read_only_is_a_line(step: int, tmp_path: Path, whole: Path, faults: Any):
    status, said = starved(tmp_path / "a", At(STEP, step, (Forbid(str(tmp_path / "a")),)))
    assert status == 74
    assert "Permission denied" in ended(said)
    for path in [*tmp_path.glob("a/outputs/*/*/"), *tmp_path.glob("a/outputs/*/*/*/")]:
        path.chmod(0o750)
    assert sound(tmp_path / "a") == (step - 1) // EVERY * EVERY
    faults.injected("process")
    for lock in tmp_path.glob("a/outputs/*/*/run.lock"):  # its holder is dead, which the next finds out
        assert lock.is_file()
    goes_on(tmp_path / "a", whole, faults)


@pytest.mark.parametrize("step", [6, pytest.param(3, marks=pytest.mark.slow)])
def test_a_folder_that_is_removed_under_the_run_is_a_line(step: int, tmp_path: Path, whole: Path, faults: Any):
    status, said = starved(tmp_path / "a", At(STEP, step, (Remove(str(tmp_path / "a")),)))
    assert status == 74
    assert "No such file or directory" in ended(said)
    assert sound(tmp_path / "a") == 0
    faults.injected("process")
    goes_on(tmp_path / "a", whole, faults)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)])
def test_no_more_open_files_is_a_line(step: int, tmp_path: Path, whole: Path, faults: Any):
    status, said = starved(tmp_path / "a", At(STEP, step, (Allow("NOFILE", 3),)))
    assert status == 74
    assert "Too many open files" in ended(said)
    assert sound(tmp_path / "a") == (step - 1) // EVERY * EVERY
    faults.injected("process")
    goes_on(tmp_path / "a", whole, faults)


@pytest.mark.parametrize("more", [0, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_no_more_memory_is_a_line(more: int, tmp_path: Path, whole: Path, faults: Any):
    """Of a batch that is as large as what there is; a small one may find room in what the process holds already."""
    large = Warm(
        tmp_path / "a", "train", *OPTIONS, "data.n=2000000", "data.batch_size=1000000", "model.width=512",
        traps=[At(STEP, 1, (Memory(more),))],
    )  # fmt: skip
    assert large.wait() == 1, large.said
    assert "out of memory (" in ended(large.said)
    faults.injected("process")
    shutil.rmtree(tmp_path / "a" / "outputs")
    goes_on(tmp_path / "a", whole, faults)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount")
    if (
        not made
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("no file system can be mounted here; a limit on files stands for it in the other tests")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@dataclass(frozen=True)
class Fill:
    """Nothing of a disk is left but for some bytes."""

    disk: str
    left: int

    def __call__(self) -> None:
        free = shutil.disk_usage(self.disk).free
        with (Path(self.disk) / "ballast").open("wb") as file:
            file.write(bytes(max(0, free - self.left)))


@dataclass(frozen=True)
class Empty:
    disk: str

    def __call__(self) -> None:
        (Path(self.disk) / "ballast").unlink()


@pytest.mark.parametrize("left", [20_000, pytest.param(0, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_ends_the_run_and_one_with_space_goes_on(
    left: int, small_disk: Path, tmp_path: Path, whole: Path, faults: Any
):
    status, said = starved(small_disk / "a", At(STEP, 6, (Fill(str(small_disk), left),)))
    said = all_said(small_disk / "a") or said
    assert status == 74
    assert sound(small_disk / "a") == 4
    (small_disk / "ballast").unlink()
    faults.injected("process")
    goes_on(small_disk / "a", whole, faults)


def test_a_disk_without_room_for_three_checkpoints_is_told_before_training(small_disk: Path, whole: Path, faults: Any):
    Fill(str(small_disk), 60_000)()
    status, said = starved(small_disk / "a")
    assert status == 74
    assert re.search(r"checkpoints need [\d,]+ more bytes, [\d,]+ are free; make space", ended(said))
    assert sound(small_disk / "a") == 0
    faults.injected("process")
    Empty(str(small_disk))()
    goes_on(small_disk / "a", whole, faults)


def test_the_comparison_would_see_a_save_that_was_skipped(tmp_path: Path, whole: Path, faults: Any):
    """A run that ends without its last state differs."""
    starved(tmp_path / "a", At(SAVE, STEPS // EVERY, (Fail(errno.ENOSPC),)))
    with pytest.raises(AssertionError):
        type(faults)().same(
            *(checkpoint.load(run / "checkpoints" / "last.ckpt") for run in (whole, run_in(tmp_path / "a")))
        )
    faults.injected("process")
