"""Pictures for a sheet: samples of a run, or those of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoiselab.data.picture import is_image
from denoiselab.errors import UserError
from denoiselab.pictures import as_image
from denoiselab.progress import Progress
from denoiselab.rng import generator
from denoiselab.run import Run, device_of, load

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

ARRAY = "samples.npy"
"""What `denoiselab sample` writes."""


def source(option: str, config: dict[str, Any]) -> tuple[list[Picture], dict[str, Any], Run | None]:
    """n pictures of a run or of a folder, what the key says of them, and the run.

    Args:
        option: a or b.
        config: of `denoiselab preference`.
    """
    path, n = config[option], config["n"]
    if path is None:
        raise UserError(f"{option}=null: need a run, a checkpoint, or a folder of pictures")
    folder = Path(str(path))
    if folder.is_dir() and (pictures := in_folder(folder, f"{option}={path}", n)):
        return pictures, {"folder": str(folder)}, None
    run = load(folder, config["weights"]).to(device_of(config["device"]))
    if len(run.parts.shape) != 3:
        raise UserError(f"{option}={path}: its samples, of shape {run.parts.shape}, are no pictures")
    parts = run.parts_for(config)
    cond = run.cond(n)
    samples, calls = run.draw(parts, cond, range(n), config["seed"], Progress(f"sampling {option}", n))
    made = {group: config[group] for group in ("sampler", "spacing", "guidance")}
    facts = {"run": str(folder), "weights": run.weights, "step": run.step, **made, "nfe": round(calls, 1)}
    return [as_picture(sample, f"{option}={path}") for sample in samples], facts, run


def in_folder(folder: Path, where: str, n: int) -> list[Picture]:
    """The first n pictures of a folder in the order of their names, or of its samples.npy; nothing where it has
    neither."""
    if (folder / ARRAY).is_file():
        try:
            samples = torch.from_numpy(np.load(folder / ARRAY, allow_pickle=False))
        except (ValueError, OSError, TypeError) as error:
            raise UserError(f"{where}: {ARRAY} cannot be read: {error}") from None
        _enough(len(samples), n, where)
        return [as_picture(sample, where) for sample in samples[:n].float()]
    files = sorted(file for file in folder.iterdir() if file.is_file() and is_image(file.name))
    if not files:
        return []
    _enough(len(files), n, where)
    return [_opened(file, where) for file in files[:n]]


def real_pictures(config: dict[str, Any], run: Run | None) -> list[Picture]:
    """One real picture per check, of the folder ``real`` or the held-out images of a run."""
    checks, path = config["checks"], config["real"]
    if not checks:
        return []
    if path is not None:
        folder = Path(str(path))
        found = in_folder(folder, f"real={path}", checks) if folder.is_dir() else []
        if not found:
            raise UserError(f"real={path}: need a folder of pictures")
        return found
    if run is None:
        raise UserError(
            "real=null: neither a nor b is a run; need a folder of real pictures for the checks, or checks=0"
        )
    data = run.parts.images
    held_out = data.held_out.draw(checks)["x_0"]
    _enough(len(held_out), checks, "checks, held-out images")
    return [as_picture(image, "real") for image in data.codec.decode(held_out)]


def noise_like(pictures: list[Picture], seed: int) -> list[Picture]:
    """A picture of independent uniform pixels for each of these, of its size and colours."""
    found = []
    for i, picture in enumerate(pictures):
        channels = len(picture.getbands())
        values = torch.rand(channels, picture.height, picture.width, generator=generator(seed, "preference-noise", i))
        found.append(as_image(2 * values - 1))
    return found


def check_sizes(a: list[Picture], b: list[Picture]) -> None:
    """Pairs of unlike size would tell which is which."""
    for one, other in zip(a, b, strict=True):
        if one.size != other.size:
            sizes = [" x ".join(map(str, picture.size)) for picture in (one, other)]
            raise UserError(f"a, b: a picture of {sizes[0]} pixels beside one of {sizes[1]}; need equal sizes")


def as_picture(sample: Tensor, where: str) -> Picture:
    """A sample (C, H, W) in [-1, 1]."""
    if sample.ndim != 3 or sample.shape[0] not in (1, 3):
        raise UserError(f"{where}: samples of shape {tuple(sample.shape)} are no pictures")
    if not bool(sample.isfinite().all()):
        raise UserError(f"{where}: has values that are not finite")
    return as_image(sample)


def _opened(file: Path, where: str) -> Picture:
    try:
        with Image.open(file) as picture:
            return picture.convert("L" if picture.mode in ("1", "L", "I", "I;16") else "RGB")
    except Exception as error:  # decoders raise nearly any type
        raise UserError(f"{where}: {file.name}: {' '.join(str(error).split())}") from None


def _enough(found: int, n: int, where: str) -> None:
    if found < n:
        raise UserError(f"{where}: {found} pictures; need {n}")
