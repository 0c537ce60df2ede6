"""What every schedule is: levels, their log-SNR and its slope, inverses and ends, in any precision and shape."""

import math

import pytest
import torch

from denoiselab.errors import UserError
from denoiselab.schedule import LEAST_RATIO, Level, Schedule, log_snr
from exact import OPTIONS, every, grid, make, parts_with
from schedules import HELD, points


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
    node = parts_with("schedule", schedule).config["schedule"]
    for key, value in node.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not found.learns:
            other = make("schedule", schedule, **{key: type(value)(value * 0.9)})
            assert other.fingerprint != found.fingerprint, key


def test_fingerprints_of_options_differ():
    names = [make("schedule", name).fingerprint for name in OPTIONS["schedule"]]
    assert len(set(names)) == len(names)


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
