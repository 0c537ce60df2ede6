"""RUN/metrics.jsonl: the numbers of a run, one JSON object per line, the truth that everything else is drawn from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from denoiselab.files import write_text
from denoiselab.loggers.evaluations import Evaluations
from denoiselab.progress import say
from denoiselab.rows import csv_text, rows, write_csv


class JsonLines(Logger):
    """Appends {"step": ..., name: value, ...}; values are numbers or lists of numbers.

    Rows that cannot be written, as on a full disk, wait in memory for the next; no checkpoint is made without them.

    Args:
        folder: the run directory.
        step: the step a run continues from: rows beyond it belong to a stretch that is made again, and are cut.
    """

    def __init__(self, folder: Path, step: int = 0):
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self.from_step = step
        self._file: IO[bytes] | None = None
        self._waiting, self._warned = b"", False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> IO[bytes]:
        """The open file, without a buffer: what was written is known when a write fails halfway."""
        if self._file is None:
            kept = [row for row in rows(self.path) if row["step"] <= self.from_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = self.path.open("ab", buffering=0)
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._waiting += (json.dumps({"step": step, **metrics}) + "\n").encode()
        try:
            self._write()
            self._warned = False
        except OSError as error:
            if not self._warned:
                say(f"warning: {self.path}: {error.strerror or error}; rows wait in memory until it can be written")
            self._warned = True

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self.experiment.write(self._waiting) :]

    @rank_zero_only
    def sync(self) -> None:
        """Have every row on the disk.

        Raises:
            OSError: it cannot be, or the file was removed since it was opened.
        """
        self._write()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self.path.stat()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write metrics.csv, one row per step with the scalar columns."""
        if self._file is not None:
            try:
                self._write()
            finally:
                self._file.close()
                self._file = None
            write_csv(self.path)

    @rank_zero_only
    def evaluated(self, found: Evaluations) -> None:
        """Write what was measured after training to evaluations.csv, and the newest values into metrics.csv."""
        write_csv(self.path, {"step": found.step, **found.values})
        write_text(self.path.with_name("evaluations.csv"), csv_text(found.table))

    def lacks(self, made: Path) -> bool:
        """Whether an evaluation, in its folder, is newer than evaluations.csv, or that is not there."""
        table = self.path.with_name("evaluations.csv")
        return not table.is_file() or table.stat().st_mtime_ns < max(
            file.stat().st_mtime_ns for file in made.glob("evaluation.json")
        )
