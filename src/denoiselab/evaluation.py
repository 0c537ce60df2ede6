"""Measuring a run: samples made under a stated protocol, metrics on them, records of both."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from denoiselab.data.base import Samples
from denoiselab.errors import NonFiniteLoss
from denoiselab.experiment import Parts
from denoiselab.files import write_text
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.loss_by_t import held_out_losses
from denoiselab.pictures import panels, tiles
from denoiselab.run import Run, by_content
from denoiselab.run_folder import digest, versions


def address(config: dict[str, Any]) -> str:
    """The hash of what an evaluation's result depends on, besides the run."""
    return digest(by_content({key: config[key] for key in ("sampler", "spacing", "guidance", "evaluation", "metrics")}))


def evaluate(run: Run, parts: Parts, rerun: bool = False) -> Path:
    """Sample, measure, and write RUN/evaluations/ADDRESS/evaluation.json with a grid beside it.

    Args:
        run: with the weights to measure.
        parts: the evaluation's sampler, guidance and metrics; its configuration's ``evaluation`` says n and seed.
        rerun: measure again even if this evaluation of this step exists.

    Returns:
        The evaluation's folder.
    """
    config = parts.config
    n, seed = config["evaluation"]["n"], config["evaluation"]["seed"]
    elsewhere = run.elsewhere(parts)
    folder = run.folder / "evaluations" / digest([address(config), run.step, *elsewhere])
    file = folder / "evaluation.json"
    if not rerun and file.is_file():
        _tell(f"already evaluated: {folder}")
        return folder

    metrics, held_out = parts.metrics, parts.data.held_out  # asked for before sampling: a set may have no samples
    started = time.perf_counter()
    cond = run.cond(n)
    label = cond.get("label")
    generated, nfe = run.draw(parts, cond, range(n), seed, _Progress(n))
    if not bool(generated.isfinite().all()):
        raise NonFiniteLoss(f"{run.folder}: the sampler gave values that are not finite; nothing was measured")
    records = [
        *(found for metric in metrics.values() for found in metric.measure(generated, label, parts.data)),
        _held_out_loss(run, held_out, buckets := {}),
    ]
    protocol = {
        **{group: config[group] for group in ("sampler", "spacing", "guidance")},
        "n": n,
        "seed": seed,
        "weights": run.weights,
        "label_policy": "balanced" if label is not None else "none",
        "nfe": round(nfe, 1),
        "dtype": "float32",
        "step": run.step,
        "schedule": parts.schedule.fingerprint,
        "trained_along": run.schedule.fingerprint,
        "versions": versions(),
    }
    result = {
        "protocol": protocol,
        "records": [asdict(record) for record in records],
        "buckets": buckets,
        "seconds": round(time.perf_counter() - started, 2),
    }
    folder.mkdir(parents=True, exist_ok=True)
    picture(generated[:100], label, run.parts.num_classes).save(folder / "samples.png")
    write_text(file, json.dumps(result, indent=2) + "\n")
    for record in records:
        _tell(describe(record))
    _tell(f"evaluation: {folder}")
    return folder


def picture(samples: Tensor, label: Tensor | None, classes: int):
    """Samples as one picture: a grid with a column per class, or points in the plane."""
    if samples.ndim == 2:
        return panels([samples], [f"{len(samples)} samples"], None if label is None else label[: len(samples)])
    return tiles(samples, classes or max(1, round(len(samples) ** 0.5)))


def describe(record: Measurement) -> str:
    """A measurement and its controls in one line."""
    controls = ", ".join(f"{name} {value:.4g}" for name, value in record.controls.items())
    return f"  {record.name:24}{record.value:<10.4g}" + (f"({controls})" if controls else "")


def _held_out_loss(run: Run, held_out: Samples, buckets: dict[str, Any]) -> Measurement:
    """The training loss on held-out data at fixed noise; its buckets are written into the given dict."""
    found, total = held_out_losses(run.denoiser, run.schedule, held_out, loss=run.loss, repeats=10, device=run.device)
    buckets.update(found.row("buckets/val"))
    return Measurement(
        "held_out_loss",
        float(total[0] / total[1]),
        "lower",
        protocol={
            "loss": run.loss.formula,
            "t": "uniform",
            "repeats": 10,
            "n_real": len(held_out),
        },
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Progress:
    """Says how far sampling is, at most every 15 seconds."""

    def __init__(self, n: int):
        self.n, self.done, self.started = n, 0, time.perf_counter()
        self.next_line = self.started + 15

    def __call__(self, added: int) -> None:
        self.done += added
        now = time.perf_counter()
        if now > self.next_line and self.done < self.n:
            left = (now - self.started) / self.done * (self.n - self.done)
            _tell(f"sampling: {self.done} of {self.n}, about {left:.0f} s left")
            self.next_line = now + 15
