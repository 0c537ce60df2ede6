"""denoiselab report"""

from __future__ import annotations

from pathlib import Path

from denoiselab.errors import UserError

USAGE = """usage: denoiselab report RUN_OR_FOLDER [output=FILE.html]

One self-contained page (and report.csv, report.md, report.tex) from a run directory or a folder of runs: a study's
question and what became of its claims, a table of arms with intervals over seeds and paired differences, learning
curves, the loss by timestep, sample grids, what failed, and how to reproduce each row."""


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return 0
    outputs = [argument.partition("=")[2] for argument in arguments if argument.startswith("output=")]
    folders = [argument for argument in arguments if not argument.startswith("output=")]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise UserError(
            f"{' '.join(arguments) or 'nothing named'}: need one run directory or folder, as in: denoiselab report "
            "outputs/digits"
        )
    from denoiselab.report import write_report

    print(write_report(Path(folders[0]), Path(outputs[-1]) if outputs else None))
    return 0
