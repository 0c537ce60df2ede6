"""Reading RUN/metrics.jsonl. Free of torch and lightning, for the parts that must start fast."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from denoiselab.files import write_text


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, each of a step; a last line torn by a crash is left out, and what else is none."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def write_csv(path: Path, more: dict[str, Any] | None = None) -> None:
    """metrics.csv beside a metrics.jsonl: its scalars, one row per step.

    Args:
        path: of the metrics.jsonl.
        more: a further row.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for row in [*rows(path), *([more] if more else [])]:
        by_step.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not isinstance(v, list)})
    columns = list(dict.fromkeys(key for row in by_step.values() for key in row))
    table = {column: [by_step[step].get(column) for step in sorted(by_step)] for column in columns}
    write_text(path.with_suffix(".csv"), csv_text(table))


def csv_text(table: dict[str, list[Any]]) -> str:
    """Columns by name as comma-separated text; None is empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue()
