"""What SLURM's controller says of our jobs. No accounting is asked, which many clusters do not keep."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAITING = frozenset(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"))
"""States in which nothing of a job runs (squeue(1), JOB STATE CODES)."""

ALIVE = WAITING | {
    *("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"),
}
"""States after which others follow."""

FIELDS = {
    **dict.fromkeys(("ArrayJobID", "ArrayTaskID", "State", "exit_code", "RestartCnt"), 32),
    **dict.fromkeys(("Reason", "Comment"), 64),
}
"""Of ``squeue --Format``, with their widths."""


@dataclass(frozen=True)
class Seen:
    """A job, as the controller knows it.

    Args:
        job: its id, as in 12 or 12_3.
        index: in its array; 0 for a job of its own.
        state: as squeue calls it.
        status: its exit status, or -n if signal n ended it; 0 while it goes on.
        restarts: how often it was requeued.
        reason: why it waits, or ended so.
        comment: that it was submitted with.
    """

    job: str
    index: int
    state: str
    status: int
    restarts: int
    reason: str
    comment: str

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    @property
    def waits(self) -> bool:
        return self.state in WAITING


def ask() -> list[Seen] | None:
    """This user's jobs: those that wait, run, or ended some minutes ago (SLURM's MinJobAge); None if nobody answers."""
    fields = ",".join(f"{name}:{width}" for name, width in FIELDS.items())
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--Format={fields}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else [_read(line) for line in answer.stdout.splitlines() if line.strip()]


def _read(line: str) -> Seen:
    values, start = [], 0
    for width in FIELDS.values():
        values.append(line[start : start + width].strip())
        start += width
    array, index, state, code, restarts, reason, comment = values
    own = not index.isdigit()  # N/A
    waited = int(code or 0)  # as wait(2) gives it
    return Seen(
        job=array if own else f"{array}_{index}",
        index=0 if own else int(index),
        state=state,
        status=waited >> 8 or -(waited & 127),
        restarts=int(restarts or 0),
        reason=reason,
        comment=comment,
    )


def mine() -> dict[str, Any] | None:
    """The SLURM job that this process is of, and which start of it; None outside of SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{index}" if array and index else os.environ["SLURM_JOB_ID"]
    return {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def over(start: dict[str, Any] | None) -> bool:
    """Whether a start of a job, as ``mine`` gave it then, is known to be over: the same job was started since, or SLURM
    says that it has ended."""
    if not (isinstance(start, dict) and isinstance(start.get("job"), str) and isinstance(start.get("restart"), int)):
        return False
    now = mine()
    if now is not None and now["job"] == start["job"]:
        return now["restart"] > start["restart"]
    seen = ask()
    return seen is not None and all(one.job != start["job"] or not one.alive for one in seen)


@dataclass
class Submission:
    """What was submitted for a run, kept beside its composed configuration, so that it is found again.

    Args:
        run: the name of its folder.
        token: the comment of its job; written before it is submitted, so that none is lost.
        index: in its array.
        job: its id, once that is known.
    """

    run: str
    token: str
    index: int
    job: str = ""

    def among(self, seen: list[Seen]) -> Seen | None:
        """The job of this submission."""
        return next((one for one in seen if (one.comment, one.index) == (self.token, self.index)), None)


SUFFIX = ".slurm"
"""Of the file of a submission, instead of the job file's."""


def read_submission(file: Path) -> Submission | None:
    """None where there is none, or none that can be read."""
    try:
        found = Submission(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    words = all(isinstance(word, str) for word in (found.run, found.token, found.job))
    own = words and Path(found.run).name == found.run != ".."  # a folder beside it, and nowhere else
    return found if own and isinstance(found.index, int) else None
