"""A wandb sweep whose agents call ``denoiselab train``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.compose import interval, option, sweep, sweeps
from denoiselab.errors import UserError

METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
ARGUMENTS = "${args_no_hyphens}"
"""Where an agent puts option=value, each as one argument."""

NUMBER = re.compile(r"[-+]?(\d+|\d*\.\d+|\d+\.)([eE][-+]?\d+)?")


@dataclass
class Asked:
    """What a sweep is to do.

    Args:
        method: grid, random or bayes, of wandb's server.
        metric: a name that runs log, such as evaluation/held_out_loss.
        goal: minimize or maximize.
        name: of the sweep; None for the server's choice.
        project, entity: on the server.
        run_cap: the most runs; None for no limit.
    """

    method: str = "grid"
    metric: str = "evaluation/held_out_loss"
    goal: str = "minimize"
    name: str | None = None
    project: str = "denoiselab"
    entity: str | None = None
    run_cap: int | None = None

    def __post_init__(self) -> None:
        for key, known in {"method": METHODS, "goal": GOALS}.items():
            if getattr(self, key) not in known:
                raise UserError(f"{key}={getattr(self, key)}: need {' or '.join(known)}")
        if self.run_cap is not None and self.run_cap < 1:
            raise UserError(f"run_cap={self.run_cap}: need at least 1")


def sweep_file(asked: Asked, overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The content of a sweep file: what is fixed stands in its command, what is swept is a parameter.

    A value that is no plain number is a text in the grammar of overrides, so that commas, brackets and blanks reach
    ``denoiselab train`` as they were given, whatever way the server writes lists, true and null. The runs log to wandb,
    online. (Agents: wandb's ``sdk/launch/sweeps/utils.py`` makes one argument ``option=value`` of each parameter.)

    Args:
        asked: method, metric and goal.
        overrides: as after ``denoiselab train -m``; interval(a,b), with tag(log, ...) or int(...), where the method is
            random or bayes.
        config_dir: the user's own folder of options.

    Raises:
        UserError: nothing is swept, or not in a way that the method can choose from.
    """
    swept = [line for line in overrides if sweeps(line)]
    if not swept:
        raise UserError("nothing is swept: give an option several values, as in optimizer.lr=1e-4,1e-3")
    fixed = [line for line in overrides if not sweeps(line)]
    if not any("wandb" in line for line in overrides if option(line) == "logger"):
        fixed.append("logger=wandb")
    if not any(option(line) == "logger.wandb.offline" for line in overrides):
        fixed.append("logger.wandb.offline=false")  # an agent's result is what the server has
    folder = ["--config-dir", str(config_dir.resolve())] if config_dir else []
    found = {
        "name": asked.name,
        "project": asked.project,
        "entity": asked.entity,
        "program": "denoiselab",
        "method": asked.method,
        "metric": {"name": asked.metric, "goal": asked.goal},
        "run_cap": asked.run_cap,
        "parameters": {key: parameter for line in swept for key, parameter in [_parameter(line, asked.method)]},
        "command": ["${env}", "denoiselab", "train", *folder, *fixed, ARGUMENTS],
    }
    return {key: value for key, value in found.items() if value is not None}


def commands(content: dict[str, Any]) -> Iterator[list[str]]:
    """The arguments of ``denoiselab train`` that agents will give: for every combination of values, and of the ends of
    intervals.

    Args:
        content: of a sweep file.
    """
    axes = [[f"{name}={value}" for value in _values(parameter)] for name, parameter in content["parameters"].items()]
    before = content["command"][content["command"].index("train") + 1 : -1]
    for chosen in itertools.product(*axes):
        yield [*before, *chosen]


def _values(parameter: dict[str, Any]) -> list[Any]:
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def _parameter(line: str, method: str) -> tuple[str, dict[str, Any]]:
    name = line.partition("=")[0]
    ends = interval(line)
    if ends is None:
        return name, {"values": [_value(job[0].partition("=")[2]) for job in sweep([line])]}
    low, high, tags = ends
    if method == "grid":
        raise UserError(f"{line}: method=grid takes lists of values; method=random and method=bayes take intervals")
    if tags - {"log"}:
        raise UserError(f"{line}: tag {', '.join(sorted(tags - {'log'}))}; need log or none")
    if not low < high or ("log" in tags and low <= 0):
        raise UserError(f"{line}: need a smaller end and a larger one{', both > 0' if 'log' in tags else ''}")
    whole = isinstance(low, int) and isinstance(high, int)
    names = {
        (False, False): "uniform",
        (True, False): "int_uniform",
        (False, True): "log_uniform_values",
        (True, True): "q_log_uniform_values",
    }
    steps = {"q": 1} if whole and "log" in tags else {}
    return name, {"distribution": names[whole, "log" in tags], "min": low, "max": high, **steps}


def _value(text: str) -> Any:
    """A number, or the text."""
    if not NUMBER.fullmatch(text):
        return text
    return int(text) if text.lstrip("+-").isdigit() else float(text)
