"""The commands that make each row of the table of arms."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from denoiselab.report.arms import Arm, Table
from denoiselab.report.axes import key, kind
from denoiselab.report.options import SAMPLING, choices, overrides, parsed
from denoiselab.report.runs import Evaluation, Run
from denoiselab.report.statistics import plain

ELSEWHERE = re.compile(r"[+~]*(seed|rerun|(sweep|launcher|sweeper|lint)(\.\w+)*)=")
"""Options that do not make the arm: the seed is written once for all runs, the others say how a sweep is run."""

PLAIN = re.compile(r"[\w./:@+-]*[A-Za-z/][\w./:@+-]*")
"""Strings that Hydra's grammar reads as themselves, but for these:"""

WORDS = ("true", "false", "null", "inf", "nan")


@dataclass
class Recipe:
    """How an arm was made."""

    label: str
    commands: list[str]
    made: str
    """Git revision and versions."""
    note: str = ""
    """Why commands are missing, or do not make all of it."""


def recipes(table: Table) -> list[Recipe]:
    """A recipe for every arm: its runs as a sweep over their seeds, then its evaluation, unless training makes it."""
    return [_recipe(arm) for arm in table.arms]


def _recipe(arm: Arm) -> Recipe:
    runs = [run for run, _ in arm.members]
    commands, notes = [], []
    alike: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if overrides(run) or not run.record.get("command"):
            alike.setdefault((*_config_dir(run), *(o for o in overrides(run) if not ELSEWHERE.match(o))), []).append(
                run
            )
        else:
            commands.append(str(run.record["command"]))
    for words, members in alike.items():
        if any("overrides" not in run.record for run in members):
            notes.append("The options of its runs were not recorded.")
            continue
        seeds = ",".join(plain(run.seed) for run in members)
        several = ["-m"] if len(members) > 1 else []
        commands.append(shlex.join(["denoiselab", "train", *several, *words, f"seed={seeds}"]))
    if arm.protocol is not None:
        measured = _evaluate(arm)
        commands += measured if isinstance(measured, list) else []
        notes += [measured] if isinstance(measured, str) else []
    config = parsed(runs[0].config)
    asked, stopping = config.get("trainer"), config.get("early_stopping")
    steps = asked.get("max_steps") if isinstance(asked, dict) else None
    early = isinstance(stopping, dict) and stopping.get("patience") is not None
    if isinstance(steps, int) and steps != arm.step and not early:
        notes.append(f"It was measured at step {arm.step}; the command trains {steps} steps.")
    return Recipe(arm.label, commands, _made(runs), " ".join(notes))


def _made(runs: list[Run]) -> str:
    found: dict[str, None] = {}
    for run in runs:
        versions = run.record.get("versions")
        packages = [f"{k} {plain(v)}" for k, v in versions.items()] if isinstance(versions, dict) else []
        found[", ".join([f"git revision {plain(run.record.get('git'))}", *packages])] = None
    return " / ".join(found)


def _config_dir(run: Run) -> list[str]:
    """The user's own folder of options, as the command named it."""
    try:
        words = shlex.split(str(run.record.get("command") or ""))
    except ValueError:
        return []
    for word, after in itertools.pairwise([*words, ""]):
        if word in ("--config-dir", "-cd"):
            return ["--config-dir", after]
        if word.startswith(("--config-dir=", "-cd=")):
            return ["--config-dir", word.partition("=")[2]]
    return []


def _evaluate(arm: Arm) -> list[str] | str:
    """The command that measures an arm as it was measured; nothing if training does it; or why there is none."""
    run, evaluation = arm.members[0][0], arm.first
    assert evaluation is not None
    protocol, config = evaluation.protocol, parsed(run.config)
    asked = config["evaluation"] if isinstance(config.get("evaluation"), dict) else {}
    along = ["schedule"] if protocol.get("schedule") != protocol.get("trained_along", protocol.get("schedule")) else []
    own = _own(run, evaluation) and not along
    drawn = dict.fromkeys(plain(e.protocol.get("seed")) for _, found in arm.members for e in found)
    seeds = [seed for seed in drawn if not (own and seed == plain(asked.get("seed")))]
    if not seeds:
        return []
    words = []
    for group in [*along, *(group for group in SAMPLING if protocol.get(group) is not None)]:
        name = _name(run, evaluation, group)
        if name is None:
            return f"The option names of its {group} were not recorded, so there is no command for its evaluation."
        words.append(f"{group}={name}")
        words += (
            [] if group in along else [f"{path}={_written(value)}" for path, value in _leaves(group, protocol[group])]
        )
    if (metrics := evaluation.choices.get("metrics")) not in (None, choices(run).get("metrics")):
        words.append(f"metrics={metrics}")
    names = [
        {record.name for record in one.records} for one in (evaluation, *(e for e in run.evaluations if _own(run, e)))
    ]
    if names[0] in names[1:]:  # the run's changes to its metrics hold here too
        words += [line for line in overrides(run) if line.lstrip("+~").startswith("metrics.")]
    words += [f"evaluation.{name}={_written(protocol.get(name))}" for name in ("n", "weights")]
    folders = ",".join(_written(_folder(member)) for member, _ in arm.members)
    several = ["-m"] if len(arm.members) > 1 or len(seeds) > 1 else []
    measure = [*several, *_config_dir(run), f"ckpt={folders}", *words, f"evaluation.seed={','.join(seeds)}"]
    return [shlex.join(["denoiselab", "evaluate", *measure])]


def _own(run: Run, evaluation: Evaluation) -> bool:
    """Whether an evaluation was made as the run's own configuration says."""
    protocol, config = evaluation.protocol, parsed(run.config)
    asked = config["evaluation"] if isinstance(config.get("evaluation"), dict) else {}
    same = all(key(config.get(group)) == key(protocol.get(group)) for group in SAMPLING)
    same = same and all(asked.get(name) == protocol.get(name) for name in ("n", "weights"))
    return same and evaluation.choices.get("metrics") in (None, choices(run).get("metrics"))


def _name(run: Run, evaluation: Evaluation, group: str) -> str | None:
    """The option of a group, if it was kept or is the run's own."""
    if evaluation.choices.get(group) is not None:
        return str(evaluation.choices[group])
    same = kind(parsed(run.config).get(group)) == kind(evaluation.protocol.get(group))
    return str(choices(run)[group]) if group in choices(run) and same and group in SAMPLING else None


def _leaves(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield path, node
        return
    for name, value in node.items():
        if not name.startswith("_"):
            yield from _leaves(f"{path}.{name}", value)


def _folder(run: Run) -> str:
    """Where its command makes the run."""
    config, slug = parsed(run.config), PurePosixPath(run.name).name
    above = [str(config[name]) for name in ("output_dir", "name") if config.get(name) is not None]
    return str(PurePosixPath(*above, slug)) if len(above) == 2 else run.name


def _written(value: Any) -> str:
    """A value in Hydra's grammar.

    >>> _written(None), _written(0.5), _written([1, "a b"]), _written("a,b=c")
    ('null', '0.5', "[1,'a b']", "'a,b=c'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_written(str(k))}:{_written(v)}' for k, v in value.items())}}}"
    if not isinstance(value, str):
        return str(value)
    if PLAIN.fullmatch(value) and value.lower() not in WORDS and not re.match(r"[\d.]+e[\d+-]", value):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"
