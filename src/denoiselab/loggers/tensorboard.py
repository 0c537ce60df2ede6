"""TensorBoard, in RUN/tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from denoiselab.loggers.base import Dashboard
from denoiselab.loggers.curves import UNITS
from denoiselab.loggers.evaluations import Evaluations
from denoiselab.loggers.facts import Facts

FILES = "events.out.tfevents.*"


class TensorBoard(Dashboard, TensorBoardLogger):
    """Scalars, pictures, and the options with the measurements of the evaluation under HPARAMS; errors by t as a
    picture and, over the steps, under CUSTOM SCALARS.

    A run that goes on writes on in the same folder. What it logged beyond its checkpoint is told to be purged
    (SummaryWriter's ``purge_step``), so a viewer shows each step once; every row is written through, so that nothing
    before it can be missing. A folder without events, of a run that was begun without TensorBoard, is filled from
    metrics.jsonl first.

    Args:
        save_dir: the run directory.
        facts: what the run is.
        step: that it goes on from.
        options: further arguments of SummaryWriter.
    """

    def __init__(self, save_dir: Path, facts: Facts, step: int = 0, **options: Any):
        begun = any((Path(save_dir) / "tensorboard").glob(FILES))
        purge = {"purge_step": step + 1} if begun else {}
        super().__init__(save_dir, name="tensorboard", version="", default_hp_metric=False, **purge, **options)
        self.facts, self.folder, self.step, self.begun, self.opened = facts, Path(save_dir), step, begun, False
        self.waiting = not begun

    def _open(self) -> None:
        """Before the first row: how errors by t are shown together, and what there is already."""
        self.opened = True
        lines = {
            f"{source}: {unit}": ["Multiline", [rf"^buckets/{source}/{unit}/\d+$"]]
            for source in ("val", "train")
            for unit in UNITS
        }
        self.experiment.add_custom_scalars({"squared error by t, a line per bucket": lines})
        if not self.begun:
            self.replay(self.folder, -1, self.step)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        if not self.opened:
            self._open()
        super().log_metrics(metrics, step)
        self.experiment.flush()

    @rank_zero_only
    def show(self, name: str, picture: Image.Image, step: int) -> None:
        if not self.opened:
            self._open()
        self.experiment.add_image(f"pictures/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.experiment.flush()

    @rank_zero_only
    def evaluated(self, found: Evaluations) -> None:
        if not self.opened:
            self._open()
        self.log_hyperparams(self.facts.options, found.values, found.step)
        self.experiment.flush()

    @rank_zero_only
    def save(self) -> None:
        """Nothing beside the events: config.yaml has the configuration."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The evaluation is still to come: ``close`` ends it."""

    @rank_zero_only
    def close(self, status: int) -> None:
        if self._experiment is not None:
            self.experiment.add_text("exit_status", str(status), self.step)
            self.experiment.close()
