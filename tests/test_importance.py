"""Importance sampling of t: the ring of losses, the weights that leave the objective alone, and what biased ones do."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from denoiselab.schedule import Cosine, Linear, Schedule
from denoiselab.timesteps import Importance, MeanImportance, Place, Stratified, Timesteps, Uniform
from exact import OPTIONS, every, make

LEVELS = Linear()


class Loop:
    """The same history kept in lists, one loss at a time."""

    def __init__(self, cells: int, history: int, floor: float, size: Callable[[list[float]], float]):
        self.rings = [[] for _ in range(cells)]
        self.history, self.floor, self.size = history, floor, size

    def update(self, t: Tensor, losses: Tensor) -> None:
        for at, value in zip(t.tolist(), losses.tolist(), strict=True):
            ring = self.rings[min(int(at * len(self.rings)), len(self.rings) - 1)]
            ring.append(value)
            del ring[: -self.history]

    @property
    def p(self) -> list[float]:
        cells = len(self.rings)
        if min(len(ring) for ring in self.rings) < self.history:
            return [1 / cells] * cells
        sizes = [self.size(ring) for ring in self.rings]
        return [(1 - self.floor) * v / sum(sizes) + self.floor / cells for v in sizes]


def rms(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def batches(cells: int, steps: int, batch: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Times of a few cells much more often than others, and losses of any size."""
    g = torch.Generator().manual_seed(seed)
    t = [torch.rand(batch, generator=g) ** 2 for _ in range(steps)]
    return [(v, torch.rand(batch, generator=g) * 10 ** (4 * torch.rand(batch, generator=g))) for v in t]


def loss(t: Tensor) -> Tensor:
    """L(t) = exp(-10 t): its standard deviation is twice its mean of 0.1."""
    return (-10 * t.double()).exp()


def learned(kind: type[Importance] = Importance, points: int = 100, noise: float = 0.0, **arguments) -> Importance:
    """That has seen ten losses of every cell, at its centre."""
    found = kind(Linear(points), **arguments)
    t = ((torch.arange(points) + 0.5) / points).repeat(10)
    g = torch.Generator().manual_seed(0)
    found.update(t.float(), (loss(t) * (1 + noise * torch.randn(len(t), generator=g)).abs()).float())
    return found


@pytest.mark.parametrize(("cells", "history", "batch"), [(50, 10, 64), (50, 10, 1000), (30, 3, 200), (30, 1, 64)])
@pytest.mark.parametrize("kind", [Importance, MeanImportance])
def test_the_history_is_that_of_a_loop_over_samples(cells, history, batch, kind):
    """After every step, with cells that occur in a batch more than once and more often than their ring is long."""
    found = kind(Linear(cells), history=history, floor=0.01)
    loop, learnt = Loop(cells, history, 0.01, mean if kind is MeanImportance else rms), 0
    for t, losses in batches(cells, 60, batch):
        found.update(t, losses)
        loop.update(t, losses)
        torch.testing.assert_close(found.p, torch.tensor(loop.p, dtype=torch.float64), rtol=1e-12, atol=0)
        learnt += len({*loop.p}) > 1
        assert found.count.sum() > 0
    assert learnt > 10
    for k, ring in enumerate(loop.rings):
        kept = found.losses[k, history - len(ring) :]
        torch.testing.assert_close(kept, torch.tensor(ring, dtype=torch.float64), rtol=1e-12, atol=0)
    assert max(torch.bincount((t * cells).long())) > history


def test_one_loss_too_few_keeps_it_uniform():
    found, t = Importance(Linear(50)), (torch.arange(50).repeat(10) + 0.5) / 50
    found.update(t[:-1], loss(t[:-1]).float())
    assert torch.equal(found.p, torch.full((50,), 1 / 50, dtype=torch.float64))
    found.update(t[-1:], loss(t[-1:]).float())
    assert found.p[0] > 5 * found.p[25]
    assert found.p.sum().item() == pytest.approx(1)


def test_warming_up_takes_as_long_as_the_rarest_cell():
    """1,000 cells and batches of 128: independent draws need about 173 batches, and strata, which cannot spare a
    cell for long by crowding the batch elsewhere, about as many."""

    def batches_until_full(draw: Timesteps, seed: int) -> int:
        found = Importance(LEVELS)
        for step in itertools.count(1):
            t = draw(128, LEVELS, Place(seed, 128 * step))[0]
            found.update(t, torch.ones(128))
            if (found.count >= 10).all():
                return step
        raise AssertionError

    independent = [batches_until_full(Uniform(), seed) for seed in range(12)]
    stratified = [batches_until_full(Stratified(), seed) for seed in range(12)]
    assert 155 < sum(independent) / 12 < 195
    assert 145 < sum(stratified) / 12 < 185


