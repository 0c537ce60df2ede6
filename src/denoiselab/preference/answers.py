"""A sheet's key and the files that raters send back, read with care: whatever is wrong is one line."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.errors import UserError
from denoiselab.preference.sheet import Trial

COLUMNS = ["sheet", "rater", "trial", "choice", "milliseconds"]

LARGEST = 1_000_000
"""Bytes of a file of answers."""

SIDES = ("left", "right")

KINDS = {"pair": {"a", "b"}, "repeat": {"a", "b"}, "check": {"real", "noise"}}


@dataclass
class Key:
    """What stands where on a sheet."""

    sheet: str
    trials: list[Trial]
    facts: dict[str, Any]


@dataclass
class Answers:
    """What a rater chose, trial by trial: ``left`` or ``right``."""

    rater: str
    choices: list[str]


def read_key(path: Path) -> Key:
    """What ``write_sheet`` wrote.

    Raises:
        UserError: it is not a key.
    """
    text = _text(path, "key", 100 * LARGEST)
    try:
        content = json.loads(text)
        trials = [
            Trial(str(row["kind"]), int(row["item"]), str(row["left"]), str(row["right"])) for row in content["trials"]
        ]
        fine = trials and all({trial.left, trial.right} == KINDS[trial.kind] for trial in trials)
        facts = {name: value for name, value in content.items() if name not in ("trials", "sheet")}
        sheet = str(content["sheet"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise UserError(f"key={path}: is no key of a sheet")
    return Key(sheet, trials, facts)


def read_answers(path: Path, key: Key) -> Answers:
    """A rater's file, every trial of the sheet answered once.

    Raises:
        UserError: it is something else; names the file, the line, and what is expected.
    """
    text = _text(path, "answers", LARGEST)
    rows = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    try:
        header, *lines = [row for row in rows if row]
    except (ValueError, csv.Error):
        raise UserError(f"answers={path}: is no table; need a file that the page saved") from None
    if header != COLUMNS:
        raise UserError(f"answers={path}: its first line is not {','.join(COLUMNS)}")
    raters, choices = set(), {}
    for number, row in enumerate(lines, 2):
        where = f"answers={path}, line {number}"
        if len(row) != len(COLUMNS):
            raise UserError(f"{where}: {len(row)} columns; need {len(COLUMNS)}")
        sheet, rater, trial, choice, _ = row
        if sheet != key.sheet:
            raise UserError(f"{where}: of the sheet {sheet[:20]!r}; the key is of {key.sheet!r}")
        if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,40}", rater):
            raise UserError(f"{where}: rater={rater[:40]!r}: need 1 to 40 letters, digits or _.-")
        if not re.fullmatch(r"[0-9]{1,6}", trial) or not 1 <= int(trial) <= len(key.trials):
            raise UserError(f"{where}: trial={trial[:20]!r}: need a number from 1 to {len(key.trials)}")
        if choice not in SIDES:
            raise UserError(f"{where}: choice={choice[:20]!r}: need left or right")
        if int(trial) in choices:
            raise UserError(f"{where}: trial {int(trial)} is answered twice")
        choices[int(trial)] = choice
        raters.add(rater)
    if len(choices) != len(key.trials):
        raise UserError(f"answers={path}: {len(choices)} of {len(key.trials)} trials are answered; need all")
    if len(raters) != 1:
        raise UserError(f"answers={path}: of {len(raters)} raters; need a file for each")
    return Answers(raters.pop(), [choices[k] for k in sorted(choices)])


def find_answers(given: Any) -> list[Path]:
    """The files that an option means: one, several, or those of a folder.

    Raises:
        UserError: there are none.
    """
    if given is None:
        raise UserError("answers=null: need the CSV file that a rater sent back, a list of them, or a folder")
    files: list[Path] = []
    for one in given if isinstance(given, list) else [given]:
        path = Path(str(one))
        files += sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"answers={given}: no CSV file in this folder")
    return files


def _text(path: Path, option: str, largest: int) -> str:
    if not path.is_file():
        raise UserError(f"{option}={path}: no such file")
    if path.stat().st_size > largest:
        raise UserError(f"{option}={path}: {path.stat().st_size:,} bytes; {largest:,} is the most")
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{option}={path}: is no text") from None
