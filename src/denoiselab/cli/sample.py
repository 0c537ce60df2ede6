"""denoiselab sample"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoiselab.cli import parse
from denoiselab.compose import compose, plain
from denoiselab.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from denoiselab.run import Run

ABOUT = """Draw samples from a run or a checkpoint: OUTPUT/samples.png, and OUTPUT/samples.npy with float32 values.
With low_res=FILE_OR_FOLDER a run of data=super_resolution enlarges your own pictures, to OUTPUT/NUMBER_NAME.png."""

N = 100
"""Samples, unless told otherwise."""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "sample", ABOUT)
    if multirun:
        raise UserError("-m: sample makes one set of samples; sweep with `denoiselab evaluate -m`")
    composed = compose("sample", overrides, config_dir)
    config = plain(composed)
    n = config["n"]
    if n is not None and not (isinstance(n, int) and n >= 1):
        raise UserError(f"n={n}: need at least 1")

    import numpy as np

    from denoiselab.evaluation import picture
    from denoiselab.files import write_atomic
    from denoiselab.pictures import as_image
    from denoiselab.run import device_of, load

    device = device_of(config["device"])
    run = load(config["ckpt"], config["weights"]).to(device)
    parts = run.parts_for(config)
    for along in run.elsewhere(parts):
        print(f"sampling along {along}; the run was trained along {run.schedule.fingerprint}", file=sys.stderr)
    names, cond, real = asked_for(run, config)
    rows = len(next(iter(cond.values()))) if cond else n or N
    samples, _ = run.draw(parts, cond, range(rows), config["seed"])
    folder = Path(config["output"]) if config["output"] else run.folder / "samples"
    columns = 0 if config["label"] is not None else run.parts.num_classes
    made = {"samples.png": picture(samples, cond, columns, real, len(names) or rows)}
    made |= {
        f"{i:04d}_{names[i % len(names)]}.png": as_image(sample) for i, sample in enumerate(samples if names else ())
    }
    for name, image in made.items():
        write_atomic(folder / name, lambda file, image=image: image.save(file, "png"))
    write_atomic(folder / "samples.npy", lambda file: np.save(file, samples.numpy()))
    print(f"{rows} samples of the {run.weights} weights of step {run.step}: {folder / 'samples.png'}", file=sys.stderr)
    return 0


def asked_for(run: Run, config: dict[str, Any]) -> tuple[list[str], dict[str, Tensor], Tensor | None]:
    """The names of the user's own pictures, what the samples are asked for, and the held-out images that they are made
    of, if they are."""
    import torch

    n, label = config["n"], config["label"]
    if config["low_res"] is not None:
        from denoiselab.pictures import read

        small = read(Path(str(config["low_res"])), run.parts.low_res or 3)
        for file, image in small.items():
            run.check_low_res(image[None], f"low_res={file}")
        n = n or len(small)
        if n % len(small):
            raise UserError(f"n={n}: need as many samples of each of the {len(small)} pictures, as in n={len(small)}")
        cond = run.cond(n, label, {"low_res": torch.stack([*small.values()])})
        return [file.stem for file in small], cond, None
    if not run.made_of:
        return [], run.cond(n or N, label), None
    batch = run.held_out(n or N)
    found = len(batch["id"])
    if n is not None and found < n:
        print(f"n={n}: there are {found} held-out samples to make samples of", file=sys.stderr)
    own = {} if label is None else run.labels(found, label)
    return [], {**batch["cond"], **own}, run.codec.decode(batch["x_0"])
