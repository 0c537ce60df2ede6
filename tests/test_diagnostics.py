"""What holds for every diagnostic: it looks, keeps, and draws the same picture again from what it kept."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from denoiselab.compose import options
from denoiselab.diagnostics import Diagnostic, Finding
from denoiselab.diagnostics.figure import WIDTH
from denoiselab.inspection import inspect_once
from healthy import subject
from looks import SMALL


@pytest.mark.parametrize("name", [option for option in options()["diagnostics"] if option != "none"])
def test_a_finding_is_kept_and_drawn_again(
    name: str, healthy: list[Path], example_run: Path, capsys: pytest.CaptureFixture[str]
):
    kind, overrides = SMALL[name]
    run = {"points": healthy[0], "digits": example_run}[kind]
    seen = subject(run, f"diagnostics={name}", *overrides)
    ((key, diagnostic),) = seen.parts.diagnostics.items()
    assert isinstance(diagnostic, Diagnostic)
    folder = inspect_once(key, diagnostic, seen.parts.config["diagnostics"][key], seen, rerun=True)
    assert str(folder) in capsys.readouterr().err
    found = Finding.load(folder)
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert rows
    assert [*rows[0]] == [*found.table]
    assert len({len(column) for column in found.table.values()}) == 1
    assert json.loads((folder / "finding.json").read_text())["protocol"]["step"] == seen.run.step
    again = diagnostic.picture(found)
    with Image.open(folder / "picture.png") as kept:
        assert kept.width >= WIDTH
        assert ImageChops.difference(kept.convert("RGB"), again).getbbox() is None
    for record in found.records:
        assert record.protocol or record.controls, f"{record.name}: what does it depend on?"
