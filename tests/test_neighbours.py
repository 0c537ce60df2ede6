"""The nearest training samples, and the test for copies."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import scipy.stats
import torch

from denoiselab.data import Digits
from denoiselab.data.base import Samples
from denoiselab.diagnostics import NearestNeighbours
from denoiselab.metrics import NearestTraining
from denoiselab.metrics.neighbours import Pool, copies
from denoiselab.metrics.precision_recall import distances
from denoiselab.metrics.space import AT_ONCE, space_of
from denoiselab.rng import generator
from healthy import subject


@pytest.fixture(scope="module")
def digits():
    return Digits()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, "test-neighbours"))


@pytest.mark.parametrize("space", ["pixels", "features"])
def test_the_nearest_is_that_of_all_pairs(digits, space: str):
    pool = Pool(digits, space_of(digits, space))
    assert len(digits.train) > 2 * AT_ONCE
    rows = pool.space.vectors
    samples = digits.held_out.x_0[:50] + 0.1 * noise(50, 1, 8, 8)
    told: list[int] = []
    found = pool.nearest(samples, told.append)
    reference = distances(rows(samples), rows(digits.train.x_0)).min(1)
    assert torch.allclose(found.distance, reference.values, rtol=1e-12)
    assert torch.equal(found.position, reference.indices)
    assert sum(told) == len(digits.train)


def test_copies_have_distance_exactly_nothing(digits):
    found = Pool(digits, space_of(digits, "pixels")).nearest(digits.train.x_0[100:140])
    assert found.distance.max() == 0
    assert torch.equal(digits.train.x_0[found.position], digits.train.x_0[100:140])


def test_a_set_that_is_read_from_files_is_measured_in_parts(digits):
    """It has no ``x_0`` as a whole."""
    whole = NearestTraining().measure(digits.held_out.x_0, None, digits)
    lazy, sizes, x_0 = copy.copy(digits), [], digits.train.x_0

    class Lazy(Samples):
        def __init__(self):
            self.ids = digits.train.ids

        def __len__(self) -> int:
            return len(x_0)

        def batch(self, index):
            sizes.append(len(index))
            return {"x_0": x_0[index], "id": self.ids[index], "cond": {}}

    lazy.train = Lazy()
    assert NearestTraining().measure(digits.held_out.x_0, None, lazy) == whole
    assert max(sizes) <= AT_ONCE


def test_the_test_keeps_its_level_with_few_held_out_samples():
    """A binomial test at 0.01 would take the percentile of 150 held-out distances for known; of 400 draws of new
    samples it rejects many times the level."""
    g = generator(0, "level")
    level, rejected, naive = 0.01, 0, 0
    for _ in range(2000):
        sample, held_out = torch.rand(1000, generator=g).double(), torch.rand(150, generator=g).double()
        found = copies(sample, held_out)
        rejected += found.p < level
        naive += scipy.stats.binom.sf(round(found.share * 1000) - 1, 1000, 0.01) < level
    assert rejected / 2000 < 0.018  # the count is discrete, so the level is not quite reached
    assert rejected / 2000 > 0.003
    assert naive / 2000 > 0.05


def test_the_test_sees_a_few_copies():
    g = generator(0, "copies")
    sample, held_out = 1 + torch.rand(1000, generator=g), 1 + torch.rand(360, generator=g)
    assert copies(sample, held_out).p > 0.01
    sample[:60] = 0.01
    found = copies(sample, held_out)
    assert found.p < 1e-3
    assert found.expected == pytest.approx(3 / 361)
    assert found.share >= 0.06


def test_copies_alarm_and_held_out_samples_and_healthy_models_do_not(healthy: list[Path]):
    look = NearestNeighbours(n=1000)
    for run in healthy:
        seen = subject(run, "sampler.steps=15")
        assert look.look(seen).alarms == [], run
    data = seen.images
    train, held_out = (data.codec.decode(part.x_0) for part in (data.train, data.held_out))
    new = copy.copy(seen)
    new.draw = lambda n, **options: (data.draw(n, seed=77)[0], 1.0)
    assert look.look(new).alarms == []
    broken = copy.copy(seen)
    picked = train[torch.randint(len(train), (1000,), generator=generator(0, "picked"))]
    picked[100:] = data.draw(900, seed=78)[0]  # a tenth are copies, moved by a hundredth of a mode's width
    picked[:100] += 0.003 * noise(100, 2)
    broken.draw = lambda n, **options: (picked, 1.0)
    found = look.look(broken)
    (said,) = found.alarms
    assert "copies of training data" in said
    assert found.records[0].details["p"] < 1e-3
    assert len(held_out) == found.protocol["n_held_out"]
    assert look.look(broken).table == found.table


def test_copies_of_digits_alarm(example_run: Path, digits):
    seen = subject(example_run)
    copied = digits.train.x_0[:200] + 0.05 * noise(200, 1, 8, 8)
    broken = copy.copy(seen)
    broken.draw = lambda n, **options: (copied.clamp(-1, 1), 1.0)
    for space in ("pixels", "features"):
        look = NearestNeighbours(n=200, space=space)
        found = look.look(broken)
        assert len(found.alarms) == 1
        assert found.table["training_id"][0] in digits.train.ids[:200].tolist()
        broken_not = copy.copy(seen)
        broken_not.draw = lambda n, **options: (digits.held_out.x_0[:200], 1.0)
        assert look.look(broken_not).alarms == []


@pytest.mark.parametrize("mistake", [{"n": 0}, {"shown": 0}])
def test_mistakes_are_named(mistake):
    with pytest.raises(ValueError, match=f"^{next(iter(mistake))}="):
        NearestNeighbours(**mistake)
