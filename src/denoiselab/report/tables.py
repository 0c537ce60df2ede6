"""The table of arms as a data frame (for CSV) and as markdown."""

from __future__ import annotations

import html
import re
from typing import Any

import pandas as pd

from denoiselab.report.arms import Arm, Table
from denoiselab.report.axes import kind, scale_of
from denoiselab.report.claims import Answer
from denoiselab.report.statistics import plain

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def frame(table: Table) -> pd.DataFrame:
    """One row per arm: its settings, and for each measurement mean, 95% half width, seeds, controls, and the paired
    difference from the reference with its 95% half width, seeds and p-value, adjusted over the arms."""
    rows = []
    for arm in table.arms:
        protocol = arm.protocol or {}
        row: dict[str, Any] = {**arm.axes, "seeds": arm.seeds, "evaluations": arm.draws, "trained_steps": arm.step}
        row |= {name: protocol.get(name) for name in ("n", "weights", "label_policy")}
        sampler, guidance = protocol.get("sampler"), protocol.get("guidance")
        row |= {"sampler": kind(sampler), "sampler.steps": sampler.get("steps") if isinstance(sampler, dict) else None}
        row |= {"guidance": kind(guidance), "guidance.scale": scale_of(guidance)}
        row |= {"network_calls": arm.calls, "reference": arm is table.reference}
        for name, cell in arm.cells.items():
            row |= {name: cell.mean, f"{name}_ci95": cell.half, f"{name}_seeds": len(cell.values)}
            row |= {f"{name}_{control}": value for control, value in cell.controls.items()}
            if (found := cell.difference) is not None:
                row |= {f"{name}_difference": found.mean, f"{name}_difference_ci95": found.half}
                row |= {f"{name}_difference_seeds": found.n, f"{name}_difference_p_holm": found.adjusted}
        rows.append({_inert(name): _inert(value) for name, value in row.items()})
    return pd.DataFrame(rows)


def _inert(value: Any) -> Any:
    """Text that a spreadsheet shows; what begins as a formula would be computed by whoever opens the table."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula and not NUMBER.fullmatch(value) else value


def markdown(table: Table, title: str, summary: str, quoted: str, notes: list[str], answers: list[Answer]) -> str:
    """The table of arms for a README or an issue, with the words of the page, answers first."""
    heads = [*table.axes, "seeds", *table.metrics, "network calls"]
    lines = [heads, ["---"] * len(heads)]
    for arm in table.arms:
        settings = [arm.axes[name] for name in table.axes]
        lines.append([*settings, arm.seeds_text, *(_markdown_cell(arm, m) for m in table.metrics), plain(arm.calls)])
    rows = "\n".join("| " + " | ".join(_safe(cell) for cell in line) + " |" for line in lines) if table.arms else ""
    said = [text for answer in answers for text in _markdown_answer(answer)]
    parts = [
        f"# {_safe(title)}",
        *said,
        _safe(summary),
        _safe(quoted),
        rows,
        "\n".join(f"- {_safe(note)}" for note in notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_answer(answer: Answer) -> list[str]:
    lines = [f"## {_safe(answer.study.question or answer.study.name)}", _safe(answer.text)]
    claims = []
    for claim in answer.claims:
        claims.append(
            f"- **{_safe(claim.summary)}**: {_safe(claim.text)}" + (f": {_safe(claim.problem)}" * bool(claim.problem))
        )
        for row in claim.rows:
            facts = [row.text if row.difference else "", f"p = {row.p}" if row.difference else "", row.why]
            facts = [fact for fact in [f"{row.verdict}", *facts] if fact]
            claims.append(f"  - {_safe(row.context) + ': ' if row.context else ''}{_safe(', '.join(facts))}")
    return [*lines, "\n".join(claims), *(_safe(note) for note in answer.study.notes)]


def _markdown_cell(arm: Arm, metric: str) -> str:
    cell = arm.cells.get(metric)
    if cell is None:
        return "–"
    control = f" ({cell.control})" if cell.control else ""
    return f"**{cell.text}**{control}" if cell.best else f"{cell.text}{control}"


def _safe(text: str) -> str:
    """Text on one line that markdown shows as it is."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[", "\\[")
