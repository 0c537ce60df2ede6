"""The page: what is shown, in which words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from denoiselab.report import figures
from denoiselab.report.arms import Arm, Group, Table
from denoiselab.report.axes import axes
from denoiselab.report.claims import Answer
from denoiselab.report.compute import Chart, Compute, of_sampling, of_training
from denoiselab.report.importance import importance
from denoiselab.report.pictures import Picture, embed
from denoiselab.report.ranking import dataset
from denoiselab.report.reference import against as against_reference
from denoiselab.report.reproduce import recipes
from denoiselab.report.runs import Evaluation, Record, Run, finite
from denoiselab.report.statistics import mean_ci, number, plain
from denoiselab.report.words import counted, depends, direction, facts, listed, notes, quoted, summary

PER_FIGURE, FIGURES = len(figures.COLOURS), 4
"""Groups of runs in a figure, and figures of a kind: more colours cannot be told apart, more figures are not read."""

LINES = 2
"""Figures of quality over compute, each with a panel for every measurement."""

PICTURES = 12
"""Pictures of a kind, at most."""

LARGEST = 8_500_000
"""Bytes of pictures on a page, a third less than they take there: it is to open at once, and to be sent by mail."""

THUMBNAILS, THUMBNAIL = 10, 200
"""Pictures of a run's progress, and the width of each in pixels."""


@dataclass
class Curves:
    """Panels that share a legend of (colour, label)."""

    legend: list[tuple[str, str]]
    panels: list[Markup]


@dataclass
class Against:
    """Quality against one kind of compute: figures, what is not in them, what the bands are, lines left out."""

    curves: list[Curves]
    notes: list[str]
    bands: str
    left_out: int


@dataclass
class Gallery:
    """Pictures side by side: files with their labels and captions, and those of them that are shown."""

    title: str
    note: str
    files: list[tuple[Path, str, str]]
    widest: int | None = None
    """Pixels that pictures are scaled down to."""
    wide: bool = False
    """Whether each takes the whole width."""
    pictures: list[Picture] = field(default_factory=list)


