"""Small autoencoders, and the latents that they make of digits."""

from __future__ import annotations

from pathlib import Path

import torch

from denoiselab import encoding
from denoiselab.compose import compose, plain
from denoiselab.data import autoencoders
from denoiselab.experiment import Parts
from denoiselab.models import KL
from networks import perturbed

TINY = {"channels": 8, "multipliers": [1, 2], "groups": 4}
SHAPE = (2, 4, 4)


def autoencoder(folder: Path, kind: type = KL, shape: tuple[int, ...] = (1, 8, 8)) -> Path:
    """One with nothing left at zero, in a folder."""
    torch.manual_seed(0)
    node = {"shape": list(shape), "latent": 2, **TINY}
    net = perturbed(kind(**node), 0.1).float()
    autoencoders.of_ours(net, {"_target_": f"denoiselab.models.{kind.__name__}", **node}).save(folder)
    return folder


def encode(output: Path, encoder: object, *overrides: str) -> Path:
    device = [] if any(line.startswith("device=") for line in overrides) else ["device=cpu"]
    lines = [f"encoder={encoder}", f"output={output}", *device, *overrides]
    config = plain(compose("encode", lines))
    return encoding.encode(Parts({**config, "loss": {"_target_": "denoiselab.loss.Reconstruction"}}))
