"""Keep a run of the denoiselab that is imported, with what it samples and measures: `freeze_run.py NAME`.

tests/faults/test_versions.py loads every run that was kept. Make one, named as the release, whenever the layout or the
keys of checkpoints change; one of an older source is made with PYTHONPATH=OLDER/src. A run that is there is never
changed: a later denoiselab must read what was written then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

RUNS = Path(__file__).parents[1] / "tests" / "fixtures" / "runs"
OPTIONS = (
    *("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1"),
    *("metrics=none", "callbacks=none", "trainer.threads=1", "trainer.max_steps=4", "trainer.log_every=2"),
    *("evaluation.n=2", "sampler.steps=2", "output_dir=outputs"),
)
SAMPLE = ("n=4", "seed=0", "sampler.steps=2")
KEPT = ("identity.json", "config.yaml", "record.json", "status.json", "metrics.jsonl")


def averages(checkpoint: Path) -> str:
    """The sha256 of the averaged weights' names and bytes."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    found = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith("ema.model.")):
        found.update(name.encode() + state[name].numpy().tobytes())
    return found.hexdigest()


def command(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "denoiselab", *arguments],
        cwd=folder,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def freeze(target: Path) -> None:
    """Train, sample and measure in a temporary folder; keep what is small."""
    from denoiselab.version import CHECKPOINT_VERSION, NUMERICS_VERSION, __version__

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(folder, "train", *OPTIONS)
        (run,) = (path.parent for path in folder.glob("outputs/*/*/identity.json"))
        command(folder, "sample", f"ckpt={run.relative_to(folder)}", *SAMPLE, "output=samples")
        (evaluation,) = run.glob("evaluations/*/evaluation.json")
        (target / "checkpoints").mkdir(parents=True)
        for file in (*KEPT, "checkpoints/last.ckpt", "checkpoints/last.ckpt.sha256"):
            shutil.copy(run / file, target / file)
        (record,) = (one for one in json.loads(evaluation.read_text())["records"] if one["name"] == "held_out_loss")
        expected = {
            "release": __version__,
            "checkpoint": CHECKPOINT_VERSION,
            "numerics": NUMERICS_VERSION,
            "averages": averages(run / "checkpoints" / "last.ckpt"),
            "held_out_loss": record["value"],
            "samples": np.load(folder / "samples" / "samples.npy").tolist(),
        }
        (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or (RUNS / sys.argv[1]).exists():
        sys.exit("usage: freeze_run.py NAME, of a folder that is not there yet")
    freeze(RUNS / sys.argv[1])