def test_the_cells_follow_the_schedule():
    assert len(make("timesteps", "importance", schedule=Linear(50)).p) == 50
    continuous = copy.copy(LEVELS)
    continuous.points = None
    assert len(make("timesteps", "importance", schedule=continuous, points=70).p) == 70


@pytest.mark.parametrize("steps", [None, 100])
def test_weights_are_the_inverse_probabilities_and_the_estimate_unbiased(steps):
    """A million draws: the mean of w L within 3 standard errors of L's own mean, as independent draws would have
    them, and far closer because they are not."""
    found = learned(noise=0.7, steps=steps)
    t, w = found(1_000_000, LEVELS, Place(0, 0))
    cells = (t.double() * 100).long().clamp(0, 99)
    torch.testing.assert_close(w.double(), 1 / (100 * found.p[cells]), rtol=1e-4, atol=0)
    values = w.double() * loss(t)
    points = torch.arange(100).double() / 99
    expected = loss(points).mean() if steps else (1 - math.exp(-10)) / 10
    error = abs(values.mean() - expected)
    assert error < 3 * values.std() / 1000
    assert error < 2e-5 * expected


def test_the_gradient_is_that_of_uniform_times():
    """Of a small fixed network, over 400,000 draws of each, once its losses have been learned."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def losses(t: Tensor, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        y = (6 * t.double()).sin() * (-4 * t.double()).exp() + 0.1 * torch.randn(len(t), generator=g)
        return (net(t.double()[:, None])[:, 0] - 3 * y).square()

    def gradient(found: Timesteps, seed: int) -> Tensor:
        times = ((torch.arange(100) + 0.5) / 100).repeat(10)
        found.update(times, losses(times, 7).detach().float())
        t, w = found(400_000, LEVELS, Place(seed, 0))
        found_gradients = torch.autograd.grad((w * losses(t, seed)).mean(), [*net.parameters()])
        return torch.cat([v.flatten() for v in found_gradients])

    ours, uniform = gradient(Importance(Linear(100)), 0), gradient(Uniform(), 1)
    assert torch.cosine_similarity(ours, uniform, dim=0) > 0.999
    assert (ours.norm() / uniform.norm()).item() == pytest.approx(1, abs=0.02)
    unweighted = gradient(Unweighted(Linear(100)), 0)
    assert not abs(unweighted.norm() / uniform.norm() - 1) < 0.02


class Unweighted(Importance):
    """The mistake of leaving the weights out."""

    def weights(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.ones_like(t)


def test_batches_vary_less_than_with_uniform_times():
    """The batch's weighted mean of a loss that is noisy also at equal times, drawn in strata by both: what is left is
    the noise, sum L^2/(w N), which importance sampling makes smaller; and beside independent draws, far smaller."""

    def means(found: Timesteps) -> Tensor:
        g = torch.Generator().manual_seed(1)
        draws = [found(64, LEVELS, Place(seed, 0)) for seed in range(600)]
        return torch.stack([(w * loss(t) * torch.randn(64, generator=g).square()).mean() for t, w in draws])

    ours, stratified, independent = (means(found).double() for found in (learned(), Stratified(), Uniform()))
    expected = (1 - math.exp(-10)) / 10
    for values in (ours, stratified, independent):
        assert values.mean().item() == pytest.approx(expected, abs=4 * values.std().item() / math.sqrt(600))
    # Var of z^2 is 2: (2 E[(w L)^2 under p]) / N for the strata, and Var L more for independent draws.
    assert ours.var().item() == pytest.approx(2 * expected**2 / 64, rel=0.25)
    assert stratified.var().item() == pytest.approx(2 * 0.05 / 64, rel=0.25)
    assert independent.var().item() == pytest.approx((2 * 0.05 + 0.04) / 64, rel=0.25)


def relative_bias(kind: type[Importance], batch: int) -> float:
    """Of the mean of 4,000 independent batches' estimates, relative to the mean of L."""
    found, g = learned(kind, 1000), torch.Generator().manual_seed(0)
    t = found.icdf(torch.rand(4000 * batch, generator=g, dtype=torch.float64), LEVELS).view(4000, batch)
    w = torch.stack([found.weights(row, LEVELS) for row in t])
    return (w * loss(t)).mean().item() / ((1 - math.exp(-10)) / 10) - 1


BIAS = {2: 3.09, 16: 1.27, 64: 0.66, 256: 0.29}
"""Of MeanImportance on L(t) = exp(-10 t), as its documentation says."""


@pytest.mark.parametrize("batch", BIAS)
def test_normalised_weights_are_biased_and_ours_are_not(batch):
    assert relative_bias(MeanImportance, batch) == pytest.approx(BIAS[batch], rel=0.1)
    assert abs(relative_bias(Importance, batch)) < 0.01
    assert f"+{round(100 * BIAS[batch])}%" in MeanImportance.__doc__


