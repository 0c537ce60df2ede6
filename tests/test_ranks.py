"""Several ranks to a run: in a sweep, under torchrun, and what each of them is told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from denoiselab.compose import compose, plain, read_job, write_job
from denoiselab.errors import UserError
from test_sweep import TINY, state

AWKWARD = "a=1, [b {c} 'd'"
TELLING = """
import json
from pathlib import Path
import lightning.pytorch as pl

class Telling(pl.Callback):
    def __init__(self, folder, text):
        self.folder, self.text = Path(folder), text

    def on_train_start(self, trainer, module):
        told = {"world": trainer.world_size, "text": self.text, "rank": trainer.global_rank}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(told))
"""
OPTION = "telling:\n  _target_: telling.Telling\n  _partial_: true\n  text: ''\n"


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder of options whose callback writes down what each rank was told."""
    folder = tmp_path / "lab"
    (folder / "callbacks").mkdir(parents=True)
    (folder / "telling.py").write_text(TELLING)
    (folder / "callbacks" / "telling.yaml").write_text(OPTION)
    return folder


def left(folder: Path) -> list[str]:
    """Processes that know of a folder."""
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line]


def told(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("rank*.json"))]


def test_two_ranks_in_a_sweep(lab: Path, tmp_path: Path, command):
    """Two run directories, two ranks in each, the same awkward value on both, and no process left."""
    options = [line for line in TINY if not line.startswith("callbacks=")]
    options += ["--config-dir", str(lab), "callbacks=telling", "trainer=ddp_cpu", f'callbacks.telling.text="{AWKWARD}"']
    result = command("train", "-m", *options, 'name="x, [y=z"', "seed=1,2", timeout=300)
    assert result.returncode == 0, result.stderr
    folders = sorted(path.parent for path in tmp_path.glob("outputs/*/*/identity.json"))
    assert [folder.parent.name for folder in folders] == ["x, [y=z"] * 2
    assert [json.loads((folder / "identity.json").read_text())["seed"] for folder in folders] == [1, 2]
    assert [state(folder) for folder in folders] == ["done"] * 2
    expected = [{"world": 2, "text": AWKWARD, "rank": rank} for rank in (0, 1)]
    assert [told(folder) for folder in folders] == [expected] * 2
    assert sorted(path.name for path in folders[0].parent.iterdir()) == [".jobs", *(folder.name for folder in folders)]
    assert left(tmp_path) == []
    launch = [float(seconds) for seconds in re.findall(r"first step ([\d.]+) s after the process began", result.stderr)]
    assert len(launch) == 2
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["speed/launch_seconds"] for row in rows if "speed/launch_seconds" in row] == [
        pytest.approx(launch[0], abs=0.06)
    ]


def test_ranks_of_torchrun(lab: Path, tmp_path: Path):
    """Which starts both itself, with one command line."""
    options = [line for line in TINY if not line.startswith("callbacks=")]
    options += ["--config-dir", str(lab), "callbacks=telling", "trainer=ddp_cpu", "callbacks.telling.text=plain"]
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "denoiselab",
        "train",
        *options,
    ]
    result = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    (run,) = (path.parent for path in tmp_path.glob("outputs/runs/*/identity.json"))
    assert told(run) == [{"world": 2, "text": "plain", "rank": rank} for rank in (0, 1)]
    assert state(run) == "done"


def test_a_job_is_read_as_it_was_composed(lab: Path, tmp_path: Path, monkeypatch):
    """Look-ups of the environment stay look-ups, and later changes of an option file are not seen."""
    monkeypatch.setenv("A_KEY", "canary")
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = "callbacks.telling.text=${oc.env:A_KEY}"
    composed = compose("train", ["callbacks=telling", text, f'name="{AWKWARD}"', "seed=3"], lab)
    file = tmp_path / "jobs" / "one.json"
    write_job(composed, file)
    assert "canary" not in file.read_text()
    (lab / "callbacks" / "telling.yaml").write_text(OPTION.replace("text", "other"))
    monkeypatch.setenv("A_KEY", "another")
    found = read_job(file)
    assert plain(found)["callbacks"]["telling"]["text"] == "another"
    assert plain(found)["name"] == AWKWARD
    assert (found.choices, found.overrides, found.config_dir) == (composed.choices, composed.overrides, lab)


def test_a_job_is_started_from_a_folder_that_only_its_owner_can_write_to(tmp_path: Path, called):
    """Since it may name anything importable."""
    file = tmp_path / "jobs" / "one.json"
    write_job(compose("train", [*TINY]), file)
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.parent.chmod(0o770)
    with pytest.raises(UserError, match="others can write to"):
        read_job(file)
    file.parent.chmod(0o700)
    file.write_text('{"config": 1')
    result = called("train", "--job", str(file))
    assert result.returncode == 2
    assert "one.json: no job that can be read" in result.stderr
    assert called("train", "--job", str(tmp_path / "none.json")).returncode == 2


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_ranks_do_not_start_sweeps(variable: str, called, monkeypatch):
    monkeypatch.setenv(variable, "2")
    result = called("train", "-m", *TINY, "seed=0,1")
    assert result.returncode == 2
    assert "-m: was started as one of several ranks" in result.stderr
