"""What a run's folder holds, in the order in which it was logged."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from denoiselab.rows import rows


class Logged(NamedTuple):
    """One thing that was logged."""

    step: int
    kind: str
    """row, picture or table."""
    name: str
    read: Callable[[], Any]


def history(folder: Path, after: int, upto: int) -> list[Logged]:
    """Rows of metrics.jsonl, pictures, and what diagnostics found, of steps after < step <= upto, by step.

    Args:
        folder: the run directory.
        after, upto: optimizer steps.
    """
    found = [Logged(row["step"], "row", "", partial(_values, row)) for row in rows(folder / "metrics.jsonl")]
    for file in sorted(folder.glob("pictures/*_*.png")):
        name, _, step = file.stem.rpartition("_")
        if step.isdigit():
            found.append(Logged(int(step), "picture", name, partial(_open, file)))
    for file in sorted(folder.glob("diagnostics/*/*-*/picture.png")):
        name, step = file.parent.parent.name, file.parent.name.partition("-")[0]
        if step.isdigit():
            found.append(Logged(int(step), "picture", name, partial(_open, file)))
            if (table := file.with_name("table.csv")).is_file():
                found.append(Logged(int(step), "table", name, partial(_table, table)))
    return sorted((one for one in found if after < one.step <= upto), key=lambda one: one.step)


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}


def _open(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.copy()


def _table(file: Path) -> dict[str, list[Any]]:
    head, *lines = list(csv.reader(file.read_text().splitlines()))
    return {name: [_cell(line[k]) for line in lines] for k, name in enumerate(head)}


def _cell(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
