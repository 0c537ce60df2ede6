"""A folder of a hundred runs with files of realistic size: how large the page is, and what is read for it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from denoiselab.report import write_report
from denoiselab.report.arms import tabulate
from denoiselab.report.page import LARGEST, PICTURES, Gallery, filled, same_noise
from test_report import evaluation, load, make_run, write
from test_report_compute import changed
from test_report_looks import look

OPENED: list[str] | None = None
"""Files opened, while somebody counts."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str):
        OPENED.append(arguments[0])


sys.addaudithook(_audit)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "OPENED", found)
    return found


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_a_hundred_runs_are_a_page_that_can_be_opened(tmp_path: Path, opened: list[str]):
    """100 runs x 8 diagnostics and 2 evaluations with pictures of 180 kB: nothing is read twice, pictures that are not
    shown are not read at all, and the page stays below 15 MB."""
    bench = script("bench_report")
    bench.make(tmp_path, runs=100, rows=50)
    opened.clear()
    page = write_report(tmp_path)
    counts = Counter(Path(name).relative_to(tmp_path).as_posix() for name in opened if name.startswith(str(tmp_path)))
    read = {name: count for name, count in counts.items() if name != "." and "report" not in name}
    assert max(read.values()) == 1
    kinds = Counter(Path(name).name for name in read)
    names = ("identity.json", "status.json", "record.json", "config.yaml", "metrics.jsonl")
    assert {name: kinds[name] for name in names} == dict.fromkeys(names, 100)
    assert kinds["evaluation.json"] == 200
    assert kinds["finding.json"] == 100 * len(bench.LOOKS)  # of the newest step, and not of the others
    text = page.read_text()
    shown = text.count("data:image/png;base64,")
    assert sum(name.endswith(".png") for name in read) == shown
    assert 12 + 9 <= shown <= PICTURES * (2 + len(bench.LOOKS))
    assert page.stat().st_size < 15e6
    assert "12 of 40 are shown" in text  # evaluated samples
    for words in ("100 runs (100 done)", "Quality against compute", "Importance of the axes", "on 200 values of 40 of"):
        assert words in text


def noise(path: Path, side: int) -> Path:
    """A PNG of about 3 side^2 bytes."""
    Image.effect_noise((side, side), 90).convert("RGB").save(path)
    return path


def test_pictures_share_the_room_there_is(tmp_path: Path):
    """Samples come first, then one of each kind in turn; what has no room is counted."""
    picture = noise(tmp_path / "large.png", 500)
    room = LARGEST // picture.stat().st_size
    assert 8 <= room < 2 * PICTURES
    galleries = [Gallery(title, "", [(picture, str(i), "") for i in range(20)]) for title in "abc"]
    found = filled(galleries)
    counts = [len(gallery.pictures) for gallery in found]
    assert [gallery.title for gallery in found] == ["a", "b", "c"]
    assert sum(counts) == room
    assert counts[0] == min(PICTURES, room)
    assert abs(counts[1] - counts[2]) <= 1


def test_samples_side_by_side_start_from_one_noise(tmp_path: Path):
    """Of arms that were measured with several seeds of the noise, the common one is shown; an arm that was not measured
    with it stands apart."""
    for schedule, draws in {"Cosine": (0, 1), "Linear": (1, 2), "Sigmoid": (2,), "Laplace": (1,)}.items():
        run = make_run(tmp_path / schedule, 0, schedule)
        for draw in draws:
            folder = run / f"evaluations/{draw}"
            evaluation(folder, 1.0, 2.0, 1000, schedule, "unet_digits")
            changed(folder / "evaluation.json", protocol={"seed": draw})
    found = same_noise(tabulate(load(tmp_path)).arms)
    labels = {draw: [arm.label for arm, *_ in shown] for draw, shown in found.items()}
    assert labels == {"1": [f"schedule {name}" for name in ("Cosine", "Laplace", "Linear")], "2": ["schedule Sigmoid"]}
    assert {e.protocol["seed"] for _, _, e in found["1"]} == {1}
    page = write_report(tmp_path).read_text()
    assert "All from the same noise and labels: evaluation.seed=1." in page
    assert page.index("<h2>Evaluated samples</h2>") < page.index("<h2>Evaluated samples, from other noise</h2>")


def test_grids_of_one_training_seed_where_there_is_one(tmp_path: Path):
    for schedule, seeds in {"Cosine": (0, 3), "Linear": (3, 5), "Sigmoid": (3,)}.items():
        for seed in seeds:
            make_run(tmp_path / f"{schedule}{seed}", seed, schedule, {1.0: 2.0})
    (shown,) = same_noise(tabulate(load(tmp_path)).arms).values()
    assert [run.seed for _, run, _ in shown] == [3, 3, 3]


def test_a_torn_finding_gives_way_to_the_one_before(tmp_path: Path):
    run = make_run(tmp_path / "run")
    look(run, "mode_map", 500)
    write(look(run, "mode_map", 1000, seed=1) / "finding.json", "{torn")
    page = write_report(tmp_path).read_text()
    assert re.search(r'alt="Mode map:.*?step 500', page, re.DOTALL)
    assert "00001000-ab12/finding.json: not a JSON object; left out" in page
