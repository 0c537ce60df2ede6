import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.errors import UserError
from denoiselab.schedule import Cosine, Discrete, Level, Linear, log_snr
from exact import OPTIONS, every, grid, make, parts

TABLES = pytest.mark.parametrize("name", ["linear", "cosine"])


def points(n: int = 1000) -> Tensor:
    """The times of a table's T points."""
    return torch.arange(n, dtype=torch.float64) / (n - 1)


def published_betas(name: str) -> list[float]:
    """The betas as the papers write them, in plain Python."""
    if name == "linear":
        return [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    return [min(1 - after / before, 0.999) for before, after in itertools.pairwise(f)]


def betas(schedule: Discrete) -> Tensor:
    """The table's betas, from its levels."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule(points(schedule.points)).alpha ** 2])
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
    found = make("schedule", schedule)
    t = torch.cat([grid(), points()])
    torch.testing.assert_close(found.inverse(found.log_snr(t)), t, rtol=0, atol=1e-10)


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
    """Against central differences that stay inside the segments of a table."""
    found, h = make("schedule", schedule), 1e-6
    t = (torch.arange(0, 999, 7, dtype=torch.float64) + 0.37) / 999
    slope = (found.log_snr(t - h) - found.log_snr(t + h)) / (2 * h)
    torch.testing.assert_close(found.rate(t), slope, rtol=1e-6, atol=0)
    assert (found.rate(grid()) > 0).all()


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
def test_no_state_is_saved(schedule):
    assert not make("schedule", schedule).state_dict()


@every("schedule")
def test_fingerprint_is_of_the_parameters(schedule):
    found = make("schedule", schedule)
    assert found.fingerprint == make("schedule", schedule).fingerprint
    node = parts(f"schedule={schedule}").config["schedule"]
    for key, value in node.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
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
    [("linear", 1e-4, 0.02, 0.0786, 4.036e-5, 259), ("cosine", 4.128e-5, 0.999, 0.4938, 2.429e-9, 496)],
)
def test_published_values(name, beta_1, beta_last, abar_500, abar_last, even):
    schedule = make("schedule", name)
    table, abar = betas(schedule), schedule(points()).alpha ** 2
    assert table[0].item() == pytest.approx(beta_1, rel=2e-4)
    assert table[-1].item() == pytest.approx(beta_last, rel=1e-9)
    assert abar[499].item() == pytest.approx(abar_500, rel=7e-4)
    assert abar[-1].item() == pytest.approx(abar_last, rel=2e-4)
    assert schedule.log_snr(points()).abs().argmin().item() + 1 == even
    assert schedule.points == 1000


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_diffusers_has_the_same_betas(name, theirs):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(beta_schedule=theirs, beta_start=1e-4, beta_end=0.02).betas
    torch.testing.assert_close(betas(make("schedule", name)).float(), reference, rtol=1e-6, atol=1e-9)


def test_linear_keeps_its_levels_at_other_t():
    """The betas scale with 1000/T, so that the whole amount of noise is nearly T's whatever it is."""
    for n in (100, 250, 4000):
        schedule = Linear(n)
        assert betas(schedule)[0].item() == pytest.approx(0.1 / n, rel=1e-9)
        assert betas(schedule)[-1].item() == pytest.approx(20 / n, rel=1e-9)
        assert schedule(torch.tensor(1.0)).alpha.log().item() == pytest.approx(-5.06, rel=0.15)


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
    """20 points would bring beta_T to 1."""
    with pytest.raises(UserError, match=r"^schedule\..*points=20\b.*21"):
        make("schedule", "linear", points=20)


@pytest.mark.parametrize("bad", [[0.1], [0.1, 1.0], [0.0, 0.1], [[0.1, 0.2]], [0.1, math.nan]])
def test_a_table_wants_betas_between_0_and_1(bad):
    with pytest.raises(ValueError, match="betas must be"):
        Discrete(torch.tensor(bad))


def test_the_smallest_tables_work():
    for schedule in (Linear(21), Cosine(2)):
        assert (schedule.log_snr(grid()).diff() < 0).all()
