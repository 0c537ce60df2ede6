"""DPM-Solver, DPM-Solver++ and UniPC: their coefficients, orders, costs and reach."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.guidance import CFG
from denoiselab.rng import Noise
from denoiselab.sampler import DDIM, Walk
from denoiselab.sampler.exponential import exact, phi, weights
from denoiselab.sampler.unipc import euler
from denoiselab.schedule import RATIO, Linear
from dpm import MULTISTEP, OWN, SDE, SINGLESTEP, UNIPC, apart, published, rung, walk
from exact import White, normals, relative, rms, solve, triangle
from walks import flows, schedule_of, slopes


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


def errors_of(name: str, schedule: str, walks: list[int], exact_start: int = 0, **arguments) -> list[float]:
    """Against the flow from the first to the last noisy level, along log_snr."""
    levels, found = schedule_of(schedule), []
    for steps in walks:
        sampler = published(name, steps, **arguments)
        rungs = sampler.levels(levels)[:-1]
        x = rungs[0].sigma * normals(16, 2)
        path = walk(sampler, triangle(), rungs, x, schedule=levels, exact_start=exact_start)
        found.append(rms(path[-1] - flows()[schedule, "log_snr"]))
    return found


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", [*SINGLESTEP, *MULTISTEP, *UNIPC])
def test_the_error_falls_at_the_order_per_call(name, schedule):
    """In the last two doublings up to 512 calls of the network. Three estimates start from exact ones; halved, the
    curvature of three makes a method of second order. On every other schedule: tests/test_sampler_order.py, since along
    levels even in lambda no step is beyond reach."""
    walks = [n // SINGLESTEP.get(name, 1) for n in (128, 256, 512)]
    found = errors_of(name, schedule, walks, exact_start=2 if "_3m" in name else 0)
    order = published(name, 2).order
    assert min(slopes(found)) > order - 0.3
    assert max(slopes(found)) < order + 0.5
    assert found[-1] > 1e-9


@pytest.mark.parametrize("name", ["dpm_solver_3m", "dpmpp_3m"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_doubling_the_curvature_makes_three_estimates_third_order(name, schedule):
    """As published, D2 = f'' h^2 / 2 is weighted as f'' h^2 would be: three estimates gain nothing in order on two."""
    published = errors_of(name, schedule, [128, 256, 512], exact_start=2)
    corrected = errors_of(f"{name}_corrected", schedule, [128, 256, 512], exact_start=2)
    assert max(slopes(published)) < 2.3
    assert min(slopes(corrected)) > 2.8
    assert corrected[-1] < published[-1] / 5


@pytest.mark.parametrize(("p", "order"), [(1, 2), (2, 3), (3, 3)])
def test_unipc_gains_an_order_by_its_corrector(p, order):
    assert published("unipc", 5, p=p).order == order
    found = errors_of("unipc", "linear", [64, 128, 256], p=p)
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

        found = published(name, steps)
        found(denoiser, Linear(), normals(1, 1))
        each = SINGLESTEP.get(name, 2 if name == "dpmpp_sde" else 1)
        assert calls == found.nfe == each * (steps - 1) + 1


@pytest.mark.parametrize("name", [*MULTISTEP, *UNIPC])
def test_no_step_extrapolates_beyond_its_reach(name):
    """Where steps are even in lambda the bound changes nothing; where the last one is long it saves the walk."""
    x, levels = normals(64, 2), schedule_of("flow")

    def final(spacing: str, **arguments) -> tuple[Tensor, float]:
        found = published(name, 20, spacing, **arguments)
        first, *_, last, _ = found.levels(levels)
        *_, state, _ = found.walk(triangle(), levels, x)
        return state.x_t, rms(state.x_t - solve(triangle(), first.sigma * x, first, last, 1500))

    assert torch.equal(final("log_snr")[0], final("log_snr", reach=2.0)[0])
    free, bounded = final("linspace")[1], final("linspace", reach=2.0)[1]
    assert bounded < min(free / (5 if name.startswith("dpmpp") else 1), 0.02)


def test_short_walks_end_with_fewer_estimates():
    """One or two estimates at the start, three at most; and two on the step before the last of fewer than 15."""
    for steps, expected in [(5, [1, 2, 3, 2]), (14, [1, 2, *[3] * 10, 2]), (15, [1, 2, *[3] * 12]), (2, [1])]:
        used = []
        for name in ("dpmpp_3m", "dpm_solver_3m"):
            found = published(name, steps)
            found.rules = tuple(lambda h, n=n, used=used: [used.append(n), *exact(h, n)][1:] for n in (1, 2, 3))
            found(White(), Linear(), normals(1, 1))
            assert used == expected
            used.clear()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("spacing", ["trailing", "log_snr"])
@pytest.mark.parametrize("steps", [3, 20])
def test_float32_from_pure_noise_loses_nothing(name, spacing, steps):
    """From alpha = sigma/1e6, where e^h is 1e6 and a difference of large terms would leave nothing."""
    levels, found = schedule_of("zero_terminal"), published(name, steps, spacing)
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
        _, *states = published(name, steps).walk(
            CFG(triangle(), 7.5), schedule_of(schedule), normals(256, 2), label=torch.arange(256) % 3
        )
        return [state.x_0_hat.abs().max().item() for state in states]

    data, noise = estimates("dpmpp_2m", 15), estimates("dpm_solver_3", 5)
    assert max(data) < 11
    assert data[-1] < 3
    assert noise[-1] > 15
    assert noise[-1] > 1.5 * noise[0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_first_order_dpm_solver_is_ddim(schedule):
    """x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) eps_hat, eq. 3.7."""
    levels, found = schedule_of(schedule), published("dpm_solver_1", 20)
    assert type(found) is DDIM
    assert found.eta == 0
    x, going = normals(16, 2), Walk(triangle(), levels)
    for t, s in itertools.pairwise(found.levels(levels)[:-1]):
        eps = (x - t.alpha * going.denoise(x, t)) / t.sigma
        expected = s.alpha / t.alpha * x - s.sigma * math.expm1(s.half_log_snr - t.half_log_snr) * eps
        assert relative(found.step(going, x, t, s), expected) < 1e-10


def test_unipc_depends_on_its_b_of_h_only_where_there_are_two_estimates():
    """The weights solve R a B = phi: B cancels, but where the authors set a_1 = 1/2."""
    rungs, x = [rung(ratio) for ratio in (9.0, 5.0, 3.0, 2.0, 1.2)], normals(16, 2)
    b2, b1 = (walk(published(name, 50, p=3), triangle(), rungs, x, exact_start=4) for name in ("unipc", "unipc_b1"))
    assert apart(b2, b1) == 0
    b2, b1 = (walk(published(name, 50, p=2), triangle(), rungs, x) for name in ("unipc", "unipc_b1"))
    assert apart(b2, b1) > 1e-3
    for h in (0.01, 1.0):
        assert euler(h) == [exact(h, 1)[0], h / 2]


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
        published(name, 5, **{key: value})
