"""Distances over steps and over calls: as measured by hand, at what they cost."""

from pathlib import Path

import pytest

from denoiselab.diagnostics import QualityVersusSteps, steps
from denoiselab.diagnostics.steps import first_reached, seconds_per_sample
from denoiselab.errors import UserError
from denoiselab.metrics import KernelMMD
from denoiselab.rng import mix
from healthy import subject
from test_trajectories import exact

POINTS = ("metrics=points", "~metrics.modes")


def test_every_sampler_is_measured_at_every_number_of_steps(healthy: list[Path]):
    """Calls are counted and distances are the metric's own. The evaluation's guidance says no class, so that one step
    of the exact denoiser finds the mean of all modes, and 32 the data."""
    seen = exact(healthy[0], *POINTS, "guidance.scale=0")
    found = QualityVersusSteps(["ddim", "heun"], [32, 1], n=300, repeats=2).look(seen)
    table = found.table
    assert table["sampler"] == ["ddim", "ddim", "heun", "heun"]
    assert table["steps"] == [1, 32, 1, 32]
    assert table["calls"] == [1, 32, 1, 63]
    values = []
    for seed in (0, mix(0, "repeat", 1)):
        drawn = seen.draw(300, seen.sampling("sampler=heun", "sampler.steps=32"), seed=seed)[0]
        values.append(KernelMMD().measure(drawn, None, seen.images)[0])
    assert table["mmd2"][3] == pytest.approx((values[0].value + values[1].value) / 2, rel=1e-6)
    assert table["mmd2_sd"][3] == pytest.approx(abs(values[0].value - values[1].value) / 2**0.5, rel=1e-6)
    null = values[0].controls
    assert found.facts["band"][1] == pytest.approx(null["null_95"])
    assert table["reached"] == [value <= null["null_95"] for value in table["mmd2"]]
    assert table["reached"] == [False, True, False, True]
    assert found.facts["first"] == {"ddim": 32, "heun": 32}
    for each, calls, whole in zip(table["ms_per_call"], table["calls"], table["ms_per_sample"], strict=True):
        assert each * calls == pytest.approx(whole)
    assert found.protocol["sampler"] == {"_target_": "ddim, heun", "steps": "1, 32"}


def test_the_guidance_is_the_evaluations(healthy: list[Path]):
    seen = subject(healthy[0], *POINTS, "guidance.scale=3")
    by_hand = seen.draw(50, seen.sampling("sampler=ddim", "sampler.steps=4"))[0]
    same = subject(healthy[0], *POINTS, "guidance.scale=3", "sampler.steps=4")
    assert (by_hand == same.draw(50)[0]).all()


def test_time_is_of_the_calls_after_a_warm_up(healthy: list[Path], monkeypatch: pytest.MonkeyPatch):
    """By a clock that the network alone moves: a second for each call, an hour for the very first."""
    seen, now = subject(healthy[0]), [0.0]

    def slow(denoiser):
        def ask(*x, **cond):
            now[0] += 3600 if now[0] == 0 else 1
            return denoiser(*x, **cond)

        return ask

    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    ways = {("heun", count): seen.sampling("sampler=heun", f"sampler.steps={count}") for count in (4, 8)}
    for parts in ways.values():
        parts.guidance = slow
    found = seconds_per_sample(seen, ways, 10)
    assert found == {("heun", 4): pytest.approx(0.7), ("heun", 8): pytest.approx(1.5)}


def test_the_null_is_reached_where_it_is_kept():
    table = {
        "sampler": ["a"] * 3 + ["b"] * 3 + ["c"],
        "steps": [4, 8, 16, 4, 8, 16, 4],
        "reached": [True, False, True, False, True, True, None],
    }
    assert [first_reached(table, name) for name in "abc"] == [16, 8, None]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samplers": []}, "samplers=.*need different options"),
        ({"steps": [0]}, "steps=.*need different numbers >= 1"),
        ({"n": 1}, "n=1: need at least 2"),
        ({"repeats": 0}, "repeats=0: need at least 1"),
    ],
)
def test_mistakes_are_named(options, says: str):
    with pytest.raises(ValueError, match=says):
        QualityVersusSteps(**options)


def test_what_cannot_be_sampled_or_measured_is_refused(healthy: list[Path]):
    seen = subject(healthy[0], *POINTS)
    with pytest.raises(ValueError, match="samplers: eulr is none; need some of ab4, "):
        QualityVersusSteps(["eulr"]).check(seen.parts)
    with pytest.raises(ValueError, match="none of them takes n=2000"):
        QualityVersusSteps().check(subject(healthy[0], "metrics=none").parts)
    with pytest.raises(UserError, match="metric=fd: need a measurement that is better when lower; there are mmd2"):
        QualityVersusSteps(["ddim"], [1], n=20, repeats=1, metric="fd").look(seen)
