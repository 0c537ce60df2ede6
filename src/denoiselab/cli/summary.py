"""denoiselab summary"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoiselab.cli import parse
from denoiselab.compose import compose, plain, sweep
from denoiselab.errors import UserError

if TYPE_CHECKING:
    from denoiselab.summary import Summary

ABOUT = """Parameters, multiply-adds and training memory of a network, counted on tensors without values: it takes no
memory and no data set, whatever the size. Takes every option of `denoiselab train`, so that a training command can be
asked before it is started; with -m, one row per combination.

    denoiselab summary model=unet_digits
    denoiselab summary -m model=unet_digits model.channels=32,64 shape=[1,28,28] num_classes=10 batch=128"""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "summary", ABOUT)
    jobs = sweep(overrides) if multirun else [overrides]
    configs = [plain(compose("summary", job, config_dir)) for job in jobs]
    made = [summary_of(config, job) for config, job in zip(configs, jobs, strict=True)]
    if multirun:
        swept = [[line for line in job if any(line not in other for other in jobs)] for job in jobs]
        print(comparison([" ".join(lines) for lines in swept], made))
        figures: Any = [{"options": job, **figures_of(one)} for job, one in zip(jobs, made, strict=True)]
    else:
        print(table(made[0]))
        figures = {"options": overrides, **figures_of(made[0])}
    if configs[0]["output"]:
        from denoiselab.files import write_text

        write_text(Path(configs[0]["output"]), json.dumps(figures, indent=2) + "\n")
    return 0


def summary_of(config: dict[str, Any], overrides: list[str]) -> Summary:
    """The network that a configuration describes, summed up."""
    import torch

    from denoiselab.checks import PRECISIONS, check_used
    from denoiselab.experiment import Parts
    from denoiselab.summary import summarise

    class Asked(Parts):
        """With the number of outputs that was given, if one was."""

        @property
        def outputs(self) -> int:
            return super().outputs if config["outputs"] is None else config["outputs"]

    trainer = config["trainer"]
    if trainer["precision"] not in PRECISIONS:
        raise UserError(f"trainer.precision={trainer['precision']}: need one of {', '.join(PRECISIONS)}")
    facts = interface(config)
    parts = Asked(config, facts)
    check_used(parts, overrides)
    _ = parts.embedding  # its table has values
    with torch.device("meta"):
        net = parts.model.to("meta")
    optimizer = {**config["optimizer"]}
    if "fused" in optimizer:
        optimizer["fused"] = None  # there is no fused kernel on meta
    try:
        return summarise(
            net,
            **facts,
            batch=micro_batch(config),
            precision=trainer["precision"],
            optimizer=lambda parameters: parts.make("optimizer", optimizer, params=parameters),
            ema=parts.make("ema", open=("model",)),
        )
    except (RuntimeError, NotImplementedError) as error:  # a shape that does not fit, or a look at values
        raise UserError(
            f"model: {type(net).__name__} fails on tensors without values: {' '.join(str(error).split())}"
        ) from error


def interface(config: dict[str, Any]) -> dict[str, Any]:
    """shape, num_classes, vector and low_res: as given, or the data set's. With a shape no data set is looked at."""
    given = {key: config[key] for key in ("shape", "num_classes", "vector", "low_res")}
    for key, value in given.items():
        if key != "shape" and not (value is None or (isinstance(value, int) and value >= 0)):
            raise UserError(f"{key}={value}: need a whole number >= 0")
    shape = given["shape"]
    if shape is not None:
        if not (isinstance(shape, list) and shape and all(isinstance(side, int) and side > 0 for side in shape)):
            raise UserError(f"shape={shape}: need whole numbers > 0, as in shape=[4,32,32]")
        return {key: value or 0 for key, value in given.items()}
    from denoiselab.experiment import Parts

    data = Parts(config).data
    return {key: getattr(data, key) if value is None else value for key, value in given.items()}


def micro_batch(config: dict[str, Any]) -> int:
    """Samples that are on one device at a time."""
    trainer, batch = config["trainer"], config["batch"]
    if batch is None:
        devices = trainer["devices"] if isinstance(trainer["devices"], int) else 1
        batch = max(1, config["data"]["batch_size"] // (trainer["accumulate"] * max(1, devices)))
    if not (isinstance(batch, int) and batch >= 1):
        raise UserError(f"batch={batch}: need a number of samples >= 1")
    return batch


def figures_of(summary: Summary) -> dict[str, Any]:
    """As plain data, with the totals of a training step."""
    totals = {"total": summary.total(), "total_recomputed": summary.total(recompute=True)}
    return {**asdict(summary), **totals}


def table(summary: Summary) -> str:
    """One row per part, the total, and what training needs."""
    rows = [
        [
            part.name + (f"  x {part.times}" if part.times > 1 else ""),
            " x ".join(map(str, part.output)),
            count(part.parameters),
            count(part.multiply_adds),
            size(part.activations),
        ]
        for part in summary.parts
    ]
    total = ["total", "", count(summary.parameters), count(summary.multiply_adds), size(summary.activations)]
    head = ["part", "output", "parameters", "multiply-adds", "activations"]
    lines = columns([head, *rows, total], left=2)
    lines.insert(-1, "-" * len(lines[0]))
    lines += ["", "multiply-adds of a forward pass, and activations kept for the backward pass, are of one sample", ""]
    whole = f"{summary.batch} sample{'s' if summary.batch > 1 else ''} at a time, {summary.precision}"
    lines.append(f"memory of training with {whole}, without what single operations need for themselves:")
    memory = {
        name: "unknown" if bytes_ is None else size(bytes_) for name, bytes_ in summary.memory.items() if bytes_ != 0
    }
    memory |= {"activations": size(summary.activations * summary.batch), "in all": size(summary.total())}
    if summary.recomputed is not None:
        memory["activations, units recomputed"] = size(summary.recomputed * summary.batch)
        memory["in all, units recomputed"] = size(summary.total(recompute=True))
    return "\n".join([*lines, *(f"  {line}" for line in columns([[NAMES.get(k, k), v] for k, v in memory.items()]))])


NAMES = {"optimizer": "optimizer state", "ema": "EMA", "autocast": "autocast's copies of weights"}


def comparison(names: list[str], summaries: list[Summary]) -> str:
    """One row per network."""
    head = ["options", "parameters", "multiply-adds", "activations", "recomputed", "batch", "training", "recomputed"]
    rows = [
        [
            name,
            count(s.parameters),
            count(s.multiply_adds),
            size(s.activations),
            "-" if s.recomputed is None else size(s.recomputed),
            str(s.batch),
            size(s.total()),
            "-" if s.recomputed is None else size(s.total(recompute=True)),
        ]
        for name, s in zip(names, summaries, strict=True)
    ]
    notes = "multiply-adds and activations are of one sample, training memory of a batch"
    return "\n".join([*columns([head, *rows]), "", f"{notes}; recomputed: units keep their inputs only"])


def columns(rows: list[list[str]], left: int = 1) -> list[str]:
    """Rows with aligned columns, all but the first ``left`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def count(number: int) -> str:
    """
    >>> count(0), count(950), count(675129632), count(118_640_000_000)
    ('0', '950', '675.13 M', '118.64 G')
    """
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def size(number: float) -> str:
    """
    >>> size(512), size(2048), size(3 * 2**20), size(2.5 * 2**30)
    ('512 B', '2.0 KiB', '3.0 MiB', '2.50 GiB')
    """
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if number >= unit:
            return f"{number / unit:.{digits}f} {name}"
    return f"{number:.0f} B"
