"""The arm that the others of a table are compared with, seed by seed."""

from __future__ import annotations

from denoiselab.report.arms import Arm, Cell, Table
from denoiselab.report.axes import key
from denoiselab.report.claims import control
from denoiselab.report.paired import difference, holm
from denoiselab.report.ranking import disagreements
from denoiselab.report.statistics import number
from denoiselab.report.studies import Study

SPACE = "\N{NO-BREAK SPACE}"


def compare(table: Table, found: list[Study]) -> None:
    """Give the table its reference, and every cell its paired difference from it.

    The reference is chosen before any value is looked at: what the first claim compares with; without a claim the first
    arm in the order of the study's axes; without a study the first arm of the table. The best arm would be a biased
    choice: the best of several is in part the luckiest, and all others would look worse than they are. P-values are
    adjusted over the arms of each column (Holm).
    """
    wanted = next((arm for study in found if (arm := control(study)) is not None), None)
    arms = [arm for arm in table.arms if arm.cells]
    named = [arm for arm in arms if wanted is not None and _address(arm) == _address(wanted)]
    table.reference = next(iter([*named, *arms]), None)
    if table.reference is None:
        return
    for metric, cell in table.reference.cells.items():
        others = [arm.cells[metric] for arm in arms if arm is not table.reference and metric in arm.cells]
        for other in others:
            other.difference = difference(other.draws, cell.draws) if _compare(cell, other) else None
        tested = [other.difference for other in others if other.difference is not None]
        for one, p in zip(tested, holm([one.p for one in tested]), strict=True):
            one.adjusted = p


def against(cell: Cell) -> str:
    """A cell's difference from the reference in words; empty where there is none."""
    found = cell.difference
    if found is None:
        return ""
    sign = "+" if found.mean > 0 else ""
    half = f"{SPACE}±{SPACE}{number(found.half, 2)}" if found.half is not None else ""
    tested = f"p{SPACE}{number(found.adjusted, 2)}" if found.adjusted is not None else "no test"
    return f"Δ{SPACE}{sign}{number(found.mean, 3)}{half}, {tested}"


def _compare(a: Cell, b: Cell) -> bool:
    """Whether two cells are of one quantity."""
    same = not disagreements([*a.basis, *b.basis]) and a.better == b.better
    return same and not (a.unrankable or b.unrankable)


def _address(arm: Arm) -> str:
    return key([arm.group.identity, arm.protocol, arm.step])
