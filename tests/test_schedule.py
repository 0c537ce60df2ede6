import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.errors import UserError
from denoiselab.schedule import (
    EDM,
    GVP,
    LEAST_RATIO,
    RATIO,
    VE,
    VP,
    Adaptive,
    Cosine,
    Discrete,
    Flow,
    Level,
    Linear,
    ScaledLinear,
    Schedule,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminal,
    log_snr,
)
from exact import OPTIONS, every, grid, make, normals, parts, triangle

HELD = 2 * math.log(RATIO)
TABLES = pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "sigmoid_beta", "sigmoid"])
DIFFUSERS = pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("sigmoid_beta", {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}),
    ],
    ids=["linear", "cosine", "scaled_linear", "sigmoid_beta"],
)


def points(n: int = 1000) -> Tensor:
    """The times of a table's T points."""
    return torch.arange(n, dtype=torch.float64) / (n - 1)


def published_betas(name: str) -> list[float]:
    """The betas as the papers write them, in plain Python."""
    even = [i / 999 for i in range(1000)]
    if name == "linear":
        return [1e-4 + (0.02 - 1e-4) * u for u in even]
    if name == "scaled_linear":
        return [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * u) ** 2 for u in even]
    if name == "sigmoid_beta":
        return [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * u)) for u in even]
    if name == "sigmoid":
        f = [1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(3 - 6 * i / 1000)) for i in range(1001)]
    else:
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    return [min(1 - after / before, 0.999) for before, after in itertools.pairwise(f)]


