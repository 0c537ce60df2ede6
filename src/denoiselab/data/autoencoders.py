"""A trained autoencoder as a folder: its configuration and its weights, ours or one of diffusers."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab import trust
from denoiselab.errors import CheckpointError, UserError
from denoiselab.files import write_text
from denoiselab.models import Autoencoder

FORMAT = "denoiselab autoencoder"
NEITHER = "neither a run or a checkpoint of an autoencoder, nor an AutoencoderKL of diffusers with safetensors"
OURS, THEIRS = "autoencoder.safetensors", "diffusion_pytorch_model.safetensors"


class Frozen(nn.Module):
    """An autoencoder that is asked and never trained: in evaluation mode, float32, without gradients of its weights.

    Args:
        net: ``encode(image) -> (mean, std or None)`` and ``decode(latent) -> image``.
        save: writes the folder that ``read`` reads.
    """

    def __init__(self, net: nn.Module, save: Callable[[Path], None]):
        super().__init__()
        self.net, self.save = net.float().eval().requires_grad_(False), save

    @torch.no_grad()
    def encode(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean and the standard deviation of the latents of images in [-1, 1], (B, C, H, W)."""
        return self.net.encode(image)  # pyright: ignore[reportCallIssue]

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a latent, not clamped."""
        return self.net.decode(latent)  # pyright: ignore[reportCallIssue]


class _Diffusers(nn.Module):
    """An AutoencoderKL of diffusers, asked as ours are."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(image).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent).sample


def of_ours(net: nn.Module, node: dict[str, Any]) -> Frozen:
    """One of our autoencoders.

    Args:
        net: with its weights.
        node: ``_target_`` and the arguments that make it again, ``shape`` among them, as primitives.
    """
    from safetensors.torch import save_file

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in net.state_dict().items()}, folder / OURS)
        write_text(folder / "config.json", json.dumps({"format": FORMAT, "model": node}, indent=2) + "\n")

    return Frozen(net, save)


def of_diffusers(source: str) -> Frozen:
    """diffusers' AutoencoderKL from a folder, or by its name on the hub. Its weights must be safetensors.

    Raises:
        UserError: diffusers is not installed, or finds none there.
    """
    path = Path(source)
    if not path.is_dir() and (not source or source.startswith(("/", ".", "~")) or source.count("/") != 1):
        raise UserError(
            f"encoder={source}: no such run, checkpoint or folder; a name on the hub is OWNER/NAME, as in "
            "stabilityai/sd-vae-ft-ema"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"encoder={source}: {NEITHER} (no config.json is there)")
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(f"encoder={source}: reading it needs diffusers: pip install diffusers") from None
    try:
        vae = AutoencoderKL.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"encoder={source}: {NEITHER} ({reason})") from None
    return Frozen(_Diffusers(vae), lambda folder: vae.save_pretrained(folder, safe_serialization=True))


def sha256(folder: Path) -> str:
    """Of an autoencoder's folder: its configuration and its weights.

    Raises:
        CheckpointError: there is none.
    """
    weights = OURS if _config(folder).get("format") == FORMAT else THEIRS
    found = hashlib.sha256()
    for name in ("config.json", weights):
        try:
            found.update((folder / name).read_bytes())
        except OSError as error:
            raise CheckpointError(f"{folder}: no autoencoder is there ({name}: {error.strerror})") from None
    return found.hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise CheckpointError(f"{folder}: no autoencoder is there (config.json: {error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: config.json is not JSON ({str(error)[:80]})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: config.json is not a JSON object")
    return config


def read(folder: Path, expected: str | None = None) -> Frozen:
    """The autoencoder in a folder that ``Frozen.save`` wrote. What it says is not trusted.

    Args:
        folder: with config.json and the weights.
        expected: its sha256.

    Raises:
        CheckpointError: missing, damaged, or not the expected one.
    """
    found = sha256(folder)
    if expected is not None and found != expected:
        raise CheckpointError(f"{folder}: holds another autoencoder than the latents were made with (sha256 {found})")
    config = _config(folder)
    if config.get("format") != FORMAT:
        return of_diffusers(str(folder))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        trust.check(config["model"], str(folder / "config.json"))
        module, _, name = config["model"]["_target_"].rpartition(".")
        arguments = {key: value for key, value in config["model"].items() if not key.startswith("_")}
        kind = getattr(importlib.import_module(module), name)
        if not issubclass(kind, Autoencoder):
            raise CheckpointError(f"{folder}: {name} is no autoencoder")
        net = kind(**arguments)
        net.load_state_dict(load_file(folder / OURS))
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{folder}: not the folder of an autoencoder ({reason})") from None
    return of_ours(net, config["model"])
