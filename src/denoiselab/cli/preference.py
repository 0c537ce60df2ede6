"""denoiselab preference"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from denoiselab.cli import parse
from denoiselab.compose import compose, plain
from denoiselab.errors import UserError

ABOUT = """Which of two runs' samples do people prefer? part=make writes a page of blinded pairs for raters, in random
order and on random sides, with checks of attention and repeated pairs, and a key to keep. part=score reads the files
that raters send back, with the key: the share that prefers b, its 95 % interval, and how far raters agree."""

PARTS = ("make", "score")


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "preference", ABOUT)
    if multirun:
        raise UserError("-m: preference compares two; make a sheet for each pair of runs")
    config = plain(compose("preference", overrides, config_dir))
    part = config["part"]
    if part not in PARTS:
        raise UserError(f"part={part}: need one of {', '.join(PARTS)}")
    (make if part == "make" else score)(config)
    return 0


def make(config: dict[str, Any]) -> None:
    """Write the sheet and its key."""
    n, repeats, checks = (config[name] for name in ("n", "repeats", "checks"))
    for name, least, most in (("n", 1, 10_000), ("repeats", 0, n), ("checks", 0, 1000)):
        if not least <= config[name] <= most:
            raise UserError(f"{name}={config[name]}: need a number from {least} to {most}")
    sheet, key = Path(config["sheet"]), Path(config["key"])
    for name, path in (("sheet", sheet), ("key", key)):
        if path.exists():
            raise UserError(f"{name}={path}: exists, and answers to it may be on their way; name another")

    from denoiselab.preference import Pictures, order, write_sheet
    from denoiselab.preference.sources import check_sizes, noise_like, real_pictures, source

    (a, of_a, run_a), (b, of_b, run_b) = source("a", config), source("b", config)
    check_sizes(a, b)
    real = real_pictures(config, run_a or run_b)
    pictures = Pictures(a, b, real, noise_like(real, config["seed"]))
    trials = order(n, repeats, checks, config["seed"])
    facts = {"a": of_a, "b": of_b, "seed": config["seed"]}
    write_sheet(sheet, key, pictures, trials, config["question"], facts)
    tell(f"{len(trials)} questions: {n} pairs, {repeats} of them twice, {checks} checks")
    tell(f"the key stays here: {key}")
    print(sheet, flush=True)  # alone on stdout, for scripts


def score(config: dict[str, Any]) -> None:
    """Read the answers, and say and write what they mean."""
    from denoiselab.files import write_text
    from denoiselab.preference.answers import find_answers, read_answers, read_key
    from denoiselab.preference.score import score as scored

    if not 0 <= config["attention"] <= 1:
        raise UserError(f"attention={config['attention']}: need a share in [0, 1]")
    key = read_key(Path(config["key"]))
    raters = [read_answers(path, key) for path in find_answers(config["answers"])]
    try:
        found = scored(key, raters, config["attention"])
    except ValueError as error:
        raise UserError(f"answers: {error}") from None
    output = Path(config["output"]) if config["output"] else Path(config["key"]).with_suffix(".score.json")
    write_text(output, json.dumps({"sheet": key.sheet, **key.facts, **found}, indent=2) + "\n")
    for line in said(found):
        tell(line)
    print(output, flush=True)


def said(found: dict[str, Any]) -> list[str]:
    """A score in lines."""
    whole, kappa = found["prefer_b"], found["agreement"]["fleiss_kappa"]
    lines = [
        f"{name:20} prefers b {one['share']:.1%} of {one['n']} {span(one['interval'])}; checks {one['checks_passed']}/"
        f"{one['checks']}, repeats alike {one['repeats_alike']}/{one['repeats']}"
        + (f"; left out: {found['excluded'][name]}" if name in found["excluded"] else "")
        for name, one in found["raters"].items()
    ]
    several = whole["raters"] > 1 and whole["interval_over_pairs"] is not None
    interval = whole["interval_over_pairs"] if several else whole["interval"]
    lines.append(
        f"b is preferred in {whole['share']:.1%} of {whole['n']} answers by {whole['raters']} of "
        f"{len(found['raters'])} raters, 95 % {span(interval)}" + (" over pairs" if several else "")
    )
    lines += [] if kappa is None else [f"agreement between raters: Fleiss' kappa {kappa:.2f} (0: as chance, 1: always)"]
    return lines


def span(interval: list[float]) -> str:
    return f"[{interval[0]:.1%}, {interval[1]:.1%}]"


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