def test_at_one_sample_the_normalised_estimate_is_that_of_another_objective():
    """sum L^2/sum L, which is 5 times the mean of L here."""
    assert learned(MeanImportance)(1, LEVELS, Place(0, 0))[1].item() == 1
    found = learned(MeanImportance, 1000)
    t = found.icdf((torch.arange(200_000).double() + 0.5) / 200_000, LEVELS)
    assert loss(t).mean().item() / 0.1 == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("kind", [Importance, MeanImportance])
def test_its_state_goes_through_a_checkpoint(kind, tmp_path):
    found, more = kind(Linear(50)), batches(50, 60, 200)
    for batch in more[:40]:
        found.update(*batch)
    torch.save(found.state_dict(), tmp_path / "state.pt")
    again = kind(Linear(50))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.p[0] != again.p[-1]
    for batch in more[40:]:
        found.update(*batch)
        again.update(*batch)
    for name, value in found.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    where = Place(0, 5)
    assert torch.equal(found(64, LEVELS, where)[0], again(64, LEVELS, where)[0])


def test_its_history_stays_exact_in_a_run_of_low_precision():
    assert {v.dtype for v in learned().bfloat16().state_dict().values()} == {torch.float64, torch.int64}


def test_a_zero_loss_is_drawn_again():
    found, t = Importance(Linear(50)), (torch.arange(50).repeat(10) + 0.5) / 50
    found.update(t, (t > 0.5).float())
    assert found.p.min().item() == pytest.approx(0.001 / 50)
    times, w = found(100_000, LEVELS, Place(0, 0))
    assert (times < 0.5).sum() == pytest.approx(50, abs=1)
    assert (w.double() * (times < 0.5)).mean().item() == pytest.approx(0.5, rel=0.05)


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for a number, or a shape depend on one."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0].lstrip("_")
        assert not any(name == refused.lstrip("_") for refused in self.REFUSED), func.name()
        return func(*args, **(kwargs or {}))


@every("timesteps")
def test_no_step_waits_for_the_device(timesteps):
    found, levels = make("timesteps", timesteps), make("schedule", "cosine")
    assert levels.earliest >= 0  # read once
    with pytest.raises(AssertionError), NoSynchronisation():
        torch.ones(3).sum().item()
    with NoSynchronisation():
        found.advance(128)
        t, w = found(128, levels, Place(0, 128, 1, 2, 0, 3))
        found.update(t, w)


@every("timesteps")
def test_no_shape_depends_on_a_value(timesteps):
    """On a device without values."""
    found, levels = make("timesteps", timesteps).to("meta"), make("schedule", "cosine").to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta")[torch.ones(3, device="meta") > 0]
    u = torch.rand(128, dtype=torch.float64, device="meta")
    found.advance(128)
    t = found.icdf(u, levels)
    assert t.shape == found.weights(t, levels).shape == (128,)
    found.update(t.float(), t.float())


def test_those_that_learn_say_so():
    assert {n for n in OPTIONS["timesteps"] if make("timesteps", n).learns} == {"importance", "mean_importance"}


RANKS = """
import sys
from pathlib import Path
import denoiselab  # isort: skip
import torch
from denoiselab.compose import compose
from denoiselab.module import Diffusion
from denoiselab.ranks import Ranks
from denoiselab.training import Job

FOLDER = Path(__file__).parent
Ranks.program = (sys.executable, __file__)
teach, told = Diffusion._teach, []


def spy(self):
    update = self.timesteps.update
    self.timesteps.update = lambda t, losses: (told.append((t, losses)), update(t, losses))
    teach(self)
    self.timesteps.update = update
    torch.save({"told": told, "state": self.timesteps.state_dict()}, FOLDER / f"rank{self.global_rank}.pt")


Diffusion._teach = spy
small = ["data=8gaussians", "data.n=200", "model=mlp", "model.width=16", "metrics=none", "callbacks=none"]
steps = ["schedule.points=20", "data.batch_size=64", "trainer.accumulate=2", "trainer.max_steps=8", "sampler.steps=10"]
over = [*small, *steps, "timesteps=importance", "timesteps.history=2", "trainer=ddp_cpu"]
Job(compose("train", [*over, f"output_dir={FOLDER / 'outputs'}"])).fit()
"""


def test_two_ranks_learn_the_same_as_one_with_the_whole_batch(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    result = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert len(first["told"]) == 8
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    alone = Importance(Cosine(20), history=2)
    for step, (t, losses) in enumerate(first["told"]):
        assert len(t) == 64
        expected = [alone(16, LEVELS, Place(0, 64 * step, r, 2, micro, 2))[0] for r in (0, 1) for micro in (0, 1)]
        assert torch.equal(t, torch.cat(expected)), step
        whole = alone(64, LEVELS, Place(0, 64 * step))[0]
        assert torch.equal(t.sort().values, whole.sort().values)
        alone.update(t, losses)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, first["state"][name]), name
    assert first["state"]["p"].max() > 1.5 / 20
