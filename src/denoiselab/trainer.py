"""Lightning's Trainer as runs need it: it loops over steps and knows devices; data order, saving and evaluating are
ours."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from denoiselab import checkpoint
from denoiselab.errors import UserError
from denoiselab.sharding import Sharded


class AtomicIO(CheckpointIO):
    """Lightning's door to our checkpoint files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        _save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoint.load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


_save = checkpoint.save


def make(
    config: dict[str, Any], folder: Path | None, callbacks: list[pl.Callback], loggers: list[Logger], here: bool = True
) -> pl.Trainer:
    """The Trainer of a run.

    Args:
        config: the options of the trainer group.
        folder: the run directory; None if nothing will be run.
        here: whether it will run on this machine; if not, it is made for a CPU, to find mistakes.

    Raises:
        UserError: Lightning refused an option.
    """
    quiet()
    accelerator = config["accelerator"]
    if (accelerator == "auto" and torch.backends.mps.is_available()) or not here:
        accelerator = "cpu"  # Apple's GPUs have no float64, in which the schedules' tables are kept
    try:
        return pl.Trainer(
            accelerator=accelerator,
            devices=config["devices"],
            num_nodes=config["nodes"],
            strategy=Sharded() if config["strategy"] == "fsdp" else config["strategy"],
            precision=config["precision"],
            max_steps=config["max_steps"],
            max_epochs=-1,
            accumulate_grad_batches=config["accumulate"],
            deterministic=config["deterministic"],
            callbacks=callbacks,
            logger=loggers,
            plugins=[AtomicIO(), *environment()],
            default_root_dir=folder,
            # The stream shards itself, evaluations are callbacks, and saving is ours.
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def environment() -> list[ClusterEnvironment]:
    """Where ranks come from under SLURM: from its tasks, if this is one of several, and from this process otherwise.

    Lightning would expect tasks wherever SLURM's variables are; and would ask for a requeue itself, which is for
    whoever submitted the job."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []


def quiet() -> None:
    """Lightning's tips and its warnings about choices that are made on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
