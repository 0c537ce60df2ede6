"""denoiselab wandb-report"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from denoiselab.compose import option
from denoiselab.errors import UserError, nearest

USAGE = """usage: denoiselab wandb-report RUN_OR_FOLDER [project=denoiselab] [entity=ENTITY] [output=FILE.json]

A report on wandb's server of the runs of a folder, as they were logged with logger=wandb: the question, measurements,
curves over optimizer steps with seeds as bands, errors by t, sample grids, the table of runs. Its description is
written to wandb_report.json in the folder. With a key and a connection the report is then saved, and its address
printed; without, the command says what to do later. WANDB_MODE=offline asks for the description alone."""

KNOWN = ("project", "entity", "output")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return 0
    given = {option(word): word.partition("=")[2] for word in arguments if "=" in word}
    for name in given:
        if name not in KNOWN:
            raise UserError(f"{name}={given[name]}: no such option; {nearest(name, KNOWN)}")
    folders = [word for word in arguments if "=" not in word]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise UserError(
            f"{' '.join(arguments) or 'nothing named'}: need one run directory or folder, as in: denoiselab "
            "wandb-report outputs/digits"
        )
    folder, project = Path(folders[0]), given.get("project", "denoiselab")
    from denoiselab.dashboard.report import publish, specification, write
    from denoiselab.report.runs import find

    report = specification(folder, project)
    runs = find(folder)
    file = Path(given.get("output") or folder / "wandb_report.json")
    write(report, file, [run.name.rpartition("-")[2] for run in runs])
    print(file)
    if why := _offline():
        folders_of = [str(run / "wandb" / "latest-run") for run in runs if (run / "wandb").is_dir()]
        missing = len(runs) - len(folders_of)
        print(f"not published: {why}. With a key and a connection:", file=sys.stderr)
        for at in folders_of:
            print(f"  wandb sync {shlex.quote(at)}", file=sys.stderr)
        print(f"  {shlex.join(['denoiselab', 'wandb-report', *arguments])}", file=sys.stderr)
        if missing:
            print(f"{missing} of {len(runs)} runs were not logged with logger=wandb: they would be missing; issuing "
                  "their command again with logger=wandb sends them", file=sys.stderr)  # fmt: skip
        return 0
    print(publish(folder, project, given.get("entity", "")).address)
    return 0


def _offline() -> str | None:
    """Why the server is not asked; None if it is."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    import wandb

    from denoiselab.loggers.reach import unreachable

    return unreachable(wandb.setup().settings)
