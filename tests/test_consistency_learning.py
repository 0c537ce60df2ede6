"""Students that learn to sample in a step or two."""

import pytest
import torch

from denoiselab.consistency import Consistency
from denoiselab.data import EightGaussians
from denoiselab.denoiser import Denoiser
from denoiselab.loss import Averaged, Doubling
from denoiselab.metrics.mmd import mmd2, splits
from denoiselab.models import MLP
from denoiselab.sampler import Consistency as Multistep
from denoiselab.sampler import Heun, Karras
from denoiselab.schedule import Cosine
from exact import Mixture
from students import distillation, training


def eight() -> Mixture:
    data = EightGaussians(n=4000)
    return Mixture((data.centres - data.codec.mean) / data.codec.std, data.std / data.codec.std)


def learn(loss_of, steps: int, batch: int, exact: Mixture, measure=None) -> Denoiser:
    """An average of the weights of a small network after so many steps."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((2,), width=64, depth=3), Consistency())
    loss, average = loss_of(denoiser), Averaged(denoiser, mu_0=0.99)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    for k in range(steps):
        torch.manual_seed(k)
        loss.advance(k * batch)
        x_0 = exact.draw(batch, seed=100 + k)[0].float()
        t = ((torch.arange(batch) + torch.rand(batch)) / batch)[:, None]
        value, _ = loss(denoiser, Cosine(), x_0, torch.randn_like(x_0), t)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 4 * (1 - k / steps))
        optimizer.zero_grad()
        value.mean().backward()
        optimizer.step()
        loss.after_step(denoiser)
        average.follow(denoiser, 1.0)
        if measure is not None and k + 1 in measure:
            measure[k + 1](average.model)
    return average.model.eval()


def distances(denoiser, exact: Mixture, n: int = 2000) -> tuple[float, float, float, float]:
    """mmd2 of one-step and two-step samples and of the teacher's, and the 95 % quantile of its null."""
    real = exact.draw(n, seed=1)[0]
    med = torch.pdist(real).median().item()
    null = splits(exact.draw(2 * n, seed=2)[0], n, med).quantile(0.95).item()
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    found = []
    for sampler, network in ((Multistep(Karras(), 1), denoiser), (Multistep(Karras(), 2), denoiser)):
        torch.manual_seed(4)
        found.append(mmd2(sampler(network, Cosine(), noise).double(), real, med))
    teacher = mmd2(Heun(Karras(), 18)(exact, Cosine(), noise.double()), real, med)
    return found[0], found[1], teacher, null


def inconsistency(denoiser: Denoiser, exact: Mixture) -> float:
    """The spread of the estimates along the teacher's own trajectories, from r = 80 to the data."""
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(5))
    states = [s for s in Heun(Karras(), 18).walk(exact, Cosine(), noise.double()) if s.level.sigma]
    with torch.no_grad():
        ends = torch.stack([denoiser(s.x_t.float(), *s.level.like(s.x_t.float())) for s in states])
    return ends.var(0).mean().item()


def test_distillation_of_an_exact_teacher_learns_to_sample_in_one_step():
    exact, spreads = eight(), []
    note = {k: lambda model: spreads.append(inconsistency(model, exact)) for k in (20, 80, 300)}
    student = learn(lambda d: distillation(exact, d), 300, 128, exact, note)
    one, two, _, _ = distances(student, exact, 1000)
    assert one < 0.02
    assert two < 0.02
    assert spreads[0] > spreads[1] > spreads[2]


@pytest.mark.slow
def test_a_distilled_student_is_as_good_as_its_teacher_at_this_resolution():
    exact = eight()
    student = learn(lambda d: distillation(exact, d), 1000, 256, exact)
    one, two, teacher, null = distances(student, exact)
    print(f"one step {one:.5f}, two steps {two:.5f}, teacher {teacher:.5f}, null {null:.5f}")
    assert one < 3 * max(teacher, null)
    assert two < max(one, null)


@pytest.mark.slow
def test_consistency_training_needs_no_teacher():
    exact, steps = eight(), 1200
    student = learn(lambda d: training(d, Doubling(end=160, every=steps * 256 // 8)), steps, 256, exact)
    one, two, _, null = distances(student, exact)
    print(f"one step {one:.5f}, two steps {two:.5f}, null {null:.5f}")
    assert one < 10 * null
    assert two < 10 * null
