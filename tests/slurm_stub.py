"""SLURM's commands as small scripts on PATH, which write down how they were called and answer from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from denoiselab.launcher.queue import FIELDS

SCRIPT = """#!{python}
import json, os, shutil, sys
folder, name = {folder!r}, {name!r}
calls = os.path.join(folder, "calls.jsonl")
inherited = sorted(key for key in os.environ if key.startswith("SLURM_"))
if name != "squeue":
    with open(calls, "a") as file:
        print(json.dumps([name, *sys.argv[1:]]), file=file)
if name == "sbatch":
    number = len([line for line in open(calls) if '"sbatch"' in line])
    shutil.copy(sys.argv[1], os.path.join(folder, f"submitted{{number}}.sh"))
    json.dump(inherited, open(os.path.join(folder, "inherited.json"), "w"))
    print(f"Submitted batch job {{10 * number}}")
if name == "scancel" and os.path.exists(os.path.join(folder, "after")):
    os.replace(os.path.join(folder, "after"), os.path.join(folder, "queue"))
if name == "squeue":
    queue = os.path.join(folder, "queue")
    sys.stdout.write(open(queue).read()) if os.path.exists(queue) else sys.exit("squeue: error: nobody answers")
"""


Row = tuple[str, str, str, str, str, str, str]
"""Array, index, state, wait status, restarts, reason, comment."""


class Slurm:
    """Where the scripts keep what they were told, and read what they tell."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("sbatch", "squeue", "srun", "scancel", "scontrol"):
            script = folder / "bin" / name
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(SCRIPT.format(python=sys.executable, folder=str(folder), name=name))
            script.chmod(0o755)
        self.queue()

    def queue(self, *rows: Row, file: str = "queue") -> None:
        """What squeue says."""
        lines = ("".join(value.ljust(width) for value, width in zip(row, FIELDS.values(), strict=True)) for row in rows)
        (self.folder / file).write_text("".join(f"{line}\n" for line in lines))

    def after_scancel(self, *rows: Row) -> None:
        """What it says then."""
        self.queue(*rows, file="after")

    def silent(self) -> None:
        """Its controller does not answer."""
        (self.folder / "queue").unlink()

    def calls(self, name: str) -> list[list[str]]:
        """How a command was called."""
        file = self.folder / "calls.jsonl"
        called = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [arguments for command, *arguments in called if command == name]

    def directives(self, number: int) -> dict[str, str]:
        """Of the n-th batch script."""
        lines = (self.folder / f"submitted{number}.sh").read_text().splitlines()
        found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]
        return dict(line.partition("=")[::2] for line in found)


def stubbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A SLURM of scripts, found first on PATH."""
    made = Slurm(folder)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    return made
