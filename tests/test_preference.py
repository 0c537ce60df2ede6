"""Preference studies: simulated raters, what a sheet gives away, and files that raters may send back."""

from __future__ import annotations

import html
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from denoiselab.errors import UserError
from denoiselab.preference import (
    Answers,
    Pictures,
    clopper_pearson,
    fleiss_kappa,
    order,
    over_pairs,
    read_answers,
    read_key,
    score,
    write_sheet,
)
from denoiselab.preference.answers import COLUMNS, Key, find_answers


def pictures(n: int, checks: int) -> Pictures:
    """Pictures in one grey each."""
    greys = iter(range(1, 250))
    return Pictures(*([Image.new("L", (8, 8), next(greys)) for _ in range(k)] for k in (n, n, checks, checks)))


def made(folder: Path, n: int = 6, repeats: int = 2, checks: int = 2, question: str = "Which?") -> Key:
    facts = {"a": {"run": "hidden_a"}, "b": {"run": "hidden_b"}, "seed": 3}
    trials = order(n, repeats, checks, 3)
    write_sheet(folder / "sheet.html", folder / "key.json", pictures(n, checks), trials, question, facts)
    return read_key(folder / "key.json")


def rater(key: Key, name: str, preference: Any, chance: random.Random, attentive: bool = True) -> Answers:
    """Prefers b with a probability, of each pair its own or one for all; sees noise where it is attentive."""
    choices = []
    for trial in key.trials:
        if trial.kind == "check" and attentive:
            wanted = "real"
        elif trial.kind == "check":
            wanted = chance.choice(["real", "noise"])
        else:
            p = preference[trial.item] if hasattr(preference, "__len__") else preference
            wanted = "b" if chance.random() < p else "a"
        choices.append("left" if trial.left == wanted else "right")
    return Answers(name, choices)


def write(path: Path, key: Key, answers: Answers, **other: str) -> Path:
    rows = [
        [other.get("sheet", key.sheet), answers.rater, str(k), choice, "812"]
        for k, choice in enumerate(answers.choices, 1)
    ]
    path.write_text("\n".join(",".join(row) for row in [COLUMNS, *rows]) + "\n")
    return path


# The sheet


@pytest.mark.parametrize("n", [50, 7])
def test_sides_and_order_are_random_and_even(n: int):
    trials = order(n, 5, 4, seed=1)
    assert len(trials) == n + 9
    assert trials == order(n, 5, 4, seed=1)
    assert trials != order(n, 5, 4, seed=2)
    pairs = {trial.item: trial for trial in trials if trial.kind == "pair"}
    assert sorted(pairs) == [*range(n)]
    at_left = sum(trial.left == "a" for trial in pairs.values())
    assert abs(2 * at_left - n) <= 1
    again = [trial for trial in trials if trial.kind == "repeat"]
    assert len({trial.item for trial in again}) == 5
    assert all((trial.left, trial.right) == (pairs[trial.item].right, pairs[trial.item].left) for trial in again)
    checks = [trial for trial in trials if trial.kind == "check"]
    assert sum(trial.left == "real" for trial in checks) == 2


def test_the_page_is_alone_and_gives_nothing_away(tmp_path: Path):
    question = 'Is <b>this</b> "real"?'
    key = made(tmp_path, question=question)
    page = (tmp_path / "sheet.html").read_text()
    assert not re.search(r"https?://|<link|@import|src=[\"'](?!data:)", page)
    assert html.escape(question, quote=True).replace("&quot;", "&#34;") in page
    for word in ("hidden_a", "hidden_b", 'repeat"', '"check', "noise", "key.json"):
        assert word not in page
    shown = json.loads(re.findall(r"trials = (\[\[.*?\]\]);", page, re.S)[0])
    assert len(shown) == len(key.trials) == 10
    assert all(url.startswith("data:image/png;base64,") for pair in shown for url in pair)
    by_item = {trial.item: pair for trial, pair in zip(key.trials, shown, strict=True) if trial.kind == "pair"}
    for trial, pair in zip(key.trials, shown, strict=True):
        if trial.kind == "repeat":
            assert pair == by_item[trial.item][::-1]
    assert "default-src 'none'" in page  # no browser would fetch anything


# Scoring


def test_simulated_raters_recover_a_known_preference():
    """Independent answers: the exact interval covers in at least 93 % of 400 studies of one rater, and also p = 1/2."""
    trials = order(60, 4, 4, seed=0)
    key, chance = Key("x", trials, {}), random.Random(0)
    for p in (0.5, 0.7, 0.95):
        covered = 0
        for _ in range(400):
            found = score(key, [rater(key, "one", p, chance)])["prefer_b"]
            assert found["n"] == 60
            covered += found["interval"][0] <= p <= found["interval"][1]
        assert covered / 400 >= 0.93


