"""What a configuration names, by content: a moved file is the same, a changed one is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from denoiselab import checkpoint
from denoiselab.curve import Curve
from denoiselab.run import find_checkpoint
from denoiselab.run_folder import digest


def by_content(node: Any) -> Any:
    """A configuration in which the files that it names stand by their sha256, for hashes of what decides a result:
    other runs' checkpoints, a measured curve, a network's weights."""
    if isinstance(node, list):
        return [by_content(value) for value in node]
    if not isinstance(node, dict):
        return node
    found = {key: by_content(value) for key, value in node.items()}
    if node.get("_target_") == "denoiselab.run.frozen":
        found["ckpt"] = checkpoint.sha256(find_checkpoint(node["ckpt"]))
    if isinstance(node.get("others"), list):
        found["others"] = [checkpoint.sha256(find_checkpoint(other)) for other in node["others"]]
    if isinstance(node.get("curve"), str):
        curve = Curve.load(node["curve"], node.get("panel", "eps"))
        found["curve"] = digest([curve.t.tolist(), curve.value.tolist()])
    if isinstance(node.get("weights"), str) and Path(node["weights"]).is_file():
        found["weights"] = checkpoint.sha256(Path(node["weights"]))
    return found
