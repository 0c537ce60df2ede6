"""The end of a run whose loss has left where it was, and stays away."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from denoiselab import checkpoint
from denoiselab.callbacks.metrics import TrainingMetrics
from denoiselab.errors import CheckpointError, Diverged

LEAST = 10
"""Rows before it judges."""

WINDOW = 25
"""Rows whose median is what the loss was."""


class Divergence(pl.Callback):
    """Ends a run where train/mse is over ``factor`` times its median for ``patience`` rows in a row.

    The median is of the last 25 rows that were not; before the tenth nothing is judged. Rows are ``trainer.log_every``
    steps, and the same on all ranks. There is no going back to the last good checkpoint by itself: a run's samples and
    noise follow from its step, so the same steps would come to the same end. What would help is another run, from that
    checkpoint or anew.

    Args:
        folder: the run directory.
        factor: > 1.
        patience: rows, >= 1.
    """

    def __init__(self, folder: Path, factor: float = 3.0, patience: int = 3):
        if not factor > 1:
            raise ValueError(f"factor={factor}: need a number > 1")
        if patience < 1:
            raise ValueError(f"patience={patience}: need a number of rows >= 1")
        self.folder, self.factor, self.patience = folder, factor, patience
        self.good: deque[float] = deque(maxlen=WINDOW)
        self.above, self.good_step = 0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        (metrics,) = (one for one in trainer.callbacks if isinstance(one, TrainingMetrics))  # type: ignore[attr-defined]
        if metrics.due(trainer, pl_module) and self.judge(metrics.mse, trainer.global_step):
            median = statistics.median(self.good)
            raise Diverged(
                f"train/mse is {metrics.mse:.4g} at step {trainer.global_step}, and has been over {self.factor:g} "
                f"times its median before ({median:.4g}) since step {self.good_step}{self._kept()}; try a lower "
                "optimizer.lr or trainer.gradient_clip=1"
            )

    def judge(self, mse: float, step: int) -> bool:
        """Take a row; whether it is one too many that is too high."""
        if len(self.good) < LEAST or mse <= self.factor * statistics.median(self.good):
            self.good.append(mse)
            self.above, self.good_step = 0, step
            return False
        self.above += 1
        return self.above >= self.patience

    def _kept(self) -> str:
        """The newest checkpoint from before."""
        for name in ("last.ckpt", "previous.ckpt"):
            file = self.folder / "checkpoints" / name
            try:
                step = checkpoint.load(file)["global_step"]
            except CheckpointError:
                continue
            if step <= self.good_step:
                return f"; init_from={file} starts from before, step {step}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"good": [*self.good], "above": self.above, "good_step": self.good_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.good.extend(state_dict["good"])
        self.above, self.good_step = state_dict["above"], state_dict["good_step"]
