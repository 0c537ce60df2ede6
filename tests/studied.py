"""Runs of a study, made up: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from denoiselab.report.claims import Answer, judge
from denoiselab.report.runs import Evaluation, Record, Run
from denoiselab.report.studies import studies

CLASSES = {
    "unit": "Unit", "min_snr": "MinSNR", "snr": "SNR", "eps": "Eps", "v": "V", "ddim": "DDIM", "heun": "Heun",
}  # fmt: skip

CLAIM = {"metric": "fd_digits", "better": {"weighting": "min_snr"}, "than": {"weighting": "unit"}}

STUDY = {
    "question": "Is min-SNR better?",
    "axes": {"weighting": ["unit", "min_snr"], "seed": [0, 1, 2, 3, 4]},
    "metrics": ["fd_digits"],
    "budget": None,
    "claims": [CLAIM],
}


def planned(*seeds: int, claims: Any = (CLAIM,), **axes: list[Any]) -> dict[str, Any]:
    """STUDY over seeds, with more axes."""
    return {**STUDY, "axes": {**STUDY["axes"], **axes, "seed": [*seeds]}, "claims": [*claims]}


def part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"denoiselab.any.{CLASSES[name]}", **arguments}


def measured(
    value: float | None,
    name: str = "fd_digits",
    better: str = "lower",
    n: int = 1000,
    seed: int = 0,
    sampler: str = "ddim",
    steps: int = 50,
    scale: float = 1.0,
    step: int = 100,
    chosen: bool = True,
    controls: dict[str, float] | None = None,
    extractor: str = "a",
) -> Evaluation:
    """An evaluation with one record; ``chosen``: whether it says which options it was composed of."""
    protocol = {
        "sampler": part(sampler, steps=steps),
        "spacing": {"_target_": "denoiselab.any.Trailing"},
        "guidance": {"_target_": "denoiselab.any.CFG", "scale": scale},
    }
    protocol |= {"n": n, "seed": seed, "weights": "ema", "label_policy": "balanced", "step": step}
    records = [Record(name, value, better, controls or {}, {"extractor": extractor}, {})]
    choices = {"sampler": sampler, "spacing": "trailing", "guidance": "cfg"} if chosen else {}
    return Evaluation(protocol, records, None, choices)


def run(
    seed: int,
    evaluations: list[Evaluation] | float | None,
    weighting: str = "unit",
    target: str = "v",
    study: Any = STUDY,
    state: str = "done",
    lr: float = 1e-3,
    said: tuple[str, ...] = (),
    **more: Any,
) -> Run:
    """A run of the study; a number stands for one evaluation."""
    if not isinstance(evaluations, list):
        evaluations = [] if state != "done" else [measured(evaluations)]
    identity = {"data": {"_target_": "denoiselab.any.Digits"}, "optimizer": {"lr": lr}, "seed": seed, **more}
    identity |= {"weighting": part(weighting), "target": part(target)}
    config = {
        **{name: value for name, value in measured(0.0).protocol.items() if name in ("sampler", "spacing", "guidance")},
        "study": study,
        "optimizer": {"lr": lr},
        "evaluation": {"n": 1000, "seed": 0, "weights": "ema"},
        "trainer": {"max_steps": 100},
        "name": "snr",
        "output_dir": "outputs",
    }
    chosen = {"weighting": weighting, "target": target, "study": "snr", "metrics": "digits", "data": "digits"}
    chosen |= {"sampler": "ddim", "spacing": "trailing", "guidance": "cfg"}
    lines = ["study=snr", f"weighting={weighting}", f"target={target}", *said, f"seed={seed}"]
    record = {"choices": chosen, "overrides": lines, "git": "0123456789ab", "versions": {"torch": "2.10"}}
    status = {"state": state, "step": 100, "max_steps": 100, "started": "2025-01-01"}
    name = f"{weighting}-{target}-{lr}-s{seed}"
    return Run(name, identity, status, record, json.dumps(config), [], {}, evaluations)  # JSON is YAML


def save(found: Run, folder: Path) -> Path:
    """A run as a directory."""
    path = folder / found.name
    for number, evaluation in enumerate(found.evaluations):
        inside = path / "evaluations" / str(number)
        inside.mkdir(parents=True, exist_ok=True)
        content = {"protocol": evaluation.protocol, "choices": evaluation.choices}
        content["records"] = [vars(record) for record in evaluation.records]
        (inside / "evaluation.json").write_text(json.dumps(content))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(found.config)
    for name in ("identity", "status", "record"):
        (path / f"{name}.json").write_text(json.dumps(getattr(found, name)))
    return path


def arms(unit: list[float | None], min_snr: list[float | None], study: Any = None, **both: Any) -> list[Run]:
    """Two arms of as many seeds."""
    study = study or planned(*range(len(unit)))
    found = [run(seed, value, "unit", study=study, **both) for seed, value in enumerate(unit)]
    return found + [run(seed, value, "min_snr", study=study, **both) for seed, value in enumerate(min_snr)]


def answer(runs: list[Run]) -> Answer:
    """Of the only study of runs."""
    (study,) = studies(runs)
    return judge(study)
