"""DPM-Solver, DPM-Solver++ and UniPC: diffusers' schedulers as a second implementation."""

import itertools

import pytest
import torch
from torch import Tensor

from denoiselab.sampler import Rung, Walk
from denoiselab.schedule import Linear
from dpm import BETAS, NUMBERS, apart, published, their_path, theirs, walk
from exact import normals, triangle
from walks import schedule_of

MULTI = pytest.mark.parametrize(
    ("name", "algorithm", "order"),
    [
        ("ddim", "dpmsolver++", 1),
        ("dpmpp_2m", "dpmsolver++", 2),
        ("dpmpp_3m", "dpmsolver++", 3),
        ("dpm_solver_1", "dpmsolver", 1),
        ("dpm_solver_2m", "dpmsolver", 2),
        ("dpm_solver_3m", "dpmsolver", 3),
    ],
)


class Torch64:
    """torch, for a module that casts to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


def multistep_paths(name: str, algorithm: str, order: int, betas: str, steps: int, dtype: torch.dtype):
    reference, levels = theirs(
        "DPMSolverMultistepScheduler",
        betas,
        steps,
        1e-12 if algorithm == "dpmsolver" else 0.0,
        algorithm_type=algorithm,
        solver_order=order,
        euler_at_final=True,
    )
    x = levels[0].sigma * normals(16, 2).float().to(dtype)
    return walk(published(name, steps), triangle(), levels, x), their_path(reference, levels, x)


@NUMBERS
@BETAS
@MULTI
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_walks_the_same_multistep_walk(name, algorithm, order, betas, steps, monkeypatch):
    """At every level. In its float32 the noise-predicting ones lose up to 1e-3 from pure noise, where alpha = 5e-5:
    they multiply x_t by alpha_s/alpha_t and take it off again. Ours lose nothing."""
    ours, others = multistep_paths(name, algorithm, order, betas, steps, torch.float32)
    if (algorithm, betas) != ("dpmsolver", "cosine"):
        assert apart(ours, others) <= 1e-5
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.torch", Torch64())
    fine, others = multistep_paths(name, algorithm, order, betas, steps, torch.float64)
    assert apart(fine, others) <= 1e-8
    assert apart(ours, fine) <= 1e-5


@NUMBERS
@BETAS
@pytest.mark.parametrize(("name", "kind"), [("unipc", "bh2"), ("unipc_b1", "bh1")])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_diffusers_walks_the_same_unipc_walk(name, kind, p, betas, steps):
    reference, levels = theirs("UniPCMultistepScheduler", betas, steps, solver_order=p, solver_type=kind)
    x, asked = levels[0].sigma * normals(16, 2).float(), []

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        asked.append(x_t)
        return triangle()(x_t, alpha_t, sigma_t)

    *_, sample = walk(published(name, steps, p=p), denoiser, levels, x)
    *others, their_sample = their_path(reference, levels, x)
    assert apart(asked, others) <= 1e-5  # their states are the predicted ones, ours the corrected
    if kind == "bh1":  # B(h) = h is infinite on the last step, and theirs not a number
        assert their_sample.isnan().all()
        assert torch.equal(sample, Walk(triangle(), Linear()).denoise(asked[-1], levels[-2]))
    else:
        assert apart([sample], [their_sample]) <= 1e-5


@BETAS
@pytest.mark.parametrize(("name", "algorithm"), [("dpmpp_2s", "dpmsolver++"), ("dpm_solver_2", "dpmsolver")])
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_walks_the_same_singlestep_walk(name, algorithm, betas, steps):
    """Which takes the middles for levels of its own: every other of them, at the mean lambda of its neighbours."""
    levels, found = schedule_of(betas), published(name, steps)
    rungs = found.levels(levels)
    going = Walk(triangle(), levels)
    middles = [going.at((t.half_log_snr + s.half_log_snr) / 2) for t, s in itertools.pairwise(rungs[:-1])]
    both = [each for pair in zip(rungs, middles, strict=False) for each in pair] + [rungs[-2]]
    reference, _ = theirs(
        "DPMSolverSinglestepScheduler", betas, 2 * steps - 1, 1e-12, algorithm_type=algorithm, solver_order=2
    )
    reference.sigmas = torch.tensor([*(each.ratio for each in both), 1e-12], dtype=torch.float64)
    x = rungs[0].sigma * normals(16, 2)
    ours, others = walk(found, triangle(), rungs, x, schedule=levels), their_path(reference, both, x)
    assert apart(ours, [*others[::2], others[-1]][: len(ours)]) <= 1e-8


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_third_order_step_is_the_papers_but_for_its_second_level():
    """Its second-order piece to r_2 = 2/3 is the paper's with solver_type heun, the last piece with midpoint: no single
    setting gives the paper's step."""
    levels = Linear()
    going = Walk(triangle(), levels)
    t, one, two, s = (going.at(half_log_snr) for half_log_snr in (-1.0, -0.6, -0.2, 0.2))
    reference, _ = theirs(
        "DPMSolverSinglestepScheduler", "linear", 3, 1e-12, algorithm_type="dpmsolver", solver_order=3
    )
    reference.sigmas = torch.tensor([each.ratio for each in (t, one, two, s)], dtype=torch.float64)
    x = normals(16, 2)

    def eps(x_t: Tensor, level: Rung) -> Tensor:
        return (x_t - level.alpha * going.denoise(x_t, level)) / level.sigma

    def step(second: str) -> Tensor:
        estimates = [eps(x, t)]
        reference._step_index = 0
        estimates.append(eps(reference.dpm_solver_first_order_update(estimates[0], sample=x), one))
        reference._step_index = 1
        reference.register_to_config(solver_type=second)
        x_two = reference.singlestep_dpm_solver_second_order_update(estimates, sample=x)
        estimates.append(eps(x_two, two))
        reference._step_index = 2
        reference.register_to_config(solver_type="midpoint")
        return reference.singlestep_dpm_solver_third_order_update(estimates, sample=x)

    ours = published("dpm_solver_3", 1).step(going, x, t, s)
    assert (ours - step("heun")).abs().max() <= 1e-8
    assert (ours - step("midpoint")).abs().max() > 1e-4
