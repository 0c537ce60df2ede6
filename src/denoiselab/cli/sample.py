"""denoiselab sample"""

from __future__ import annotations

import sys
from pathlib import Path

from denoiselab.cli import parse
from denoiselab.compose import compose, plain
from denoiselab.errors import UserError

ABOUT = """Draw samples from a run or a checkpoint: OUTPUT/samples.png, and OUTPUT/samples.npy with float32 values."""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "sample", ABOUT)
    if multirun:
        raise UserError("-m: sample makes one set of samples; sweep with `denoiselab evaluate -m`")
    composed = compose("sample", overrides, config_dir)
    config = plain(composed)
    if config["n"] < 1:
        raise UserError(f"n={config['n']}: need at least 1")

    import numpy as np

    from denoiselab.evaluation import picture
    from denoiselab.run import load

    run = load(config["ckpt"], config["weights"])
    parts = run.parts_for(config)
    run.elsewhere(parts)
    cond = run.cond(config["n"], config["label"])
    samples, _ = run.draw(parts, cond, range(config["n"]), config["seed"])
    folder = Path(config["output"]) if config["output"] else run.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    columns = 0 if config["label"] is not None else run.parts.num_classes
    picture(samples, cond.get("label"), columns).save(folder / "samples.png")
    np.save(folder / "samples.npy", samples.numpy())
    print(f"{folder / 'samples.png'}", file=sys.stderr)
    return 0
