"""denoiselab status"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from denoiselab.errors import UserError

USAGE = """usage: denoiselab status RUN_OR_FOLDER [watch=SECONDS]

How runs stand: done, running with steps per second and the time that is left, failed with the error, died without a
word; with SLURM also queued or requeued, with the id of the job. watch=2 looks again every two seconds until no run
goes on; end it with Ctrl-C."""


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return 0
    options = [argument for argument in arguments if argument.startswith("watch=")]
    folders = [argument for argument in arguments if argument not in options]
    if len(folders) != 1 or folders[0].startswith("-"):
        asked = " ".join(arguments) or "nothing named"
        raise UserError(f"{asked}: need one run directory or folder, as in: denoiselab status outputs")
    folder, seconds = Path(folders[0]), _seconds(options[-1]) if options else None
    from denoiselab.status import standings, table

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    while True:
        found = standings(folder)
        if not found:
            raise UserError(f"{folder}: no run here; a run directory holds identity.json")
        clear = "\x1b[H\x1b[2J" if seconds is not None and sys.stdout.isatty() else ""
        print(f"{clear}{table(found)}", flush=True)
        if seconds is None or not any(one.state in ("running", "queued", "requeued") for one in found):
            return 0
        time.sleep(seconds)


def _seconds(option: str) -> float:
    try:
        seconds = float(option.partition("=")[2])
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise UserError(f"{option}: need seconds from 0.1 to 3600")
    return seconds
