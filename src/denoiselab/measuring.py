"""What `denoiselab evaluate` is asked for: composed, checked, and made, by itself or as one of a sweep.

In a sweep each evaluation is a process of its own, as a run is. One process for all evaluations of a checkpoint would
save what starts take, some seconds each on two cores, which matters where an evaluation takes as little; but it would
lose all of them where one dies hard, keep what a metric has left in memory, and leave devices idle where one run is
measured in many ways.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from denoiselab import lint
from denoiselab.checks import check_evaluation
from denoiselab.compose import JOBS, Composed, plain, write_job
from denoiselab.diagnostics import Subject
from denoiselab.errors import one_line
from denoiselab.evaluation import RESULT, evaluate
from denoiselab.evaluation import folder_of as evaluation_folder
from denoiselab.files import write_text
from denoiselab.inspection import folder_of, inspect_once
from denoiselab.launcher import Task
from denoiselab.run import Run, devices_of, load

FAILED = "failed.json"
"""Beside where a result would be: why there is none."""


class Asked:
    """An evaluation of a run, looks at it, or both; checked, unless it is all there.

    Args:
        composed: the configuration, with the overrides that the user gave.
        run: that is meant; an outline is enough for anything but ``make``.

    Raises:
        UserError: it cannot work; nothing was written.
    """

    def __init__(self, composed: Composed, run: Run):
        self.composed, self.run, self.config = composed, run, plain(composed)
        check_evaluation(self.config)
        self.parts = parts = run.parts_for(self.config)
        looks = {name: node for name, node in self.config["diagnostics"].items() if node}
        self.measured = not looks or any(line.startswith("metrics=") for line in composed.overrides)
        subject = Subject(run, parts)
        self.looks = {name: folder_of(name, node, subject) for name, node in looks.items()}
        self.results = [evaluation_folder(run, parts) / RESULT] if self.measured else []
        self.results += [folder / "finding.json" for folder in self.looks.values()]
        self.advice = [] if self.made and not self.config["rerun"] else self._check()

    @property
    def made(self) -> bool:
        return all(file.is_file() for file in self.results)

    def _check(self) -> list[lint.Advice]:
        run, parts = self.run, self.parts
        parts.data, parts.images = run.parts.data, run.parts.images  # read once for all evaluations of the run
        _ = parts.diagnostics, (parts.metrics if self.measured else None), parts.data.held_out
        if run.denoiser.generates:
            _ = parts.guidance
        return lint.look(lint.Case(parts, trained=run.schedule), training=False)

    def make(self) -> Path:
        """Make what is missing, or all of it where ``rerun`` says so; the folder of the first result."""
        config, run, folder = self.config, self.run, self.results[0].parent
        try:
            if self.measured:
                evaluate(run, self.parts, config["rerun"], self.composed.choices)
            subject = Subject(run, self.parts, self._raw, self.composed.config_dir)
            for name in self.looks:
                inspect_once(name, self.parts.diagnostics[name], config["diagnostics"][name], subject, config["rerun"])
        except Exception as error:
            with suppress(OSError):  # a full disk, which the error itself may be of
                write_text(folder / FAILED, json.dumps({"error": f"{type(error).__name__}: {one_line(error)}"}) + "\n")
            raise
        (folder / FAILED).unlink(missing_ok=True)
        return folder

    def _raw(self) -> Any:
        return load(self.config["ckpt"], "raw").to(self.run.device).denoiser


def loaded(config: dict[str, Any]) -> Run:
    """The run that a configuration of ``evaluate`` names, on the devices that it names."""
    check_evaluation(config)
    devices = devices_of(config["device"])
    return load(config["ckpt"], config["evaluation"]["weights"]).to(*devices)


class Job:
    """One evaluation of a sweep, planned.

    Args:
        asked: of an outline; it is not kept.
        overrides: that it was made of.
        here: whether it will be made on this machine; if not, what devices there are is not looked at.
    """

    def __init__(self, asked: Asked, overrides: Sequence[str], here: bool):
        self.composed, self.overrides, self.results = asked.composed, [*overrides], asked.results
        self.advice, self.run, self.rerun = asked.advice, asked.run.folder, asked.config["rerun"]
        self.again = False
        idle = asked.config["device"] == "cpu" or (here and not torch.cuda.is_available())
        self.gpus = 0 if idle else None

    @property
    def path(self) -> Path:
        return self.results[0].parent

    @property
    def makes(self) -> tuple[Path, ...]:
        return tuple(file.resolve() for file in self.results)

    @property
    def evaluation_address(self) -> str:
        return self.path.name

    @property
    def command(self) -> str:
        """That makes this evaluation alone, for a shell."""
        folder = self.composed.config_dir
        return shlex.join(
            ["denoiselab", "evaluate", *(["--config-dir", str(folder)] if folder else []), *self.overrides]
        )

    @property
    def finished(self) -> bool:
        return not self.again and all(file.is_file() for file in self.results)

    @property
    def error(self) -> str:
        try:
            return str(json.loads((self.path / FAILED).read_text())["error"])
        except OSError:
            return ""
        except (ValueError, KeyError, TypeError):
            return "unknown"

    def set_aside(self) -> None:
        """The old result stays until the new one takes its place."""
        self.again = True
        (self.path / FAILED).unlink(missing_ok=True)

    def task(self, label: str) -> Task:
        file = self.run.resolve() / JOBS / f"{self.path.parent.name}-{self.path.name}.json"
        write_job(self.composed, file)
        return Task(label, ["evaluate", "--job", str(file)], self.path, gpus=self.gpus)
