"""denoiselab evaluate"""

from __future__ import annotations

from pathlib import Path

from denoiselab.cli import parse
from denoiselab.compose import compose, plain, sweep

ABOUT = """Measure a run or a checkpoint. Each evaluation (sampler, guidance, n, seed, weights, metrics) has an address
of its own under the run and is made once; with -m, several values are measured in turn."""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "evaluate", ABOUT)
    jobs = sweep(overrides) if multirun else [overrides]
    for job in jobs:
        compose("evaluate", [line for line in job if not _of_metrics(line)], config_dir)
    for job in jobs:
        evaluate_one(job, config_dir)
    return 0


def evaluate_one(overrides: list[str], config_dir: Path | None) -> None:
    """Load the run, then measure it as asked; with the metrics it was trained with, unless others are named."""
    from denoiselab import lint
    from denoiselab.checks import check_evaluation
    from denoiselab.diagnostics import Subject
    from denoiselab.evaluation import evaluate
    from denoiselab.inspection import inspect_once
    from denoiselab.run import device_of, load

    known = [line for line in overrides if not _of_metrics(line) and not line.startswith("metrics=")]
    config = plain(compose("evaluate", known, config_dir))
    check_evaluation(config)
    device = device_of(config["device"])
    run = load(config["ckpt"], config["evaluation"]["weights"]).to(device)
    own = (
        []
        if any(line.startswith("metrics=") for line in overrides)
        else [f"metrics={run.record['choices']['metrics']}"]
    )
    config = plain(compose("evaluate", [*own, *overrides], config_dir))
    parts = run.parts_for(config)
    diagnostics = parts.diagnostics
    lint.say(lint.look(lint.Case(parts, trained=run.schedule), training=False))
    if not diagnostics or any(line.startswith("metrics=") for line in overrides):
        evaluate(run, parts, config["rerun"])
    if diagnostics:
        subject = Subject(run, parts, lambda: load(config["ckpt"], "raw").to(device).denoiser, config_dir)
        for name, diagnostic in diagnostics.items():
            inspect_once(name, diagnostic, config["diagnostics"][name], subject, config["rerun"])


def _of_metrics(line: str) -> bool:
    """Whether an override changes the metrics' own options, which depend on the run's choice of metrics."""
    return line.lstrip("+~").startswith("metrics.")
