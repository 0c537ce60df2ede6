"""denoiselab export"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from denoiselab.cli import parse
from denoiselab.compose import compose, plain
from denoiselab.errors import UserError

ABOUT = """Write the network of a run or a checkpoint for other programs. format=diffusers makes a folder that the
pipelines, models and schedulers of diffusers read; format=safetensors one that denoiselab reads, without a pickle."""

FORMATS = ("diffusers", "safetensors")


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "export", ABOUT)
    if multirun:
        raise UserError("-m: export writes one folder")
    config = plain(compose("export", overrides, config_dir))
    kind, label = config["format"], config["label"]
    if kind not in FORMATS:
        raise UserError(f"format={kind}: need one of {', '.join(FORMATS)}")
    if label is not None and kind != "diffusers":
        raise UserError(f"label={label}: only format=diffusers fixes a class; leave it out")

    from denoiselab.exchange.files import write_folder
    from denoiselab.run import load

    run = load(config["ckpt"], config["weights"])
    name = kind if run.weights == "ema" else f"{kind}-{run.weights}"
    folder = Path(config["output"]) if config["output"] else run.folder / "exports" / name
    content, notes = diffusers(run, label) if kind == "diffusers" else safetensors(run)
    made_of = {"source": run.folder.name, "weights": run.weights, "step": run.step}
    write_folder(folder, content, {"format": kind, **made_of, "schedule": run.schedule.fingerprint})
    for line in notes:
        print(line, file=sys.stderr)
    print(folder, flush=True)  # alone on stdout, for scripts
    return 0


def diffusers(run: Any, label: int | None) -> tuple[dict[str, Any], list[str]]:
    """The files, and what to say of them."""
    from denoiselab.exchange import pipeline

    chosen = run.parts.config.get("spacing", {}).get("_target_", "").rpartition(".")[2].lower()
    spacing = chosen if chosen in pipeline.SPACINGS else "trailing"
    latents = run.parts.interface["codec"]["_target_"] == "denoiselab.data.Latent"
    content = pipeline.diffusers(run.denoiser, run.schedule, spacing, label, latents)
    made = content.get("model_index.json", {}).get("_class_name")
    if made:
        given = ", given the vae=... whose latents these are," if made == "DiTPipeline" else ""
        return content, [f"{made}.from_pretrained{given} reads this folder"]
    why = "no pipeline of diffusers gives such a network its conditions"
    why = "no pipeline of diffusers decodes what such a network draws" if latents else why
    why += "; call it in a loop (docs/exchange.md)"
    fix = ", or fix a class with label=..." if run.parts.num_classes and not latents else ""
    return content, [why + fix]


def safetensors(run: Any) -> tuple[dict[str, Any], list[str]]:
    from denoiselab.exchange import ours

    learned = {f"schedule.{key}": value for key, value in run.schedule.state_dict().items()}
    learned |= {f"loss.{key}": value for key, value in run.learned.items()}
    config = {**run.parts.config, "sigma_data": run.denoiser.sigma_data}
    facts = {"weights": run.weights, "step": run.step, "fingerprint": run.schedule.fingerprint}
    facts |= {"interface": run.parts.interface, "choices": run.record["choices"]}
    content = ours.files(run.denoiser.state_dict(), learned, config, facts)
    return content, ["`denoiselab sample ckpt=` and `denoiselab import source=` read this folder"]