def betas(schedule: Discrete) -> Tensor:
    """The table's betas, from its levels."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule(points(schedule.points or 0)).alpha ** 2])
    return 1 - abar[1:] / abar[:-1]


@every("schedule")
def test_log_snr_falls_strictly(schedule):
    found = make("schedule", schedule)
    assert (found.log_snr(grid(20_001)).diff() < 0).all()
    assert found.log_snr(grid()).isfinite().all()


@every("schedule")
def test_levels_are_those_of_the_log_snr(schedule):
    found = make("schedule", schedule)
    alpha_t, sigma_t = found(grid())
    assert (alpha_t >= 0).all()
    assert (sigma_t >= 0).all()
    torch.testing.assert_close(found.log_snr(grid()), found(grid()).log_snr, rtol=0, atol=0)
    inside = alpha_t * sigma_t > 0
    expected = 2 * (alpha_t / sigma_t)[inside].log()
    torch.testing.assert_close(found.log_snr(grid())[inside], expected, rtol=1e-12, atol=1e-12)


@every("schedule")
def test_inverse_undoes_log_snr(schedule):
    """Wherever the log-SNR is not held, so that one time alone has it."""
    found = make("schedule", schedule)
    t = torch.cat([grid(), points()])
    t = t[found.log_snr(t).abs() < HELD - 1e-9]
    assert len(t) > 1000
    torch.testing.assert_close(found.inverse(found.log_snr(t)), t, rtol=0, atol=1e-10)


@every("schedule")
def test_inverse_in_closed_form_is_the_bisection(schedule):
    found = make("schedule", schedule)
    value = torch.linspace(-27, 27, 541, dtype=torch.float64).view(1, -1)
    torch.testing.assert_close(found.inverse(value), Schedule.inverse(found, value), rtol=1e-12, atol=1e-12)


@every("schedule")
def test_inverse_is_clipped_beyond_the_ends(schedule):
    t = make("schedule", schedule).inverse(torch.tensor([1e3, -1e3]))
    torch.testing.assert_close(t, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)


@every("schedule")
def test_at_finds_the_level(schedule):
    found = make("schedule", schedule)
    wanted = found.log_snr(grid())
    torch.testing.assert_close(found.at(wanted).log_snr, wanted, rtol=1e-10, atol=1e-10)


@every("schedule")
def test_rate_is_the_slope(schedule):
    """Against central differences that stay inside the segments of a table, and far below the least t."""
    found, h = make("schedule", schedule), 1e-7
    t = (torch.arange(0, 999, 7, dtype=torch.float64) + 0.37) / 999
    slope = (found.log_snr(t - h) - found.log_snr(t + h)) / (2 * h)
    torch.testing.assert_close(found.rate(t), slope, rtol=1e-6, atol=0)
    assert (found.rate(grid()) > 0).all()


@every("schedule")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rate_is_finite_up_to_both_ends(schedule, dtype):
    """And so is SNR x rate, from the first time that is trained at."""
    found, near = make("schedule", schedule), torch.logspace(-20, -1, 96, dtype=torch.float64)
    t = torch.cat([torch.zeros(1), near, 1 - near, torch.ones(1)]).to(dtype)
    assert found.rate(t).isfinite().all()
    assert (found.rate(t) > 0).all()
    t = t.clamp_min(found.earliest)
    alpha_t, sigma_t = found(t)
    density = (alpha_t / sigma_t) ** 2 * found.rate(t)
    assert density.isfinite().all()
    assert ((density > 0) == (alpha_t > 0)).all()


@every("schedule")
def test_where_the_ratio_is_held_the_rate_is_the_one_at_the_bound(schedule):
    found = make("schedule", schedule)
    for t, bound in ((1.0, -HELD), (0.0, HELD)):
        t = torch.tensor(t, dtype=torch.float64)
        if abs(found.log_snr(t).item()) >= HELD - 1e-9:
            at_bound = found.inverse(torch.tensor(bound).double() * (1 - 1e-7))
            assert found.rate(t).item() == pytest.approx(found.rate(at_bound).item(), rel=1e-4)


@every("schedule")
def test_the_earliest_level_is_the_first_one_or_the_least_ratio(schedule):
    found, zero = make("schedule", schedule), torch.zeros((), dtype=torch.float64)
    alpha_t, sigma_t = found(zero + found.earliest)
    if found.earliest:
        assert (sigma_t / alpha_t).item() == pytest.approx(LEAST_RATIO, rel=1e-6)
        assert found.earliest < 2e-4
    else:
        assert sigma_t / alpha_t > LEAST_RATIO * (1 - 1e-6)


@every("schedule")
def test_a_schedule_is_where_it_was_moved_to(schedule):
    """One without tables too: times are drawn on its device."""
    found = make("schedule", schedule)
    assert found.device == torch.device("cpu")
    assert found.to("meta").device == torch.device("meta")


@every("schedule")
def test_training_waits_for_no_number(schedule):
    """On a device that holds none, so that reading one raises; what is read once is kept."""
    found, t = make("schedule", schedule), torch.rand(8, 1, device="meta")
    found.rate(torch.full((1,), found.earliest))
    found.to("meta")
    for value in (*found(t), found.rate(t), found.inverse(t)):
        assert value.shape == t.shape
        assert value.device == t.device
    found.update(*[t[:, 0]] * 3)
    assert found.earliest >= 0


@every("schedule")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_levels_are_float32_at_least(schedule, dtype):
    """And of the very time that was given: no arithmetic in the time's own precision."""
    found = make("schedule", schedule)
    t = torch.linspace(0, 1, 65).to(dtype)
    wide = found(t.double())
    for narrow, value in zip(found(t), wide, strict=True):
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, value.float())
    assert wide.alpha.dtype == found.rate(t.double()).dtype == found.inverse(t).dtype == torch.float64
    assert found.log_snr(t).dtype == found.rate(t).dtype == torch.float32


@every("schedule")
def test_levels_take_any_shape(schedule):
    found = make("schedule", schedule)
    t = grid(12)
    for shape in [(), (1,), (3, 4), (12, 1, 1, 1)]:
        one = t[: math.prod(shape)].reshape(shape)
        for value in (*found(one), found.log_snr(one), found.inverse(one), found.rate(one)):
            assert value.shape == shape


@every("schedule")
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_module_of_low_precision_keeps_the_schedule(schedule, to):
    found = make("schedule", schedule)
    before, name = found(grid()), found.fingerprint
    torch.nn.ModuleList([found]).to(to)
    assert all(torch.equal(a, b) for a, b in zip(before, found(grid()), strict=True))
    assert found.fingerprint == name


