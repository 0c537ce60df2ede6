"""Measuring a run: samples made under a stated protocol, metrics on them, records of both."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from denoiselab.checks import check_evaluates
from denoiselab.content import by_content
from denoiselab.data.base import Samples
from denoiselab.denoiser import Reconstructor, reconstructed
from denoiselab.errors import NonFiniteLoss, UserError
from denoiselab.experiment import Parts
from denoiselab.files import write_atomic, write_text
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.loss_by_t import held_out_losses
from denoiselab.pictures import enlargements, pairs, panels, tiles
from denoiselab.progress import Progress, say
from denoiselab.run import Run
from denoiselab.run_folder import digest, versions

RESULT = "evaluation.json"

SHOWN = 100
"""Most samples in a grid."""

RECONSTRUCTED = 10
"""Reconstructions in a picture."""

CHOSEN = ("sampler", "spacing", "guidance", "metrics", "schedule")
"""Groups that an evaluation is composed of."""


def address(config: dict[str, Any]) -> str:
    """The hash of what an evaluation's result depends on, besides the run."""
    return digest(by_content({key: config[key] for key in ("sampler", "spacing", "guidance", "evaluation", "metrics")}))


def folder_of(run: Run, parts: Parts) -> Path:
    """RUN/evaluations/ADDRESS of the evaluation of a run by these parts. Where samples are made along another schedule
    than was trained along, that is part of the address."""
    return run.folder / "evaluations" / digest([address(parts.config), run.step, *run.elsewhere(parts)])


