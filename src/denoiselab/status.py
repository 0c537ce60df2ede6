"""How runs stand: done, running and for how long, failed and why. Free of torch, so that it answers at once."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from denoiselab.errors import printable
from denoiselab.launcher.base import LOG
from denoiselab.launcher.queue import SUFFIX, Seen, Submission, ask, read_submission
from denoiselab.report.runs import DEPTH, find, finite
from denoiselab.run_folder import alive

TAIL = 65_536
"""Bytes at the end of metrics.jsonl that are read."""

SILENT = 600.0
"""Seconds without a word after which a run on another machine is said to be silent."""


@dataclass
class Standing:
    """How one run stands."""

    name: str
    state: str
    """done, running, failed, preempted, died (its process is gone and said nothing), silent, or unknown; of jobs of
    SLURM that wait also queued, or requeued if they ran before."""
    step: int
    max_steps: int | None
    loss: float | None
    rate: float | None
    """Steps per second of training itself."""
    left: float | None
    """Seconds, of a run that goes on."""
    error: str = ""
    log: Path | None = None
    """What it said, of one that failed or died, where a launcher kept that."""

    @property
    def cells(self) -> list[str]:
        steps = f"{self.step}" if self.max_steps is None else f"{self.step}/{self.max_steps}"
        loss = "" if self.loss is None else f"{self.loss:.4g}"
        rate = "" if self.rate is None else f"{self.rate:.3g}"
        return [self.state, steps, loss, rate, "" if self.left is None else duration(self.left), self.name]


HEAD = ["state", "step", "loss", "steps/s", "left", "run"]


def standings(folder: Path) -> list[Standing]:
    """Of every run in a folder, and of those that wait in SLURM's queue and have no directory yet."""
    runs = find(folder)
    submitted = _submitted(folder)
    seen = ask() if submitted else None
    jobs: dict[Path, tuple[Submission, Seen | None]] = {}
    for submission, run in submitted if seen is not None else []:
        job = submission.among(seen or [])
        if run not in jobs or (job and job.alive):
            jobs[run] = submission, job
    waiting = [run for run, (_, job) in jobs.items() if job and job.alive and run not in runs]
    return [standing(run, folder, jobs.get(run)) for run in sorted([*runs, *waiting])]


def _submitted(folder: Path) -> list[tuple[Submission, Path]]:
    """What was submitted to SLURM, with the run's directory; beside the runs of a folder, or of a run."""
    found = [file for depth in range(DEPTH) for file in folder.glob(f"{'*/' * depth}.jobs/*{SUFFIX}")]
    found += folder.parent.glob(f".jobs/{folder.name}-*{SUFFIX}")
    read = [(submission, file.parents[1]) for file in found if (submission := read_submission(file))]
    return [(submission, parent / submission.run) for submission, parent in read]


def standing(run: Path, root: Path, job: tuple[Submission, Seen | None] | None = None) -> Standing:
    """A run directory's; files that are missing or torn leave gaps.

    Args:
        run, root: what it is, and what its name is relative to.
        job: that was submitted for it, and what SLURM says of that now (None: it is gone).
    """
    status, row = _status(run / "status.json"), _newest(run / "metrics.jsonl")
    state = str(status.get("state") or "unknown")
    error = " ".join(str(status.get("error") or "").split())
    step = int(max(finite(status.get("step")) or 0, row.get("step", 0)))
    asked = finite(status.get("max_steps"))
    rate, left = row.get("speed/steps_per_second"), None
    if state == "running":
        state = _still(run, status)
    if job is not None and not (state == "running" and status.get("host") == socket.gethostname()):  # seen to be alive
        state, error = _at(*job, state, error)
    if state == "running":
        if rate is None and (seconds := _since(status.get("started"))) and step > (finite(status.get("step")) or 0):
            rate = (step - (finite(status.get("step")) or 0)) / seconds
        if rate and asked is not None:
            left = (asked - step) / rate
    return Standing(
        name=run.relative_to(root).as_posix() if run != root else run.resolve().name,
        state=state,
        step=step,
        max_steps=None if asked is None else int(asked),
        loss=row.get("train/loss"),
        rate=rate if state == "running" else None,
        left=left,
        error=error,
        log=_log(run, job[0] if job else None) if state in ("failed", "died") else None,
    )


def table(found: list[Standing]) -> str:
    """Rows under a head, the errors of those that failed, and how many are in which state."""
    rows = [HEAD, *([printable(cell) for cell in one.cells] for one in found)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for number in range(len(found), 0, -1):
        if log := found[number - 1].log:
            lines.insert(number + 1, f"  log: {printable(str(log))}")
        if found[number - 1].error:
            lines.insert(number + 1, f"  {printable(found[number - 1].error)}")
    states = Counter(one.state for one in found)
    return "\n".join([*lines, ", ".join(f"{count} {printable(state)}" for state, count in sorted(states.items()))])


def duration(seconds: float) -> str:
    """In words.

    >>> [duration(s) for s in (42, 90, 7300, 200_000)]
    ['42 s', '1 min 30 s', '2 h 1 min', '2 d 7 h']
    """
    total = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if total >= size:
            return f"{total // size} {unit} {total % size // part} {smaller}"
    return f"{total} s"


def _at(submission: Submission, job: Seen | None, state: str, error: str) -> tuple[str, str]:
    """State and what is said of it, going by SLURM where the run cannot know."""
    if job is None or not job.alive:
        said = state in ("done", "failed", "preempted")
        how = f"is {job.state}" if job else "is gone"
        return (state, error) if said else ("died", f"SLURM job {submission.job} {how}")
    if job.waits:
        return "requeued" if job.restarts else "queued", f"SLURM job {job.job}: {job.reason}"
    return (state, error) if state in ("done", "failed") else ("running", "")


def _log(run: Path, submission: Submission | None) -> Path | None:
    """The newest of a run's logs."""
    jobs = run.parent / ".jobs"
    found = [*jobs.glob(f"{run.name}-*{LOG}")]
    if submission and submission.job.replace("_", "").isdigit():
        found += jobs.glob(f"slurm/{submission.job}_0_log.out")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _still(run: Path, status: dict[str, Any]) -> str:
    """Whether a run that says it is running is."""
    if status.get("host") == socket.gethostname():
        pid = status.get("pid")
        return "running" if isinstance(pid, int) and alive(pid) else "died"
    files = [path for path in (run / "metrics.jsonl", run / "status.json") if path.is_file()]
    newest = max((path.stat().st_mtime for path in files), default=0.0)
    return "running" if time.time() - newest < SILENT else "silent"


def _since(started: Any) -> float | None:
    try:
        return max(time.time() - datetime.fromisoformat(str(started)).timestamp(), 1e-9)
    except (ValueError, OverflowError, OSError):  # a time that no clock shows
        return None


def _status(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _newest(path: Path) -> dict[str, float]:
    """The newest value of each scalar near the end of a metrics.jsonl."""
    try:
        with path.open("rb") as file:
            file.seek(-min(TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut at the front, or torn
        if isinstance(row, dict):
            found |= {key: number for key, value in row.items() if (number := finite(value)) is not None}
    return found
