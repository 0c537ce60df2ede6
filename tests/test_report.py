"""The report, on run directories made up here: nothing is trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from denoiselab.errors import UserError
from denoiselab.report import write_report
from denoiselab.report.arms import Cell, rank, tabulate
from denoiselab.report.axes import axes
from denoiselab.report.runs import Run, find, read

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def picture(path: Path, seed: int, tiles: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (tiles * 8, 80), dtype=np.uint8)
    Image.fromarray(small).resize((560, tiles * 56), Image.Resampling.NEAREST).save(path)


def metrics(seed: int, level: float, steps: int, k: int = 10) -> list[dict[str, Any]]:
    """Rows that look like training: falling losses, an error that rises with t."""
    noise, found = np.random.default_rng(seed), []
    for step in range(100, steps + 1, 100):
        loss = level * (0.2 + 2 * np.exp(-step / 300)) * (1 + 0.03 * noise.standard_normal())
        row: dict[str, Any] = {"step": step, "train/loss": loss * (1 + 0.1 * noise.standard_normal())}
        row |= {"speed/steps_per_second": 40 + seed, "speed/samples_per_second": 5000.0, "speed/evaluation_share": 0.1}
        if step % 500 == 0:
            row |= {"val/loss": loss, "val/loss_raw": loss * 1.1}
            t = (np.arange(k) + 0.5) / k
            snr = (np.cos(t * np.pi / 2) / np.sin(t * np.pi / 2)) ** 2
            for source in ("train", "val", "val_raw"):
                x_0 = level * 0.3 * t**2 * (1 + 0.05 * noise.standard_normal(k))
                for panel, scale in {"x_0": 1, "eps": snr, "v": snr + 1}.items():
                    row[f"buckets/{source}/{panel}"] = [None, *(x_0 * scale)[1:]]
                    row[f"buckets/{source}/{panel}_se"] = [None, *(0.1 * x_0 * scale)[1:]]
                row[f"buckets/{source}/count"] = [0] + [100] * (k - 1)
        found.append(row)
    return found


def make_run(
    folder: Path,
    seed: int = 0,
    schedule: str = "Cosine",
    fd: dict[float, float] | None = None,
    n: int = 1000,
    state: str = "done",
    error: str | None = None,
    steps: int = 2000,
    text: str = "unet_digits",
) -> Path:
    """A run directory with an evaluation for each guidance scale in ``fd``."""
    kinds = {"target": "target.V", "weighting": "weighting.Unit", "data": "data.Digits", "model": "models.UNet"}
    identity = {group: {"_target_": f"denoiselab.{name}"} for group, name in kinds.items()}
    identity |= {"schedule": {"_target_": f"denoiselab.schedule.{schedule}"}, "precision": "32-true", "numerics": 1}
    write(folder / "identity.json", {**identity, "seed": seed})
    write(folder / "config.yaml", f"seed: {seed}\nmodel: {text}\n")
    status = {"state": state, "step": steps, "max_steps": 2000, "error": error, "seconds": 61.25}
    write(folder / "status.json", {**status, "started": "2025-01-01T00:00:00+00:00"})
    record = {
        "command": f"denoiselab train schedule={schedule.lower()} seed={seed} model={text}",
        "git": "0123456789ab",
        "versions": {"python": "3.11.9", "torch": "2.10.0"},
        "parameters": 773185,
        "weight": "SNR + 1",
        "loss": "(SNR + 1) * mean |x_0_hat - x_0|^2",
        "choices": {"data": "digits", "model": text, "sampler": "ddim", "guidance": "cfg"},
        "sizes": {"train": 1437, "held_out": 360},
        "hardware": "2 CPU cores (x86_64)",
    }
    write(folder / "record.json", record)
    rows = metrics(seed, 1.0 if schedule == "Cosine" else 1.4, steps)
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for step in (1000, 2000):
        if step <= steps:
            picture(folder / f"pictures/sample_grid_{step:08d}.png", seed + step)
            picture(folder / f"pictures/guidance_sweep_{step:08d}.png", seed + step, tiles=6)
    for scale, value in (fd or {}).items():
        evaluation(folder / f"evaluations/{scale:g}", scale, value, n, schedule, text)
    return folder


def evaluation(folder: Path, scale: float, value: float, n: int, schedule: str, text: str) -> None:
    sampler = {"_target_": "denoiselab.sampler.DDIM", "_partial_": True, "steps": 50, "eta": 0.0}
    guidance = {"_target_": "denoiselab.guidance.CFG", "_partial_": True, "scale": scale}
    protocol = {"sampler": sampler, "guidance": guidance, "versions": {"torch": "2.10.0"}}
    protocol |= {"n": n, "seed": 0, "weights": "ema", "label_policy": "balanced", "nfe": 50, "dtype": "float32"}
    protocol |= {"step": 2000, "schedule": f"{schedule}:ab12"}
    confusion = (np.eye(10) * 90 + 1).astype(int).tolist()
    fd = {"controls": {"floor": 0.9, "floor_std": 0.05}, "protocol": {"extractor": f"digits_net:{text}"}}
    records = [
        {"name": "fd_digits", "value": value, "better": "lower", **fd},
        {"name": "class_accuracy", "value": 1 - value / 100, "better": "higher", "details": {"confusion": confusion}},
        {"name": "held_out_loss", "value": value / 10, "better": "lower", "protocol": {"loss": "(SNR + 1) * mse"}},
    ]
    write(folder / "evaluation.json", {"protocol": protocol, "records": records, "seconds": 12.3})
    picture(folder / "samples.png", int(100 * value))


def sweep(folder: Path) -> Path:
    """2 schedules x 3 seeds at 2 guidance scales, and one run that failed."""
    for i, schedule in enumerate(("Cosine", "Linear")):
        for seed in range(3):
            fd = {1.0: 2.0 + i + 0.1 * seed, 3.0: 1.5 + i + 0.2 * seed}
            make_run(folder / f"{schedule.lower()}-s{seed}", seed, schedule, fd)
    failed = {"state": "failed", "error": "non-finite loss at step 300", "steps": 300}
    make_run(folder / "linear-s3", 3, "Linear", **failed)
    return folder


def load(folder: Path) -> list[Run]:
    return [read(path, folder) for path in find(folder)]


class Tags(HTMLParser):
    """Collects what a browser would run or fetch; escaped text is neither."""

    def __init__(self, page: str):
        super().__init__()
        self.active: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.active += [tag] if tag in ("script", "iframe", "object", "embed", "link", "base", "form") else []
        for name, value in attrs:
            fetches = name in ("src", "href", "xlink:href", "srcset", "poster") and not re.match("data:|#", value or "")
            if fetches or name.startswith("on") or self.fetching(value or ""):
                self.active.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.active += [data] if self.lasttag == "style" and self.fetching(data) else []

    @staticmethod
    def fetching(style: str) -> bool:
        return bool(re.search(r"url\(\s*[\"']?(?!#)|@import", style))


def test_means_and_intervals_over_seeds(tmp_path):
    page = write_report(sweep(tmp_path)).read_text()
    table = tabulate(load(tmp_path))
    assert table.axes == ["schedule", "guidance.scale"]
    labels = [list(arm.axes.values()) for arm in table.arms]
    assert labels == [["Cosine", "1"], ["Cosine", "3"], ["Linear", "1"], ["Linear", "3"]]
    cells = [arm.cells["fd_digits"] for arm in table.arms]
    assert [cell.mean for cell in cells] == pytest.approx([2.1, 1.7, 3.1, 2.7])
    # Student's t at 2 degrees of freedom: 4.302653; the standard deviations are 0.1 and 0.2
    half = 4.302653 / np.sqrt(3)
    assert [cell.half for cell in cells] == pytest.approx([0.1 * half, 0.2 * half, 0.1 * half, 0.2 * half], rel=1e-6)
    assert [cell.best for cell in cells] == [False, True, False, False]
    assert [arm.cells["class_accuracy"].best for arm in table.arms] == [False, True, False, False]
    assert '<span class="dot">●</span> 1.700 ± 0.50' in page
    assert "floor 0.9000\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.050" in page
    for words in ("7 runs (6 done, 1 failed)", "schedule (Cosine, Linear)", "guidance.scale (1, 3)", "n = 1000"):
        assert words in page
    assert "guidance scale 1 or guidance scale 3; DDIM, 50 steps; EMA weights" in page
    assert "non-finite loss at step 300" in page


def test_tables_beside_the_page(tmp_path):
    write_report(sweep(tmp_path / "runs"), tmp_path / "out" / "page.html")
    frame = pd.read_csv(tmp_path / "out" / "page.csv")
    assert list(frame["fd_digits"]) == pytest.approx([2.1, 1.7, 3.1, 2.7])
    assert list(frame["seeds"]) == [3, 3, 3, 3]
    assert list(frame["guidance.scale"]) == [1, 3, 1, 3]
    assert {"fd_digits_ci95", "fd_digits_floor", "n", "weights", "sampler.steps", "network_calls"} <= set(frame)
    text = (tmp_path / "out" / "page.md").read_text()
    assert "| Cosine | 3 | 3 | **1.700 ± 0.50** (floor 0.9000 ± 0.050) |" in text


def test_losses_of_different_schedules_are_not_ranked(tmp_path):
    table = tabulate(load(sweep(tmp_path)))
    assert not any(arm.cells["held_out_loss"].best for arm in table.arms)
    assert "held_out_loss is not ranked: arms differ in schedule." in table.notes


def test_arms_with_other_n_are_not_ranked(tmp_path):
    make_run(tmp_path / "a", 0, "Cosine", {1.0: 2.0}, n=1000)
    make_run(tmp_path / "b", 0, "Linear", {1.0: 1.0}, n=200)
    table = tabulate(load(tmp_path))
    assert not any(cell.best for arm in table.arms for cell in arm.cells.values())
    assert "fd_digits is not ranked: arms differ in n." in table.notes
    assert "arms differ in n." in write_report(tmp_path).read_text()


def test_only_comparable_cells_are_ranked():
    def cells(**other: Any) -> list[Cell]:
        one = Cell("fd", [1.0], "lower", {}, [{"extractor": "a"}])
        return [one, Cell(**{**vars(one), "values": [2.0], **other})]

    assert rank(same := cells()) is None
    assert [cell.best for cell in same] == [True, False]
    assert "extractor" in str(rank(cells(basis=[{"extractor": "b"}])))
    assert "direction" in str(rank(cells(better="higher")))
    assert rank(tied := cells(values=[1.0])) is None
    assert not any(cell.best for cell in tied)


def test_seeds_measured_differently_are_not_averaged(tmp_path):
    for seed, text in enumerate(("a", "b")):
        make_run(tmp_path / text, seed, fd={1.0: 2.0}, text=text)
    (arm,) = tabulate(load(tmp_path)).arms
    assert arm.cells["fd_digits"].mean is None
    assert "not averaged: seeds differ in extractor" in write_report(tmp_path).read_text()


def test_runs_of_different_code_are_said(tmp_path):
    for seed in (0, 1):
        record = make_run(tmp_path / str(seed), seed) / "record.json"
        write(record, json.loads(record.read_text()) | {"git": None, "versions": {"torch": f"2.1{seed}"}})
    assert "same code: they differ in torch (2.10, 2.11)." in write_report(tmp_path).read_text()


def test_a_seed_counts_once(tmp_path):
    for name in ("a", "copy"):
        make_run(tmp_path / name, 0, fd={1.0: 2.0})
    make_run(tmp_path / "a.old-20250101T000000", 0, fd={1.0: 9.0})
    table = tabulate(load(tmp_path))
    assert [(arm.seeds, arm.cells["fd_digits"].half) for arm in table.arms] == [(1, None)]
    assert "1 of the runs repeat a seed of the same arm; each seed is counted once." in table.notes


def test_evaluation_seeds_are_averaged_within_a_run(tmp_path):
    """Samples drawn again from one run are no new run: they make its value, not the interval over runs."""
    values = {0: [2.0, 4.0, 6.0], 1: [1.0, 3.0, 5.0]}
    for seed, fds in values.items():
        run = make_run(tmp_path / str(seed), seed)
        for draw, fd in enumerate(fds):
            file = run / f"evaluations/{draw}/evaluation.json"
            evaluation(file.parent, 1.0, fd, 1000, "Cosine", "unet_digits")
            found = json.loads(file.read_text())
            write(file, found | {"protocol": found["protocol"] | {"seed": draw}})
    (arm,) = tabulate(load(tmp_path)).arms
    assert (arm.seeds, arm.draws, arm.seeds_text) == (2, 3, "2 × 3 evaluations")
    assert arm.cells["fd_digits"].values == [4.0, 3.0]
    (alone,) = tabulate(load(tmp_path / "0")).arms
    assert alone.cells["fd_digits"].values == [2.0, 4.0, 6.0]
    assert alone.cells["held_out_loss"].values == [pytest.approx(0.4)]


def test_one_run(tmp_path):
    make_run(tmp_path / "run", fd={1.0: 2.0})
    page = write_report(tmp_path / "run").read_text()
    assert (tmp_path / "run" / "report.csv").is_file()
    for words in ("One run, done, 2000 of 2000", "one seed: no interval", "Confusion", "Progress of the sample grid"):
        assert words in page
    assert page.count("<svg") == 4
    assert page.count("data:image/png;base64,") == 5
    assert "denoiselab train schedule=cosine seed=0" in page


def test_hostile_strings_are_text(tmp_path):
    folder = tmp_path / "<script>alert(0)<"
    make_run(folder / "a", 0, "Cosine", {1.0: 2.0}, text=HOSTILE)
    make_run(folder / "<b onclick=x>", 1, f"Lin{HOSTILE}", {1.0: 2.5}, text=HOSTILE)
    make_run(folder / "c", 2, state="failed", error=HOSTILE + "\ud800", steps=500)
    write(folder / "c" / "status.json", {"state": HOSTILE, "step": HOSTILE, "max_steps": [], "error": {"a": HOSTILE}})
    page = write_report(folder).read_text()
    assert not re.search(r"<script|<img src=http|<b onclick", page)
    assert "&lt;script&gt;" in page
    assert not Tags(page).active
    assert "<script" not in (folder / "report.md").read_text()


@pytest.mark.parametrize("runs", [sweep, lambda folder: make_run(folder, fd={1.0: 2.0})])
def test_nothing_is_fetched(tmp_path, runs):
    page = write_report(runs(tmp_path)).read_text()
    assert not Tags(page).active
    assert not re.search(r"https?://", page)


ACTIVE = ["<script>", '<img src="https://a.example/x">', "<a onclick=x>", "<p style='background: url(//a)'>"]


@pytest.mark.parametrize("page", [*ACTIVE, "<style>a{b:url(http://c)}</style>"])
def test_the_check_sees_what_is_fetched(page):
    assert Tags(page).active
    assert not Tags("<p style='clip-path: url(#p1)'>&lt;script&gt;").active


def test_partial_and_torn_runs(tmp_path):
    write(tmp_path / "bare" / "identity.json", {"seed": 0})
    write(tmp_path / "empty" / "identity.json", "")
    write(tmp_path / "torn" / "identity.json", '{"seed": 0, "data"')
    running = make_run(tmp_path / "running", 1, state="running", steps=500)
    with (running / "metrics.jsonl").open("a") as file:
        file.write(
            '3\n{"step": null}\n{"step": 600, "val/loss": NaN, "buckets/val/x_0": "no", "train/loss": 1e-320}\n{"s'
        )
    write(running / "pictures" / "sample_grid_00000500.png", "not a picture")
    write(
        running / "evaluations" / "x" / "evaluation.json", {"protocol": {"step": "?"}, "records": [1, {"value": "?"}]}
    )
    write(running / "evaluations" / "y" / "evaluation.json", "[]")
    page = write_report(tmp_path).read_text()
    assert "4 runs" in page
    assert "torn/identity.json: not a JSON object; left out" in page
    assert "identity.json: is empty" in page


def test_runs_three_levels_down(tmp_path):
    make_run(tmp_path / "a" / "b" / "c")
    make_run(tmp_path / "a" / "b" / "d" / "e")
    assert [path.name for path in find(tmp_path)] == ["c"]


@pytest.mark.parametrize(
    "make", [lambda folder: None, lambda folder: folder.mkdir(), lambda folder: folder.write_text("")]
)
def test_no_run_is_one_line(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match="no run here") as error:
        write_report(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_unwritable_output_is_one_line(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "there.html").mkdir()
    for output in (tmp_path / "there.html", tmp_path / "x.csv", tmp_path / "run" / "config.yaml" / "x.html"):
        with pytest.raises(UserError) as error:
            write_report(tmp_path / "run", output)
        assert "\n" not in str(error.value)


def test_what_differs():
    a = {"lr": 1, "part": {"_target_": "m.A", "x": 1, "y": 2}, "seed": 0}
    assert axes([a, {**a, "part": {"_target_": "m.A", "x": 1.0, "y": 3}}]) == {"part.y": ["2", "3"]}
    three = [a, {**a, "part": {"_target_": "m.B"}}, {**a, "part": {"_target_": "m.A", "x": 4, "y": 2}}]
    assert axes(three) == {"part": ["A x=1", "B", "A x=4"]}
    assert axes([a, {**a, "max_steps": 5}]) == {"max_steps": ["–", "5"]}
    assert axes([]) == {}


def test_torch_is_not_imported():
    code = "import sys, denoiselab.report; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
