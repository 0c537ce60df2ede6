"""Quality against compute: which arms are one line, what they cost, and what is not drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from denoiselab.report import write_report
from denoiselab.report.arms import Table, tabulate
from denoiselab.report.compute import Chart, Compute, band_of, of_sampling, of_training
from denoiselab.report.figures import MARKERS, short
from test_report import evaluation, load, make_run, write


def changed(path: Path, **parts: Any) -> None:
    """A JSON file with some of its values replaced, those of inner objects one by one."""
    found = json.loads(path.read_text())
    for name, value in parts.items():
        found[name] = {**found[name], **value} if isinstance(value, dict) and name in found else value
    write(path, found)


def sampled(run: Path, steps: int, value: float, sampler: str = "DDIM", scale: float = 1.0, **protocol: Any) -> None:
    """An evaluation of a run: so many steps, each one call, or of Heun's 2 N - 1 in all."""
    name = "-".join(map(str, (sampler, steps, scale, *protocol.values())))
    evaluation(run / "evaluations" / name, scale, value, 1000, "Cosine", "unet_digits")
    part = {"_target_": f"denoiselab.sampler.{sampler}", "steps": steps}
    calls = 2 * steps - 1 if sampler == "Heun" else steps
    file = run / "evaluations" / name / "evaluation.json"
    changed(file, protocol={"sampler": part, "nfe": float(calls), "trained_along": "Cosine:ab12", **protocol})


