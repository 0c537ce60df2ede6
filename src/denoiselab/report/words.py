"""What the page says in words: of the runs, of the table of arms, of how to read it."""

from __future__ import annotations

from collections import Counter

from denoiselab.report.arms import Arm, Table, protocol_facts
from denoiselab.report.axes import axes
from denoiselab.report.runs import Run, finite
from denoiselab.report.statistics import number, plain


def summary(runs: list[Run], table: Table) -> str:
    """How many runs, how they ended, what differs between them."""
    states = Counter(run.state for run in runs)
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    if len(runs) == 1:
        text = f"One run, {runs[0].state}, {runs[0].steps} optimizer steps, seed {plain(runs[0].seed)}."
    else:
        seeds = sorted({plain(run.seed) for run in runs if run.identity})
        text = f"{len(runs)} runs ({ended}) with {len(seeds)} different seed{'s' * (len(seeds) != 1)}."
    columns = {name: [group.axes[name] for group in table.groups] for name in _group_axes(table)}
    columns |= {name: [arm.axes[name] for arm in table.arms] for name in table.axes if name not in columns}
    differ = [f"{name} ({_values(texts)})" for name, texts in columns.items()]
    if differ:
        return f"{text} {'Its evaluations' if len(runs) == 1 else 'They'} differ in {listed(differ)}."
    return text if len(runs) == 1 else f"{text} They differ in nothing but the seed."


def quoted(arms: list[Arm]) -> str:
    """The protocol that every number of the table goes with; what takes many values is left to the table."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        for name, text in protocol_facts(arm.protocol).items() if arm.protocol else ():
            found.setdefault(name, []).append(text)
    values = {name: list(dict.fromkeys(texts)) for name, texts in found.items() if any(texts)}
    samples = "; ".join(" or ".join(v) if len(v) <= 3 else f"{name} as in the table" for name, v in values.items())
    return f"{samples or 'No samples were measured'}; {counted([arm.seeds for arm in arms], 'seed')} per arm."


def notes(table: Table) -> list[str]:
    """How to read the table of arms."""
    cells = [cell for arm in table.arms for cell in arm.cells.values()]
    found = []
    if any(cell.half is not None for cell in cells):
        found.append(
            "±: half the width of the 95% confidence interval of the mean over seeds (of a single run: over its "
            "evaluation seeds, which says nothing of other runs), by Student's t."
        )
    if any(len(cell.values) == 1 for cell in cells):
        found.append("A value without ± comes from one seed: no interval can be given.")
    if any(cell.best for cell in cells):
        found.append("Bold marks the best mean of a column; where intervals overlap, the order may be chance.")
    if any(cell.like_data for cell in cells):
        found.append(
            "Indistinguishable from data: the mean lies where 95% of what the same measurement gives on real data lie. "
            "Of several such arms none is the best."
        )
    if len({tuple(sorted(plain(run.seed) for run, _ in arm.members)) for arm in table.arms if arm.cells}) > 1:
        found.append("Not all arms have the same seeds: bold goes by the seeds that all arms of a column have.")
    if any(cell.difference is not None for cell in cells):
        reference = table.reference.label if table.reference is not None else ""
        untested = [cell for cell in cells if cell.difference is not None and cell.difference.p is None]
        found.append(
            f"Δ: mean difference from {reference}, paired over common seeds, ± half of its 95% interval by Student's "
            "t; p is two-sided and adjusted over the arms of the column (Holm). That arm was not chosen by its values."
            + (" No test: one seed is common, or the differences do not vary." if untested else "")
        )
    if any(cell.control for cell in cells):
        found.append(
            "Beside a value in small print or brackets: its control, what the same measurement gives on real data, on "
            "real data that were encoded and decoded, or on what a simpler method makes."
        )
    runs = [run for group in table.groups for run in group.runs]
    made = axes([{"git": run.record.get("git"), "versions": run.record.get("versions")} for run in runs])
    if made:
        differ = [f"{name.removeprefix('versions.')} ({_values(texts)})" for name, texts in made.items()]
        found.append(f"Not all runs were made with the same code: they differ in {listed(differ)}.")
    return [*found, *table.notes]


def depends(table: Table) -> list[tuple[str, str]]:
    """Per measurement, the protocol that it records of itself."""
    found = {}
    for arm in table.arms:
        for evaluation in [e for _, evaluations in arm.members for e in evaluations]:
            for record in evaluation.records:
                text = ", ".join(f"{name} {plain(value)}" for name, value in record.protocol.items())
                found.setdefault(record.name, text)
    return [(name, text) for name, text in found.items() if text]


def facts(run: Run) -> list[tuple[str, str]]:
    """What is recorded of a run, in words."""

    def pairs(name: str) -> str:
        value = run.record.get(name)
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items()) if isinstance(value, dict) else ""

    record, seconds = run.record, finite(run.status.get("seconds"))
    found = {
        "state": f"{run.state}, {run.steps} steps",
        "options": pairs("choices"),
        "loss": str(record.get("loss") or ""),
        "weight on the x_0 error": str(record.get("weight") or ""),
        "parameters": plain(record["parameters"]) if "parameters" in record else "",
        "samples": pairs("sizes"),
        "hardware": str(record.get("hardware") or ""),
        "started": str(run.status.get("started") or ""),
        "seconds": number(seconds) if seconds is not None else "",
        "git revision": str(record.get("git") or ""),
        "versions": pairs("versions"),
    }
    return [(name, text) for name, text in found.items() if text]


def direction(table: Table, name: str) -> str:
    """An arrow to where a measurement is better; empty where arms disagree or none is."""
    found = {arm.cells[name].better for arm in table.arms if name in arm.cells}
    return {"lower": "↓", "higher": "↑"}.get(found.pop(), "") if len(found) == 1 else ""


def _group_axes(table: Table) -> list[str]:
    return list(table.groups[0].axes) if table.groups else []


def _values(texts: list[str]) -> str:
    found = list(dict.fromkeys(texts))
    return ", ".join(found) if len(found) <= 6 else f"{len(found)} values"


def listed(words: list[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(counts: list[int], noun: str) -> str:
    """From the least to the most of something, in words."""
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low if low == high else f'{low} to {high}'} {noun}{'s' * (high != 1)}"
