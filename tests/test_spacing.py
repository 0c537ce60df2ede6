"""Where noise levels lie: on every schedule, and each spacing by its formula."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.errors import UserError
from denoiselab.sampler import DDIM, Karras, Leading, Linspace, LogSNR, Rung, Trailing
from denoiselab.sampler.spacing import Quadratic
from denoiselab.schedule import EDM, GVP, LEAST_RATIO, RATIO, VE, VP, Cosine, Flow, Linear, Schedule, ZeroTerminal
from exact import OPTIONS, every, make
from walks import schedule_of, spacing_of

GRIDS = [(Trailing, "trailing"), (Leading, "leading"), (Linspace, "linspace")]


def untold(schedule: Schedule, spacing: str, steps: int) -> list[Rung]:
    return DDIM(spacing_of(spacing), steps).levels(schedule)


def sigma(schedule: Schedule, times: Tensor) -> Tensor:
    alpha_t, sigma_t = schedule(times)
    return sigma_t / alpha_t


class Even(Schedule):
    """A schedule without points: log-SNR from 10 to -10, straight."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value = 10 - 20 * t
        return value.sigmoid().sqrt(), (-value).sigmoid().sqrt()


@every("spacing", "schedule")
def test_levels_fall_strictly_to_the_data(spacing, schedule):
    """Between earliest and 1, noisy ones that training meets, so that every walk divides by sigma_t; and the clean."""
    found = schedule_of(schedule)
    for steps in (1, 2, 5, 7, 10, 13, 50, 999, 1000):
        times = spacing_of(spacing)(found, steps)
        levels = untold(found, spacing, steps)
        assert times.shape == (steps,)
        assert times.dtype == torch.float64
        assert ((times >= found.earliest) & (times <= 1)).all()
        assert (found(times).sigma > 0).all()
        assert len(levels) == steps + 1
        assert levels[-1] == (1.0, 0.0)
        assert all(isinstance(value, float) for level in levels for value in level)
        assert all(t.ratio > s.ratio for t, s in itertools.pairwise(levels))
        assert levels[0].ratio <= RATIO * (1 + 1e-9)
        assert levels[-2].ratio > LEAST_RATIO * (1 - 1e-6)
        told = torch.tensor(levels[:-1], dtype=torch.float64).T
        torch.testing.assert_close(told, torch.stack(found(times)), rtol=0, atol=1e-6)  # alpha is held at sigma/1e6


@every("spacing")
@pytest.mark.parametrize("steps", [1, 2, 13, 1500])
def test_levels_fall_strictly_on_a_continuous_schedule(spacing, steps):
    levels = untold(Even(), spacing, steps)
    assert len(levels) == steps + 1
    assert all(t.ratio > s.ratio for t, s in itertools.pairwise(levels))


@every("schedule")
@pytest.mark.parametrize("steps", [1, 2, 13, 50])
def test_trailing_linspace_and_log_snr_start_at_pure_noise(schedule, steps):
    found = schedule_of(schedule)
    for spacing in ("trailing", "linspace", "log_snr"):
        assert spacing_of(spacing)(found, steps)[0] == 1


@every("schedule")
@pytest.mark.parametrize("steps", [2, 13, 50])
def test_all_but_trailing_end_at_the_cleanest_level(schedule, steps):
    found = schedule_of(schedule)
    for spacing in set(OPTIONS["spacing"]) & {"leading", "linspace", "log_snr", "karras"}:
        assert spacing_of(spacing)(found, steps)[-1].item() == pytest.approx(found.earliest, abs=1e-12)


@pytest.mark.parametrize(("spacing", "name"), GRIDS)
@pytest.mark.parametrize("steps", [2, 4, 5, 10, 13, 16, 50, 300, 999, 1000])
def test_diffusers_visits_the_same_points(spacing, name, steps):
    """Points are counted from 0 there. 16 trailing steps fall on halves, which are rounded to the even point of
    1..T (Lin et al. 2023, table 2)."""
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(timestep_spacing=name, steps_offset=0)
    reference.set_timesteps(steps)
    index = spacing()(Linear(), steps) * 999
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    assert index.round().long().tolist() == reference.timesteps.tolist()


@every("schedule")
@pytest.mark.parametrize("steps", [3, 20])
def test_log_snr_spacing_is_even_in_log_snr(schedule, steps):
    found = schedule_of(schedule)
    log_snr = found.log_snr(LogSNR()(found, steps))
    torch.testing.assert_close(log_snr, torch.linspace(log_snr[0], log_snr[-1], steps).double(), rtol=1e-6, atol=1e-6)
    earliest = torch.tensor(found.earliest, dtype=torch.float64)
    assert log_snr[-1].item() == pytest.approx(found.log_snr(earliest).item(), abs=1e-9)