def trained(
    run: Path, batch: int = 128, parameters: int = 1000, step: int = 2000, rate: float = 40.0, **record: Any
) -> None:
    """Sets what a run's training cost."""
    changed(run / "identity.json", data={"batch_size": batch}, model={"channels": parameters // 10})
    changed(run / "record.json", parameters=parameters, **record)
    write(run / "metrics.jsonl", json.dumps({"step": step, "speed/steps_per_second": rate}) + "\n")
    for file in run.glob("evaluations/*/evaluation.json"):
        changed(file, protocol={"step": step})


def table_of(folder: Path) -> Table:
    return tabulate(load(folder))


def chart(found: Compute, metric: str = "fd_digits", x: str | None = None) -> Chart:
    (one,) = [c for c in found.charts if c.metric == metric and x in (None, c.x)]
    return one


def points(found: Chart) -> dict[str, list[tuple[float, float]]]:
    return {line.label: [(point.x, pytest.approx(point.mean)) for point in line.points] for line in found.lines}


def solvers(folder: Path) -> Path:
    """One training, three seeds, two samplers at three budgets each."""
    for seed in range(3):
        run = make_run(folder / f"s{seed}", seed)
        for steps in (4, 8, 16):
            sampled(run, steps, 8 / steps + 0.1 * seed)
            sampled(run, steps, 4 / steps + 0.1 * seed, "Heun")
    return folder


def test_a_line_is_a_sampler_over_its_calls(tmp_path: Path):
    found = of_sampling(table_of(solvers(tmp_path)))
    one = chart(found)
    assert one.x == "network calls per sample"
    assert points(one) == {
        "DDIM": [(4, 2.1), (8, 1.1), (16, 0.6)],
        "Heun": [(7, 1.1), (15, 0.6), (31, 0.35)],
    }
    half = 4.302653 * 0.1 / 3**0.5  # Student's t at 2 degrees of freedom; the standard deviation is 0.1
    assert [point.half for point in one.lines[0].points] == pytest.approx([half] * 3)
    assert one.band == (pytest.approx(0.8), pytest.approx(1.0), "floor")
    assert {c.metric for c in found.charts} == {"fd_digits", "class_accuracy"}  # the held-out loss needs no samples
    page = write_report(tmp_path).read_text()
    assert "Quality against compute" in page
    assert page.count('aria-label="a measurement over network calls per sample"') == 2
    assert "fd_digits: floor" in page


def test_trainings_and_guidance_are_lines_of_their_own(tmp_path: Path):
    for schedule in ("Cosine", "Linear"):
        run = make_run(tmp_path / schedule, 0, schedule)
        for scale in (1.0, 3.0):
            for steps in (4, 16):
                sampled(run, steps, 8 / steps, scale=scale)
    found = of_sampling(table_of(tmp_path))
    assert {line.label: len(line.points) for line in chart(found).lines} == {
        f"schedule {schedule}, guidance.scale {scale}": 2 for schedule in ("Cosine", "Linear") for scale in (1, 3)
    }
    assert found.notes == ["A guided call computes two rows of the network, and is counted once."]


def test_other_protocols_have_panels_of_their_own(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for n in (200, 1000):
        for steps in (4, 16):
            sampled(run, steps, 1000 / n + 1 / steps, n=n)
    found = [c for c in of_sampling(table_of(tmp_path)).charts if c.metric == "fd_digits"]
    assert [c.only for c in found] == ["n 200", "n 1000"]
    assert all(len(c.lines) == 1 and len(c.lines[0].points) == 2 for c in found)


def test_what_cannot_be_ranked_is_not_drawn(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for steps in (4, 16):
        sampled(run, steps, 1 / steps)
    for file in run.glob("evaluations/*/evaluation.json"):
        content = json.loads(file.read_text())
        content["records"][0]["protocol"]["dimensions"] = 2048
        content["records"][1]["better"] = "none"
        write(file, content)
    found = of_sampling(table_of(tmp_path))
    assert found.charts == []
    (note,) = found.notes
    assert "2 of 2 arms are not drawn: the covariance of n = 1000 samples in 2048 dimensions is singular" in note


def test_nothing_that_does_not_vary_is_drawn(tmp_path: Path):
    for seed in range(2):
        for schedule in ("Cosine", "Linear"):
            make_run(tmp_path / f"{schedule}{seed}", seed, schedule, {1.0: 2.0 + seed})
    table = table_of(tmp_path)
    assert of_sampling(table).charts == of_training(table).charts == []
    assert "Quality against compute" not in write_report(tmp_path).read_text()


def test_samples_seen_are_steps_times_batch(tmp_path: Path):
    """Runs that were measured at two steps, with two batch sizes: a line per schedule and none per batch."""
    for schedule in ("Cosine", "Linear"):
        for batch in (64, 128):
            for step in (500, 1000):
                run = make_run(tmp_path / f"{schedule}{batch}-{step}", 0, schedule, {1.0: 1e5 / step / batch})
                trained(run, batch, step=step)
    found = of_training(table_of(tmp_path))
    one = chart(found, x="training samples seen")
    line = [(32_000, 3.125), (64_000, 1.5625), (64_000, 1.5625), (128_000, 0.78125)]
    assert points(one) == {"schedule Cosine": line, "schedule Linear": line}
    assert {c.x for c in found.charts if c.metric == "fd_digits"} == {"training samples seen", "seconds of training"}


def sizes(folder: Path, **record: Any) -> Path:
    for seed in range(2):
        for parameters in (1000, 4000, 16_000):
            run = make_run(folder / f"{parameters}-{seed}", seed, fd={1.0: 1e4 / parameters + 0.1 * seed})
            adds = {name: value * parameters for name, value in record.items()}
            trained(run, parameters=parameters, rate=1e5 / parameters, **adds)
    return folder


def test_sizes_are_one_line_over_parameters_and_seconds(tmp_path: Path):
    found = of_training(table_of(sizes(tmp_path)))
    assert points(chart(found, x="parameters")) == {"all arms": [(1000, 10.05), (4000, 2.55), (16_000, 0.675)]}
    assert points(chart(found, x="seconds of training")) == {"all arms": [(20, 10.05), (80, 2.55), (320, 0.675)]}
    assert "training samples seen" not in {c.x for c in found.charts}  # the same for all
    (note,) = found.notes
    assert "multiply-adds are not recorded" in note


def test_flops_where_they_are_recorded(tmp_path: Path):
    """2 operations per multiply-add, 3 passes' worth of them per sample: 6 x 0.5 P x 2000 steps x 128 samples."""
    found = of_training(table_of(sizes(tmp_path, multiply_adds=0.5)))
    xs = [x for x, _ in points(chart(found, x="training FLOPs"))["all arms"]]
    assert xs == pytest.approx([6 * 0.5 * p * 2000 * 128 for p in (1000, 4000, 16_000)])
    assert not found.notes


def test_seconds_of_other_machines_are_not_compared(tmp_path: Path):
    for path in sizes(tmp_path).glob("1000-*/record.json"):
        changed(path, hardware="a GPU")
    assert {c.x for c in of_training(table_of(tmp_path)).charts} == {"parameters"}


def test_a_machine_that_did_other_work_is_not_timed(tmp_path: Path):
    """Seeds of an arm differ by a factor of 4, arms by one of 16: log 4 / log 16 is a half."""
    for file in sizes(tmp_path).glob("*-1/metrics.jsonl"):
        row = json.loads(file.read_text())
        write(file, json.dumps({**row, "speed/steps_per_second": row["speed/steps_per_second"] / 4}) + "\n")
    found = of_training(table_of(tmp_path))
    assert {c.x for c in found.charts} == {"parameters"}
    assert any("seeds of one arm differ too much" in note for note in found.notes)


def test_what_is_the_same_everywhere_is_said_and_not_drawn(tmp_path: Path):
    for parameters in (1000, 4000):
        run = make_run(tmp_path / str(parameters), fd={1.0: 2.0})
        trained(run, parameters=parameters)
    found = of_training(table_of(tmp_path))
    assert found.charts == []
    assert "fd_digits: 2.000 in all arms, and not drawn." in found.notes


def test_a_length_that_the_learning_rate_follows_is_no_other_arm(tmp_path: Path):
    for step in (1000, 2000):
        run = make_run(tmp_path / str(step), 0, fd={1.0: 1000 / step})
        trained(run, step=step)
        changed(run / "identity.json", lr_schedule={"_target_": "denoiselab.lr_schedule.Cosine", "steps": step})
    found = of_training(table_of(tmp_path))
    assert points(chart(found, x="training samples seen")) == {"all arms": [(128_000, 1.0), (256_000, 0.5)]}


@pytest.mark.parametrize(
    ("controls", "band"),
    [
        ({"null_mean": 1.0, "null_95": 1.5}, (0.5, 1.5, "null")),
        ({"null_mean": 1.0, "null_std": 0.25}, (0.5, 1.5, "null")),
        ({"floor": 1.0, "floor_std": 0.25}, (0.5, 1.5, "floor")),
        ({"held_out": 0.9}, (0.9, 0.9, "held out")),
        ({}, None),
    ],
)
def test_bands_are_what_controls_say(tmp_path: Path, controls: dict[str, float], band: Any):
    run = make_run(tmp_path / "run", fd={1.0: 2.0})
    file = run / "evaluations/1/evaluation.json"
    content = json.loads(file.read_text())
    content["records"][0]["controls"] = controls
    write(file, content)
    (arm,) = table_of(tmp_path).arms
    assert band_of([arm.cells["fd_digits"]]) == band


def test_ticks_say_what_there_is(tmp_path: Path):
    """A tick at each budget that was tried, and no other."""
    page = write_report(solvers(tmp_path)).read_text()
    svg = re.search(r'aria-label="a measurement over network calls per sample">(.*?)</svg>', page, re.DOTALL)
    assert svg
    ticks = set(re.findall(r"<!-- (\d+) -->|>(\d+)</text>", svg[1]))
    shown = {int(text) for pair in ticks for text in pair if text}
    assert {4, 31} <= shown
    assert shown & set(range(40)) <= {4, 7, 8, 15, 16, 31} | {0, 1, 2, 3}  # of the other axis
    assert [short(x) for x in (4, 38_400, 35_700_000, 2.5e15)] == ["4", "38.4k", "35.7M", "2.5e15"]
    assert len(set(MARKERS)) == 6


def test_many_lines_are_split_and_counted(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for scale in range(1, 15):
        for steps in (4, 16):
            sampled(run, steps, scale / steps, scale=float(scale))
    page = write_report(tmp_path).read_text()
    assert page.count('aria-label="a measurement over network calls per sample"') == 4  # 2 measurements, 2 x 6 lines
    assert "2 more lines are not drawn." in page
