"""A run's network as two files without a pickle: config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange.files import Content, read_object, read_tensors, weights
from denoiselab.version import CHECKPOINT_VERSION

GROUPS = ("data", "model", "embedding", "schedule", "target", "weighting", "timesteps", "loss", "p_null", "sigma_data")
"""The parts of a run's configuration that say what its network is, and how its loss is measured."""

FACTS: dict[str, type] = {
    "version": int,
    "weights": str,
    "step": int,
    "fingerprint": str,
    "interface": dict,
    "choices": dict,
    "config": dict,
}
"""What config.json says, and as what."""


def files(
    network: dict[str, Tensor], learned: dict[str, Tensor], config: dict[str, Any], facts: dict[str, Any]
) -> Content:
    """The two files, by name.

    Args:
        network: a denoiser's state, under "net.".
        learned: what the schedule and the loss have learned, under "schedule." and "loss.".
        config: the run's, as plain containers.
        facts: FACTS, but for version and config.
    """
    chosen = {group: config[group] for group in GROUPS}
    content = {"format": "denoiselab", "version": CHECKPOINT_VERSION, **facts, "config": chosen}
    return {"config.json": content, "model.safetensors": {**network, **learned}}


def is_export(path: Path) -> bool:
    """Whether a path is the folder of such an export."""
    config = path / "config.json"
    return (
        (path / "model.safetensors").is_file()
        and config.is_file()
        and read_object(config).get("format") == "denoiselab"
    )


def read(folder: Path, prefix: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint with its one kind of weights would hold. Its configuration is not trusted.

    Args:
        folder: the export.
        prefix: what names of a denoiser's weights begin with in a checkpoint, for ema and raw.

    Raises:
        CheckpointError: damaged, or from a later version.
    """
    file, facts = folder / "config.json", read_object(folder / "config.json")
    for key, kind in FACTS.items():
        if not isinstance(facts.get(key), kind):
            raise CheckpointError(f"{file}: says nothing usable of its {key}")
    if facts["version"] > CHECKPOINT_VERSION:
        version = facts["version"]
        raise CheckpointError(
            f"{file}: has layout {version}; this denoiselab reads up to {CHECKPOINT_VERSION}: upgrade it"
        )
    lacking = min(set(GROUPS) - facts["config"].keys(), default=None)
    if facts["weights"] not in prefix or lacking:
        raise CheckpointError(f"{file}: says nothing usable of its {lacking or 'weights'}")
    found = weights(read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
    chosen = prefix[facts["weights"]]
    state = {key if key.startswith(("schedule.", "loss.")) else chosen + key: value for key, value in found.items()}
    return {"state_dict": state, "global_step": facts["step"], "denoiselab": facts}