def test_raters_who_agree_on_pairs_need_the_interval_over_pairs():
    """Each pair has a preference of its own, Beta(1.4, 0.6): ten raters of forty pairs are not 400 answers."""
    trials = order(40, 0, 0, seed=0)
    key, chance, noise = Key("x", trials, {}), random.Random(1), np.random.default_rng(1)
    covered, naive, studies = 0, 0, 300
    for _ in range(studies):
        own = noise.beta(1.4, 0.6, 40)
        found = score(key, [rater(key, str(k), own, chance) for k in range(10)])
        both = found["prefer_b"]
        covered += both["interval_over_pairs"][0] <= 0.7 <= both["interval_over_pairs"][1]
        naive += both["interval"][0] <= 0.7 <= both["interval"][1]
        assert found["agreement"]["fleiss_kappa"] > 0
    assert covered / studies >= 0.93
    assert naive / studies < 0.8


def test_the_interval_is_the_exact_one():
    for wins, n in ((0, 10), (1, 7), (30, 50), (50, 50)):
        reference = scipy.stats.binomtest(wins, n).proportion_ci(0.95, "exact")
        assert clopper_pearson(wins, n) == pytest.approx([reference.low, reference.high], abs=1e-12)
    assert over_pairs(np.ones((1, 3), bool)) is None
    alike = over_pairs(np.ones((12, 5), bool))
    assert alike == clopper_pearson(12, 12)  # twelve pairs, not sixty answers