@every("schedule")
def test_state_is_saved_of_what_learns_alone(schedule):
    found = make("schedule", schedule)
    assert bool(found.state_dict()) == found.learns


@every("schedule")
def test_fingerprint_is_of_the_parameters(schedule):
    """How to learn is none of them: the fingerprint is of what was learned."""
    found = make("schedule", schedule)
    assert found.fingerprint == make("schedule", schedule).fingerprint
    node = parts(f"schedule={schedule}").config["schedule"]
    for key, value in node.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not found.learns:
            other = make("schedule", schedule, **{key: type(value)(value * 0.9)})
            assert other.fingerprint != found.fingerprint, key


def test_fingerprints_of_options_differ():
    names = [make("schedule", name).fingerprint for name in OPTIONS["schedule"]]
    assert len(set(names)) == len(names)


@TABLES
def test_the_table_is_the_published_product(name):
    """abar as a running product and 1 - abar as a running sum, which loses nothing near abar = 1."""
    schedule, abar, variance = make("schedule", name), 1.0, 0.0
    alpha_t, sigma_t = schedule(points())
    for i, beta in enumerate(published_betas(name)):
        variance, abar = variance + abar * beta, abar * (1 - beta)
        assert alpha_t[i].item() ** 2 == pytest.approx(abar, rel=1e-11 if i == 999 else 1e-12)
        assert sigma_t[i].item() ** 2 == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "beta_1", "beta_last", "abar_500", "abar_last", "even"),
    [
        ("linear", "1.000e-04", "2.000e-02", "7.86e-02", "4.036e-05", 259),
        ("cosine", "4.128e-05", "9.990e-01", "4.94e-01", "2.429e-09", 496),
        ("sigmoid_beta", "1.49e-04", "1.995e-02", "3.02e-01", "3.97e-05", 439),
        ("sigmoid", "3.0e-04", "9.990e-01", "5.00e-01", "3.0e-07", 500),
        ("scaled_linear", "8.50e-04", "1.200e-02", "2.78e-01", "4.66e-03", 354),
    ],
)
def test_published_values(name, beta_1, beta_last, abar_500, abar_last, even):
    """To the digits that are written."""
    schedule = make("schedule", name)
    table, abar = betas(schedule), schedule(points()).alpha ** 2
    found = [table[0], table[-1], abar[499], abar[-1]]
    for value, printed in zip(found, (beta_1, beta_last, abar_500, abar_last), strict=True):
        assert f"{value.item():.{printed.index('e') - 2}e}" == printed
    assert (schedule.log_snr(points()) > -1e-9).sum().item() == even  # the last index with SNR >= 1
    assert schedule.points == 1000


@DIFFUSERS
def test_diffusers_has_the_same_betas(name, theirs):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**theirs).betas
    torch.testing.assert_close(betas(make("schedule", name)).float(), reference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", [Linear, ScaledLinear, SigmoidBeta])
def test_betas_keep_the_levels_at_other_t(schedule):
    """They scale with 1000/T, so that the whole amount of noise is nearly T's whatever it is."""
    wanted = betas(schedule())
    most = schedule()(torch.tensor(1.0).double()).alpha.log().item()
    for n in (100, 250, 4000):
        found = schedule(n)
        assert betas(found)[0].item() == pytest.approx(wanted[0].item() * 1000 / n, rel=1e-9)
        assert betas(found)[-1].item() == pytest.approx(wanted[-1].item() * 1000 / n, rel=1e-9)
        assert found(torch.tensor(1.0)).alpha.log().item() == pytest.approx(most, rel=0.15)


@TABLES
def test_between_points_the_log_snr_is_linear(name):
    schedule = make("schedule", name)
    table = schedule.log_snr(points())
    for share in (0.25, 0.5):
        between = schedule.log_snr((torch.arange(999, dtype=torch.float64) + share) / 999)
        torch.testing.assert_close(between, torch.lerp(table[:-1], table[1:], share), rtol=1e-11, atol=1e-10)


@every("schedule")
def test_a_level_is_spread_over_samples(schedule):
    found = make("schedule", schedule)
    x = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    one = Level(*found(torch.tensor(0.3, dtype=torch.float64))).like(x)
    three = Level(*found(torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64))).like(x)
    assert one.alpha.shape == one.sigma.shape == three.alpha.shape == (3, 1, 1, 1)
    assert torch.equal(one.alpha[2], three.alpha[1])
    assert torch.equal(three.sigma.flatten(), found(torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)).sigma)
    assert Level(torch.ones(()).double(), torch.ones(()).double()).like(x.float()).alpha.dtype == torch.float32


