"""Common mistakes: configurations that work and are seldom meant. Each rule says what is seen and what to do.

What cannot work at all is refused elsewhere (checks.py), guidance with p_null=0 among it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from denoiselab.errors import UserError

if TYPE_CHECKING:
    from denoiselab.experiment import Parts
    from denoiselab.schedule import Schedule

LEVELS = ("warn", "error", "none")

LARGEST = 256
"""The side of the largest images that are usually diffused as pixels (Dhariwal and Nichol 2021, arXiv:2105.05233)."""

STEPS = 1000
"""T of the discrete-time models."""

INCEPTION = 2048
"""Features that the customary numbers of samples of a Frechet distance are for: 10,000, and at least 5,000."""


class Advice(NamedTuple):
    """A mistake that was found."""

    rule: str
    text: str


@dataclass
class Case:
    """What is looked at."""

    parts: Parts
    trained: Schedule | None = None
    """That a run which is sampled was trained along."""
    folder: Path | None = None
    """Of a run that is to be trained,"""
    identity: dict[str, Any] | None = None
    """and what its result is determined by."""

    @property
    def config(self) -> dict[str, Any]:
        return self.parts.config


def schedule(case: Case) -> str | None:
    """Sampling along another schedule than was trained along."""
    along = case.parts.schedule.fingerprint
    if case.trained is None or case.trained.fingerprint == along:
        return None
    return (
        f"samples are made along {along}, and the run was trained along {case.trained.fingerprint}; the network is "
        "then asked at noise levels that it may have seen seldom. Leave schedule= out"
    )


def pixels(case: Case) -> str | None:
    """Diffusing pixels of more than 256 x 256."""
    shape, parts = case.parts.shape, case.parts
    if len(shape) != 3 or shape[1] * shape[2] <= LARGEST**2 or parts.low_res or parts.data.source is not None:
        return None
    times = shape[1] * shape[2] / LARGEST**2
    return (
        f"{shape[1]} x {shape[2]} pixels are diffused, {times:.1f} times as many as 256 x 256. "
        "Diffuse latents (denoiselab encode, data=latents) or enlarge small images (data=super_resolution)"
    )


def frechet(case: Case) -> str | None:
    """A Frechet distance of too few samples for its features."""
    from denoiselab.metrics import FrechetDistance

    n = case.config["evaluation"]["n"]
    for name, metric in case.parts.metrics.items():
        d = metric.features.dims if isinstance(metric, FrechetDistance) else None
        if d is None or n >= 10_000 * d / INCEPTION:
            continue
        usual, least = (math.ceil(samples * d / INCEPTION) for samples in (10_000, 5_000))
        what = f"n={n} samples in the {d} features of metrics.{name}: the distance is biased upwards by about 1/n"
        if n <= d:
            return f"{what}, its covariance is singular, and it is not ranked. Take evaluation.n={usual} or more"
        strongly = ", strongly" if n < least else ""
        return f"{what}{strongly}; compare values of this n alone. Take evaluation.n={usual} or more"
    return None


def steps(case: Case) -> str | None:
    """As many sampler steps as the discrete-time models have."""
    found = case.config["sampler"].get("steps")
    if not isinstance(found, int) or found < STEPS:
        return None
    return (
        f"sampler.steps={found}: as many network calls per sample as published chains have. ddim and the solvers are "
        "about as good in 20 to 50"
    )


def average(case: Case) -> str | None:
    """No exponential moving average."""
    if case.config["evaluation"]["weights"] == "raw":
        return "raw weights are measured, which jump about from step to step. Take evaluation.weights=ema"
    if case.config.get("ema", {}).get("decay") == 0:
        return "ema.decay=0: there is no average of the weights, and samples of raw weights are worse. Take 0.999"
    return None


def horizon(case: Case) -> str | None:
    """An average that still holds the initial weights when the run ends."""
    ema, last = case.config["ema"], case.config["trainer"]["max_steps"]
    decay = ema.get("decay")
    if ema.get("warmup", True) or not decay or (share := decay**last) <= 0.01:
        return None
    return (
        f"ema.decay={decay:g}, ema.warmup=false: after {last} steps the average still holds {share:.0%} of the initial "
        f"weights. Take ema.warmup=true, or a decay below {0.01 ** (1 / last):.4g}"
    )


def warmup(case: Case) -> str | None:
    """A learning rate that rises until the end."""
    found, last = case.config["lr_schedule"].get("warmup") or 0, case.config["trainer"]["max_steps"]
    if found < last:
        return None
    return f"lr_schedule.warmup={found}: the learning rate rises for all of the {last} steps. Take a twentieth of them"


def length(case: Case) -> str | None:
    """The same run at another length, where the learning rate depends on it."""
    if case.folder is None or case.identity is None or "steps" not in case.identity["lr_schedule"]:
        return None
    if case.folder.exists():
        return None
    for file in sorted(case.folder.parent.glob("*/identity.json")):
        try:
            other = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(other, dict) and _but_for_steps(other) == _but_for_steps(case.identity):
            return (
                f"{file.parent.name} is this run at another length: with lr_schedule=cosine the length decides the "
                "learning rate, so this run starts over. Keep trainer.max_steps, or take lr_schedule=inverse_sqrt"
            )
    return None


def batch(case: Case) -> str | None:
    """A batch that is larger than the data."""
    size, n = case.parts.data.batch_size, len(case.parts.data.train)
    if size <= n:
        return None
    return f"data.batch_size={size}: there are {n} training samples, so each batch holds some twice. Take at most {n}"


def clip(case: Case) -> str | None:
    """Clipping what has no bounds."""
    from denoiselab.data.codec import Identity

    bound = case.config["sampler"].get("clip")
    if bound is None or isinstance(case.parts.codec, Identity):
        return None
    what = "points" if len(case.parts.shape) == 1 else "latents"
    return f"sampler.clip={bound:g}: {what} have unit variance and reach further than 1. Take sampler.clip=null"


def scale(case: Case) -> str | None:
    """A guidance scale of another convention."""
    if not case.parts.num_classes or case.config["guidance"].get("scale") != 0:
        return None
    return (
        "guidance.scale=0 is unconditional here: x_0_null + scale (x_0_cond - x_0_null). What papers write as w = 0 is "
        "guidance.scale=1"
    )


def classes(case: Case) -> str | None:
    """Fewer samples than classes."""
    n, k = case.config["evaluation"]["n"], case.parts.num_classes
    if n >= k or not case.parts.metrics:
        return None
    return f"evaluation.n={n}: of {k} classes {k - n} are never asked for. Take a multiple of {k}"


Rule = Callable[[Case], str | None]

SAMPLING: tuple[Rule, ...] = (schedule, frechet, steps, average, clip, scale, classes)
"""Of how a run is sampled and measured."""

TRAINING: tuple[Rule, ...] = (pixels, horizon, warmup, length, batch)

NAMES = (*(rule.__name__ for rule in (*SAMPLING, *TRAINING)), "weighting")


def look(case: Case, training: bool) -> list[Advice]:
    """What the rules say of a configuration, but for those that ``lint.allow`` names.

    Args:
        training: whether a run is to be trained; otherwise one is to be measured.

    Raises:
        UserError: lint.level or lint.allow is something else, or a rule spoke with lint.level=error.
    """
    level, allowed = _options(case.config)
    generates = case.parts.denoiser_class.generates
    rules = [*(SAMPLING if generates else ()), *(TRAINING if training else ())]
    if level == "none":
        return []
    found = [
        Advice(rule.__name__, text)
        for rule in rules
        if rule.__name__ not in allowed and (text := rule(case)) is not None
    ]
    if found and level == "error":
        raise UserError(sentence(found[0]))
    return found


def sweep(configs: list[dict[str, Any]]) -> list[Advice]:
    """What is to be said of the runs of a sweep together: the ``weighting`` that moves with a swept target.

    Raises:
        UserError: lint.level=error, and there is something.
    """
    level, allowed = _options(configs[0])
    targets = {json.dumps(config["target"], sort_keys=True) for config in configs}
    unit = all(config["weighting"]["_target_"] == "denoiselab.weighting.Unit" for config in configs)
    if level == "none" or "weighting" in allowed or len(targets) < 2 or not unit:
        return []
    advice = Advice(
        "weighting",
        "targets are swept with weighting=unit, which is another weight on the x_0 error for each target, so two "
        "things change at once. Take weighting=min_snr, or another that does not follow the target",
    )
    if level == "error":
        raise UserError(sentence(advice))
    return [advice]


def sentence(advice: Advice) -> str:
    return f"lint.{advice.rule}: {advice.text}; if it is meant: lint.allow=[{advice.rule}]"


def say(advice: Iterable[Advice]) -> None:
    """Each once, on stderr."""
    for one in dict.fromkeys(advice):
        print(f"warning: {sentence(one)}", file=sys.stderr, flush=True)


def _options(config: dict[str, Any]) -> tuple[str, list[str]]:
    level, allowed = config["lint"]["level"], config["lint"]["allow"]
    if level not in LEVELS:
        raise UserError(f"lint.level={level}: need one of {', '.join(LEVELS)}")
    for name in allowed:
        if name not in NAMES:
            raise UserError(f"lint.allow={name}: no such rule; rules are {', '.join(NAMES)}")
    return level, allowed


def _but_for_steps(identity: dict[str, Any]) -> dict[str, Any]:
    rates = identity.get("lr_schedule")
    rates = {name: value for name, value in rates.items() if name != "steps"} if isinstance(rates, dict) else rates
    return {**identity, "lr_schedule": rates}
