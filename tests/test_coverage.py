"""Shares of samples in clusters of real data: the tests against scipy and by simulation, and lost classes."""

from __future__ import annotations

import copy
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from denoiselab.data import Digits, EightGaussians
from denoiselab.diagnostics import Coverage
from denoiselab.diagnostics.coverage import alarms
from denoiselab.metrics import ClusterCoverage
from denoiselab.metrics.coverage import as_asked, compare, log10_sf
from denoiselab.rng import generator
from healthy import subject


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def metric():
    """Fitted once for all."""
    return ClusterCoverage()


def drawn(index: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """n of these with replacement."""
    return index[torch.randint(len(index), (n,), generator=generator(seed, "test-coverage"))]


def values(found) -> dict[str, float]:
    return {record.name: record.value for record in found}


def test_the_test_is_scipys():
    a, b = torch.tensor([30, 50, 0, 20, 7]), torch.tensor([18, 61, 0, 33, 0])
    found = compare(a, b)
    kept = np.array([[30, 50, 20, 7], [18, 61, 33, 0]])
    reference = scipy.stats.chi2_contingency(kept, correction=False)
    assert found.chi2 == pytest.approx(reference.statistic, rel=1e-12)
    assert found.degrees == reference.dof
    assert 10**found.log10_p == pytest.approx(reference.pvalue, rel=1e-10)
    p, q = a / a.sum(), b / b.sum()
    js = scipy.spatial.distance.jensenshannon(p.numpy(), q.numpy()) ** 2
    assert found.js == pytest.approx(js, rel=1e-5)
    for k in range(5):  # the square of z is the chi-square of the bin against all others
        if a[k] + b[k]:
            pair = np.array([[a[k], a.sum() - a[k]], [b[k], b.sum() - b[k]]])
            assert found.z[k] ** 2 == pytest.approx(scipy.stats.chi2_contingency(pair, correction=False).statistic)
    assert found.z[2] == 0
    assert (found.z > 0).tolist() == [False, True, False, True, False]
    assert compare(a, a).log10_p == 0
    assert compare(torch.tensor([5, 0]), torch.tensor([0, 7])).js == pytest.approx(np.log(2))


@pytest.mark.parametrize(("x", "degrees"), [(3.0, 9), (40.0, 7), (1290.0, 9), (1400.0, 1), (4000.0, 99), (1e5, 19)])
def test_the_tail_is_known_beyond_what_a_float_holds(x: float, degrees: int):
    with mpmath.workdps(30):
        reference = mpmath.log10(mpmath.gammainc(mpmath.mpf(degrees) / 2, mpmath.mpf(x) / 2, regularized=True))
    assert log10_sf(x, degrees) == pytest.approx(float(reference), rel=1e-10)


def test_of_new_real_samples_a_twentieth_of_the_clusters_differ():
    """NDB/K of independent draws is alpha, also in clusters that were fitted to one of them."""
    data = EightGaussians(n=20_000)
    metric = ClusterCoverage(100)
    points = [data.draw(2000, seed)[0] for seed in range(1, 21)]
    found = [values(metric.measure(part, None, data)) for part in points]
    ndb = np.array([one["ndb"] for one in found])
    # Bins of one draw are nearly independent, so the mean of 20 x 100 has a standard error of 0.005.
    assert abs(ndb.mean() - 0.05) < 0.02
    p = 10 ** np.array([one["cluster_log10_p"] for one in found])
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3
    assert all(one["clusters_covered"] == 100 for one in found)


@pytest.mark.parametrize("clusters", [None, 50])
def test_two_lost_digits_are_seen_at_1000_and_real_digits_are_not(digits, clusters):
    metric = ClusterCoverage(clusters)
    train = digits.train
    kept = (train.label > 1).nonzero().flatten()
    for seed in range(5):
        found = values(metric.measure(train.x_0[drawn(kept, 1000, seed)], None, digits))
        assert found["cluster_log10_p"] < -6
        assert found["clusters_covered"] <= (clusters or 10) - 2
        assert found["ndb"] > 0.1
        found = values(metric.measure(train.x_0[drawn(torch.arange(len(train)), 1000, seed)], None, digits))
        assert found["cluster_log10_p"] > -3
        assert found["clusters_covered"] == (clusters or 10)
    assert metric.measure(train.x_0, None, digits)[2].controls["held_out"] > -3


def test_uneven_classes_alone_are_no_difference():
    """Samples are asked for class by class; half of the data are of one class."""
    from denoiselab.data import Mixture

    data = Mixture([[0, 0], [4, 0], [0, 4]], stds=[0.5, 0.5, 0.5], weights=[8, 1, 1], n=5000)
    label = torch.arange(900) % 3
    points = torch.stack([data.draw(20_000, 3)[0][data.draw(20_000, 3)[1] == c][:300] for c in range(3)], 1)
    points = points.flatten(0, 1)
    metric = ClusterCoverage()
    assert values(metric.measure(points, label, data))["cluster_log10_p"] > -2
    assert values(metric.measure(points, None, data))["cluster_log10_p"] < -6
    index = as_asked(data.train.label, label, 5000)
    counts = data.train.label[index].bincount()
    assert counts.max() - counts.min() <= 1
    assert len(index.unique()) == len(index)


def test_alarms_name_the_clusters_that_are_missed():
    real = torch.tensor([100, 100, 100, 100])
    z = compare(real, torch.tensor([100, 100, 100, 0])).z
    (said,) = alarms(real, torch.tensor([100, 100, 100, 0]), z)
    assert "clusters 4 (0.0% of the samples, 25.0% due)" in said
    few = torch.tensor([3, 2, 3, 0])  # eight samples say nothing
    assert alarms(real, few, compare(real, few).z) == []
    assert alarms(real, real, torch.zeros(4)) == []


def test_lost_modes_alarm_and_healthy_models_do_not(healthy: list[Path]):
    look = Coverage(n=1000)
    for run in healthy:
        seen = subject(run, "sampler.steps=15")
        found = look.look(seen)
        assert found.alarms == [], run
        assert found.records[3].value == 8
    broken = copy.copy(seen)
    samples, _ = seen.draw(1000, cond={"label": torch.arange(1000) % 6})  # and says that they were all eight
    broken.draw = lambda n, **options: (samples, 15.0)
    found = look.look(broken)
    (said,) = found.alarms
    assert said.count("12.5% due") == 2
    assert found.records[2].value < -6
    assert look.look(broken).table == found.table


@pytest.mark.parametrize("mistake", [{"clusters": 1}, {"n": 1}, {"every": 0}])
def test_mistakes_are_named(mistake):
    with pytest.raises(ValueError, match=f"^{next(iter(mistake))}="):
        Coverage(**mistake)
    with pytest.raises(ValueError, match=r"^space=colours: need one of features, pixels"):
        ClusterCoverage(space="colours").check(EightGaussians(n=100))
    with pytest.raises(ValueError, match=r"^clusters=200: need at least 2, and at most the 100 real samples"):
        ClusterCoverage(200).measure(torch.zeros(3, 2), None, EightGaussians(n=100))
