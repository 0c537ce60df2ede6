"""RUN/metrics.jsonl: the numbers of a run, one JSON object per line, the truth that everything else is drawn from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from denoiselab.files import write_text
from denoiselab.loggers.evaluations import Evaluations
from denoiselab.rows import csv_text, rows, write_csv


class JsonLines(Logger):
    """Appends {"step": ..., name: value, ...}; values are numbers or lists of numbers.

    Args:
        folder: the run directory.
        step: the step a run continues from: rows beyond it belong to a stretch that is made again, and are cut.
    """

    def __init__(self, folder: Path, step: int = 0):
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self.from_step = step
        self._file: io.TextIOWrapper | None = None

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> io.TextIOWrapper:
        """The open file."""
        if self._file is None:
            kept = [row for row in rows(self.path) if row["step"] <= self.from_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = self.path.open("a")
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.experiment.write(json.dumps({"step": step, **metrics}) + "\n")
        self.experiment.flush()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write metrics.csv, one row per step with the scalar columns."""
        if self._file is not None:
            self._file.close()
            self._file = None
            write_csv(self.path)

    @rank_zero_only
    def evaluated(self, found: Evaluations) -> None:
        """Write what was measured after training to evaluations.csv, and the newest values into metrics.csv."""
        write_csv(self.path, {"step": found.step, **found.values})
        write_text(self.path.with_name("evaluations.csv"), csv_text(found.table))
