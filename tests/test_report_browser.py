"""Pages in a browser: silent, without the network, everything shown, no wider than the window, reachable by keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from browser import BROWSER, MISSING, SUMMARIES, Tab, browser
from denoiselab.preference import Pictures, order, write_sheet
from denoiselab.report import write_report
from test_report import HOSTILE, make_run, sweep, write
from test_report_compute import sampled
from test_report_looks import look

pytestmark = pytest.mark.skipif(BROWSER is None, reason=MISSING)

WIDTHS, SCHEMES = (1280, 400), {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study that has every section: a question with a claim, arms, compute, importance, curves, pictures,
    findings, something that failed, and long names."""
    folder = sweep(tmp_path_factory.mktemp("study") / "a-study-with-a-rather-long-name-that-does-not-fit-a-telephone")
    claim = {"metric": "fd_digits", "better": {"schedule": "cosine"}, "than": {"schedule": "linear"}}
    node = {"question": "Which schedule is better?", "axes": {"schedule": ["cosine", "linear"], "seed": [0, 1, 2]}}
    node |= {"metrics": ["fd_digits"], "budget": None, "claims": [claim]}
    for i, run in enumerate(sorted(path.parent for path in folder.glob("*/identity.json"))):
        write(run / "config.yaml", f"study: {json.dumps(node)}\nname: schedules\n" + "long_option_name: 1\n" * 50)
        look(run, "mode_map", 1000, seed=i, alarms=(f"mode {i} is missing: {'a/very/long/path' * 8}",))
        if i < 6:
            for steps in (4, 16):
                sampled(run, steps, 8 / steps + 0.01 * i + (i > 2))
    return write_report(folder)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_of_a_study(tab: Tab, study: Path, width: int, scheme: str):
    seen = tab.look(study.as_uri(), width, scheme)
    assert seen.faults() == []
    assert seen.background == SCHEMES[scheme]
    page = study.read_text()
    assert len(seen.pictures) == page.count("<img") + page.count("<svg") > 20


def test_the_page_of_one_run(tab: Tab, tmp_path: Path):
    page = write_report(make_run(tmp_path / "run", fd={1.0: 2.0}))
    for width in WIDTHS:
        assert tab.look(page.as_uri(), width).faults() == []


def test_a_page_of_hostile_names(tab: Tab, tmp_path: Path):
    make_run(tmp_path / "a", 0, "Cosine", {1.0: 2.0}, text=HOSTILE)
    make_run(tmp_path / "b", 1, f"Lin{HOSTILE}", {1.0: 2.5}, state="failed", error="x" * 500, text=HOSTILE)
    for width in WIDTHS:
        assert tab.look(write_report(tmp_path).as_uri(), width).faults() == []


def test_details_are_reached_and_opened_by_keys(tab: Tab, study: Path):
    tab.look(study.as_uri(), 1280)
    inner = "[...document.querySelectorAll('details details summary')].length"
    outer = tab.value(SUMMARIES) - tab.value(inner)
    assert outer >= 8  # what measurements depend on, and the runs
    assert len(tab.reached(2 * outer)) == outer
    tab.value("document.querySelector('summary').focus()")
    opened = "document.querySelector('details').open"
    assert tab.value(opened) is False
    tab.press("Enter", 13)
    assert tab.value(opened) is True


BEGIN = "document.getElementById('rater').value = 'r1', document.querySelector('#start button').click()"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_sheet_of_a_preference_study(tab: Tab, tmp_path: Path, width: int):
    """Before a rater has given a name no picture is shown, and then two at a time, chosen by keys as well."""
    wide = [Image.new("L", (512, 512), grey) for grey in range(1, 7)]
    shown = Pictures(a=wide[:2], b=wide[2:4], real=wide[4:5], noise=wide[5:])
    write_sheet(tmp_path / "sheet.html", tmp_path / "key.json", shown, order(2, 1, 1, 3), "Which is better?", {})
    url = (tmp_path / "sheet.html").as_uri()
    before = tab.look(url, width)
    assert [*before.messages, *before.requests] == []
    assert before.scrolled <= width
    assert all(shown == 0 for _, _, shown in before.pictures)
    seen = tab.look(url, width, then=BEGIN)
    assert seen.faults() == []
    assert [name for name, *_ in seen.pictures] == ["left", "right"]


BROKEN = {
    "console.error: ['it broke']": "<script>console.error('it broke')</script>",
    "console.warning: ['beware']": "<script>console.warn('beware')</script>",
    "exception: Uncaught": "<script>throw new Error('it broke')</script>",
    "request: http://127.0.0.1:9/a.png": "<img alt='far' src='http://127.0.0.1:9/a.png'>",
    "request: file:///nowhere/style.css": "<link rel=stylesheet href='file:///nowhere/style.css'>",
    "no picture: torn": "<img alt='torn' src='data:image/png;base64,AAAA'>",
    "not shown: hidden": "<svg aria-label='hidden' viewBox='0 0 9 9' style='display: none'></svg>",
    "pixels wide in a window of 400: DIV.": "<div style='width: 3000px'>wide</div>",
}


def test_a_page_with_faults_fails_every_check(tab: Tab, tmp_path: Path):
    """What the other tests look for is found where it is."""
    page = tmp_path / "broken.html"
    for fault, html in BROKEN.items():
        page.write_text(f"<!DOCTYPE html><body>{html}</body>")
        assert any(fault in found for found in tab.look(page.as_uri(), 400).faults()), fault
    page.write_text("<!DOCTYPE html><body>nothing</body>")
    assert tab.look(page.as_uri(), 400).faults() == []


def test_the_page_allows_no_script_and_no_request(tab: Tab, study: Path, tmp_path: Path):
    """Its own policy stops what somebody adds to it; the browser says so."""
    page = tmp_path / "page.html"
    added = "<script>document.title = 'ran'</script><img alt='far' src='http://127.0.0.1:9/a.png'>"
    page.write_text(study.read_text().replace("<h1>", f"{added}<h1>", 1))
    seen = tab.look(page.as_uri(), 1280)
    assert tab.value("document.title") != "ran"
    assert sum("Content Security Policy" in message for message in seen.messages) >= 2
