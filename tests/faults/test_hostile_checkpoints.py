"""Files made to harm, given as a checkpoint: each is refused in a line that names it, and nothing in it is run."""

from __future__ import annotations

import re
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import denoiselab
import hostile
from denoiselab import checkpoint
from denoiselab.errors import UserError
from runs import POINTS, trained
from traps import At, Signal
from warm import Warm

pytestmark = pytest.mark.faults

MEGABYTES = 400
"""Most that all of them together may take, of which one alone claims 100,000."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("good")) / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def corpus(good: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path, str]]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantize", UserWarning)
        return [*hostile.everything(tmp_path_factory.mktemp("hostile") / "files", good)]


def said_of(file: Path, reason: str) -> str | None:
    """What is wrong with how a file is refused."""
    try:
        denoiselab.load(file)
    except UserError as error:
        fine = re.search(reason, str(error)) and str(file) in str(error) and "\n" not in str(error)
        return None if fine else str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "it was loaded"


def test_every_file_is_refused_in_one_line_and_nothing_in_it_runs(corpus, faults):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {name: said for name, file, reason in corpus if (said := said_of(file, reason))}
    assert found == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024
    assert len(corpus) > 180
    faults.refused(corpus[0][1].with_name("marker"), len(corpus))


def test_the_file_they_were_made_of_is_loaded(good: Path, tmp_path: Path):
    """Or any refusal would do. So is a copy alone, and one whose content was changed and changed back."""
    assert said_of(good, "") == "it was loaded"
    checkpoint.save(checkpoint.load(good), tmp_path / "again.ckpt")
    shutil.copy(good, tmp_path / "alone.ckpt")
    for name in ("again.ckpt", "alone.ckpt"):
        assert said_of(tmp_path / name, "") == "it was loaded"


def test_the_code_in_them_is_live(corpus):
    """Opened by those who run what they find, every one makes its marker."""
    plain = [file for name, file, _ in corpus if name.startswith("plain ")]
    assert len(plain) >= 8
    assert [file.name for file in plain if not hostile.executed(file)] == []
    inside = next(file for name, file, _ in corpus if name == "inside os.system")
    torch.load(inside, weights_only=False)
    marker = inside.with_name("marker")
    assert marker.exists()
    marker.unlink()


def test_automatic_continuation_passes_over_every_one_of_them(corpus, good: Path, tmp_path: Path, faults):
    """And says so; what it goes on from is the newest good one."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(good, folder / "previous.ckpt")
    of_configuration = {name for name, (change, _) in hostile.INSIDE.items() if change}
    refused = 0
    for name, file, _ in corpus:
        if not file.is_file() or name in of_configuration:
            continue  # what is said of a network is not read where training goes on
        shutil.copy(file, folder / "last.ckpt")
        if (beside := file.with_name(file.name + ".sha256")).is_file():
            shutil.copy(beside, folder / "last.ckpt.sha256")
        said: list[str] = []
        found = checkpoint.newest(folder, said.append)
        assert found is not None
        assert found[0].name == "previous.ckpt", name
        assert len(said) == 1, name
        assert str(folder / "last.ckpt") in said[0]
        assert "\n" not in said[0]
        (folder / "last.ckpt.sha256").unlink(missing_ok=True)
        refused += 1
    assert refused > 100
    faults.refused(folder / "marker", refused)


def test_a_run_goes_on_where_its_newest_checkpoint_was_put_there_by_somebody(tmp_path: Path, faults):
    """The training itself: killed, given a checkpoint that is code, started again."""
    command = ["train", *POINTS, "trainer.max_steps=12", "trainer.checkpoint_every=2", "output_dir=runs"]
    killed = Warm(tmp_path / "lab", *command, traps=[At("denoiselab.module:Diffusion.training_step", 9, (Signal(9),))])
    assert killed.wait() == -9
    faults.injected("process")
    (last,) = (tmp_path / "lab" / "runs").glob("*/*/checkpoints/last.ckpt")
    marker = tmp_path / "marker"
    torch.save({**checkpoint.load(last), "call": hostile.calls(marker)["os.system"]}, last)
    last.with_name("last.ckpt.sha256").unlink()
    again = Warm(tmp_path / "lab", *command)
    assert again.wait() == 0
    (line,) = [line for line in again.said.splitlines() if "passing over" in line]
    assert str(last.relative_to(tmp_path / "lab")) in line
    assert "nothing was executed" in line
    assert checkpoint.load(last)["global_step"] == 12
    faults.refused(marker)
