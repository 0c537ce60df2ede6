"""What diagnostics found, on the page: the newest of each, in full width, and what looks wrong."""

from __future__ import annotations

from pathlib import Path

from denoiselab.report import write_report
from test_report import HOSTILE, Tags, make_run, picture, write


def look(run: Path, name: str, step: int, address: str = "ab12", seed: int = 0, alarms: tuple[str, ...] = ()) -> Path:
    folder = run / "diagnostics" / name / f"{step:08d}-{address}"
    records = [{"name": "closeness", "value": 0.125, "better": "lower", "controls": {"floor": 0.0625}}]
    write(folder / "finding.json", {"protocol": {"n": 8}, "records": records, "alarms": list(alarms), "table": {}})
    picture(folder / "picture.png", seed)
    return folder


def test_a_run_shows_the_newest_look_of_each_way(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for step in (500, 1000):
        look(run, "mode_map", step, seed=step)
    look(run, "mode_map", 1000, "cd34", seed=7)
    look(run, "other", 500)
    page = write_report(tmp_path).read_text()
    assert page.count('alt="Mode map:') == 2
    assert page.count('alt="Other:') == 1
    assert "step 1000; closeness 0.1250 (floor 0.06250)" in page
    assert "What looks wrong" not in page


def test_what_looks_wrong_stands_above_the_curves_with_its_run(tmp_path: Path):
    for seed in (0, 1):
        run = make_run(tmp_path / f"run{seed}", seed)
        look(run, "mode_map", 500, alarms=("an old fault",))
        look(run, "mode_map", 1000, alarms=(f"mode 3 is missing in seed {seed}",))
    page = write_report(tmp_path).read_text()
    assert "an old fault" not in page
    for seed in (0, 1):
        assert 0 < page.index(f"mode 3 is missing in seed {seed}") < page.index("Learning curves")
        assert f"mode_map, step 1000, run{seed}" in page
    assert page.count('alt="Mode map:') == 1  # one arm; the first seed's


def test_findings_are_not_trusted(tmp_path: Path):
    run = make_run(tmp_path / "run")
    look(run, "mode_map", 500, alarms=(HOSTILE,))
    for name, content in {
        "a": "[]",
        "b": '{"protocol": 1}',
        "c": {"protocol": {}, "records": [1, {"value": "x"}], "alarms": "no list"},
        "d": {"protocol": {}, "records": {"x": 1}, "alarms": [{"deep": [1]}]},
    }.items():
        write(run / "diagnostics" / name / "00000500-x" / "finding.json", content)
        write(run / "diagnostics" / name / "00000500-x" / "picture.png", "not a picture")
    write(run / "diagnostics" / "e" / "latest" / "finding.json", {"protocol": {}})
    page = write_report(tmp_path).read_text()
    assert not Tags(page).active
    assert "&lt;script&gt;" in page
    assert "00000500-x/finding.json: not a JSON object; left out" in page
