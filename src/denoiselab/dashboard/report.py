"""A report on wandb's server of the runs of a folder: its description, and publishing it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.errors import UserError, one_line
from denoiselab.loggers.wandb import STEP
from denoiselab.report.axes import axes, kind
from denoiselab.report.runs import Run, find, read

CURVES = (
    *("train/loss", "val/loss", "val/loss_raw", "train/mse", "train/grad_norm", "train/lr", "train/null_share"),
    *("val/psnr", "val/ssim", "val/mse", "early_stopping/loss"),
)
"""Scalars of training that are drawn where a run has them, in this order."""

SPEED = ("speed/steps_per_second", "speed/samples_per_second", "speed/evaluation_share")

UNITS = ("x_0", "eps", "v")

WIDE, HALF, HIGH = 24, 12, 9
"""Columns of a grid, of half of it, and rows of a panel."""


@dataclass
class Published:
    """Where a report is."""

    address: str


def specification(folder: Path, project: str, entity: str = "") -> Any:
    """The report, as wandb-workspaces writes it.

    The question, if the runs belong to a study; scalars over trainer/global_step, arms as lines and their seeds as
    bands of one standard deviation; measurements as bars; errors by t; pictures; and the table of runs. It shows the
    runs of the folder and no others of the project: it names their ids.

    Args:
        folder: of runs, or a run.
        project, entity: on the server; without an entity it can be built and not published.

    Raises:
        UserError: there are no runs, or wandb-workspaces is not installed.
    """
    wr = _library()
    paths = find(folder) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder}: no runs here; need a run directory or a folder of runs")
    runs = [read(path, folder) for path in paths]
    ids = [path.name.rpartition("-")[2] for path in paths]
    varying = _varying(runs)
    logged = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    measured = dict.fromkeys(record.name for run in runs for made in run.evaluations for record in made.records)

    def grid(panels: Sequence[Any], table: bool = False) -> Any:
        runset = wr.Runset(
            entity=entity,
            project=project if entity else "",
            name="arms" if varying else "runs",
            filters=f"Metric('ID') in {ids!r}",
            groupby=[f"config.{key}" for key in varying],
            order=[wr.OrderBy("Name", ascending=True)],
            pinned_columns=[
                "run:displayName",
                *(f"config:{_column(key)}" for key in varying),
                "config:seed.value",
                *(f"summary:evaluation/{name}" for name in measured),
                "run:state",
            ],
        )
        return wr.PanelGrid(runsets=[runset], panels=[*panels], hide_run_sets=not table)

    def curve(name: str, place: int, log_y: bool = False) -> Any:
        banded = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        layout = wr.Layout(x=place % 2 * HALF, y=place // 2 * HIGH, w=HALF, h=HIGH)
        return wr.LinePlot(
            title=name, x=STEP, y=[name], title_x="optimizer steps", log_y=log_y, layout=layout, **banded
        )

    def media(names: Sequence[str], title: str, place: int) -> Any:
        layout = wr.Layout(x=0, y=place * 2 * HIGH, w=WIDE, h=2 * HIGH)
        axis = {"mode": "grid", "grid_x_axis": "step", "grid_y_axis": "run"}
        return wr.MediaBrowser(title=title, media_keys=[*names], layout=layout, **axis)

    def section(title: str, panels: Sequence[Any]) -> list[Any]:
        return [wr.H2(title), grid(panels)] if panels else []

    def bars(name: str, place: int) -> Any:
        layout = wr.Layout(x=place % 2 * HALF, y=place // 2 * HIGH, w=HALF, h=HIGH)
        metric = f"evaluation/{name}"
        spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.BarPlot(title=name, metrics=[metric], layout=layout, **spread)

    def by_t(unit: str, place: int) -> Any:
        layout = wr.Layout(x=place * 8, y=0, w=8, h=HIGH)
        pattern = f"^buckets/val/{unit}/[0-9]+$"
        return wr.LinePlot(
            title=f"error of {unit}, a line per t", x=STEP, metric_regex=pattern, log_y=True, layout=layout
        )

    scalars = [name for name in CURVES if name in logged]
    units = [unit for unit in UNITS if f"buckets/val/{unit}" in logged]
    pictures = sorted({kept for run in runs for kept in run.pictures} - {"buckets"})
    looks = sorted({look.name for run in runs for look in run.looks})
    shown = [media(["pictures/buckets"], "squared error by t", 1)] if units else []
    grids = [media([f"pictures/{name}"], name, place) for place, name in enumerate([*pictures, *looks])]
    title = folder.resolve().name
    return wr.Report(
        project=project,
        entity=entity,
        title=title[:128],
        description=_question(runs)[:500],
        width="fluid",
        blocks=[
            wr.MarkdownBlock(_introduction(folder, runs, varying)),
            wr.H2("Runs"),
            grid([], table=True),
            *section("What was measured", [bars(name, k) for k, name in enumerate(measured)]),
            *section("Training", [curve(name, k, name.endswith(("loss", "mse"))) for k, name in enumerate(scalars)]),
            *section("Errors by t", [*(by_t(unit, k) for k, unit in enumerate(units)), *shown]),
            *section("Samples and what diagnostics saw", grids),
            *section("Speed", [curve(name, k) for k, name in enumerate(name for name in SPEED if name in logged)]),
        ],
    )


def as_json(report: Any) -> dict[str, Any]:
    """What wandb's server would be sent."""
    return report._to_model().model_dump(by_alias=True, exclude_none=True, mode="json")