def test_log_snr_is_finite_at_the_clean_level_and_at_pure_noise():
    one, nothing = torch.ones(()).double(), torch.zeros(()).double()
    assert log_snr(one, nothing).item() == pytest.approx(2 * math.log(1e6))
    assert log_snr(nothing, one).item() == pytest.approx(-2 * math.log(1e6))
    assert log_snr(80 * one, nothing).item() == pytest.approx(2 * math.log(1e6))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("linear", "points", 1),
        ("linear", "beta_min", 0),
        ("linear", "beta_min", 0.03),
        ("linear", "beta_max", 1.0),
        ("linear", "beta_max", math.nan),
        ("cosine", "points", 1),
        ("cosine", "shift", 0),
        ("cosine", "shift", math.nan),
        ("cosine", "beta_max", 1),
        ("cosine", "beta_max", 0),
        ("scaled_linear", "beta_max", 1.0),
        ("sigmoid_beta", "beta_min", 0),
        ("sigmoid", "points", 1),
        ("sigmoid", "start", 3.0),
        ("sigmoid", "tau", 0),
        ("sigmoid", "tau", math.nan),
        ("sigmoid", "beta_max", 1),
        ("vp", "beta_min", 0),
        ("vp", "beta_max", 0.1),
        ("vp", "beta_max", math.nan),
        ("ve", "sigma_min", 0),
        ("ve", "sigma_max", 0.01),
        ("edm", "sigma_min", 80.0),
        ("edm", "sigma_max", math.nan),
        ("edm", "rho", 0),
        ("flow", "shift", 0),
        ("flow", "shift", math.nan),
        ("adaptive", "carries", "eps"),
        ("adaptive", "bins", 1),
        ("adaptive", "decay", 1.0),
        ("adaptive", "decay", math.nan),
        ("adaptive", "floor", 0.0),
        ("adaptive", "warm_up", -1),
        ("adaptive", "every", 0),
    ],
)
def test_bad_arguments_are_refused_in_a_line(name, key, value):
    with pytest.raises(UserError) as refused:
        make("schedule", name, **{key: value})
    line = str(refused.value)
    assert line.startswith("schedule.")
    assert f"{key}={value}" in line
    assert "need" in line
    assert "\n" not in line


def test_too_few_points_are_refused_by_their_number():
    """20 points would bring beta_T to 1, and 12 a beta_T of 0.012 at 1,000."""
    for name in ("linear", "sigmoid_beta"):
        with pytest.raises(UserError, match=r"^schedule\..*points=20\b.*21"):
            make("schedule", name, points=20)
    with pytest.raises(UserError, match=r"^schedule\..*points=12\b.*13"):
        make("schedule", "scaled_linear", points=12)


@pytest.mark.parametrize("bad", [[0.1], [0.1, 1.0], [0.0, 0.1], [[0.1, 0.2]], [0.1, math.nan]])
def test_a_table_wants_betas_between_0_and_1(bad):
    with pytest.raises(ValueError, match="betas must be"):
        Discrete(torch.tensor(bad))


def test_the_smallest_tables_work():
    for schedule in (Linear(21), Cosine(2), ScaledLinear(13), SigmoidBeta(21), Sigmoid(2)):
        assert (schedule.log_snr(grid()).diff() < 0).all()


# Continuous time


