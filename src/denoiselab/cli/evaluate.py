"""denoiselab evaluate"""

from __future__ import annotations

from denoiselab.cli import parse
from denoiselab.compose import Composed, compose, plain, sweep

ABOUT = """Measure a run or a checkpoint. Each evaluation (sampler, guidance, n, seed, weights, metrics) has an address
of its own under the run and is made once; with -m, several values are measured in turn."""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "evaluate", ABOUT)
    jobs = [compose("evaluate", job, config_dir) for job in (sweep(overrides) if multirun else [overrides])]
    for job in jobs:
        evaluate_one(job)
    return 0


def evaluate_one(composed: Composed) -> None:
    """Load the run, then measure it as asked."""
    from denoiselab.evaluation import evaluate
    from denoiselab.experiment import Parts, check_evaluation
    from denoiselab.run import load

    config = plain(composed)
    check_evaluation(config)
    run = load(config["ckpt"], config["evaluation"]["weights"])
    if not any(line.startswith("metrics") for line in composed.overrides):
        config["metrics"] = run.parts.config["metrics"]
    trained = {group: run.parts.config[group] for group in ("data", "schedule", "p_null")}
    parts = Parts({**trained, **config})
    parts.check_sampler()
    evaluate(run, parts, config["rerun"])
