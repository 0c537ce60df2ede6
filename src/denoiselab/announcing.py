"""What a run says of itself, in its folder and on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from denoiselab.checks import without_weights
from denoiselab.compose import Composed, to_yaml
from denoiselab.data.base import Data
from denoiselab.experiment import Parts
from denoiselab.files import write_text
from denoiselab.module import Diffusion
from denoiselab.progress import say
from denoiselab.run_folder import RunFolder
from denoiselab.summary import summarise


def announce(
    folder: RunFolder, composed: Composed, config: dict[str, Any], parts: Parts, module: Diffusion, step: int
) -> None:
    """Say what is about to run, from which step on, and write it down."""
    parameters, steps = sum(p.numel() for p in module.denoiser.parameters()), config["trainer"]["max_steps"]
    facts = {
        "command": composed.command,
        "choices": composed.choices,
        "overrides": composed.overrides,
        "parameters": parameters,
        "loss": module.loss.formula,
        "weight": parts.weighting.formula if module.denoiser.generates else None,
        "multiply_adds": _multiply_adds(config, parts),
        "sizes": {"train": len(parts.data.train), "held_out": len(parts.data.held_out)},
        "matmul_precision": config["trainer"]["matmul_precision"],
        "threads": torch.get_num_threads(),
    }
    before = folder.revision()
    folder.describe(to_yaml(composed), facts)
    if step and before != (now := folder.revision()):
        say(f"note: this run was begun with git revision {before} and goes on with {now}")
    folder.status("running", step, steps)
    say(f"{folder.path}")
    say(
        f"{parameters:,} parameters; {len(parts.data.train):,} training samples in batches of "
        f"{parts.data.batch_size}; loss {module.loss.formula}"
    )
    say(f"continuing at step {step} of {steps}" if step else f"training for {steps} steps")


def _multiply_adds(config: dict[str, Any], parts: Parts) -> int | None:
    """Of one sample's forward pass, for the report's axis of training; None where it cannot be counted."""
    own = Parts(config, parts.interface)  # whose embedding may leave the device
    shapes = (parts.shape, parts.num_classes, parts.vector, parts.low_res)
    try:
        net = without_weights(own).to("meta")
        return summarise(net, *shapes, precision=config["trainer"]["precision"]).multiply_adds
    except (RuntimeError, NotImplementedError):
        return None


def list_skipped(data: Data, folder: Path) -> None:
    """List the bad samples that another was taken for."""
    if skipped := getattr(data.train, "skipped", []):
        write_text(folder / "bad_samples.jsonl", "".join(f"{json.dumps(row)}\n" for row in skipped))
        say(f"{len(skipped)} bad samples were passed over: {folder / 'bad_samples.jsonl'}")
