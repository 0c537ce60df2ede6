"""The value of a trial, read from what its runs wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from denoiselab.errors import UserError
from denoiselab.run_folder import digest


@dataclass
class Value:
    """A measurement of one run, or its mean over several."""

    number: float
    better: str
    basis: dict[str, str]
    """What the number depends on, as text: numbers compare if these agree."""


def measured(run: Path, address: str, metric: str) -> Value:
    """A measurement of a run in its newest evaluation of an address.

    Raises:
        UserError: it was not evaluated so, the measurement is not there, or it has no place in an order.
    """
    from denoiselab.report.ranking import basis, unrankable
    from denoiselab.report.runs import Record, read

    found = [json.loads(file.read_text()) for file in run.glob("evaluations/*/evaluation.json") if _is(file, address)]
    if not found:
        raise UserError(f"{run}: no evaluation of it")
    newest = max(found, key=lambda content: content["protocol"]["step"])
    records = {record["name"]: record for record in newest["records"]}
    if metric not in records:
        raise UserError(
            f"sweeper.metric={metric}: not measured; metrics= chooses what is, and it gave {', '.join(records)}"
        )
    record = Record(**records[metric])
    if record.better not in ("lower", "higher"):
        raise UserError(f"sweeper.metric={metric}: neither direction of it is better")
    if reason := unrankable(newest["protocol"], record):
        raise UserError(f"sweeper.metric={metric}: {reason}")
    number = float("nan") if record.value is None else float(record.value)
    depends = basis(read(run, run), newest["protocol"], record)
    return Value(number, record.better, {name: digest(text) for name, text in depends.items()})


def _is(file: Path, address: str) -> bool:
    """Whether an evaluation's file is of an address, at whatever step."""
    protocol: dict[str, Any] = json.loads(file.read_text())["protocol"]
    along = protocol.get("schedule")
    elsewhere = [] if along == protocol.get("trained_along") else [along]
    return file.parent.name == digest([address, protocol["step"], *elsewhere])


def mean(values: list[Value]) -> Value:
    """Of a trial's runs, which differ in the seed alone."""
    return Value(fmean(value.number for value in values), values[0].better, values[0].basis)
