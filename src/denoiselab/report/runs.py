"""Run directories, read into dataclasses; whatever is missing or torn is left out and said."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from denoiselab.rows import rows

DEPTH = 3
"""How far below the given folder run directories may lie."""

SET_ASIDE = re.compile(r"\.old-\d{8}T\d{6}$")
"""Names of runs that a newer one replaced: counting both would count a seed twice."""

LARGEST = 1e100
"""What is larger has diverged; its square could not be computed."""


@dataclass
class Record:
    """One measurement of an evaluation."""

    name: str
    value: float | None
    better: str
    controls: dict[str, float]
    protocol: dict[str, Any]
    details: dict[str, Any]


@dataclass
class Evaluation:
    """What was measured on samples that were made in one way."""

    protocol: dict[str, Any]
    records: list[Record]
    picture: Path | None
    choices: dict[str, Any] = field(default_factory=dict)
    """The options that it was composed of, by group; empty in older ones."""


@dataclass
class Look:
    """What a diagnostic found, at one step and in one way of sampling."""

    name: str
    step: int
    address: str
    protocol: dict[str, Any]
    records: list[Record]
    alarms: list[str]
    picture: Path


@dataclass
class Run:
    """One run directory."""

    name: str
    identity: dict[str, Any]
    status: dict[str, Any]
    record: dict[str, Any]
    config: str
    rows: list[dict[str, Any]]
    pictures: dict[str, list[tuple[int, Path]]]
    """By kind, in order of their step."""
    evaluations: list[Evaluation]
    looks: list[Look] = field(default_factory=list)
    """The newest of each diagnostic and way of sampling."""
    problems: list[str] = field(default_factory=list)
    """Files that could not be read, in words."""
    known: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict, repr=False)
    """Series that were asked for."""

    @property
    def seed(self) -> Any:
        return self.identity.get("seed")

    @property
    def state(self) -> str:
        return str(self.status.get("state") or "unknown")

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return int(finite(self.status.get("step")) or max((row["step"] for row in self.rows), default=0))

    @property
    def steps(self) -> str:
        """Optimizer steps made, of those asked for."""
        asked = finite(self.status.get("max_steps"))
        return f"{self.step}" if asked is None else f"{self.step} of {asked:.0f}"

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged number, rising in step; values that are not numbers are left out."""
        if name not in self.known:
            found = {row["step"]: value for row in self.rows if (value := finite(row.get(name))) is not None}
            steps = sorted(found)
            self.known[name] = steps, [found[step] for step in steps]
        return self.known[name]

    def last(self, name: str, step: float = math.inf) -> Any:
        """The newest value of a logged number or list at or before a step; None if there is none."""
        known = [row for row in self.rows if row["step"] <= step and row.get(name) is not None]
        return max(known, key=lambda row: row["step"])[name] if known else None


def finite(value: Any) -> float | None:
    """A number out of a file, or None for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    return float(value) if number else None


def find(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The run directories in a folder, itself included, that no newer one replaced."""
    if (folder / "identity.json").is_file():
        return [folder]
    if depth == 0:
        return []
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not SET_ASIDE.search(path.name)]
    return [run for path in inside for run in find(path, depth - 1)]


def read(folder: Path, root: Path) -> Run:
    """A run directory; ``root`` is what its name is relative to."""
    problems: list[str] = []
    name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    identity = _object(folder / "identity.json", problems)
    if not identity and not problems:
        problems.append("identity.json: is empty")
    return Run(
        name=name,
        identity=identity,
        status=_object(folder / "status.json", problems),
        record=_object(folder / "record.json", problems),
        config=_text(folder / "config.yaml", problems),
        rows=_rows(folder / "metrics.jsonl", problems),
        pictures=_pictures(folder / "pictures"),
        evaluations=[
            evaluation
            for path in sorted(folder.glob("evaluations/*/evaluation.json"))
            if (evaluation := _evaluation(path, problems)) is not None
        ],
        looks=_looks(folder / "diagnostics", problems),
        problems=problems,
    )


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(errors="replace") if path.is_file() else ""
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return ""


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A file's JSON object; empty if the file is missing, or is anything else."""
    text = _text(path, problems)
    if not text:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        problems.append(f"{path.parent.name}/{path.name}: not a JSON object; left out")
        return {}
    return content


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        found = rows(path)
    except (OSError, ValueError, RecursionError):
        problems.append(f"{path.name}: cannot be read; left out")
        return []
    return [row for row in found if isinstance(row, dict) and finite(row.get("step")) is not None]


def _pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := re.fullmatch(r"(.+)_(\d+)", path.stem):
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {kind: sorted(pictures) for kind, pictures in found.items()}


def _looks(folder: Path, problems: list[str]) -> list[Look]:
    """The newest of each name and address; files of older steps are opened only where newer ones are torn."""
    paths: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.glob("*/*/finding.json")):
        if match := re.fullmatch(r"(\d+)-(.+)", path.parent.name):
            paths.setdefault((path.parent.parent.name, match[2]), []).append(path)
    found = (_newest(name, address, looks, problems) for (name, address), looks in paths.items())
    return [look for look in found if look]


def _newest(name: str, address: str, paths: list[Path], problems: list[str]) -> Look | None:
    for path in reversed(paths):
        content = _object(path, problems)
        if isinstance(content.get("protocol"), dict):
            alarms, step = content.get("alarms"), int(path.parent.name.partition("-")[0])
            return Look(
                *(name, step, address, content["protocol"], _records(content)),
                alarms=[str(alarm) for alarm in alarms] if isinstance(alarms, list) else [],
                picture=path.with_name("picture.png"),
            )
    return None


def _evaluation(path: Path, problems: list[str]) -> Evaluation | None:
    content = _object(path, problems)
    if not isinstance(content.get("protocol"), dict):
        return None
    picture = path.with_name("samples.png")
    picture = picture if picture.is_file() else None
    return Evaluation(content["protocol"], _records(content), picture, _dict(content, "choices"))


def _records(content: dict[str, Any]) -> list[Record]:
    listed = content.get("records")
    return [
        Record(
            name=str(entry.get("name", "unnamed")),
            value=finite(entry.get("value")),
            better=str(entry.get("better", "none")),
            controls={str(k): v for k, x in _dict(entry, "controls").items() if (v := finite(x)) is not None},
            protocol=_dict(entry, "protocol"),
            details=_dict(entry, "details"),
        )
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict)
    ]


def _dict(entry: dict[str, Any], key: str) -> dict[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}
