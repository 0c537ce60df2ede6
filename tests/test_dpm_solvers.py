"""DPM-Solver, DPM-Solver++ and UniPC: their orders, and diffusers' schedulers as a second implementation."""

import itertools
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from denoiselab.guidance import CFG
from denoiselab.rng import Noise
from denoiselab.sampler import DDIM, Heun, Rung, Sampler
from denoiselab.sampler.base import CLEAN, Denoise, on
from denoiselab.sampler.exponential import exact, phi, weights
from denoiselab.sampler.unipc import euler
from denoiselab.schedule import RATIO, Linear
from exact import Scaled, White, every, make, normals, relative, rms, solve, triangle

SINGLESTEP = {"dpm_solver_2": 2, "dpm_solver_3": 3, "dpmpp_2s": 2}
"""Network calls of a step."""

MULTISTEP = ["dpm_solver_2m", "dpm_solver_3m", "dpm_solver_3m_corrected", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_corrected"]
UNIPC = ["unipc", "unipc_b1"]
SDE = ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"]
OWN = [*SINGLESTEP, *MULTISTEP, *UNIPC, *SDE]


def option(name: str, steps: int, spacing: str = "log_snr", **arguments) -> Sampler:
    """As published: with no bound on how far estimates are extrapolated, unless one is given."""
    if name in (*MULTISTEP, *UNIPC, "dpmpp_2m_sde", "dpmpp_3m_sde"):
        arguments.setdefault("reach", math.inf)
    return make("sampler", name, spacing=make("spacing", spacing), steps=steps, clip=None, **arguments)


def slopes(errors: list[float]) -> list[float]:
    return [math.log2(before / after) for before, after in itertools.pairwise(errors)]


def walk(found: Sampler, denoiser, levels: list[Rung], x_t: Tensor, noise=None, schedule=None, exact_start: int = 0):
    """x at every level. The first ``exact_start`` steps only fill the memory: x_t comes from the flow."""
    memory, denoise, path = {}, Denoise(denoiser), [x_t]
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        stepped = found.step(denoise, path[-1], t, s, schedule, noise, memory)
        path.append(solve(denoiser, path[-1], t, s, 16) if i < exact_start else stepped)
    return path


# The coefficients


@pytest.mark.parametrize("h", [-30.0, -2.0, -1.0, -0.999, -1e-4, 0.0, 1e-9, 0.5, 1.0, 7.0])
def test_phi_is_the_integral_that_defines_it(h):
    """phi_k(h) = int_0^1 e^((1 - u) h) u^(k-1)/(k-1)! du."""
    u, w = torch.linspace(0, 1, 20_001, dtype=torch.float64), torch.tensor([2.0, 4.0]).double().repeat(10_001)[:20_001]
    w[[0, -1]] = 1.0
    for k in (1, 2, 3, 4):
        values = ((1 - u) * h).exp() * u ** (k - 1) / math.factorial(k - 1)
        assert phi(k, h) == pytest.approx((w * values).sum().item() / 60_000, rel=1e-9)
    assert phi(0, h) == pytest.approx(math.exp(h), rel=1e-14)


@pytest.mark.parametrize("nodes", [[0.0], [0.0, -1.3], [0.0, -0.7, -2.0], [0.0, -0.7, -2.0, 1.0], [0.5, -9.0, 3.0]])
def test_weights_have_their_moments(nodes):
    moments = [0.8, 0.3, -0.4, 0.1][: len(nodes)]
    found = weights(nodes, moments)
    for k, moment in enumerate(moments):
        assert sum(w * r**k for w, r in zip(found, nodes, strict=True)) == pytest.approx(moment, abs=1e-12)


# Order


@cache
def flow_on(schedule: str, spacing: str) -> tuple[Tensor, Tensor]:
    """Normals, and where the flow from the first to the last noisy level takes them."""
    levels, x = make("schedule", schedule), normals(16, 2)
    first, *_, last, _ = option("ddim", 20, spacing).levels(levels)
    return x, solve(triangle(), first.sigma * x, first, last, 600)


def errors_of(name: str, schedule: str, spacing: str, walks: list[int], exact_start: int = 0, **arguments):
    levels, (x, expected) = make("schedule", schedule), flow_on(schedule, spacing)
    found = []
    for steps in walks:
        sampler = option(name, steps, spacing, **arguments)
        rungs = sampler.levels(levels)[:-1]
        path = walk(sampler, triangle(), rungs, rungs[0].sigma * x, schedule=levels, exact_start=exact_start)
        found.append(rms(path[-1] - expected))
    return found


@every("schedule")
@pytest.mark.parametrize("name", [*SINGLESTEP, *MULTISTEP, *UNIPC])
def test_the_error_falls_at_the_order(name, schedule):
    """From the first to the last noisy level, in the last doublings up to 512 calls of the network. Three estimates
    start from exact ones; halved, the curvature of three makes a method of second order."""
    calls = SINGLESTEP.get(name, 1)
    walks = [n // calls for n in ((128, 256, 512) if schedule in ("linear", "cosine") else (128, 256))]
    found = errors_of(name, schedule, "log_snr", walks, exact_start=2 if "_3m" in name else 0)
    order = option(name, 2).order
    assert min(slopes(found)) > order - 0.3
    assert max(slopes(found)) < order + 0.5
    assert found[-1] > 1e-9


@pytest.mark.parametrize("schedule", ["ve", "edm"])
@pytest.mark.parametrize("name", [*SINGLESTEP, *MULTISTEP, *UNIPC])
def test_the_error_falls_at_the_order_on_karras_levels(name, schedule):
    calls = SINGLESTEP.get(name, 1)
    walks = [128 // calls, 256 // calls, 512 // calls]
    found = errors_of(name, schedule, "karras", walks, exact_start=2 if "_3m" in name else 0)
    assert min(slopes(found)) > option(name, 2).order - 0.3


def test_the_reference_agrees_with_many_steps_of_heun():
    """With its limit: 1,024 and 2,048 steps extrapolated, whose error falls by 4."""
    x, expected = flow_on("linear", "log_snr")
    ends = []
    for steps in (1024, 2048):
        *_, last, _ = Heun(make("spacing", "log_snr"), steps).walk(triangle(), Linear(), x)
        ends.append(last.x_t)
    limit = ends[1] + (ends[1] - ends[0]) / 3
    assert rms(ends[1] - expected) < 1e-4
    assert rms(limit - expected) < 1e-7
    first, *_, end, _ = option("ddim", 20).levels(Linear())
    assert rms(solve(triangle(), first.sigma * x, first, end, 1200) - expected) < 1e-8


@pytest.mark.parametrize("name", ["dpm_solver_3m", "dpmpp_3m"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_doubling_the_curvature_makes_three_estimates_third_order(name, schedule):
    """As published, D2 = f'' h^2 / 2 is weighted as f'' h^2 would be: three estimates gain nothing in order on two."""
    published = errors_of(name, schedule, "log_snr", [128, 256, 512], exact_start=2)
    corrected = errors_of(f"{name}_corrected", schedule, "log_snr", [128, 256, 512], exact_start=2)
    assert max(slopes(published)) < 2.3
    assert min(slopes(corrected)) > 2.8
    assert corrected[-1] < published[-1] / 5


@pytest.mark.parametrize(("p", "order"), [(1, 2), (2, 3), (3, 3)])
def test_unipc_gains_an_order_by_its_corrector(p, order):
    assert option("unipc", 5, p=p).order == order
    found = errors_of("unipc", "linear", "log_snr", [64, 128, 256], p=p)
    assert min(slopes(found)) > order - 0.3


# What they cost, and when


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_walk_costs_what_it_says(steps):
    for name in OWN:
        calls = 0

        def denoiser(x_t, alpha_t, sigma_t):
            nonlocal calls
            calls += 1
            return 0.5 * x_t

        found = option(name, steps)
        found(denoiser, Linear(), normals(1, 1))
        each = SINGLESTEP.get(name, 2 if name == "dpmpp_sde" else 1)
        assert calls == found.nfe == each * (steps - 1) + 1


@pytest.mark.parametrize("name", [*MULTISTEP, *UNIPC])
def test_no_step_extrapolates_beyond_its_reach(name):
    """Where steps are even in lambda the bound changes nothing; where the last one is long it saves the walk."""
    x, levels = normals(64, 2), make("schedule", "flow")

    def final(spacing: str, **arguments) -> tuple[Tensor, float]:
        found = option(name, 20, spacing, **arguments)
        first, *_, last, _ = found.levels(levels)
        *_, state, _ = found.walk(triangle(), levels, x)
        return state.x_t, rms(state.x_t - solve(triangle(), first.sigma * x, first, last, 1500))

    assert torch.equal(final("log_snr")[0], final("log_snr", reach=2.0)[0])
    published, bounded = final("linspace")[1], final("linspace", reach=2.0)[1]
    assert bounded < min(published / (5 if name.startswith("dpmpp") else 1), 0.02)


def test_short_walks_end_with_fewer_estimates():
    """One or two estimates at the start, three at most; and two on the step before the last of fewer than 15."""
    for steps, expected in [(5, [1, 2, 3, 2]), (14, [1, 2, *[3] * 10, 2]), (15, [1, 2, *[3] * 12]), (2, [1])]:
        used = []
        for name in ("dpmpp_3m", "dpm_solver_3m"):
            found = option(name, steps)
            found.rules = tuple(lambda h, n=n, used=used: [used.append(n), *exact(h, n)][1:] for n in (1, 2, 3))
            found(White(), Linear(), normals(1, 1))
            assert used == expected
            used.clear()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    ("schedule", "k"),
    [*itertools.product(["linear", "cosine", "flow"], [0.1, 80.0]), ("linear", None), ("cosine", None)],
)
def test_the_scale_of_the_levels_does_not_matter(name, schedule, k):
    """None is variance exploding, which has no level without data, as flow has."""
    levels, found = make("schedule", schedule), option(name, 13)
    expected = found(triangle(), levels, Noise(0, range(16), (2,), dtype=torch.float64))
    scaled = found(triangle(), Scaled(levels, k), Noise(0, range(16), (2,), dtype=torch.float64))
    assert relative(scaled, expected) < 1e-8


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("spacing", ["trailing", "log_snr"])
@pytest.mark.parametrize("steps", [3, 20])
def test_float32_from_pure_noise_loses_nothing(name, spacing, steps):
    """From alpha = sigma/1e6, where e^h is 1e6 and a difference of large terms would leave nothing."""
    levels, found = make("schedule", "zero_terminal"), option(name, steps, spacing)
    first = found.levels(levels)[0]
    assert first.ratio == pytest.approx(RATIO)
    fine = found(triangle(), levels, Double(Noise(0, range(64), (2,))))
    coarse = found(triangle(), levels, Noise(0, range(64), (2,)))
    assert coarse.dtype == torch.float32
    assert rms(coarse - fine) < 2e-5


class Double:
    """A source's normals in float64."""

    def __init__(self, source):
        self.source = source

    def __call__(self) -> Tensor:
        return self.source().double()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_strong_guidance_leaves_estimates_of_the_data_bounded(schedule):
    """Scale 7.5 on the mixture, 13 to 15 calls, long steps in lambda: noises' differences are multiplied by e^h - 1,
    the data's by 1 - e^-h."""

    def estimates(name: str, steps: int) -> list[float]:
        _, *states = option(name, steps).walk(
            CFG(triangle(), 7.5), make("schedule", schedule), normals(256, 2), label=torch.arange(256) % 3
        )
        return [state.x_0_hat.abs().max().item() for state in states]

    data, noise = estimates("dpmpp_2m", 15), estimates("dpm_solver_3", 5)
    assert max(data) < 11
    assert data[-1] < 3
    assert noise[-1] > 15
    assert noise[-1] > 1.5 * noise[0]


# A second implementation

THEIRS = {"linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}


def theirs(name: str, betas: str, steps: int, last: float = 0.0, **arguments):
    """A scheduler of diffusers with its levels in float64, and the same levels as rungs. ``last`` is sigma at the end:
    noise prediction cannot go to 0 there."""
    import diffusers

    arguments.setdefault("final_sigmas_type", "sigma_min" if last else "zero")
    reference = getattr(diffusers, name)(**THEIRS[betas], prediction_type="sample", **arguments)
    reference.set_timesteps(steps)
    alphas = (1 - reference.betas.double()).cumprod(0)[reference.timesteps]
    reference.sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), torch.tensor([last], dtype=torch.float64)])
    return reference, [*(rung(sigma) for sigma in reference.sigmas[:-1].tolist()), CLEAN]


def rung(ratio: float) -> Rung:
    alpha = (1 + ratio**2) ** -0.5
    return Rung(alpha, ratio * alpha)


def their_path(reference, levels: list[Rung], x_t: Tensor, noise=None) -> list[Tensor]:
    path, denoise = [x_t], Denoise(triangle())
    for t, index in zip(levels, reference.timesteps.tolist(), strict=False):
        extra = {} if noise is None else {"variance_noise": noise()}
        path.append(reference.step(denoise(path[-1], t), index, path[-1], **extra).prev_sample)
    return path


def apart(ours: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, others, strict=True))


NUMBERS = pytest.mark.parametrize("steps", [5, 10, 20, 50])
BETAS = pytest.mark.parametrize("betas", list(THEIRS))
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
    return walk(option(name, steps), triangle(), levels, x), their_path(reference, levels, x)


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
def test_diffusers_walks_the_same_stochastic_walk(betas, steps):
    reference, levels = theirs(
        "DPMSolverMultistepScheduler", betas, steps, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    ours, others = Noise(3, range(16), (2,)), Noise(3, range(16), (2,))
    x = levels[0].sigma * normals(16, 2).float()
    path = walk(option("dpmpp_2m_sde", steps), triangle(), levels, x, ours)
    assert apart(path, their_path(reference, levels, x, others)) <= 1e-5


def test_diffusers_has_a_wrong_sign_in_its_third_order_stochastic_step():
    """D2's weight there is (1 - e^-H - H)/H^2 - 1/2, about -1, where H = 2h. With + 1/2 it is H phi_3(-H), about H/6,
    as in k-diffusion."""
    for h in (0.01, 0.3, 2.0):
        big = 2 * h
        written = (1 - math.exp(-big) - big) / big**2
        assert big * phi(3, -big) == pytest.approx(written + 0.5, rel=1e-8)
        assert written - 0.5 < -0.5
    reference, levels = theirs(
        "DPMSolverMultistepScheduler", "linear", 20, algorithm_type="sde-dpmsolver++", solver_order=3
    )
    found, x = option("dpmpp_3m_sde", 20), normals(16, 2)
    reference._step_index, m, z = 5, [normals(16, 2, seed=i) for i in (1, 2, 3)], normals(16, 2, seed=4)
    wrong = reference.multistep_dpm_solver_third_order_update(m[::-1], sample=x, noise=z)
    memory = {}
    for i, value in ((3, m[2]), (4, m[1])):
        found.step(lambda *_, y=value: y, x, levels[i], levels[i + 1], None, lambda: z, memory)
    ours = found.step(lambda *_: m[0], x, levels[5], levels[6], None, lambda: z, memory)
    lam = [level.half_log_snr for level in levels[3:7]]
    h, r_0, r_1 = lam[3] - lam[2], (lam[2] - lam[1]) / (lam[3] - lam[2]), (lam[1] - lam[0]) / (lam[3] - lam[2])
    d2 = ((m[0] - m[1]) / r_0 - (m[1] - m[2]) / r_1) / (r_0 + r_1)
    assert (ours - (wrong + levels[6].alpha * d2)).abs().max() <= 1e-9


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

    *_, sample = walk(option(name, steps, p=p), denoiser, levels, x)
    *others, their_sample = their_path(reference, levels, x)
    assert apart(asked, others) <= 1e-5  # their states are the predicted ones, ours the corrected
    if kind == "bh1":  # B(h) = h is infinite on the last step, and theirs not a number
        assert their_sample.isnan().all()
        assert torch.equal(sample, Denoise(triangle())(asked[-1], levels[-2]))
    else:
        assert apart([sample], [their_sample]) <= 1e-5


def test_unipc_depends_on_its_b_of_h_only_where_there_are_two_estimates():
    """The weights solve R a B = phi: B cancels, but where the authors set a_1 = 1/2."""
    rungs, x = [rung(ratio) for ratio in (9.0, 5.0, 3.0, 2.0, 1.2)], normals(16, 2)
    b2, b1 = (walk(option(name, 50, p=3), triangle(), rungs, x, exact_start=4) for name in ("unipc", "unipc_b1"))
    assert apart(b2, b1) == 0
    b2, b1 = (walk(option(name, 50, p=2), triangle(), rungs, x) for name in ("unipc", "unipc_b1"))
    assert apart(b2, b1) > 1e-3
    for h in (0.01, 1.0):
        assert euler(h) == [exact(h, 1)[0], h / 2]


@BETAS
@pytest.mark.parametrize(("name", "algorithm"), [("dpmpp_2s", "dpmsolver++"), ("dpm_solver_2", "dpmsolver")])
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_walks_the_same_singlestep_walk(name, algorithm, betas, steps):
    """Which takes the middles for levels of its own: every other of them, at the mean lambda of its neighbours."""
    levels, found = make("schedule", betas), option(name, steps)
    rungs = found.levels(levels)
    middles = [on(levels, (t.half_log_snr + s.half_log_snr) / 2) for t, s in itertools.pairwise(rungs[:-1])]
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
    t, s = on(levels, -1.0), on(levels, 0.2)
    one, two = on(levels, -0.6), on(levels, -0.2)
    reference, _ = theirs(
        "DPMSolverSinglestepScheduler", "linear", 3, 1e-12, algorithm_type="dpmsolver", solver_order=3
    )
    reference.sigmas = torch.tensor([each.ratio for each in (t, one, two, s)], dtype=torch.float64)
    x, denoise = normals(16, 2), Denoise(triangle())

    def eps(x_t: Tensor, level: Rung) -> Tensor:
        return (x_t - level.alpha * denoise(x_t, level)) / level.sigma

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

    ours = option("dpm_solver_3", 1).step(denoise, x, t, s, levels, None, {})
    assert (ours - step("heun")).abs().max() <= 1e-8
    assert (ours - step("midpoint")).abs().max() > 1e-4


@BETAS
def test_the_first_order_dpm_solver_is_ddim(betas):
    """x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) eps_hat, eq. 3.7."""
    levels, found = make("schedule", betas), option("dpm_solver_1", 20)
    assert type(found) is DDIM
    assert found.eta == 0
    x, denoise = normals(16, 2), Denoise(triangle())
    for t, s in itertools.pairwise(found.levels(levels)[:-1]):
        eps = (x - t.alpha * denoise(x, t)) / t.sigma
        expected = s.alpha / t.alpha * x - s.sigma * math.expm1(s.half_log_snr - t.half_log_snr) * eps
        assert relative(found.step(denoise, x, t, s, levels, None, {}), expected) < 1e-10


# With noise


class Impulses:
    """Row i of n is 1 at draw i and 0 at all others: a linear walk returns its coefficients of the normals."""

    def __init__(self, n: int):
        self.n, self.draw = n, 0

    def __call__(self) -> Tensor:
        self.draw += 1
        return (torch.arange(self.n) == self.draw - 1).double()[:, None]


def width_error(found: Sampler, schedule) -> float:
    """By how much the variance at the last noisy level is off for Gaussian data, relatively and without sampling."""
    data = White(0.0, 0.5)
    *_, state, _ = found.walk(data, schedule, Impulses(2 * found.steps + 2))
    right = (state.level.alpha * data.std) ** 2 + state.level.sigma**2
    return abs(state.x_t.square().sum().item() / right - 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", SDE)
def test_the_variance_is_right_to_second_order(name, eta, schedule):
    """Where DDPM's is to first."""
    levels = make("schedule", schedule)
    found = [width_error(option(name, steps, eta=eta), levels) for steps in (64, 128, 256)]
    assert min(slopes(found)) > 1.7
    ddpm = [width_error(option("ddpm", steps), levels) for steps in (64, 128, 256)]
    assert max(slopes(ddpm)) < 1.2
    assert found[-1] < ddpm[-1] / 5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SDE)
def test_noise_leaves_the_mean_and_the_variance_of_gaussian_data(name, schedule):
    n, data = 20_000, White(0.3, 0.5)
    x_0 = option(name, 150)(data, make("schedule", schedule), normals(n, 1))
    assert abs(x_0.mean().item() - data.mean) < 4 * data.std / math.sqrt(n)
    assert abs(x_0.var().item() / data.std**2 - 1) < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize(("name", "same"), [("dpmpp_2m_sde", "dpmpp_2m"), ("dpmpp_sde", "dpmpp_2s")])
def test_without_noise_they_are_the_deterministic_ones(name, same):
    levels, x = Linear(), normals(16, 2)
    found, expected = option(name, 20, eta=0.0)(triangle(), levels, x), option(same, 20)(triangle(), levels, x)
    assert (found - expected).abs().max() < 1e-12


def k_diffusion_2s(x: Tensor, sigma_t: float, sigma_s: float, eta: float, denoise, noise: list[Tensor]) -> Tensor:
    """sample_dpmpp_sde's step in alpha = 1, written from its formulas."""

    def split(start: float, end: float) -> tuple[float, float]:
        up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
        return math.sqrt(end**2 - up**2), up

    middle = math.sqrt(sigma_t * sigma_s)
    x_0 = denoise(x, Rung(1.0, sigma_t))
    down, up = split(sigma_t, middle)
    x_m = down / sigma_t * x + (1 - down / sigma_t) * x_0 + up * noise[0]
    down, up = split(sigma_t, sigma_s)
    return down / sigma_t * x + (1 - down / sigma_t) * denoise(x_m, Rung(1.0, middle)) + up * noise[1]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_k_diffusions_singlestep_sde_is_the_same_but_for_the_path_of_its_noise(eta):
    """Given the whole step's normal. There it shares with the middle's what Brownian motion in sigma does; here what
    the SDE does; were it drawn anew, the variance would be of first order."""
    levels, x, denoise = Scaled(Linear()), 5 * normals(16, 2), Denoise(triangle())
    t, s = Rung(1.0, 6.0), Rung(1.0, 2.0)
    z = [normals(16, 2, seed=1), normals(16, 2, seed=2)]
    found = option("dpmpp_sde", 2, eta=eta)
    ours = found.step(denoise, x, t, s, levels, iter(z).__next__, {})

    r = math.sqrt(2 / 6)  # the ratio of sigmas over half a step, which exact Ito integrals give
    share = math.sqrt((1 - eta**2 * (1 - r**2)) * (1 - r**2) / (1 - r**4))
    shared = share * z[0] + math.sqrt(1 - share**2) * z[1]
    assert (ours - k_diffusion_2s(x, 6.0, 2.0, eta, denoise, [z[0], shared])).abs().max() < 1e-9


def test_noise_drawn_anew_for_the_whole_step_would_cost_an_order():
    data, levels, errors = White(0.0, 0.5), Scaled(Linear()), []
    for steps in (64, 128, 256):
        rungs = option("ddim", steps).levels(levels)[:-1]
        source = Impulses(2 * steps + 2)
        x = rungs[0].sigma * source()
        for t, s in itertools.pairwise(rungs):
            x = k_diffusion_2s(x, t.sigma, s.sigma, 1.0, Denoise(data), [source(), source()])
        errors.append(abs(x.square().sum().item() / (data.std**2 + rungs[-1].sigma ** 2) - 1))
    assert max(slopes(errors)) < 1.3
    assert width_error(option("dpmpp_sde", 256), levels) < errors[-1] / 10


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 2.0])
def test_k_diffusions_third_order_sde_takes_the_same_steps(eta):
    """sample_dpmpp_3m_sde, in alpha = 1, written from its formulas."""
    sigmas, x, denoise = [20.0, 9.0, 5.0, 2.5, 1.5, 0.6, 0.1], 20 * normals(16, 2), Denoise(triangle())
    rungs = [*(Rung(1.0, sigma) for sigma in sigmas), CLEAN]
    ours = walk(option("dpmpp_3m_sde", 7, eta=eta), triangle(), rungs, x, Noise(1, range(16), (2,), dtype=x.dtype))
    noise, past, path = Noise(1, range(16), (2,), dtype=x.dtype), [], [x]
    for sigma_t, sigma_s in itertools.pairwise(sigmas):
        past.insert(0, denoise(x, Rung(1.0, sigma_t)))
        h = math.log(sigma_t / sigma_s)
        big = (1 + eta) * h
        x = math.exp(-big) * x + (1 - math.exp(-big)) * past[0]
        phi_2 = (math.exp(-big) - 1) / big + 1
        phi_3 = phi_2 / big - 0.5
        i = len(past)
        before = [math.log(sigmas[i - k - 2] / sigmas[i - k - 1]) / h for k in range(min(2, i - 1))]
        slope = [(past[k] - past[k + 1]) / r for k, r in enumerate(before)]
        if len(slope) == 1:
            x = x + phi_2 * slope[0]
        elif slope:
            curve = (slope[0] - slope[1]) / sum(before)
            x = x + phi_2 * (slope[0] + (slope[0] - slope[1]) * before[0] / sum(before)) - phi_3 * curve
        x = x + sigma_s * math.sqrt(1 - math.exp(-2 * eta * h)) * (noise() if eta else 0)
        path.append(x)
    assert apart(ours[:-1], path) < 1e-9


# Refusals


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((name, "eta", value) for name in SDE for value in (-0.1, math.nan)),
        ("dpmpp_sde", "eta", 1.5),
        *((name, "eta", math.inf) for name in SDE),
        *(("unipc", "p", value) for value in (0, 4, 1.5)),
    ],
)
def test_bad_arguments_are_refused_in_a_line(name, key, value):
    with pytest.raises(ValueError, match=rf"{key}={value}: need[^\n]*$"):
        option(name, 5, **{key: value})