def test_kappa_is_fleiss():
    """The worked example of fourteen raters, ten subjects, five categories: 0.210."""
    counts = [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    assert fleiss_kappa(np.array(counts)) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1
    assert fleiss_kappa(np.array([[2, 0], [2, 0]])) is None
    assert fleiss_kappa(np.array([[1, 1], [1, 1]])) == -1


def test_inattentive_raters_are_left_out_and_repeats_are_counted():
    key = Key("x", order(40, 10, 10, seed=5), {})
    chance = random.Random(3)
    careful = [rater(key, f"careful{i}", 1.0, chance) for i in range(3)]
    asleep = Answers("asleep", ["left"] * len(key.trials))
    found = score(key, [*careful, asleep])
    assert [*found["excluded"]] == ["asleep"]
    assert "passed 5 of 10 checks; need 90%" in found["excluded"]["asleep"]
    assert found["prefer_b"]["share"] == 1
    assert found["prefer_b"]["n"] == 120
    assert found["raters"]["asleep"]["repeats_alike"] == 0  # the sides are swapped
    assert found["raters"]["asleep"]["left_share"] == 1
    assert found["raters"]["careful0"]["repeats_alike"] == 10
    assert found["agreement"]["fleiss_kappa"] is None
    assert score(key, [*careful, asleep], attention=0.5)["excluded"] == {}
    with pytest.raises(ValueError, match=r"attention=0\.9: no rater passed"):
        score(key, [asleep])
    with pytest.raises(ValueError, match="rater asleep answered twice"):
        score(key, [asleep, asleep])
    json.dumps(found, allow_nan=False)


# Files


def test_answers_are_read_as_the_page_wrote_them(tmp_path: Path):
    key = made(tmp_path)
    answers = rater(key, "r-1", 0.5, random.Random(0))
    path = write(tmp_path / "a.csv", key, answers)
    assert read_answers(path, key) == answers
    lines = path.read_text().splitlines()
    path.write_bytes(
        ("\ufeff" + "\r\n".join([lines[0], *lines[:0:-1]]) + "\r\n\r\n").encode()
    )  # by way of a spreadsheet
    assert read_answers(path, key) == answers
    write(tmp_path / "b.csv", key, answers)
    assert [file.name for file in find_answers(str(tmp_path))] == ["a.csv", "b.csv"]


HOSTILE = {
    "": "is no table",
    "a,b\n1,2\n": "its first line is not sheet,rater",
    "{head}\n": "0 of 10 trials are answered; need all",
    "{head}\n{sheet},r,1,left\n": "line 2: 4 columns; need 5",
    "{head}\nother,r,1,left,5\n": "of the sheet 'other'; the key is of",
    "{head}\n{sheet},=cmd(),1,left,5\n": "rater='=cmd\\(\\)': need 1 to 40 letters",
    "{head}\n{sheet},r,11,left,5\n": "trial='11': need a number from 1 to 10",
    "{head}\n{sheet},r,٣,left,5\n": "trial='٣': need a number",
    "{head}\n{sheet},r,1,both,5\n": "choice='both': need left or right",
    "{head}\n{sheet},r,1,left,5\n{sheet},r,1,right,5\n": "line 3: trial 1 is answered twice",
    "\x00" * 50: "is no table|its first line",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_bad_file_is_one_line(text: str, tmp_path: Path):
    key = made(tmp_path)
    path = tmp_path / "bad.csv"
    path.write_text(text.format(head=",".join(COLUMNS), sheet=key.sheet))
    with pytest.raises(UserError, match=HOSTILE[text]) as error:
        read_answers(path, key)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_what_they_should_be(tmp_path: Path):
    key = made(tmp_path)
    both = write(tmp_path / "both.csv", key, rater(key, "x", 0.5, random.Random(0)))
    both.write_text(both.read_text().replace(",x,1,", ",y,1,"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.csv").write_bytes(b" " * 1_000_001)
    for name, text in (("both", "of 2 raters"), ("binary", "is no text"), ("large", "1,000,000 is the most")):
        with pytest.raises(UserError, match=text):
            read_answers(tmp_path / f"{name}.csv", key)
    (tmp_path / "empty").mkdir()
    for given, text in ((None, "answers=null: need the CSV"), (str(tmp_path / "empty"), "no CSV file")):
        with pytest.raises(UserError, match=text):
            find_answers(given)
    for content in (
        "",
        "[]",
        '{"sheet": 1, "trials": []}',
        '{"sheet": "x", "trials": [{"kind": "pair"}]}',
        "[" * 10_000,
    ):
        (tmp_path / "no_key.json").write_text(content)
        with pytest.raises(UserError, match=r"no_key\.json: is no key of a sheet"):
            read_key(tmp_path / "no_key.json")


# The command


def folder_of(path: Path, grey: int, n: int = 4, size: int = 8) -> Path:
    path.mkdir()
    for i in range(n):
        Image.new("RGB", (size, size), (grey + i,) * 3).save(path / f"{i}.png")
    return path


def test_from_two_runs_to_a_score(example_run: Path, called, tmp_path: Path):
    small = ["n=4", "repeats=1", "checks=2", "sampler.steps=1"]
    result = called("preference", f"a={example_run}", f"b={example_run}", "weights=raw", *small)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "preference.html\n"
    key = read_key(tmp_path / "preference.key.json")
    assert key.facts["a"]["run"] == str(example_run)
    assert key.facts["a"]["sampler"]["steps"] == 1
    again = called("preference", f"a={example_run}", f"b={example_run}", *small)
    assert again.returncode == 2
    assert "sheet=preference.html: exists" in again.stderr
    chance = random.Random(0)
    for name in ("x", "y"):
        write(tmp_path / f"{name}.csv", key, rater(key, name, 1.0, chance))
    result = called("preference", "part=score", "answers=[x.csv,y.csv]")
    assert result.returncode == 0, result.stderr
    assert "b is preferred in 100.0% of 8 answers by 2 of 2 raters" in result.stderr
    found = json.loads((tmp_path / "preference.key.score.json").read_text())
    assert found["prefer_b"]["interval_over_pairs"] == pytest.approx(clopper_pearson(4, 4))
    assert found["b"]["run"] == str(example_run)


def test_from_two_folders(called, tmp_path: Path):
    a, b, real = (folder_of(tmp_path / name, grey) for name, grey in (("a", 10), ("b", 100), ("real", 200)))
    result = called("preference", f"a={a}", f"b={b}", "n=4", "repeats=0", "checks=3", f"real={real}")
    assert result.returncode == 0, result.stderr
    assert len(read_key(tmp_path / "preference.key.json").trials) == 7
    np.save(folder_of(tmp_path / "c", 0, 0) / "samples.npy", np.zeros((4, 1, 8, 8), np.float32))
    more = ["sheet=2.html", "key=2.json"]
    assert called("preference", f"a={a}", "b=c", "n=4", "repeats=0", "checks=0", *more).returncode == 0


MISTAKES = {
    ("a=a", "b=b", "n=5", "repeats=0"): "a=a: 4 pictures; need 5",
    ("a=a", "b=b", "n=4"): "repeats=10: need a number from 0 to 4",
    ("a=a", "b=b", "n=4", "repeats=0"): "real=null: neither a nor b is a run",
    ("a=a", "b=large", "n=4", "repeats=0", "checks=0"): "8 x 8 pixels beside one of 9 x 9",
    ("a=a", "n=4", "repeats=0"): "b=null: need a run",
    ("part=both",): "part=both: need one of make, score",
    ("-m",): "-m: preference compares two",
    ("part=score",): "key=preference.key.json: no such file",
    ("part=score", "attention=2"): "attention=2: need a share",
    ("a=bad", "b=b", "n=1", "repeats=0"): "bad.png",
    ("a=nowhere", "b=b"): "nowhere: no such run directory",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_writes_nothing(arguments: tuple[str, ...], called, tmp_path: Path):
    for name, grey, size in (("a", 10, 8), ("b", 100, 8), ("large", 50, 9)):
        folder_of(tmp_path / name, grey, size=size)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"no picture")
    result = called("preference", *arguments)
    assert result.returncode == 2, result.stderr
    assert MISTAKES[arguments] in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "bad", "large"]


def test_points_are_no_pictures(healthy: list[Path], called):
    result = called("preference", f"a={healthy[0]}", f"b={healthy[1]}", "n=2", "repeats=0")
    assert result.returncode == 2
    assert "its samples, of shape (2,), are no pictures" in result.stderr
