"""denoiselab study"""

from __future__ import annotations

import sys
from pathlib import Path

from denoiselab.cli import parse
from denoiselab.cli.train import run_all
from denoiselab.compose import option, options
from denoiselab.errors import UserError, nearest
from denoiselab.study import axes_of, composed, study_of

ABOUT = """Make the runs that a question needs, then the report that answers it. A study is an option file (conf/study/,
or study/ in a folder of your own): a question, axes with their values, the measurements that decide, the claims that
are tested. Issuing the command again makes what is missing. Without a name: what there is."""

USAGE = f"""usage: denoiselab study [--config-dir DIR] [NAME [option=value ...]]

{ABOUT}

Further options are those of `denoiselab train -m`, for every run: launcher.jobs=2, trainer.max_steps=200. One that is
an axis of the study takes its place: seed=0,1."""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return 0
    words, config_dir, _ = parse(arguments, "train", ABOUT)
    known = [name for name in options(config_dir)["study"] if name != "none"]
    if not words:
        width = max(map(len, known))
        for name in known:
            print(f"{name:{width}}  {study_of(composed(name, [], config_dir))['question']}")
        return 0
    name, *own = words
    if name not in known:
        raise UserError(f"{name}: no such study; {nearest(name, known)}")
    chosen = composed(name, [line for line in own if option(line) in ("name", "output_dir")], config_dir)
    axes = axes_of(study_of(chosen), name)
    swept = [line for line in axes if option(line) not in map(option, own)]
    status = run_all([f"study={name}", *swept, *own], config_dir)
    from denoiselab.report import write_report
    from denoiselab.report.runs import find

    folder = Path(chosen.config.output_dir) / chosen.config.name
    if folder.is_dir() and find(folder):
        print(f"report: {write_report(folder)}", file=sys.stderr)
    return status