def evaluate(run: Run, parts: Parts, rerun: bool = False, choices: Mapping[str, str] | None = None) -> Path:
    """Sample, measure, and write RUN/evaluations/ADDRESS/evaluation.json with a grid beside it.

    Args:
        run: with the weights to measure.
        parts: the evaluation's sampler, guidance and metrics; its configuration's ``evaluation`` says n and seed.
        rerun: measure again even if this evaluation of this step exists.
        choices: the options that the configuration was composed of, by group; kept for reports.

    Returns:
        The evaluation's folder.
    """
    config = parts.config
    n, seed = config["evaluation"]["n"], config["evaluation"]["seed"]
    check_evaluates(run.denoiser)
    folder = folder_of(run, parts)
    file = folder / RESULT
    if not rerun and file.is_file():
        say(f"already evaluated: {folder}")
        return folder

    metrics, held_out = parts.metrics, parts.data.held_out  # asked for before sampling: a set may have no samples
    if n > len(held_out) and (run.made_of or not run.denoiser.generates):
        n = len(held_out)
        say(f"measuring {n} samples, one of each held-out one")
        _check_enough(metrics, n)
    started = time.perf_counter()
    made = sample(run, parts, n, seed) if run.denoiser.generates else reconstruct(run, parts, n)
    if not bool(made.generated.isfinite().all()):
        raise NonFiniteLoss(f"{run.folder}: the sampler gave values that are not finite; nothing was measured")
    records = [
        *(found for metric in metrics.values() for found in metric.measure(made.generated, made.label, parts.images)),
        _held_out_loss(run, held_out, buckets := {}),
    ]
    for record in records:
        if record.name in parts.data.reconstruction:  # what decoding alone loses
            record.controls["reconstruction"] = parts.data.reconstruction[record.name]
    protocol = {
        **made.protocol,
        "n": n,
        "weights": run.weights,
        "dtype": "float32",
        "step": run.step,
        "versions": versions(),
    }
    result = {
        "protocol": protocol,
        "choices": {group: name for group, name in (choices or {}).items() if group in CHOSEN},
        "records": [asdict(record) for record in records],
        "buckets": buckets,
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_atomic(folder / "samples.png", lambda out: made.picture.save(out, "png"))
    write_text(file, json.dumps(result, indent=2) + "\n")
    for record in records:
        say(describe(record))
    say(f"evaluation of the {run.weights} weights of step {run.step}: {folder}")
    return folder


class Made(NamedTuple):
    """What is measured, and how it was made."""

    generated: Tensor
    """Decoded, (n, ...) on the CPU."""
    label: Tensor | None
    """The class that each was asked for."""
    protocol: dict[str, Any]
    picture: Image.Image


def sample(run: Run, parts: Parts, n: int, seed: int) -> Made:
    """n samples: of every class in turn, or, where a model is told more than a class, of the conditions of the first n
    held-out samples."""
    config, batch = parts.config, run.held_out(n, parts.data) if run.made_of else None
    cond = run.cond(n) if batch is None else batch["cond"]
    real = None if batch is None else parts.data.codec.decode(batch["x_0"])
    label = cond.get("label")
    generated, nfe = run.draw(parts, cond, range(n), seed, Progress("sampling", n))
    policy = "balanced" if batch is None else "held-out"
    protocol = {
        **{group: config[group] for group in ("sampler", "spacing", "guidance")},
        "seed": seed,
        "label_policy": policy if label is not None else "none",
        "nfe": round(nfe, 1),
        "schedule": parts.schedule.fingerprint,
        "trained_along": run.schedule.fingerprint,
        **({"made_of": [f"held-out {name}" for name in run.made_of]} if run.made_of else {}),
    }
    return Made(generated, label, protocol, picture(generated, cond, run.parts.num_classes, real))


def reconstruct(run: Run, parts: Parts, n: int) -> Made:
    """What an autoencoder makes of the first n held-out images; the picture has them above."""
    assert isinstance(run.denoiser, Reconstructor)
    batch, codec = parts.data.held_out.draw(n), parts.data.codec
    made = codec.decode(reconstructed(run.denoiser, batch["x_0"], run.device))
    given = codec.decode(batch["x_0"])
    protocol = {"made_of": ["held-out images"]}
    return Made(made, batch["cond"].get("label"), protocol, pairs(given[:RECONSTRUCTED], made[:RECONSTRUCTED]))


def picture(
    samples: Tensor, cond: dict[str, Tensor], classes: int = 0, real: Tensor | None = None, columns: int | None = None
) -> Image.Image:
    """The first samples as one picture: under the small images that they were made of, in a grid with a column per
    class, or as points in the plane.

    Args:
        samples: decoded, (N, ...).
        cond: what they were asked for.
        classes: how many there are, where samples are of every class in turn.
        real: the images that the conditions were taken from.
        columns: how many small images there are, of which all samples were made in turn; None for N.
    """
    if "low_res" in cond:
        return enlargements(cond["low_res"][:columns], samples, real)
    samples, label = samples[:SHOWN], cond.get("label")
    if samples.ndim == 2:
        return panels([samples], [f"{len(samples)} samples"], None if label is None else label[: len(samples)])
    in_turn = classes if "vector" not in cond else 0
    return tiles(samples, in_turn or max(1, round(len(samples) ** 0.5)))


def _check_enough(metrics: dict[str, Metric], n: int) -> None:
    for name, metric in metrics.items():
        if n < metric.least:
            raise UserError(f"data: {n} held-out samples; metrics.{name} needs at least {metric.least}")


def describe(record: Measurement) -> str:
    """A measurement and its controls in one line."""
    controls = ", ".join(f"{name} {value:.4g}" for name, value in record.controls.items())
    return f"  {record.name:27} {record.value:<11.4g}" + (f"({controls})" if controls else "")


def _held_out_loss(run: Run, held_out: Samples, buckets: dict[str, Any]) -> Measurement:
    """The training loss on held-out data at fixed noise; its buckets, where it has times, are written into the given
    dict."""
    timed = run.denoiser.generates
    repeats = 10 if timed else 1
    found, total = held_out_losses(
        run.denoiser, run.schedule, held_out, loss=run.loss, repeats=repeats, device=run.device
    )
    if timed:
        buckets.update(found.row("buckets/val"))
    return Measurement(
        "held_out_loss",
        float(total[0] / total[1]),
        "lower",
        protocol={
            "loss": run.loss.formula,
            "t": "uniform" if timed else "none",
            "repeats": repeats,
            "n_real": len(held_out),
        },
    )