def render(runs: list[Run], table: Table, title: str, answers: list[Answer]) -> str:
    """The page as HTML; every string of a run is escaped."""
    environment = Environment(
        loader=PackageLoader("denoiselab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "breakable": _breakable, "number": number, "against": against_reference}
    drawn = [group for group in table.groups if any(run.rows for run in group.counted)]
    return environment.get_template("page.html").render(
        title=title,
        answers=answers,
        recipes=recipes(table),
        compared=any(cell.difference for arm in table.arms for cell in arm.cells.values()),
        summary=summary(runs, table),
        facts=facts(runs[0]) if len(runs) == 1 else [],
        table=table,
        quoted=quoted(table.arms),
        notes=notes(table),
        directions={name: direction(table, name) for name in table.metrics},
        depends=depends(table),
        sampling=against(of_sampling(table)),
        training=against(of_training(table)),
        importance=importance(table),
        losses=losses(drawn),
        buckets=buckets(drawn),
        caution=caution(drawn),
        several=len(drawn) > 1,
        left_out=max(0, len(drawn) - PER_FIGURE * FIGURES),
        seeds=counted([len(group.counted) for group in drawn], "seed"),
        galleries=filled([*galleries(runs, table), *looks(table.groups)]),
        alarms=[(run.name, look.name, look.step, text) for run in runs for look in run.looks for text in look.alarms],
        confusions=confusions(table) if len(runs) == 1 else [],
        speed=speed(table.groups),
        troubled=[run for run in runs if run.state != "done" or run.problems],
        runs=[(run, facts(run)) for run in runs],
    )


def against(compute: Compute) -> Against:
    """Charts of quality over compute, a panel per measurement and cost, with what their grey bands are."""
    shown, found = compute.labels[: PER_FIGURE * LINES], []
    for start in range(0, len(shown), PER_FIGURE):
        part = shown[start : start + PER_FIGURE]
        panels = [titled(chart, svg) for chart in compute.charts if (svg := figures.quality(chart, part))]
        found.append(Curves(list(zip(figures.COLOURS, part, strict=False)), panels))
    bands = dict.fromkeys(f"{chart.metric}: {chart.band[2]}" for chart in compute.charts if chart.band)
    return Against(found, compute.notes, ", ".join(bands), len(compute.labels) - len(shown))


def titled(chart: Chart, svg: str) -> Markup:
    arrow = {"lower": "↓", "higher": "↑"}.get(chart.better, "")
    only = Markup("<small>{}</small>").format(chart.only) if chart.only else ""
    return Markup('<p class="panel">{} {}{}</p>{}').format(_breakable(chart.metric), arrow, only, Markup(svg))


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
    return listed(found)


def galleries(runs: list[Run], table: Table) -> list[Gallery]:
    """Samples of each arm, the last pictures of training, and a single run's progress; the first seed of each."""
    found = []
    for seed, shown in same_noise(table.arms).items():
        note = f"All from the same noise and labels: evaluation.seed={seed}." if len(shown) > 1 else ""
        files = [
            (e.picture, arm.label, f"seed {plain(run.seed)}, {arm.protocol_text}") for arm, run, e in shown if e.picture
        ]
        found.append(Gallery("Evaluated samples" + (", from other noise" if found else ""), note, files))
    firsts = [(group.label, group.counted[0]) for group in table.groups]
    for kind, name in {"sample_grid": "Sample grids of training", "guidance_sweep": "Guidance sweeps"}.items():
        last = [
            (path, label, f"seed {plain(run.seed)}, step {step}, EMA weights{_choices(run, kind)}")
            for label, run in firsts
            if kind in run.pictures
            for step, path in run.pictures[kind][-1:]
        ]
        found.append(Gallery(name, "The last of each run, from fixed noise.", last))
    grids = firsts[0][1].pictures.get("sample_grid", []) if len(runs) == 1 and firsts else []
    if len(grids) > 1:
        picked = sorted({round(i) for i in np.linspace(0, len(grids) - 1, THUMBNAILS)})
        progress = [(grids[i][1], f"step {grids[i][0]}", "") for i in picked]
        found.append(Gallery("Progress of the sample grid", "The same noise throughout.", progress, THUMBNAIL))
    return found


def looks(groups: list[Group]) -> list[Gallery]:
    """What diagnostics found of the first seed of each group, a gallery per diagnostic."""
    found: dict[str, list[Any]] = {}
    for group in groups:
        run = group.counted[0]
        for look in run.looks:
            facts = [f"seed {plain(run.seed)}", f"step {look.step}", *map(_described, look.records)]
            found.setdefault(look.name, []).append((look.picture, group.label, "; ".join(facts)))
    names = {name: name.replace("_", " ").capitalize() for name in sorted(found)}
    return [Gallery(title, "", found[name], wide=True) for name, title in names.items()]


def same_noise(arms: list[Arm]) -> dict[str, list[tuple[Arm, Run, Evaluation]]]:
    """By seed of the evaluation: the run of each arm whose samples stand beside those of other arms.

    Samples of one evaluation seed start from the same noise, one by one, so that what differs between two grids is the
    arm. The seed that most arms have comes first; an arm has a place beside others of the first seed that it has. Of
    its runs it is one of the training seed that most arms have.
    """
    pictures = [(arm, run, e) for arm in arms for run, found in arm.members for e in found if e.picture]
    draws = Counter(
        draw for _, draw in dict.fromkeys((id(arm), plain(e.protocol.get("seed"))) for arm, _, e in pictures)
    )
    seeds = Counter(seed for _, seed in dict.fromkeys((id(arm), plain(run.seed)) for arm, run, _ in pictures))
    found: dict[str, list[tuple[Arm, Run, Evaluation]]] = {draw: [] for draw, _ in draws.most_common()}
    for arm in arms:
        own = [(run, e) for one, run, e in pictures if one is arm]
        if own:
            run, best = max(
                own, key=lambda pair: (draws[plain(pair[1].protocol.get("seed"))], seeds[plain(pair[0].seed)])
            )
            found[plain(best.protocol.get("seed"))].append((arm, run, best))
    return {draw: shown for draw, shown in found.items() if shown}


def filled(galleries: list[Gallery]) -> list[Gallery]:
    """Those with pictures: of each kind as many as the page has room for, the first gallery before the others."""
    room, counts = LARGEST, [0] * len(galleries)
    for most in range(1, PICTURES + 1):
        for k, gallery in enumerate(galleries):
            wanted = len(gallery.files) if gallery.widest else min(PICTURES if k == 0 else most, len(gallery.files))
            for path, *_ in gallery.files[counts[k] : wanted]:
                size = 0 if gallery.widest else _size(path)
                if size > room:
                    break
                room, counts[k] = room - size, counts[k] + 1
    for gallery, count in zip(galleries, counts, strict=True):
        found = [embed(path, label, caption, gallery.widest) for path, label, caption in gallery.files[:count]]
        gallery.pictures = [picture for picture in found if picture]
    return [
        gallery
        for gallery, count in zip(galleries, counts, strict=True)
        if gallery.pictures or len(gallery.files) > count
    ]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _described(record: Record) -> str:
    """A measurement and its controls in words."""
    controls = ", ".join(f"{name} {number(value)}" for name, value in record.controls.items())
    return f"{record.name} {number(record.value)}" + (f" ({controls})" if controls else "")


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


def _breakable(name: str) -> Markup:
    """A name that may be broken after its underscores and dots, so that columns stay narrow."""
    return escape(name).replace("_", Markup("_<wbr>")).replace(".", Markup(".<wbr>"))
