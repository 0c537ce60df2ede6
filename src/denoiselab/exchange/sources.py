"""Networks that were trained elsewhere, read into our terms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange import adm, dit, unet
from denoiselab.exchange.files import read_object, read_tensors, weights
from denoiselab.exchange.schedules import from_scheduler, levels, made
from denoiselab.models import LogSNR
from denoiselab.schedule import Schedule

FORMATS = ("safetensors", "diffusers", "adm", "dit")
"""Our own export, a folder of diffusers, a checkpoint of guided-diffusion, one of DiT."""

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

PARTS = ("unet", "transformer")
"""Folders of a pipeline that a network lies in."""

UNET, DIT = "denoiselab.models.UNet", "denoiselab.models.DiT"

KEYS = {"input_blocks.0.0.weight": "adm", "x_embedder.proj.weight": "dit"}
"""Names of weights that only one kind of file has."""


@dataclass
class Source:
    """A pretrained network."""

    model: str
    """Of our classes."""
    arguments: dict[str, Any]
    """Of that class, with shape, num_classes, outputs and embedding; low_res where it has any."""
    state: dict[str, Tensor]
    """Weights by our names; an average of them, where there is one."""
    raw: dict[str, Tensor]
    embedding: str
    """An option, like target and spacing."""
    file: Path
    """With the weights."""
    notes: list[str]
    schedule: dict[str, Any] | None = None
    """A node, where the source says it; so with target and spacing."""
    target: str | None = None
    spacing: str | None = None
    has_null: bool = True
    """Whether it was trained to know of no label."""


def look(path: Path, kind: str | None = None) -> tuple[str, dict[str, Any]]:
    """Which of FORMATS a path is of, unless that is known, and what it holds if it is a file.

    Raises:
        CheckpointError: none of them.
    """
    found = {} if path.is_dir() else read_tensors(path)
    if "denoiselab" in found:
        raise CheckpointError(f"{path}: a checkpoint of denoiselab needs no import; give it as ckpt= or init_from=")
    if kind is not None:
        if path.is_dir() != (kind in ("safetensors", "diffusers")):
            raise CheckpointError(f"{path}: format={kind} is a {'file' if path.is_dir() else 'folder'}")
        return kind, found
    if path.is_dir():
        if (path / "config.json").is_file() and read_object(path / "config.json").get("format") == "denoiselab":
            return "safetensors", found
        if any((path / name).exists() for name in ("model_index.json", "config.json", *PARTS)):
            return "diffusers", found
        raise CheckpointError(
            f"{path}: no network lies there; need the folder of a pipeline, of a model, or of an export"
        )
    for names in (found, *(part for part in found.values() if isinstance(part, dict))):
        for key, kind in KEYS.items():
            if key in names:
                return kind, found
    raise CheckpointError(
        f"{path}: neither weights of guided-diffusion nor of DiT; for a model of diffusers, name its folder"
    )


def diffusers(path: Path) -> Source:
    """A pipeline's folder, or that of a model with or without a scheduler_config.json.

    Raises:
        CheckpointError: something is missing or damaged, or there is no network of ours that is the same function.
    """
    folder, scheduler, notes = _folders(path)
    config = read_object(folder / "config.json")
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: no {' and no '.join(WEIGHTS)} lies there")
    state = weights(read_tensors(file), file)
    schedule = target = embedding = spacing = None
    if (named := scheduler / "scheduler_config.json").is_file():
        said = read_object(named)
        schedule, target = from_scheduler(said, str(named))
        spacing, habits = _habits(said)
        notes += habits
        config, state, embedding = _by_log_snr(config, state, made(schedule))
    model, arguments, state = _converted(config, state, folder / "config.json")
    embedding = embedding or arguments["embedding"]
    if model == UNET and arguments["num_classes"]:
        notes.append(f"its class {arguments['num_classes']}, the last, is taken for no label")
    said = {"schedule": schedule, "target": target, "spacing": spacing}
    return Source(model, arguments, state, state, embedding, file, notes, **said)


def guided_diffusion(
    path: Path, found: dict[str, Any], arguments: dict[str, Any], new_attention_order: bool = False
) -> Source:
    """A checkpoint of guided-diffusion: eps, with or without a variance.

    Args:
        path: the file.
        found: what it holds: weights.
        arguments: of a UNet, which such a file does not say, with shape.
        new_attention_order: as for ``adm.from_adm``.

    Raises:
        CheckpointError: damaged, or not of these arguments.
    """
    try:
        told, state = adm.from_adm(arguments, weights(found, path), new_attention_order)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    notes = ["it was not trained without labels, so that guidance.scale stays 1"] if told["num_classes"] else []
    return Source(UNET, told, state, state, told["embedding"], path, notes, target="eps", has_null=False)


def published_dit(path: Path, found: dict[str, Any], heads: int | None = None) -> Source:
    """A checkpoint of DiT: eps, with or without a variance.

    Args:
        path: the file.
        found: what it holds: weights, or as the training script saves them "model" and their average "ema".
        heads: as for ``dit.from_dit``.

    Raises:
        CheckpointError: damaged, or not of such a model.
    """
    both = [found[name] for name in ("ema", "model") if isinstance(found.get(name), dict)] or [found]
    try:
        read = [dit.from_dit(weights(state, path), heads) for state in both]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    (told, ema), (_, raw) = read[0], read[-1]
    return Source(DIT, told, ema, raw, told["embedding"], path, [], target="eps")


def _folders(path: Path) -> tuple[Path, Path, list[str]]:
    """Where the network and the scheduler lie, and what else there is; in old repositories all lie in one folder."""
    index = read_object(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    part = next((name for name in PARTS if name in index or (path / name).is_dir()), None)
    if part is None and index:
        raise CheckpointError(f"{path / 'model_index.json'}: names neither a unet nor a transformer")
    folder, scheduler = (path / name if name and (path / name).is_dir() else path for name in (part, "scheduler"))
    others = sorted(name for name, what in index.items() if name not in (part, "scheduler") and isinstance(what, list))
    return folder, scheduler, [f"not imported: {', '.join(others)}"] if others else []


def _habits(scheduler: dict[str, Any]) -> tuple[str, list[str]]:
    """Its spacing, and what its pipeline does while it samples that a command here would have to ask for."""
    spacing, notes = scheduler.get("timestep_spacing", "leading"), []
    if spacing in ("leading", "linspace"):
        notes.append(f"its pipeline's levels are those of spacing={spacing}")
    by_default = scheduler.get("_class_name") in ("DDPMScheduler", "DDIMScheduler")
    if scheduler.get("clip_sample", by_default):
        notes.append(f"its pipeline bounds x_0_hat, as sampler.clip={scheduler.get('clip_sample_range', 1.0)} does")
    return spacing, notes


def _converted(
    config: dict[str, Any], state: dict[str, Tensor], source: Path
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(class, arguments, weights by our names)."""
    kind = config.get("_class_name")
    try:
        if kind == "UNet2DModel":
            return UNET, *unet.from_diffusers(config, state)
        if kind in ("DiTTransformer2DModel", "Transformer2DModel"):
            return DIT, *dit.from_diffusers(config, state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except (TypeError, ValueError, KeyError, IndexError) as error:  # of values that are no configuration's
        raise CheckpointError(f"{source}: cannot be read as {kind} ({type(error).__name__}: {error})") from None
    need = "UNet2DModel or DiTTransformer2DModel"
    raise CheckpointError(f"{source}: _class_name={str(kind)[:60]!r}: need {need}")


def _by_log_snr(
    config: dict[str, Any], state: dict[str, Tensor], schedule: Schedule
) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """A U-Net with a learned table of features that are LogSNR's at the schedule's points, as one that has none: what
    format=diffusers makes of embedding=log_snr. Anything else as it is."""
    table = state.get("time_proj.weight")
    if config.get("time_embedding_type") != "learned" or table is None or table.ndim != 2:
        return config, state, None
    features = LogSNR()(levels(schedule)[1], table.shape[1])
    if features.shape != table.shape or not torch.allclose(features, table, rtol=0, atol=1e-3):
        return config, state, None
    config = {key: value for key, value in config.items() if key not in ("time_embedding_type", "num_train_timesteps")}
    return config, {key: value for key, value in state.items() if key != "time_proj.weight"}, "log_snr"
