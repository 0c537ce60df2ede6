"""The page: what is shown, in which words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from denoiselab.report import figures
from denoiselab.report.arms import Arm, Group, Table, protocol_facts
from denoiselab.report.axes import axes
from denoiselab.report.pictures import Picture, embed
from denoiselab.report.ranking import dataset
from denoiselab.report.runs import Record, Run, finite
from denoiselab.report.statistics import mean_ci, number, plain

PER_FIGURE, FIGURES = len(figures.COLOURS), 4
"""Groups of runs in a figure, and figures of a kind: more colours cannot be told apart, more figures are not read."""

PICTURES = 12
"""Pictures of a kind, at most."""

THUMBNAILS, THUMBNAIL = 10, 200
"""Pictures of a run's progress, and the width of each in pixels."""


@dataclass
class Curves:
    """Panels that share a legend of (colour, label)."""

    legend: list[tuple[str, str]]
    panels: list[Markup]


@dataclass
class Gallery:
    """Pictures side by side; ``total`` is how many there would be."""

    title: str
    note: str
    pictures: list[Picture] = field(default_factory=list)
    total: int = 0
    small: bool = False


def render(runs: list[Run], table: Table, title: str) -> str:
    """The page as HTML; every string of a run is escaped."""
    environment = Environment(
        loader=PackageLoader("denoiselab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "breakable": _breakable}
    drawn = [group for group in table.groups if any(run.rows for run in group.counted)]
    return environment.get_template("page.html").render(
        title=title,
        summary=summary(runs, table),
        facts=facts(runs[0]) if len(runs) == 1 else [],
        table=table,
        quoted=quoted(table.arms),
        notes=notes(table),
        directions={name: _direction(table, name) for name in table.metrics},
        depends=depends(table),
        losses=losses(drawn),
        buckets=buckets(drawn),
        caution=caution(drawn),
        several=len(drawn) > 1,
        left_out=max(0, len(drawn) - PER_FIGURE * FIGURES),
        seeds=_range([len(group.counted) for group in drawn], "seed"),
        galleries=[gallery for gallery in galleries(runs, table) if gallery.pictures],
        looks=[gallery for gallery in looks(table.groups) if gallery.pictures],
        alarms=[(run.name, look.name, look.step, text) for run in runs for look in run.looks for text in look.alarms],
        confusions=confusions(table) if len(runs) == 1 else [],
        speed=speed(table.groups),
        troubled=[run for run in runs if run.state != "done" or run.problems],
        runs=[(run, facts(run)) for run in runs],
    )


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
        return f"{text} {'Its evaluations' if len(runs) == 1 else 'They'} differ in {_listed(differ)}."
    return text if len(runs) == 1 else f"{text} They differ in nothing but the seed."


def quoted(arms: list[Arm]) -> str:
    """The protocol that every number of the table goes with; what takes many values is left to the table."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        for name, text in protocol_facts(arm.protocol).items() if arm.protocol else ():
            found.setdefault(name, []).append(text)
    values = {name: list(dict.fromkeys(texts)) for name, texts in found.items() if any(texts)}
    samples = "; ".join(" or ".join(v) if len(v) <= 3 else f"{name} as in the table" for name, v in values.items())
    return f"{samples or 'No samples were measured'}; {_range([arm.seeds for arm in arms], 'seed')} per arm."


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
    if any(cell.control for cell in cells):
        found.append(
            "Beside a value in small print or brackets: its control, what the same measurement gives on real data, on "
            "real data that were encoded and decoded, or on what a simpler method makes."
        )
    runs = [run for group in table.groups for run in group.runs]
    made = axes([{"git": run.record.get("git"), "versions": run.record.get("versions")} for run in runs])
    if made:
        differ = [f"{name.removeprefix('versions.')} ({_values(texts)})" for name, texts in made.items()]
        found.append(f"Not all runs were made with the same code: they differ in {_listed(differ)}.")
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


def losses(groups: list[Group]) -> list[Curves]:
    """Learning curves; for several groups, training batches have a panel of their own."""
    names = list(figures.LINES)
    if len(groups) == 1:
        return _curves(groups, figures.LINES, [lambda part: figures.losses(part)])
    return _curves(
        groups,
        figures.LINES,
        [
            lambda part: figures.losses(part, names[:2], "held out"),
            lambda part: figures.losses(part, names[2:], "training batches"),
        ],
    )


def buckets(groups: list[Group]) -> list[Curves]:
    """The error over t in its three units; for one group also of training batches and raw weights."""
    sources = list(figures.SOURCES) if len(groups) == 1 else ["val"]

    def panel(name: str) -> Callable[[Any], str | None]:
        return lambda part: figures.buckets(part, name, sources)

    return _curves(groups, figures.SOURCES, [panel(name) for name in figures.PANELS])


def _curves(groups: list[Group], lines: dict[str, str], panels: Sequence[Callable[[Any], str | None]]) -> list[Curves]:
    found = []
    for start in range(0, min(len(groups), PER_FIGURE * FIGURES), PER_FIGURE):
        part = groups[start : start + PER_FIGURE]
        drawn = [panel([group.counted for group in part]) for panel in panels]
        labels = list(lines.values()) if len(groups) == 1 else [group.label for group in part]
        legend = list(zip(figures.COLOURS, labels, strict=False))
        if any(drawn):
            found.append(Curves(legend, [Markup(svg) for svg in drawn if svg]))
    return found


def caution(groups: list[Group]) -> str:
    """What makes the losses of these groups incomparable, if anything."""
    basis = [
        {"data": dataset(group.runs[0]), "schedule": group.identity.get("schedule")}
        | {name: group.runs[0].record.get(name) for name in ("weight", "loss")}
        for group in groups
    ]
    found = list(dict.fromkeys(name.partition(".")[0] for name in axes(basis)))
    return _listed(found)


def galleries(runs: list[Run], table: Table) -> list[Gallery]:
    """Samples of each arm, the last pictures of training, and a single run's progress; the first seed of each."""
    shown = [(arm, arm.members[0][0], arm.first) for arm in table.arms]
    samples = [(e.picture, a.label, f"seed {plain(r.seed)}, {a.protocol_text}") for a, r, e in shown if e and e.picture]
    found = [_gallery("Evaluated samples", "", samples)]
    firsts = [(group.label, group.counted[0]) for group in table.groups]
    for kind, name in {"sample_grid": "Sample grids of training", "guidance_sweep": "Guidance sweeps"}.items():
        last = [
            (path, label, f"seed {plain(run.seed)}, step {step}, EMA weights{_choices(run, kind)}")
            for label, run in firsts
            if kind in run.pictures
            for step, path in run.pictures[kind][-1:]
        ]
        found.append(_gallery(name, "The last of each run, from fixed noise.", last))
    grids = firsts[0][1].pictures.get("sample_grid", []) if len(runs) == 1 and firsts else []
    if len(grids) > 1:
        picked = sorted({round(i) for i in np.linspace(0, len(grids) - 1, THUMBNAILS)})
        progress = [(grids[i][1], f"step {grids[i][0]}", "") for i in picked]
        found.append(_gallery("Progress of the sample grid", "The same noise throughout.", progress, THUMBNAIL))
    return found


def looks(groups: list[Group]) -> list[Gallery]:
    """What diagnostics found of the first seed of each group, a gallery per diagnostic."""
    found: dict[str, list[Any]] = {}
    for group in groups:
        run = group.counted[0]
        for look in run.looks:
            facts = [f"seed {plain(run.seed)}", f"step {look.step}", *map(_described, look.records)]
            found.setdefault(look.name, []).append((look.picture, group.label, "; ".join(facts)))
    return [_gallery(name.replace("_", " ").capitalize(), "", files) for name, files in sorted(found.items())]


def _described(record: Record) -> str:
    """A measurement and its controls in words."""
    controls = ", ".join(f"{name} {number(value)}" for name, value in record.controls.items())
    return f"{record.name} {number(record.value)}" + (f" ({controls})" if controls else "")


def _gallery(title: str, note: str, files: list[Any], widest: int | None = None) -> Gallery:
    pictures = [embed(path, label, caption, widest) for path, label, caption in files[:PICTURES]]
    return Gallery(title, note, [picture for picture in pictures if picture], len(files), widest is not None)


def _choices(run: Run, kind: str) -> str:
    """The sampler that the run's pictures were made with, by its option's name."""
    choices = run.record.get("choices")
    wanted = ("sampler", "guidance") if kind == "sample_grid" else ("sampler",)
    named = [f", {name} {plain(choices[name])}" for name in wanted if isinstance(choices, dict) and name in choices]
    return "".join(named)


def confusions(table: Table) -> list[tuple[str, list[list[tuple[str, float]]]]]:
    """Confusion matrices with the protocol of each; every entry as text and as share of its row."""
    found = []
    for arm in table.arms:
        evaluation = arm.first
        for record in evaluation.records if evaluation else ():
            matrix = record.details.get("confusion")
            rows = matrix if isinstance(matrix, list) else []
            if rows and all(isinstance(row, list) and len(row) == len(rows) for row in rows):
                values = [[max(finite(entry) or 0.0, 0.0) for entry in row] for row in rows]
                cells = [[(f"{entry:.3g}", entry / (sum(row) or 1.0)) for entry in row] for row in values]
                found.append((f"{record.name}: {arm.protocol_text}", cells))
    return found


def speed(groups: list[Group]) -> list[list[str]]:
    """Per group: seeds, steps and samples per second, the share of evaluations, parameters and hardware."""
    found = []
    for group in groups:
        cells = []
        for name in ("steps_per_second", "samples_per_second", "evaluation_share"):
            medians = [float(np.median(v)) for run in group.counted if (v := run.series(f"speed/{name}")[1])]
            mean, half = mean_ci(medians) if medians else (None, None)
            cells.append(number(mean, 3) + (f" ± {number(half, 2)}" if half is not None else ""))
        if any(cell != number(None) for cell in cells):
            record = group.runs[0].record
            hardware = dict.fromkeys(plain(run.record.get("hardware")) for run in group.counted)
            parameters = plain(record.get("parameters"))
            found.append([group.label, str(len(group.counted)), *cells, parameters, " / ".join(hardware)])
    return found


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


def _breakable(name: str) -> Markup:
    """A name that may be broken after its underscores and dots, so that columns stay narrow."""
    return escape(name).replace("_", Markup("_<wbr>")).replace(".", Markup(".<wbr>"))


def _direction(table: Table, name: str) -> str:
    found = {arm.cells[name].better for arm in table.arms if name in arm.cells}
    return {"lower": "↓", "higher": "↑"}.get(found.pop(), "") if len(found) == 1 else ""


def _group_axes(table: Table) -> list[str]:
    return list(table.groups[0].axes) if table.groups else []


def _values(texts: list[str]) -> str:
    found = list(dict.fromkeys(texts))
    return ", ".join(found) if len(found) <= 6 else f"{len(found)} values"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _range(counts: list[int], noun: str) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low if low == high else f'{low} to {high}'} {noun}{'s' * (high != 1)}"
