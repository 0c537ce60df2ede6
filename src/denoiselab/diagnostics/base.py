"""What a diagnostic is: a look at a model that leaves a picture, the data behind it, and what it says of its health.

One class serves twice: during training on a cadence and within a budget, and on a checkpoint. It writes ``look``, which
measures, and ``draw``, which makes the picture of what was found and of nothing else, so that a finding that was kept
can be drawn again.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from denoiselab.files import write_atomic, write_text
from denoiselab.metrics.base import Measurement

if TYPE_CHECKING:
    from denoiselab.diagnostics.subject import Subject
    from denoiselab.experiment import Parts

Table = dict[str, list[Any]]
"""Columns of equal length; numbers, words, or None where there is nothing."""


@dataclass
class Finding:
    """What a diagnostic found."""

    table: Table
    """The numbers behind the picture; kept as CSV too. A unit stands in the column's name."""
    protocol: dict[str, Any]
    """What it depends on: ``Subject.protocol``, and the diagnostic's own options. Its facts stand under the picture."""
    records: list[Measurement] = field(default_factory=list)
    """Numbers that stand for the whole, with their controls, for dashboards and reports."""
    alarms: list[str] = field(default_factory=list)
    """What looks wrong, a sentence each; empty where all is well."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the picture needs: numbers, words, lists and mappings of these."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Images that the picture shows, on the CPU."""

    def save(self, folder: Path, picture: Image.Image) -> None:
        """Write picture.png, table.csv, tensors.safetensors if there are any, and at last finding.json."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in asdict(self).items() if key != "tensors"}
        text = json.dumps(content, indent=2, allow_nan=False)
        write_text(folder / "table.csv", self.csv())
        write_atomic(folder / "picture.png", lambda file: picture.save(file, format="png"))
        if self.tensors:
            packed = save({name: value.contiguous() for name, value in self.tensors.items()})
            write_atomic(folder / "tensors.safetensors", lambda file: file.write(packed))
        write_text(folder / "finding.json", text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Finding:
        """What ``save`` wrote."""
        content = json.loads((folder / "finding.json").read_text())
        records = [Measurement(**record) for record in content.pop("records")]
        file = folder / "tensors.safetensors"
        return cls(**content, records=records, tensors=load_file(file) if file.is_file() else {})

    def csv(self) -> str:
        """The table, a row per line under the names of its columns."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.table)
        writer.writerows(zip(*self.table.values(), strict=True))
        return text.getvalue()


class Diagnostic:
    """Looks at a model; a subclass writes ``look`` and ``draw``.

    Args:
        every: optimizer steps between looks during training, >= 1; also after the last step.
        budget: the most of the training time that its looks may take, as in "5%"; None for no limit. It says so when
            it was left out or cut short for that.
    """

    generates: ClassVar[bool | None] = True
    """Whether the model that it looks at can be sampled (True) or is an autoencoder (False); None for any."""

    copies: ClassVar[bool] = False
    """Whether it cannot do without a copy of the weights, of which it takes gradients."""

    def __init__(self, every: int = 2000, budget: str | None = "5%"):
        if every < 1:
            raise ValueError(f"every={every}: need a number of steps >= 1")
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", "100%" if budget is None else str(budget))
        if share is None or not 0 < float(share[1]) <= 100:
            raise ValueError(f"budget={budget}: need a share of the training time such as 5%, or null for no limit")
        self.every = every
        self.share = None if budget is None else float(share[1]) / 100

    def idle(self, parts: Parts) -> bool:
        """Whether models of these parts have nothing for it to look at, so that it is left out from among the
        callbacks."""
        return False

    def check(self, parts: Parts) -> None:
        """Raise ValueError, in one line, if models of these parts cannot be looked at so."""

    def look(self, subject: Subject) -> Finding:
        """Measure. Whoever draws samples or loops does so through ``subject``, which knows when time is up."""
        raise NotImplementedError

    def draw(self, finding: Finding) -> Image.Image:
        """The picture, made of the finding alone; title, axes with units, one legend. What it depends on is written
        under it by ``framed``."""
        raise NotImplementedError

    def picture(self, finding: Finding) -> Image.Image:
        """``draw``, over the facts that its numbers depend on and what looks wrong."""
        import matplotlib

        from denoiselab.diagnostics.figure import STYLE, framed

        with matplotlib.rc_context(STYLE):
            return framed(self.draw(finding), finding)
