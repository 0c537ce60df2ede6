"""What starting a run takes: from the start of its process to the end of its first step.

It is paid once per run of a sweep, since each is a process of its own. Importing torch, Lightning and Hydra alone, in a
process that then ends, is what no process of that kind can do without.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import torch

from denoiselab.bench.record import Record, need, result, times
from denoiselab.bench.refusal import Unavailable
from denoiselab.bench.timing import Contender, alternate

IMPORTS = "import denoiselab, torch, lightning.pytorch, hydra, torchmetrics, torchvision"
SAID = "first step "
"""How the line begins that a run writes after its first step."""


class Launch:
    """A run that is started, waited for until it has made its first step, and then left to end.

    Args:
        options: of ``denoiselab train``.
        folder: where it writes.
    """

    def __init__(self, options: list[str], folder: str):
        words = [*options, f"output_dir={folder}", "rerun=true", "lint.level=none"]
        self.command = [sys.executable, "-m", "denoiselab", "train", *words]
        self.process: subprocess.Popen[str] | None = None

    def until_first_step(self) -> None:
        told: list[str] = []
        self.process = subprocess.Popen(self.command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            told.append(line)
            if line.startswith(SAID):
                return
        raise Unavailable(f"the run ended without a step: {' '.join(told[-1:]).strip()}")

    def end(self) -> None:
        """Let it finish, which does not count."""
        if self.process is not None:
            self.process.communicate()
            self.process = None


def measure(options: dict[str, Any], device: torch.device) -> list[Record]:
    """Seconds from the start of a process to its first step, beside those of the imports.

    Args:
        options: rounds, options (as for ``denoiselab train``), at_most (seconds).
        device: where to.
    """
    where = f"trainer.accelerator={'cpu' if device.type == 'cpu' else 'gpu'}"
    with tempfile.TemporaryDirectory() as folder:
        launch = Launch([*options["options"], where, "trainer.max_steps=1"], folder)
        ours = Contender("a run", launch.until_first_step, launch.end)
        floor = Contender("imports", lambda: subprocess.run([sys.executable, "-c", IMPORTS], check=True), launch.end)
        try:
            alternate([ours, floor], options["rounds"], "launch")
        finally:
            launch.end()
    name = " ".join(options["options"])
    found = result("seconds to the first step", ours.seconds)
    return [Record("launch", name, "a start", options["rounds"], times([ours, floor]), found, need(options, "at_most"))]
