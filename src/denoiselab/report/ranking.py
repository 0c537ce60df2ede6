"""Which measurements may be ranked: those whose protocols agree. The one definition, for reports and for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.errors import UserError
from denoiselab.report.axes import key
from denoiselab.report.runs import Evaluation, Record, Run, find, read

LOSSES = ("held_out_loss", "val/loss")
"""Measurements that need no samples, and that depend on what the loss was."""


class Incomparable(UserError):
    """Measurements that are different quantities, so that none is better than another."""


@dataclass
class Ranked:
    """A measurement in an order."""

    value: float
    run: Path
    protocol: dict[str, Any]
    """How its samples were made."""
    record: Record


def dataset(run: Run) -> Any:
    """The data that a run learns, however it is batched."""
    data = run.identity.get("data")
    return {k: v for k, v in data.items() if k not in ("batch_size", "workers")} if isinstance(data, dict) else data


def basis(run: Run, protocol: dict[str, Any], record: Record) -> dict[str, str]:
    """What a number depends on beside the settings that are compared, as text: two numbers compare if these agree.

    The data set, the weights, and what the measurement says of itself, such as feature extractor and hash,
    preprocessing, reference and k; for measurements on samples n and the label policy; for losses the loss, its
    weighting and the schedule.

    Args:
        run: that was measured.
        protocol: of the evaluation, or as much as is known without one.
        record: of the measurement.
    """
    depends: dict[str, Any] = {"data": dataset(run), "weights": protocol.get("weights"), **record.protocol}
    if record.name in LOSSES:  # its mean over uniform t runs over the noise levels of the run's own schedule
        depends |= {"schedule": run.identity.get("schedule"), "weighting": run.record.get("weight")}
    else:
        depends |= {name: protocol.get(name) for name in ("n", "label_policy")}
    return {name: key(value) for name, value in depends.items()}


def disagreements(bases: list[dict[str, str]]) -> list[str]:
    """The parts that are not the same in all."""
    names = dict.fromkeys(name for basis in bases for name in basis)
    return [name for name in names if len({basis.get(name) for basis in bases}) > 1]


def unrankable(protocol: dict[str, Any], record: Record) -> str | None:
    """Why a measurement on samples has no place in an order whatever stands beside it; None where it has."""
    if record.name in LOSSES:
        return None
    missing = [name for name in ("n", "weights") if protocol.get(name) is None]
    if "made_of" not in protocol or "sampler" in protocol:  # what is made of images is drawn by no sampler
        missing += ["sampler"] if protocol.get("sampler") is None else []
        missing += ["guidance scale"] if protocol.get("guidance") is None else []
    if missing:
        return f"its protocol does not say {' and '.join(missing)}"
    return too_few(protocol["n"], record)


def too_few(n: Any, record: Record) -> str | None:
    """Why a Frechet distance of few samples cannot be ranked: of n <= d samples in d dimensions the covariance is
    singular, and the distance is nearly all bias (Chong and Forsyth 2020, arXiv:1911.07023)."""
    d = record.protocol.get("dimensions")
    if not isinstance(n, int) or not isinstance(d, int) or n > d:
        return None
    return f"the covariance of n = {n} samples in {d} dimensions is singular; need more than {d}"


def rank(*folders: str | Path, metric: str) -> list[Ranked]:
    """A measurement of runs in order, the best first.

    Args:
        folders: run directories, or folders of them. Every evaluation that has the measurement takes part.
        metric: the measurement's name, such as ``fd_digits``.

    Raises:
        Incomparable: the numbers are different quantities; says what differs, or what a protocol leaves out.
        UserError: nothing of that name was measured there.
    """
    found: list[tuple[Run, Evaluation, Ranked]] = []
    known: set[str] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for path in find(folder):
            run = read(path, path)
            for evaluation in run.evaluations:
                known |= {record.name for record in evaluation.records}
                found += [
                    (run, evaluation, Ranked(record.value, path, evaluation.protocol, record))
                    for record in evaluation.records
                    if record.name == metric and record.value is not None
                ]
    if not found:
        raise UserError(f"{metric}: not measured here; known: {', '.join(sorted(known)) or 'nothing'}")
    if reason := incomparable([(run, evaluation.protocol, row.record) for run, evaluation, row in found]):
        raise Incomparable(f"{metric} cannot be ranked: {reason}")
    rows = [row for *_, row in found]
    return sorted(rows, key=lambda row: row.value, reverse=rows[0].record.better == "higher")


def incomparable(measured: list[tuple[Run, dict[str, Any], Record]]) -> str | None:
    """Why measurements of one name are not to be ranked; None where they are.

    Args:
        measured: run, protocol of the evaluation, and record.
    """
    reasons = [reason for _, protocol, record in measured if (reason := unrankable(protocol, record))]
    if reasons:
        return reasons[0]
    differing = disagreements([basis(*one) for one in measured])
    directions = {record.better for *_, record in measured}
    if len(directions) > 1:
        differing.append("which direction is better")
    if differing:
        return f"protocols differ in {', '.join(differing)}"
    return "no direction of it is better" if directions == {"none"} else None
