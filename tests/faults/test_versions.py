"""Runs that older versions made, kept as files: each is read, or refused in a line that says what reads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denoiselab import checkpoint
from denoiselab.version import CHECKPOINT_VERSION, NUMERICS_VERSION, OLDEST_NUMERICS, __version__
from runs import trained

pytestmark = pytest.mark.faults

SCRIPT = Path(__file__).parents[2] / "scripts" / "freeze_run.py"
KEPT = sorted((Path(__file__).parents[1] / "fixtures" / "runs").iterdir())
READ = [path for path in KEPT if json.loads((path / "expected.json").read_text())["numerics"] >= OLDEST_NUMERICS]
REFUSED = [path for path in KEPT if path not in READ]
CLOSE = 1e-5
"""How far samples of order 1 may lie from those that were kept: matrix products round otherwise on other processors. On
the one that made them they are the same bits."""


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "outputs" / "runs" / request.param.name))


def expected(run: Path) -> dict[str, Any]:
    return json.loads((run / "expected.json").read_text())


def averages(run: Path) -> str:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from freeze_run import averages
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return averages(run / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("run", READ, indirect=True, ids=lambda path: path.name)
def test_a_run_of_an_older_version_is_sampled_and_measured_as_it_was_then(run: Path, called, tmp_path: Path, faults):
    kept = expected(run)
    assert averages(run) == kept["averages"]
    sampled = called("sample", f"ckpt={run}", "n=4", "sampler.steps=2", "device=cpu", f"output={tmp_path / 's'}")
    assert sampled.returncode == 0, sampled.stderr
    found = np.load(tmp_path / "s" / "samples.npy")
    np.testing.assert_allclose(found, kept["samples"], rtol=0, atol=CLOSE)
    assert np.abs(found - np.roll(found, 1, axis=0)).max() > 100 * CLOSE  # other samples would be seen
    measured = called("evaluate", f"ckpt={run}", "metrics=none", "evaluation.n=2", "sampler.steps=2", "device=cpu")
    assert measured.returncode == 0, measured.stderr
    (file,) = run.glob("evaluations/*/evaluation.json")
    (record,) = json.loads(file.read_text())["records"]
    assert record["value"] == pytest.approx(kept["held_out_loss"], rel=CLOSE)
    faults.injected("file")


@pytest.mark.parametrize("run", READ, indirect=True, ids=lambda path: path.name)
def test_a_run_of_an_older_version_goes_on(run: Path, tmp_path: Path, faults):
    """Into the same directory, from the same state; where options were added since, the address may be another."""
    content = checkpoint.load(run / "checkpoints" / "last.ckpt")
    whole = trained(tmp_path / "whole", "sampler.steps=2", "trainer.max_steps=6")
    if (
        content["denoiselab"]["identity"]
        != checkpoint.load(whole / "checkpoints" / "last.ckpt")["denoiselab"]["identity"]
    ):
        pytest.skip("its options are no longer those of today: the same command makes another run")
    there = tmp_path / "parts" / "runs" / whole.name
    shutil.copytree(run, there)
    assert trained(tmp_path / "parts", "sampler.steps=2", "trainer.max_steps=6") == there
    faults.same(
        *(_state(checkpoint.load(path / "checkpoints" / "last.ckpt")) for path in (whole, there)),
    )
    faults.injected("file")


def _state(content: dict[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


@pytest.mark.parametrize("run", REFUSED, indirect=True, ids=lambda path: path.name)
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_run_that_is_too_old_is_refused_in_a_line_that_says_what_reads_it(run: Path, command: str, called, faults):
    before = sorted(run.rglob("*"))
    refused = called(command, f"ckpt={run / 'checkpoints' / 'last.ckpt'}", "device=cpu")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    numerics = expected(run)["numerics"]
    assert f"was made by a denoiselab with numerics {numerics}; this one, {__version__}, reads from " in line
    assert "use the git revision that record.json beside it names" in line
    assert sorted(run.rglob("*")) == before
    faults.injected("file")


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_file_that_is_newer_than_this_version_is_a_line(command: str, called, tmp_path: Path, faults):
    run = Path(shutil.copytree(READ[0], tmp_path / "run"))
    file = run / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["denoiselab"] |= {"version": CHECKPOINT_VERSION + 1, "release": "9.9.9"}
    checkpoint.save(content, file)
    refused = called(command, f"ckpt={file}", "device=cpu")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert (
        f"has layout {CHECKPOINT_VERSION + 1} of denoiselab 9.9.9; this one, {__version__}, reads up to layout" in line
    )
    faults.injected("file")


def shape(value: Any) -> Any:
    """What a checkpoint is made of: the keys and kinds of its parts, whatever they hold."""
    if isinstance(value, dict):
        return {str(key): shape(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shape(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {[*value.shape]}"
    return type(value).__name__


def newest() -> Path:
    """The run that this version's own code was kept with."""
    (found,) = (path for path in KEPT if path.name == __version__)
    return found


def test_every_layout_has_a_run_that_was_kept(tmp_path: Path):
    """If this fails, checkpoints have changed: keep a run of this version with scripts/freeze_run.py under the name of
    its release; and if what they had before cannot be read any more, raise CHECKPOINT_VERSION."""
    kept = expected(newest())
    assert (kept["checkpoint"], kept["numerics"]) == (CHECKPOINT_VERSION, NUMERICS_VERSION)
    assert {expected(path)["numerics"] for path in KEPT} == {*range(1, NUMERICS_VERSION + 1)}
    now = shape(
        checkpoint.load(trained(tmp_path, "sampler.steps=2", "trainer.log_every=2") / "checkpoints" / "last.ckpt")
    )
    then = shape(checkpoint.load(newest() / "checkpoints" / "last.ckpt"))
    assert now == then
    del now["denoiselab"]["interface"]
    assert now != then


def test_a_run_that_was_kept_is_small_and_names_nobodys_folders():
    for path in KEPT:
        files = [file for file in path.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 60_000
        assert not any(b"/home/" in file.read_bytes() or b"/tmp/" in file.read_bytes() for file in files)


@pytest.mark.slow
def test_keeping_a_run_is_repeatable(tmp_path: Path):
    """The script makes what is there: the same averages and the same samples."""
    program = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import freeze_run, pathlib; "
    program += f"freeze_run.freeze(pathlib.Path({str(tmp_path / 'made')!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True)
    assert shape(checkpoint.load(tmp_path / "made" / "checkpoints" / "last.ckpt")) == shape(
        checkpoint.load(newest() / "checkpoints" / "last.ckpt")
    )
    np.testing.assert_allclose(
        expected(tmp_path / "made")["samples"], expected(newest())["samples"], rtol=0, atol=CLOSE
    )