def test_vp_in_closed_form():
    """And its rate, beta(t)/sigma_t^2."""
    t = grid(1001)[1:]
    alpha_t, sigma_t = VP(0.1, 20)(t)
    torch.testing.assert_close(alpha_t**2, (-0.1 * t - 9.95 * t**2).exp(), rtol=1e-13, atol=0)
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(VP(0.1, 20).rate(t), (0.1 + 19.9 * t) / sigma_t**2, rtol=1e-10, atol=0)
    early = torch.tensor(1e-9).double()
    assert VP(0.1, 20)(early).sigma.item() == pytest.approx(1e-5, rel=1e-7)  # sqrt(beta_min t), nothing cancelled


def test_many_betas_are_vp():
    """Linear's table tends to it as T grows."""
    t, far = grid()[1:], []
    for n in (1000, 10_000):
        far.append((Linear(n)(t).alpha - VP()(t).alpha).abs().max())
    assert far[1] < far[0] / 5
    assert far[1] < 1e-3


def test_ve_is_even_in_log_sigma():
    t = grid()
    alpha_t, sigma_t = VE(0.01, 50)(t)
    assert (alpha_t == 1).all()
    torch.testing.assert_close(sigma_t.log(), math.log(0.01) + t * math.log(5000))
    torch.testing.assert_close(VE(0.01, 50).rate(t), torch.full_like(t, 2 * math.log(5000)))


