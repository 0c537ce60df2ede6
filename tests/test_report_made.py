"""The page's answers, the commands that make each row, and the table for a paper."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from denoiselab.compose import compose, sweep
from denoiselab.report import write_report
from denoiselab.report.arms import Cell, rank, tabulate
from denoiselab.report.latex import escaped, latex
from denoiselab.report.options import parsed
from denoiselab.report.reproduce import _written, recipes
from denoiselab.report.runs import Run, find, read
from denoiselab.report.words import notes
from studied import CLAIM, STUDY, arms, measured, planned, run, save
from test_report import HOSTILE, Tags, make_run

TINY = (
    *("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1"),
    *("metrics=none", "callbacks=none", "trainer.threads=1", "trainer.max_steps=2", "evaluation.n=2"),
)
HIGH, LOW = [3.0, 3.1, 2.9], [2.0, 2.2, 1.9]


def page_of(runs: list[Run], folder: Path) -> str:
    for one in runs:
        save(one, folder)
    return write_report(folder).read_text()


def test_the_question_and_its_answer_stand_above_everything(tmp_path):
    page = page_of(arms(HIGH, LOW), tmp_path)
    places = ["<h1>", "Is min-SNR better?", "Supported.", "fd_digits is better with", "<h2>Arms</h2>"]
    assert [page.index(words) for words in places] == sorted(page.index(words) for words in places)
    text = (tmp_path / "report.md").read_text()
    assert (
        text.index("## Is min-SNR better?") < text.index("- **supported**: fd_digits is better") < text.index("| 3 |")
    )
    frame = pd.read_csv(tmp_path / "report.csv").set_index("weighting")
    expected = stats.ttest_rel(LOW, HIGH)
    assert list(frame["reference"]) == [False, True]
    assert frame["fd_digits_difference"]["MinSNR"] == pytest.approx(-2.9 / 3)
    assert frame["fd_digits_difference_p_holm"]["MinSNR"] == pytest.approx(expected.pvalue)
    half = expected.confidence_interval().high + 2.9 / 3
    assert frame["fd_digits_difference_ci95"]["MinSNR"] == pytest.approx(half)
    assert frame["fd_digits_difference_seeds"]["MinSNR"] == 3
    assert pd.isna(frame["fd_digits_difference"]["Unit"])
    assert "Δ\N{NO-BREAK SPACE}-0.967\N{NO-BREAK SPACE}±" in page
    assert "Δ: mean difference from weighting Unit, paired" in page


def test_every_study_of_a_folder_has_a_block_and_one_without_claims_no_verdict(tmp_path):
    other = {**planned(0, 1, 2, claims=[]), "question": "What else?"}
    runs = arms(HIGH, LOW)
    for one in arms(HIGH, LOW, other, lr=2e-3):
        one.record["choices"]["study"] = "other"
        runs.append(one)
    page = page_of(runs, tmp_path)
    assert page.count('<section class="study">') == 2
    assert page.index("What else?") < page.index("makes no claim") < page.index("Is min-SNR better?")
    assert page.count('<span class="verdict') == 1
    make_run(tmp_path / "alone" / "run", fd={1.0: 2.0})
    assert '<section class="study">' not in write_report(tmp_path / "alone").read_text()


DEEP = "study: " + "[" * 50_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)  # 9^12 strings once it is written out


UNREADABLE = (
    "",
    "study: {",
    "study: 3",
    "study: [1]",
    DEEP,
    BOMB + "study: *a11",
    "study: 2020-01-01",
    "\0study: \ud800",
)
TAGGED = ("study: {? [a, b] : c}", "study: !!python/object/apply:os.getcwd []")


@pytest.mark.parametrize("text", [*UNREADABLE, *TAGGED])
def test_a_study_that_cannot_be_read_is_a_line(tmp_path, text):
    runs, started = arms(HIGH, LOW), time.monotonic()
    for one in runs:
        one.config = text.encode(errors="replace").decode()
    page = page_of(runs, tmp_path)
    assert "definition could not be read" in page
    assert time.monotonic() - started < 5


def test_a_hostile_study_is_text(tmp_path):
    options = {
        HOSTILE: [HOSTILE, None],
        "weighting": {"a": HOSTILE},
        "seed": [HOSTILE, [1], {"a": 2}],
        "target": HOSTILE,
    }
    claims = [
        HOSTILE,
        {"metric": HOSTILE, "better": {HOSTILE: HOSTILE}, "than": {HOSTILE: [HOSTILE]}},
        {"metric": "fd_digits", "better": {"weighting": HOSTILE}, "than": {"weighting": {"a": [HOSTILE]}}},
        {"metric": "fd_digits", "better": {"optimizer": HOSTILE}, "than": {"optimizer.lr": float("nan")}},
        {"metric": "fd_digits", "better": {"weighting": None}, "than": {"weighting": float("inf")}},
    ]
    study = {"question": {"a": HOSTILE * 100}, "axes": options, "claims": claims, "budget": HOSTILE, "metrics": HOSTILE}
    runs = arms(HIGH, LOW, study=study)
    runs[0].record["choices"] = HOSTILE
    runs[1].record |= {"overrides": [HOSTILE, 3], "versions": HOSTILE, "git": [HOSTILE], "command": "'" + HOSTILE}
    runs[2].evaluations[0].choices = {"sampler": [HOSTILE], "guidance": HOSTILE}
    page = page_of(runs, tmp_path)
    assert not Tags(page).active
    assert "&lt;script&gt;" in page
    assert "<script" not in (tmp_path / "report.md").read_text()
    for strange in (
        {},
        {"claims": {"a": 1}},
        {"axes": [1], "claims": 3},
        {"axes": {"seed": 3}, "claims": [CLAIM] * 500},
    ):
        page = page_of(arms(HIGH, LOW, study=strange or {"question": None}), tmp_path / str(len(str(strange))))
        assert "<h2>snr</h2>" in page


def test_anchors_are_not_read():
    assert parsed("study: &a {question: x}\nother: *a") == {}
    assert parsed("study: {question: x}") == {"study": {"question": "x"}}


def job(command: str) -> tuple[str, list[list[str]]]:
    """What a command of the page composes to: its application, and the options of each of its jobs."""
    program, app, *words = shlex.split(command)
    assert program == "denoiselab"
    several = words[0] == "-m"
    return app, (sweep(words[1:]) if several else [words])


def test_commands_make_the_same_runs_and_the_same_evaluations(train, called, tmp_path, monkeypatch):
    """Composed again they have the addresses of what they are beside."""
    monkeypatch.chdir(tmp_path)
    own = (*TINY, "output_dir=outputs", "name='its [a], name'", "weighting=min_snr")
    folders = [train(*own, "sampler.steps=1", f"seed={seed}", quick=()) for seed in (0, 1)]
    for folder in folders:
        ckpt = f"ckpt={_written(str(folder))}"
        asked = ("sampler=heun", "sampler.steps=2", "guidance=interval", "guidance.scale=1.5", "evaluation.n=2")
        assert called("evaluate", ckpt, *asked, "evaluation.seed=3", "device=cpu").returncode == 0
    table = tabulate([read(path, tmp_path) for path in find(tmp_path)])
    by_training, by_hand = (next(r for r in recipes(table) if len(r.commands) == n) for n in (1, 2))
    app, jobs = job(by_training.commands[0])
    assert (app, by_hand.commands[0]) == ("train", by_training.commands[0])
    from denoiselab.training import Job

    assert sorted(Job(compose(app, one)).folder.path.resolve() for one in jobs) == sorted(f.resolve() for f in folders)
    app, jobs = job(by_hand.commands[1])
    assert [compose(app, one).choices["guidance"] for one in jobs] == ["interval"] * 2
    again = called(*shlex.split(by_hand.commands[1])[1:], "device=cpu")
    assert (again.returncode, (again.stdout + again.stderr).count("measured before")) == (0, 2)
    assert sum(len(one.evaluations) for arm in table.arms for one, _ in arm.members) == 8  # and none was added
    assert len([*tmp_path.rglob("evaluation.json")]) == 4


def test_a_recipe_names_the_seeds_once_and_not_how_the_sweep_was_run():
    runs = arms(HIGH, LOW)
    for one in runs:
        one.record["overrides"] += [
            "launcher=local",
            "sweep.retry=true",
            "launcher.jobs=2",
            "lint.level=none",
            "rerun=true",
        ]
    found = recipes(tabulate(runs))
    assert [recipe.commands for recipe in found] == [
        ["denoiselab train -m study=snr weighting=min_snr target=v seed=0,1,2"],
        ["denoiselab train -m study=snr weighting=unit target=v seed=0,1,2"],
    ]
    assert found[0].made == "git revision 0123456789ab, torch 2.10"
    for one in runs[3:]:
        one.record["command"] = "denoiselab train --config-dir 'my options' weighting=min_snr seed=0"
    assert recipes(tabulate(runs))[0].commands[0].startswith("denoiselab train -m --config-dir 'my options' study=snr")
    runs[0].record["overrides"] = ["study=snr", "weighting=unit", "model.note=a b;rm -rf $HOME", "seed=0"]
    (_, unit) = recipes(tabulate(runs))
    assert shlex.split(unit.commands[0]) == ["denoiselab", "train", *runs[0].record["overrides"][:3], "seed=0"]
    assert len(unit.commands) == 2


def test_an_evaluation_is_measured_with_the_metrics_of_the_run():
    one = run(0, [measured(2.0), measured(1.0, steps=10), measured(1.0, name="other", steps=20)])
    one.record["overrides"].append("~metrics.modes")
    commands = {recipe.label: recipe.commands for recipe in recipes(tabulate([one]))}
    assert [len(found) for found in commands.values()] == [2, 2, 1]
    assert shlex.split(commands["sampler.steps 10"][1])[3:] == [
        *(
            "sampler=ddim",
            "sampler.steps=10",
            "spacing=trailing",
            "guidance=cfg",
            "guidance.scale=1.0",
            "~metrics.modes",
        ),
        *("evaluation.n=1000", "evaluation.weights=ema", "evaluation.seed=0"),
    ]
    assert "~metrics.modes" not in commands["sampler.steps 20"][1]


def test_what_cannot_be_made_by_a_command_is_said():
    old = run(0, [measured(2.0, sampler="heun", chosen=False)])
    (recipe,) = recipes(tabulate([old]))
    assert recipe.commands == ["denoiselab train study=snr weighting=unit target=v seed=0"]
    assert "names of its sampler were not recorded" in recipe.note
    (recipe,) = recipes(tabulate([run(0, [measured(2.0, step=60)])]))
    assert "measured at step 60; the command trains 100 steps" in recipe.note


TEXTS = (
    "a,b",
    "x y",
    "it's",
    "a=b",
    "[1]",
    "{a}",
    "\\",
    "a\\'b'",
    "true",
    "1e5",
    "3",
    "",
    "ü",
    "$x",
    "outputs/a-b/c_1.2",
)


@pytest.mark.parametrize("value", [*TEXTS, None, True, 1.5, -2, 1e-7, [1, "a b", None]])
def test_values_are_written_in_hydras_grammar(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in (f"x={_written(value)}", sweep([f"x={_written(value)},{_written(value)}"])[1][0]):
        assert OverridesParser.create().parse_override(text).value() == value


def test_an_arm_is_not_the_best_for_lacking_its_worst_seed():
    """Over seeds 0 to 2, which both have, min-SNR is better; unit looks better where the hard seed 3 is missing."""
    runs = arms([3.0, 3.2, 3.1], [2.5, 2.7, 2.6, 9.0])
    table = tabulate(runs)
    found = {arm.label: arm.cells["fd_digits"] for arm in table.arms}
    assert found["weighting Unit"].mean < found["weighting MinSNR"].mean
    assert [name for name, cell in found.items() if cell.best] == ["weighting MinSNR"]
    assert any("bold goes by the seeds that all arms" in note for note in notes(table))
    apart = tabulate([run(0, 3.0, "unit"), run(1, 2.0, "min_snr")])
    assert [arm.cells["fd_digits"].best for arm in apart.arms] == [True, False]


def controlled(value: float, n: int = 1, **controls: float) -> Cell:
    return Cell("mmd2", [value] * n, "lower", controls, [{}] * n)


@pytest.mark.parametrize("null", [{"null_95": 0.01}, {"null_mean": 0.0, "null_std": 0.00608}, {"floor": 0.01}])
def test_what_cannot_be_told_from_data_is_not_better_than_what_cannot_be_either(null):
    inside = [controlled(-0.002, **null), controlled(0.005, **null)]
    outside = [controlled(0.02, **null), controlled(0.03, **null)]
    assert rank([*inside, *outside]) is None
    assert [cell.like_data for cell in [*inside, *outside]] == [True, True, False, False]
    assert not any(cell.best for cell in [*inside, *outside])
    rank(one := [inside[0], *outside])
    assert [cell.best for cell in one] == [True, False, False]
    rank(outside)
    assert [cell.best for cell in outside] == [True, False]
    higher = Cell("recall", [0.1], "higher", {"held_out": 0.9, **null}, [{}])
    assert not higher.like_data


def test_the_page_says_what_cannot_be_told_from_data(tmp_path):
    both = {"unit": 0.001, "min_snr": -0.002}
    runs = [run(s, [measured(v + s * 1e-4, controls={"null_95": 0.01})], w) for w, v in both.items() for s in range(3)]
    page = page_of(runs, tmp_path)
    assert page.count("<small>indistinguishable from data</small>") == 2
    assert "Of several such arms none is the best." in page
    assert '<span class="dot">' not in page
    assert r"\textbf" not in (tmp_path / "report.tex").read_text()


def test_the_latex_table_has_the_structure_of_one(tmp_path):
    page_of(arms(HIGH, LOW), tmp_path)
    lines = (tmp_path / "report.tex").read_text().splitlines()
    assert [line for line in lines if line in (r"\toprule", r"\midrule", r"\bottomrule")] == [
        *(r"\toprule", r"\midrule", r"\bottomrule")
    ]
    rows = [line for line in lines if line.endswith(r"\\")]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", "\n".join(lines))
    assert columns is not None
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns[1])}
    assert rows[1] == r"MinSNR & 3 & \textbf{2.033 $\pm$ 0.38} & -- \\"
    assert rows[2] == r"Unit & 3 & 3.000 $\pm$ 0.25 & -- \\"
    text = "\n".join(lines)
    assert [text.count(f"\\{word}{{table}}") for word in ("begin", "end")] == [1, 1]
    assert r"weighting=min\_snr than with weighting=unit: supported." in text


NASTY = [
    "a_b",
    "100%",
    "$x$",
    "#1",
    "a&b",
    "{",
    "}",
    "\\input{/etc/passwd}",
    "^",
    "~",
    "\\",
    "a\nb",
    "é",
    "漢字",
    "±",
    "\x07",
    "%",
]


@pytest.mark.parametrize("name", NASTY)
def test_hostile_names_are_escaped_for_tex(name):
    found = escaped(name)
    assert found.isascii()
    assert found.isprintable()
    shown = re.sub(r"\\(textbackslash|textasciicircum|textasciitilde)\{\}|\\[&%$#_{}]|\$\\pm\$", "", found)
    assert not re.search(r"[\\&%$#_{}^~]", shown)
    runs: list[Any] = [run(s, [measured(2.0 + s, name=name)], study={**STUDY, "question": name}) for s in range(2)]
    text = latex(tabulate(runs), name, name, [])
    bare = re.sub(r"\\[\\{}]", "", text)
    assert bare.count("{") == bare.count("}")
    comments = [line for line in text.splitlines() if re.search(r"(?<!\\)%", line)]
    assert comments == text.splitlines()[:2]