@every("schedule")
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_spacing_is_even_in_a_root_of_sigma(schedule, rho):
    """And bounded by sigma_max where the schedule goes beyond it."""
    found = schedule_of(schedule)
    for sigma_max in (2.0, 80.0, 1e9):
        times = make("spacing", "karras", rho=rho, sigma_max=sigma_max)(found, 18)
        root = (found.log_snr(times) / -2).exp() ** (1 / rho)
        first = min(sigma_max, (found.log_snr(torch.ones(()).double()) / -2).exp().item())
        assert root[0].item() ** rho == pytest.approx(first, rel=1e-9)
        torch.testing.assert_close(root.diff(), root.diff()[:1].expand(17), rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [2, 10, 13, 50])
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VE()])
def test_quadratic_is_even_in_the_root_of_t(schedule, steps):
    times = Quadratic()(schedule, steps)
    expected = [((steps - 1 - i) / (steps - 1)) ** 2 for i in range(steps)]
    torch.testing.assert_close(times, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_quadratic_is_ddims_but_for_rounding(steps):
    """linspace(0, sqrt(0.8 T), N)^2 of T = 1000, each rounded down to a whole index from 0."""
    published = [int((i / (steps - 1) * math.sqrt(800)) ** 2 + 1e-9) for i in range(steps)]
    found = Quadratic(0.8)(Linear(), steps).flip(0) * 1000
    assert (found + 1e-6).floor().long().tolist() == published


@every("schedule")
@pytest.mark.parametrize("reach", [1.0, 0.8, 0.3])
def test_quadratic_goes_from_its_reach_to_the_cleanest_level(schedule, reach):
    found = schedule_of(schedule)
    for steps in (2, 20, 1000):
        times = make("spacing", "quadratic", reach=reach)(found, steps)
        assert times[0].item() == pytest.approx(reach, rel=1e-15)
        assert times[0] <= reach
        assert times[-1].item() == pytest.approx(found.earliest, rel=1e-12, abs=1e-15)
        assert (times.diff().diff() > 0).all()  # ever closer
    assert make("spacing", "quadratic", reach=reach)(found, 1).item() == pytest.approx(reach, rel=1e-15)


@pytest.mark.parametrize("reach", [0, -0.5, 1.1, math.nan])
def test_a_bad_reach_is_refused_in_a_line(reach):
    with pytest.raises(UserError, match=rf"^spacing\.reach={reach}: need [^\n]*$"):
        make("spacing", "quadratic", reach=reach)


@pytest.mark.parametrize("schedule", [VP(), Flow(), GVP()])
@pytest.mark.parametrize("spacing", [Linspace(), LogSNR(), Karras(), Quadratic()])
def test_where_the_schedule_ends_in_data_the_last_level_has_the_least_ratio(spacing, schedule):
    assert sigma(schedule, spacing(schedule, 20))[-1].item() == pytest.approx(LEAST_RATIO, rel=1e-6)


@pytest.mark.parametrize("schedule", [Flow(), Flow(3.0), GVP(), ZeroTerminal(Linear())])
def test_log_snr_spacing_starts_at_pure_noise_and_goes_on_from_the_bound(schedule):
    times = LogSNR()(schedule, 21)
    assert schedule(times).alpha[0] == 0
    least = schedule.log_snr(times[-1]).item()
    expected = torch.linspace(-2 * math.log(RATIO), least, 21, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(times), expected, rtol=0, atol=1e-6)


@every("schedule")
def test_karras_starts_at_its_sigma_max_or_the_noisiest_level(schedule):
    found = schedule_of(schedule)
    noisiest = math.exp(found.log_snr(torch.ones(()).double()).item() / -2)
    assert sigma(found, Karras()(found, 18))[0].item() == pytest.approx(min(80, noisiest), rel=1e-9)


def test_karras_levels_are_edms_own_grid():
    """EDM is the schedule on which they are even in t."""
    torch.testing.assert_close(Karras()(EDM(), 18), torch.linspace(1, 0, 18).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        sigma(Flow(), Karras(sigma_max=50)(Flow(), 18))[[0, -1]], torch.tensor([50, LEAST_RATIO]).double()
    )


@pytest.mark.parametrize("steps", [2, 10, 18, 50])
def test_diffusers_has_the_same_karras_sigmas(steps):
    """Of EDM's range, and of Stable Diffusion's betas."""
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

    reference = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, rho=7)
    reference.set_timesteps(steps)
    torch.testing.assert_close(sigma(EDM(), Karras()(EDM(), steps)).float(), reference.sigmas[:-1], rtol=1e-5, atol=0)

    reference = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )
    reference.set_timesteps(steps)
    schedule = make("schedule", "scaled_linear")
    torch.testing.assert_close(
        sigma(schedule, Karras()(schedule, steps)).float(), reference.sigmas[:-1], rtol=2e-4, atol=0
    )  # its table is in float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_diffusers_has_the_same_flow_levels(shift, steps):
    """Trailing times, as its pipelines pass them in, shifted."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    schedule, expected = Flow(shift), torch.as_tensor(reference.sigmas)[:-1]
    sigma_t = schedule(Trailing()(schedule, steps)).sigma
    torch.testing.assert_close(sigma_t.float(), expected, rtol=1e-6, atol=0)


@every("spacing")
@pytest.mark.parametrize("schedule", [VP(), VE(), EDM(), Flow(), GVP()])
def test_any_number_of_levels_is_found_in_continuous_time(spacing, schedule):
    times = spacing_of(spacing)(schedule, 1500)
    assert (times.diff() < 0).all()
    assert (schedule.log_snr(times).diff() > 0).all()


def test_levels_below_the_least_ratio_are_refused_in_a_line():
    """20,000 even times would put two below 1e-4."""
    with pytest.raises(ValueError, match=r"^steps=20000: Linspace finds no 20000 distinct levels on this schedule$"):
        Linspace()(Flow(), 20_000)
