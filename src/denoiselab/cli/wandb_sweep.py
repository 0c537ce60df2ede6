"""denoiselab wandb-sweep"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from denoiselab.cli import parse
from denoiselab.compose import option
from denoiselab.errors import UserError
from denoiselab.study import axes_of, composed, study_of

ABOUT = """Write a sweep file for wandb, whose server then says which runs are made and whose agents make them:

  denoiselab wandb-sweep experiment=digits optimizer.lr=1e-4,1e-3 seed=0,1 output=sweep.yaml
  wandb sweep sweep.yaml
  wandb agent ENTITY/PROJECT/ID        # on as many machines as there are

Options are those of `denoiselab train -m`, with interval(a,b), tag(log, interval(a,b)) and int(interval(a,b)) where the
method is random or bayes. study=NAME brings the axes of a study. Every combination is checked before anything is
written; of an interval, its ends."""

USAGE = f"""usage: denoiselab wandb-sweep [--config-dir DIR] [option=value,...] [own options]

{ABOUT}

own options:
  output=FILE            otherwise the file is printed
  method=grid            of the server: grid, random or bayes
  metric=evaluation/held_out_loss
                         what the server compares runs by; with another one, say its goal
  goal=minimize          or maximize
  sweep_name=NAME        on the server
  project=denoiselab entity=ENTITY
  run_cap=N              the most runs"""

OWN = {"sweep_name": "name", **{field: field for field in ("method", "metric", "goal", "project", "entity", "run_cap")}}


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return 0
    words, config_dir, _ = parse(arguments, "train", ABOUT)
    own = {option(word): word.partition("=")[2] for word in words if option(word) in (*OWN, "output")}
    overrides = [word for word in words if option(word) not in (*OWN, "output")]
    import yaml

    from denoiselab.dashboard.sweep_file import commands, sweep_file
    from denoiselab.sweeper.base import refuse_idle_axes

    overrides = [*_of_study(overrides, config_dir), *overrides]
    content = sweep_file(_asked(own), overrides, config_dir)
    from denoiselab.compose import compose
    from denoiselab.training import Job

    expanded = [_without_folder(one) for one in commands(content)]
    jobs = [Job(compose("train", one, config_dir), here=False) for one in expanded]
    refuse_idle_axes(jobs, overrides)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    if "output" not in own:
        print(text, end="")
        return 0
    from denoiselab.files import write_text

    write_text(Path(own["output"]), text)
    print(own["output"])
    print(f"{len(jobs)} combinations checked; next: wandb sweep {own['output']}", file=sys.stderr)
    return 0


def _asked(own: dict[str, str]) -> Any:
    from denoiselab.dashboard.sweep_file import Asked

    given: dict[str, Any] = {OWN[key]: value for key, value in own.items() if key in OWN}
    if "metric" in given and "goal" not in given:
        raise UserError(f"metric={given['metric']}: say which way is better too, goal=minimize or goal=maximize")
    if "run_cap" in given:
        if not given["run_cap"].isdigit():
            raise UserError(f"run_cap={given['run_cap']}: need a whole number")
        given["run_cap"] = int(given["run_cap"])
    assert given.keys() <= {field.name for field in fields(Asked)}
    return Asked(**given)


def _of_study(overrides: list[str], config_dir: Path | None) -> list[str]:
    """The axes of the study that is chosen, if one is, but for those that were given."""
    named = [line.partition("=")[2] for line in overrides if option(line) == "study" and line != "study=none"]
    if not named:
        return []
    axes = axes_of(study_of(composed(named[-1], [], config_dir)), named[-1])
    return [line for line in axes if option(line) not in map(option, overrides)]


def _without_folder(arguments: list[str]) -> list[str]:
    return arguments[2:] if arguments[:1] == ["--config-dir"] else arguments
