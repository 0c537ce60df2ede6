"""The timer of `denoiselab bench`, the intervals of its results, and their verdicts."""

from __future__ import annotations

import math
import random

import pytest
import torch

from denoiselab.bench.record import Record, Result, need, ratio, result, times
from denoiselab.bench.refusal import difference
from denoiselab.bench.timing import LEAST, WARMUP, Contender, alternate, median_interval, turns


@pytest.mark.parametrize("n", [6, 7, 20, 31])
def test_the_interval_covers_the_median_as_often_as_it_says_and_no_shorter_one_would(n):
    """Of every distribution, so the ranks alone decide: P(x_(k) <= median <= x_(n+1-k)) from binomials."""
    low, high = median_interval(range(1, n + 1))
    assert low + high == n + 1
    miss = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in (low, low + 1)]
    assert miss[0] <= 0.05 < miss[1]


def test_the_interval_covers_a_known_ratio():
    """Paired times of a machine that is twice as slow now and then: the true ratio is 0.7."""
    draw = random.Random(0)
    covered, trials = 0, 1000
    for _ in range(trials):
        ours, theirs = Contender("ours", int), Contender("theirs", int)
        for _ in range(20):
            load = draw.choice([1.0, 1.0, 1.0, 2.0])
            ours.seconds.append(0.7 * load * math.exp(draw.gauss(0, 0.1)))
            theirs.seconds.append(load * math.exp(draw.gauss(0, 0.1)))
        found = ratio(ours, theirs)
        covered += found.interval[0] <= 0.7 <= found.interval[1]
        assert found.interval[0] <= found.quartiles[0] * 1.2
    assert 0.945 <= covered / trials <= 0.985  # 0.959 by the binomials


def test_paired_ratios_are_taken_round_by_round():
    ours, theirs = Contender("ours", int), Contender("theirs", int)
    ours.seconds, theirs.seconds = [1.0, 2.0, 30.0, 4.0, 5.0, 6.0], [2.0, 4.0, 60.0, 8.0, 10.0, 6.0]
    found = ratio(ours, theirs)
    assert (found.of, found.median, found.interval) == ("ours / theirs", 0.5, (0.5, 1.0))
    assert times([ours, theirs])["ours"].ms == 4500


def test_an_outlier_moves_neither_end():
    values = [1 + 0.01 * i for i in range(20)]
    assert median_interval([*values[:-1], 1000.0]) == median_interval(values)


def test_too_few_rounds_have_no_interval():
    with pytest.raises(ValueError, match="rounds=5: need at least 6"):
        median_interval([1.0] * (LEAST - 1))


@pytest.mark.parametrize(
    ("interval", "median", "needed", "verdict"),
    [
        ((0.5, 0.6), 0.55, {"at_most": 0.7}, "met"),
        ((0.5, 0.8), 0.6, {"at_most": 0.7}, "met by the median"),
        ((0.6, 0.8), 0.75, {"at_most": 0.7}, "missed by the median"),
        ((0.8, 0.9), 0.85, {"at_most": 0.7}, "missed"),
        ((0.98, 1.1), 1.0, {"at_least": 0.97}, "met"),
        ((0.9, 1.1), 1.0, {"at_least": 0.97}, "met by the median"),
        ((0.9, 1.1), 0.95, {"at_least": 0.97}, "missed by the median"),
        ((0.9, 0.95), 0.93, {"at_least": 0.97}, "missed"),
        ((0.9, 0.95), 0.93, {}, None),
    ],
)
def test_a_verdict_says_whether_the_whole_interval_agrees(interval, median, needed, verdict):
    record = Record("part", "name", "work", 6, {}, Result("ours / theirs", median, interval, interval), needed)
    assert record.verdict == record.as_dict()["verdict"] == verdict


def test_only_what_was_promised_is_needed():
    assert need({"at_most": 0.7}, "at_most") == {"at_most": 0.7}
    assert need({"at_most": None}, "at_most") == need({}, "at_least") == {}


def test_contenders_alternate_and_only_their_own_turn_counts():
    """A clock that moves by what is done: preparing and the other contender must not be in anyone's time."""
    now, order = [0.0], []

    def pass_(seconds: float, what: str | None = None):
        now[0] += seconds
        order.extend([what] if what else [])

    a, b = (
        Contender(name, lambda s=s, name=name: pass_(s, name), lambda: pass_(100.0), clock=lambda: now[0], per=per)
        for name, s, per in (("a", 1.0, 1), ("b", 6.0, 3))
    )
    a.seconds.append(7.0)  # of an earlier use
    alternate([a, b], 6, "title")
    assert a.seconds == [1.0] * 6
    assert b.seconds == [2.0] * 6
    assert len(order) == 2 * (WARMUP + 6)
    first = [order[i] for i in range(0, len(order), 2)]
    assert {"".join(order[i : i + 2]) for i in range(0, len(order), 2)} == {"ab", "ba"}
    assert first.count("a") == first.count("b")


def test_the_time_of_a_turn_ends_when_the_next_is_asked_for():
    now = [0.0]
    one = Contender("one", int, clock=lambda: now[0])
    for number, contender in enumerate(turns([one], LEAST, "title")):
        assert contender is one
        now[0] += number
    assert one.seconds == list(range(WARMUP, WARMUP + LEAST))


def test_waiting_is_announced_once_where_there_is_no_terminal(capsys):
    alternate([Contender("a", int)], 6, "a title")
    assert capsys.readouterr().err.startswith("a title: 8 rounds, about ")


def test_difference_is_relative_to_the_largest_value():
    a = torch.tensor([1000.0, 0.0])
    assert difference(a, a + torch.tensor([0.0, 1.0])) == pytest.approx(1e-3)
    assert difference(torch.tensor([0.5]), torch.tensor([0.25])) == 0.25
    assert difference(torch.ones(2), torch.ones(3)) == math.inf
    assert not difference(torch.tensor([math.nan]), torch.ones(1)) <= 1


def test_statistics_are_over_rounds():
    found = result("images/s", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found.median, found.interval, found.quartiles) == (3.5, (1.0, 6.0), (2.25, 4.75))
