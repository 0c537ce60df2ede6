"""Tables of betas against their papers and diffusers."""

import itertools
import math

import pytest
import torch

from denoiselab.errors import UserError
from denoiselab.schedule import Cosine, Discrete, Linear, ScaledLinear, Sigmoid, SigmoidBeta
from exact import grid, make
from schedules import DIFFUSERS, TABLES, betas, points


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
