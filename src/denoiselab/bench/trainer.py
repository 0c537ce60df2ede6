"""Turns between steps of `denoiselab train`: the trainer is one contender, and others run in its pauses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from denoiselab.bench.timing import WARMUP, Contender, finished, turns
from denoiselab.compose import compose
from denoiselab.module import Diffusion
from denoiselab.training import Job


class Turns(pl.Callback):
    """A turn of "ours" is ``steps`` optimizer steps of the trainer that this callback belongs to.

    Args:
        title: for the person who waits.
        rounds: that count.
        steps: per turn.
        others: makes the other contenders, given the module on its device.
    """

    def __init__(
        self, title: str, rounds: int, steps: int, others: Callable[[Diffusion], Sequence[Contender]] = lambda _: []
    ):
        self.title, self.rounds, self.steps, self.make_others = title, rounds, steps, others
        self.loss: Any = 0.0
        """The sum of the losses of ours."""

    @property
    def max_steps(self) -> int:
        """Of training, for all rounds."""
        return (WARMUP + self.rounds) * self.steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        clock = pl_module.clock
        self.ours = Contender(
            "ours",
            run=lambda: None,
            clock=lambda: finished() - clock.started - clock.paused_for,  # of training, evaluations left out
            per=self.steps,
        )
        self.others = list(self.make_others(pl_module))
        self.turns: Iterator[Contender] = turns([self.ours, *self.others], self.rounds, self.title, live=False)
        self._hand_on(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.loss += outputs["loss"].detach()
        if pl_module.stepped and trainer.global_step % self.steps == 0:
            self._hand_on(pl_module)

    def _hand_on(self, module: Diffusion) -> None:
        """The others' turns, until it is ours again or nobody's."""
        for contender in self.turns:
            if contender is self.ours:
                return
            with module.clock.paused():
                contender.run()
                finished()


def train(
    options: Sequence[str],
    turns: Turns,
    callbacks: Callable[[list[Any]], list[Any]],
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train in a folder of its own that is gone afterwards; the last row of numbers.

    Args:
        options: as for ``denoiselab train``.
        turns: says how long.
        callbacks: from the run's callbacks to those that it gets, ``turns`` among them.
        data: in the place of the data group's node.
    """
    with tempfile.TemporaryDirectory() as folder:
        composed = compose("train", [*options, f"trainer.max_steps={turns.max_steps}", f"output_dir={folder}"])
        if data is not None:
            composed.config["data"] = data
        job = Job(composed)
        make = job.make_trainer

        def make_trainer(own: list[pl.Callback], loggers: list[Any]) -> pl.Trainer:
            return make(callbacks(own), loggers)

        job.make_trainer = make_trainer  # pyright: ignore[reportAttributeAccessIssue]
        with job.folder.locked():
            job.fit()
        rows = Path(job.folder.path / "metrics.jsonl").read_text().splitlines()
        return json.loads(rows[-1]) if rows else {}
