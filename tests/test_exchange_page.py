"""The commands and the code of docs/exchange.md work, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from denoiselab.cli import run as command_line

PAGE = (Path(__file__).parents[1] / "docs" / "exchange.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
FEW = ["debug=quick", "callbacks=none", "metrics=none", "trainer.threads=1", "trainer.max_steps=1"]

pytest.importorskip("diffusers")


def words(line: str) -> list[str]:
    """A command's, with RUN filled in as the one run that its folder holds, and a training that is short."""
    for folder in re.findall(r"[\w/]+/RUN", line):
        (run,) = Path(folder).parent.iterdir()
        line = line.replace(folder, str(run))
    name, *options = shlex.split(line.removeprefix("denoiselab "))
    return [name, *options, *(FEW if name == "train" else [])]


def test_the_page_from_its_beginning_to_its_end(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made: dict[str, object] = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "docs/exchange.md", "exec"), made)
            continue
        for line in block.splitlines():
            missing = re.findall(r"\S+\.pt\b", line)
            status = command_line(words(line))
            said = capsys.readouterr().err
            assert status == (2 if missing else 0), said
            assert not missing or said.endswith("no such file\n")
    assert [kind for kind, _ in BLOCKS].count("python") == 3
    assert len(made["images"]) == 16  # pyright: ignore[reportArgumentType]
    for name, shape in (("x", (20, 1, 8, 8)), ("x_0", (4, 1, 8, 8))):
        found = made[name]
        assert isinstance(found, torch.Tensor)
        assert found.shape == shape
        assert found.isfinite().all()
    assert np.load("drawn/samples.npy").shape == (20, 1, 8, 8)
