"""Common mistakes: each rule speaks of what is wrong, and is silent of what is right."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from denoiselab import lint
from denoiselab.compose import compose, conf_dir, plain
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.metrics import FrechetDistance
from denoiselab.run import load
from denoiselab.training import Job

POINTS = ["experiment=points", "trainer.threads=1"]
UNKNOWN = ["data=unknown", "metrics=none"]

CASES = {
    "pixels": ([*UNKNOWN, "data.shape=[3,512,512]"], [*UNKNOWN, "data.shape=[3,256,256]"], "4.0 times as many"),
    "frechet": (["evaluation.n=200"], [], "n=200 samples in the 64 features"),
    "steps": (["sampler.steps=1000"], [], "sampler.steps=1000"),
    "average": (["ema.decay=0"], [], "ema.decay=0"),
    "horizon": (["ema.warmup=false", "ema.decay=0.9999"], ["ema.decay=0.9999"], "82% of the initial"),
    "warmup": (["lr_schedule.warmup=2000"], [], "for all of the 2000 steps"),
    "batch": (["data.batch_size=2048"], [], "1437 training samples"),
    "clip": ([*POINTS, "sampler.clip=1"], ["sampler.clip=1"], "points have unit variance"),
    "scale": (["guidance.scale=0"], [], "is unconditional here"),
    "classes": (["evaluation.n=7"], [], "3 are never asked for"),
}
"""By rule: what it speaks of, what it is silent of, and a part of what it says."""


@cache
def case(*overrides: str) -> lint.Case:
    return lint.Case(Parts(resolve(compose("train", overrides))))


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_speaks_of_the_mistake_and_of_nothing_else(rule: str):
    wrong, right, text = CASES[rule]
    function = {one.__name__: one for one in (*lint.SAMPLING, *lint.TRAINING)}[rule]
    said = function(case(*wrong))
    assert said is not None
    assert text in said
    assert function(case(*right)) is None


def test_every_rule_is_tried():
    elsewhere = {"schedule", "length", "weighting"}
    assert {*lint.NAMES} == {*CASES} | elsewhere


def test_raw_weights_are_spoken_of():
    assert "raw weights are measured" in str(lint.average(case("evaluation.weights=raw")))


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (2049, "biased upwards by about 1/n, strongly"),
        (2048, "singular, and it is not ranked"),
        (5000, "about 1/n; compare"),
        (10_000, None),
    ],
)
def test_a_frechet_distance_in_features_of_inceptions_size(n: int, said: str | None):
    """10,000 is customary, 5,000 the least, and 2,048 what a covariance needs."""
    metric = FrechetDistance()
    metric.features = SimpleNamespace(dims=2048)  # pyright: ignore[reportAttributeAccessIssue]
    found = lint.Case(Parts({**case().config, "evaluation": {"n": n}}))
    found.parts.__dict__["metrics"] = {"fid": metric}
    text = lint.frechet(found)
    assert (text is None) if said is None else (said in str(text))


@pytest.mark.parametrize("name", ["digits", "points", "sr_digits", "autoencoder_digits"])
def test_shipped_experiments_are_silent(name: str):
    experiment = case(f"experiment={name}")
    assert lint.look(experiment, training=True) == []


def test_experiments_on_files_allow_what_they_mean():
    for file in sorted((conf_dir() / "experiment").glob("*.yaml")):
        text = file.read_text()
        assert ("steps: 1000\n  variance" not in text) or "allow: [steps]" in text, file


def test_another_schedule_is_spoken_of_when_a_run_is_measured(example_run: Path, called):
    run = load(example_run)
    for option, speaks in ((None, False), ("cosine", False), ("linear", True)):
        lines = [] if option is None else [f"schedule={option}"]
        parts = run.parts_for(plain(compose("evaluate", ["ckpt=none", "metrics=none", *lines])))
        found = lint.look(lint.Case(parts, trained=run.schedule), training=False)
        assert [one.rule for one in found] == (["schedule"] if speaks else [])
    small = ["evaluation.n=20", "sampler.steps=1", "metrics=none", f"ckpt={example_run}", "evaluation.seed=5"]
    result = called("evaluate", *small, "schedule=linear")
    assert result.returncode == 0, result.stderr
    assert "warning: lint.schedule: samples are made along Linear" in result.stderr
    refused = called("evaluate", *small, "schedule=linear", "lint.level=error", "rerun=true")
    assert refused.returncode == 2
    assert "lint.schedule" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_run_that_starts_over_is_named(tmp_path: Path):
    options = [*POINTS, "lr_schedule=cosine", f"output_dir={tmp_path}"]
    job = Job(compose("train", [*options, "trainer.max_steps=300"]))
    assert job.advice == []
    job.folder.path.mkdir(parents=True)
    (job.folder.path / "identity.json").write_text(json.dumps(job.identity))
    longer = Job(compose("train", [*options, "trainer.max_steps=400"]))
    assert [one.rule for one in longer.advice] == ["length"]
    assert job.folder.path.name in longer.advice[0].text

    def said(folder: str, **identity: Any) -> str | None:
        return lint.length(
            lint.Case(case().parts, None, job.folder.path.parent / folder, {**longer.identity, **identity})
        )

    assert said("new")
    assert said("new", seed=1) is None  # another run anyhow
    assert said("new", lr_schedule={"_target_": "x.Constant", "warmup": 0}) is None  # whose length decides nothing
    assert said(job.folder.path.name) is None  # this very run, which goes on
    (job.folder.path / "identity.json").write_text("[")
    assert said("new") is None


def test_a_weighting_that_follows_a_swept_target_is_spoken_of():
    targets = [plain(compose("train", [f"target={target}"])) for target in ("eps", "v")]

    def with_(**parts: Any):
        return [{**config, **parts} for config in targets]

    (advice,) = lint.sweep(targets)
    assert "two things change at once" in advice.text
    assert lint.sweep(with_(weighting={"_target_": "denoiselab.weighting.MinSNR"})) == []
    assert lint.sweep(with_(lint={"level": "warn", "allow": ["weighting"]})) == []
    assert lint.sweep(with_(lint={"level": "none", "allow": []})) == []
    assert lint.sweep(targets[:1]) == []
    with pytest.raises(UserError, match=r"^lint\.weighting: targets are swept"):
        lint.sweep(with_(lint={"level": "error", "allow": []}))


def test_levels_and_what_is_allowed(tmp_path: Path, called, capsys):
    wrong = ["evaluation.n=200", "ema.decay=0"]
    found = lint.look(case(*wrong), training=True)
    assert [one.rule for one in found] == ["frechet", "average"]
    lint.say([*found, *found])
    assert capsys.readouterr().err.count("warning: lint.") == 2

    def at(level: str, *allow: str) -> lint.Case:
        return lint.Case(Parts({**case(*wrong).config, "lint": {"level": level, "allow": [*allow]}}))

    assert lint.look(at("none"), training=True) == []
    assert [one.rule for one in lint.look(at("warn", "average"), training=True)] == ["frechet"]
    result = called("train", *wrong, "lint.level=error")
    assert result.returncode == 2
    assert "lint.frechet" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(UserError, match=r"^lint\.level=loud: need one of warn, error, none"):
        lint.look(at("loud"), training=True)
    with pytest.raises(UserError, match=r"^lint\.allow=pixel: no such rule; rules are schedule, "):
        lint.look(at("warn", "pixel"), training=True)