def publish(folder: Path, project: str, entity: str) -> Published:
    """Save the report on the server.

    Raises:
        UserError: that failed, and why; nothing was published.
    """
    wr = _library()
    try:
        report = specification(folder, project, entity or _default_entity())
        report.save()
        address = report.url
    except UserError:
        raise
    except Exception as error:  # of whatever kind: wandb's own, the network's, the library's
        raise UserError(f"not published: {one_line(error)[:200]}") from error
    assert wr is not None
    return Published(address)


def _default_entity() -> str:
    import wandb

    return wandb.Api().default_entity or ""


def _library() -> Any:
    try:
        import wandb_workspaces.reports.v2 as library
    except ImportError:
        raise UserError("wandb-report: needs wandb-workspaces: pip install 'denoiselab[workspaces]'") from None
    return library


def _varying(runs: Sequence[Run]) -> list[str]:
    """The settings that tell arms apart, as names in the configuration that wandb has; the seed is none of them."""
    found = []
    for name in axes([run.identity for run in runs]):
        parts = [_at(run.identity, name) for run in runs]
        chosen = any(kind(part) for part in parts) and name in (runs[0].record.get("choices") or {})
        found.append(f"choices.{name}" if chosen else name)
    return [name for name in found if name != "seed"]


def _at(node: Any, name: str) -> Any:
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _column(key: str) -> str:
    first, _, rest = key.partition(".")
    return f"{first}.value" + (f".{rest}" if rest else "")


def _question(runs: Sequence[Run]) -> str:
    """Of the study that the runs belong to; empty if that is none, or several."""
    found = {question for run in runs if (question := _study(run).get("question"))}
    return str(found.pop()) if len(found) == 1 else ""


def _study(run: Run) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(run.config)
    except yaml.YAMLError:
        return {}
    study = config.get("study") if isinstance(config, dict) else None
    return study if isinstance(study, dict) else {}


def _introduction(folder: Path, runs: Sequence[Run], varying: Sequence[str]) -> str:
    states = [run.state for run in runs]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    by = ", ".join(f"`{key}`" for key in varying) or "nothing but the seed"
    lines = [
        *([f"**{question}**", ""] if (question := _question(runs)) else []),
        f"{len(runs)} runs ({told}), grouped by {by}; bands are one standard deviation over seeds.",
        "",
        f"Intervals, paired significance and which numbers compare: `denoiselab report {folder.name}`, "
        "which draws from the same files.",
    ]
    return "\n".join(lines)


def write(report: Any, file: Path, ids: Sequence[str] = ()) -> None:
    """Keep a report's description.

    Args:
        report: of ``specification``.
        file: a JSON file.
        ids: of its runs, for people.
    """
    from denoiselab.files import write_text

    write_text(file, json.dumps({"runs": [*ids], "view": as_json(report)}, indent=2) + "\n")