def test_edm_is_even_in_a_root_of_sigma():
    t = grid()
    alpha_t, sigma_t = EDM(0.002, 80, 7)(t)
    assert (alpha_t == 1).all()
    torch.testing.assert_close(sigma_t ** (1 / 7), 0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7)))
    torch.testing.assert_close(sigma_t[[0, -1]], torch.tensor([0.002, 80]).double())


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_flow_is_straight_and_its_shift_multiplies_sigma_over_alpha(shift):
    t = grid()[1:-1]
    alpha_t, sigma_t = Flow(shift)(t)
    torch.testing.assert_close(alpha_t + sigma_t, torch.ones_like(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(sigma_t / alpha_t, shift * t / (1 - t), rtol=1e-13, atol=0)
    torch.testing.assert_close(Flow(shift).rate(t), 2 / (t * (1 - t)), rtol=1e-10, atol=0)
    assert torch.equal(Flow()(t).sigma, t)


def test_gvp_goes_round_the_circle_at_even_speed():
    t = grid()[1:-1]
    alpha_t, sigma_t = GVP()(t)
    torch.testing.assert_close(torch.atan2(sigma_t, alpha_t), t * math.pi / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.hypot(alpha_t, sigma_t), torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(GVP().rate(t), 2 * math.pi / (math.pi * t).sin(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("schedule", "clean", "noise"),
    [
        (VP(), True, False),
        (Flow(), True, True),
        (Flow(3.0), True, True),
        (GVP(), True, True),
        (ZeroTerminal(Linear()), False, True),
        (ZeroTerminal(VP()), True, True),
        (VE(), False, False),
    ],
)
def test_ends_that_are_data_or_noise_are_so_exactly(schedule, clean, noise):
    alpha_t, sigma_t = schedule(torch.tensor([0.0, 1.0]).double())
    assert (sigma_t[0] == 0) == clean
    assert (alpha_t[1] == 0) == noise
    assert alpha_t[0] > 0
    assert sigma_t[1] > 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_has_the_same_flow(shift):
    """Its 1,000 levels are at t = 1/1000, ..., 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    sigma_t = Flow(shift)(torch.arange(1000, 0, -1).double() / 1000).sigma
    torch.testing.assert_close(sigma_t.float(), reference, rtol=1e-6, atol=0)


def test_diffusers_has_the_same_edm():
    from diffusers import EDMEulerScheduler

    reference = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, rho=7)
    reference.set_timesteps(18)
    sigma_t = EDM(0.002, 80, 7)(torch.linspace(1, 0, 18).double()).sigma
    torch.testing.assert_close(sigma_t.float(), reference.sigmas[:-1], rtol=1e-5, atol=0)


# Zero terminal SNR


@every("schedule")
def test_rescaling_keeps_the_first_level_and_ends_in_noise(schedule):
    """In between, sqrt(abar_t) is shifted and scaled."""
    other = make("schedule", schedule)
    found = ZeroTerminal(other)
    a = {s: s.log_snr(grid()[1:-1]).sigmoid().sqrt() for s in (found, other)}
    first, last = (torch.nn.functional.normalize(torch.stack(other(grid()[[0, -1]])), dim=0)[0]).tolist()
    torch.testing.assert_close(a[found], (a[other] - last) * first / (first - last), rtol=1e-9, atol=1e-12)
    alpha_t, sigma_t = found(grid())
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones(101).double(), rtol=1e-14, atol=0)
    assert found.log_snr(grid()[0]).item() == pytest.approx(other.log_snr(grid()[0]).item(), abs=1e-9)
    assert alpha_t[-1] == 0
    assert found.points == other.points


@DIFFUSERS
def test_diffusers_rescales_the_same(name, theirs):
    from diffusers import DDPMScheduler
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    schedule = make("schedule", name)
    abar = (1 - rescale_zero_terminal_snr(betas(schedule))).cumprod(0)
    alpha_t, sigma_t = ZeroTerminal(schedule)(points())
    torch.testing.assert_close(alpha_t**2, abar, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(sigma_t**2, 1 - abar, rtol=1e-10, atol=1e-15)
    shipped = DDPMScheduler(**theirs, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close((alpha_t**2)[:-1].float(), shipped[:-1], rtol=2e-4, atol=1e-7)  # theirs is in float32


def test_rescaling_loses_no_digits_near_data():
    """1 - alpha^2 of 1e-12 is not the difference of two ones."""
    t = torch.tensor(1e-11).double()
    assert ZeroTerminal(Flow())(t).sigma.item() == pytest.approx(1e-11, rel=1e-9)
    assert ZeroTerminal(VP())(t).sigma.item() == pytest.approx(VP()(t).sigma.item(), rel=1e-2)


# Learning


def gaussian(log_snr: Tensor, std: float = 0.5) -> Tensor:
    """SNR mse / 2 of the exact denoiser of data N(0, std^2): the bound's density per nat of log-SNR."""
    return ((log_snr + 2 * math.log(std)).sigmoid()) / 2


def gaussian_bound(log_snr: Tensor, std: float = 0.5) -> Tensor:
    """Its antiderivative."""
    return torch.nn.functional.softplus(log_snr + 2 * math.log(std)) / 2


def taught(schedule: Schedule, updates: int = 1000, batch: int = 256, loss=None, noise: float = 0.3, **arguments):
    """An Adaptive that has seen that many batches of noisy errors: the bound's of Gaussian data, or a known loss."""
    arguments = {"carries": "loss" if loss else "vlb", "warm_up": 50, "every": 50, "decay": 0.99} | arguments
    found, g = Adaptive(schedule, **arguments), torch.Generator().manual_seed(0)
    for _ in range(updates):
        t = ((torch.arange(batch) + torch.rand(batch, generator=g)) / batch).clamp_max(1 - 2**-24)
        factor = (noise * torch.randn(batch, generator=g) - noise**2 / 2).exp()  # of mean 1
        value = found.log_snr(t)
        mse = 2 * gaussian(value) * (-value).exp() * factor
        losses = loss(found.retimed(t.double())).float() * factor if loss else torch.ones(batch)
        found.update(t, losses, mse)
    return found


def bump(u: Tensor) -> Tensor:
    return 0.05 + (-(((u - 0.3) / 0.1) ** 2)).exp()


def bump_carried(u: Tensor) -> Tensor:
    return 0.05 * u + 0.1 * math.sqrt(math.pi) / 2 * torch.erf((u - 0.3) / 0.1)


def unevenness(carried: Tensor) -> float:
    """Of what is carried by equal steps, whose cumulated amounts are given: standard deviation over mean."""
    step = carried.diff()
    return (step.std(correction=0) / step.mean()).abs().item()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), VE(), EDM(), Flow(), GVP(), ZeroTerminal(Linear())])
def test_equal_steps_come_to_carry_equal_shares_of_the_bound(schedule):
    found = taught(schedule)
    for steps in (10, 50):
        before = unevenness(gaussian_bound(Adaptive(schedule).log_snr(grid(steps + 1))))
        after = unevenness(gaussian_bound(found.log_snr(grid(steps + 1))))
        assert after < 0.2 * before
        assert after < 0.25


@pytest.mark.parametrize("schedule", [Cosine(), Flow()])
def test_equal_steps_come_to_carry_equal_shares_of_a_known_loss(schedule):
    found = taught(schedule, loss=bump)
    before, after = (unevenness(bump_carried(s.retimed(grid(21)))) for s in (Adaptive(schedule), found))
    assert before > 1
    assert after < 0.1 * before


@pytest.mark.parametrize("schedule", [Linear(), VP(), Flow()])
def test_constant_density_leaves_the_timing_as_it_is(schedule):
    found = taught(schedule, updates=100, loss=torch.ones_like, noise=0.0)
    torch.testing.assert_close(found.knots, Adaptive(schedule).knots, rtol=1e-9, atol=1e-12)
    assert found.updates == 100


def test_constant_density_of_the_bound_leaves_the_timing_as_it_is():
    found = Adaptive(Cosine(), warm_up=0, every=1)
    t = (torch.arange(100_000).double() + 0.5) / 100_000
    found.update(t, torch.ones_like(t), 2 / (found.log_snr(t).exp() * found.rate(t)))
    torch.testing.assert_close(found.retimed(grid()), grid(), rtol=0, atol=1e-4)


def test_what_is_learned_does_not_depend_on_how_times_are_drawn():
    """Averages per level, not sums."""
    found = Adaptive(Cosine(), carries="loss", warm_up=0, every=1, floor=1e-3)
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    timings = []
    for t in (u, u**2):
        other = Adaptive(Cosine(), carries="loss", warm_up=0, every=1, floor=1e-3)
        other.update(t, bump(found.retimed(t)), torch.ones_like(t))
        timings.append(other.retimed(grid()))
    torch.testing.assert_close(*timings, rtol=0, atol=2e-3)
    assert (timings[0] - grid()).abs().max() > 0.2


@every("schedule")
def test_a_learned_timing_is_a_schedule(schedule):
    """As for the options, between the ends that it had."""
    other = make("schedule", schedule)
    found = taught(other, updates=60, batch=2000)
    assert (found.log_snr(grid(20_001)).diff() < 0).all()
    ends = torch.tensor([other.earliest, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found.log_snr(grid(2)), other.log_snr(ends), rtol=1e-12, atol=1e-9)
    assert found.earliest == 0
    inside = grid(1001)[1:-1]
    torch.testing.assert_close(found.inverse(found.log_snr(inside)), inside, rtol=0, atol=1e-9)
    extremes = found.inverse(torch.tensor([1e3, -1e3]))
    torch.testing.assert_close(extremes, grid(2), rtol=0, atol=1e-15)
    t = (found.knots[1:] + found.knots[:-1]) / 2
    if other.points is None:
        h = found.knots.diff() / 1e4
        slope = (found.log_snr(t - h) - found.log_snr(t + h)) / (2 * h)
        free = found.log_snr(t).abs() < HELD - 1
        assert free.sum() > 100
        torch.testing.assert_close(found.rate(t)[free], slope[free], rtol=1e-4, atol=0)
    assert (found.rate(grid()) > 0).all()
    assert found.rate(grid().float()).isfinite().all()


@pytest.mark.parametrize("carries", ["vlb", "loss"])
def test_what_was_learned_survives_a_checkpoint(carries):
    found, other = taught(Cosine(), updates=120, loss=bump if carries == "loss" else None), None
    other = Adaptive(Cosine(), carries=carries, warm_up=50, every=50, decay=0.99)
    untaught = other.fingerprint
    other.load_state_dict(found.state_dict())
    assert found.fingerprint == other.fingerprint != untaught
    t = torch.rand(256, generator=torch.Generator().manual_seed(1))
    for _ in range(40):  # beyond the next change
        for one in (found, other):
            one.update(t, t + 1, t)
    assert found.fingerprint == other.fingerprint
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in found.state_dict().items())
    assert found.updates == 160


def test_the_timing_changes_at_its_updates_alone():
    found, t = Adaptive(Cosine(), carries="loss", warm_up=7, every=3), torch.rand(64)
    changed = []
    for update in range(1, 19):
        before = found.knots.clone()
        found.update(t, 1 + t * update, t)
        if not torch.equal(before, found.knots):
            changed.append(update)
    assert changed == [9, 12, 15, 18]


def test_old_losses_are_forgotten():
    found, t = Adaptive(Cosine(), carries="loss", decay=0.9, warm_up=0, every=1), grid(5000)
    found.update(t, bump(t), t)
    bumped = found.knots.clone()
    for _ in range(100):
        found.update(t, bump(1 - found.retimed(t)), t)
    fresh = Adaptive(Cosine(), carries="loss", decay=0.0, warm_up=0, every=1)
    fresh.update(t, bump(1 - t), t)
    assert (found.knots - bumped).abs().max() > 0.2
    torch.testing.assert_close(found.knots, fresh.knots, rtol=0, atol=1e-3)


def test_losses_of_nothing_leave_the_timing_as_it_is():
    found, t = Adaptive(Flow(), carries="loss", warm_up=0, every=1), torch.rand(8)
    found.update(t, torch.zeros(8), torch.zeros(8))
    torch.testing.assert_close(found.knots, Adaptive(Flow()).knots)


# Schedules agree on the bound


def between(found: Schedule, cleanest: float, noisiest: float, n: int) -> tuple[Tensor, float]:
    """n times even between the schedule's times of two log-SNRs, and how far these are apart."""
    start, end = found.inverse(torch.tensor([cleanest, noisiest]).double()).tolist()
    return start + (torch.arange(n).double() + 0.5) / n * (end - start), end - start


def any_schedule() -> dict[str, Schedule]:
    options: dict[str, Schedule] = {name: make("schedule", name) for name in OPTIONS["schedule"]}
    return {**options, "taught cosine": taught(Cosine(), updates=200), "taught flow": taught(Flow(), updates=200)}


def test_the_bound_of_gaussian_data_is_the_same_along_every_schedule():
    """The mean of SNR rate mse / 2 over uniform t between two levels, in closed form."""
    ends = torch.tensor([-5.0, 7.0]).double()
    expected = gaussian_bound(ends).diff().item()
    for name, found in any_schedule().items():
        t, length = between(found, 7.0, -5.0, 20_000)
        density = gaussian(found.log_snr(t)) * found.rate(t)
        assert length * density.mean().item() == pytest.approx(expected, rel=1e-3), name


def test_the_bound_of_a_mixture_is_the_same_along_every_schedule():
    """With noisy samples and their exact posterior variance, against an integral over the log-SNR."""
    mixture, n = triangle(), 40_000
    x_0, _ = mixture.draw(n, seed=1)
    eps, shuffled = normals(n, 2, seed=2), torch.randperm(n, generator=torch.Generator().manual_seed(3))

    def snr_mse(log_snr: Tensor) -> Tensor:
        alpha_t, sigma_t = (log_snr.sigmoid().sqrt()[shuffled, None], (-log_snr).sigmoid().sqrt()[shuffled, None])
        _, variance = mixture.posterior(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t)
        return log_snr[shuffled].exp() * variance / 2

    expected = 12 * snr_mse(-5 + 12 * (torch.arange(n).double() + 0.5) / n).mean().item() / 2
    for name, found in any_schedule().items():
        t, length = between(found, 7.0, -5.0, n)
        bound = length * (snr_mse(found.log_snr(t)) * found.rate(t)[shuffled]).mean().item() / 2
        assert bound == pytest.approx(expected, rel=0.01), name
