"""Weights by hand, by their papers and by diffusers; their formulas, ends and refusals."""

import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.loss import WeightedLoss
from denoiselab.target import EDM, Eps, Flow, V
from denoiselab.weighting import CosMap, InverseVariance, MinSNR, SoftMinSNR, Uncertainty, VLBBeta, VLBBetaTilde
from exact import every, make, noisy_levels, normals, telling_levels
from losses import TABLES, Says, weighings, weights


@every("schedule")
@pytest.mark.parametrize(
    ("weighting", "target"), [("snr", Eps()), ("snr_plus_one", V()), ("inverse_variance", Flow()), ("edm", EDM(0.5))]
)
def test_the_plain_mse_of_a_target_under_its_own_name(schedule, weighting, target):
    found = make("schedule", schedule)
    t = noisy_levels(found)[0]
    named = make("weighting", weighting, sigma_data=0.5)
    unit = make("weighting", "unit", target=target)
    torch.testing.assert_close(weights(named, found, t), weights(unit, found, t), rtol=1e-12, atol=0)


BY_HAND = {
    "unit": (2, 5, 1.25),  # of v
    "snr": (1, 4, 0.25),
    "snr_plus_one": (2, 5, 1.25),
    "truncated_snr": (1, 4, 1),
    "inverse_variance": (4, 9, 2.25),
    "edm": (5, 8, 4.25),
    "min_snr": (1, 3, 0.25),
    "soft_min_snr": (0.75, 12 / 7, 3 / 13),
    "p2": (1 / 3, 2 / 3, 1 / 9),
    "vlb": (1.5, 6, 0.375),
    "sigmoid": (1.5 / 3, 6 / 9, 0.375 / 1.5),
    "cosmap": (16 / math.pi, 2 * 81 / (5 * math.pi), 2 * 5.0625 / (1.25 * math.pi)),
    "uncertainty": (5, 8, 4.25),
}


@every("weighting")
def test_weights_worked_out_by_hand(weighting):
    """At SNR = 1, 4 and 1/4, with a rate of 3, gamma = 3, k = 2, b = log(1/2) and sigma_data = 1/2."""
    if weighting in TABLES:
        return
    chosen = {"min_snr": {"gamma": 3.0}, "soft_min_snr": {"gamma": 3.0}, "p2": {"k": 2.0, "gamma": 1.0}}
    chosen["sigmoid"] = {"b": math.log(1 / 2)}
    weigh = make("weighting", weighting, target=V(), sigma_data=0.5, **chosen.get(weighting, {}))
    alpha_t, sigma_t = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]).double()
    found = weigh.weight(alpha_t, sigma_t, torch.full((3,), 3.0).double())
    torch.testing.assert_close(found, torch.tensor(BY_HAND[weighting]).double(), rtol=1e-6, atol=0)


@every("schedule")
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
def test_min_snr_as_its_paper_writes_it_for_eps_and_v(schedule, gamma):
    found, weigh = make("schedule", schedule), make("weighting", "min_snr", gamma=gamma)
    t, alpha_t, sigma_t = noisy_levels(found)
    snr = (alpha_t / sigma_t)[:, 0] ** 2
    capped = snr.clamp_max(gamma)
    x_0, eps, output = (normals(len(t), 16, seed=seed) for seed in (1, 2, 3))
    for y, factor in ((Eps(), capped / snr), (V(), capped / (snr + 1))):
        loss, _ = WeightedLoss(weigh)(Denoiser(Says(output), y), found, x_0, eps, t)
        plain = (output - y(x_0, eps, alpha_t, sigma_t)).square().mean(1)
        torch.testing.assert_close(loss, factor * plain, rtol=1e-10, atol=0)


def test_min_snr_is_not_the_other_form_for_v():
    """min(SNR + 1, gamma)/(SNR + 1) of public code, at SNR = gamma."""
    sigma_t = torch.tensor(1 / 6).double().sqrt()
    alpha_t = (1 - sigma_t**2).sqrt()
    factor = MinSNR(5.0).weight(alpha_t, sigma_t, torch.ones(())) / V().precision(alpha_t, sigma_t)
    assert factor.item() == pytest.approx(5 / 6)


def test_soft_min_snr_as_written_on_the_output_of_edm():
    """(sigma sigma_data)^2/(sigma^2 + sigma_data^2)^2 on F, with gamma = 1/sigma_data^2 = 4; below min(SNR, gamma)
    everywhere, and half of it where the two meet."""
    alpha_t, sigma = torch.ones(200).double(), torch.logspace(-3, 3, 200).double()
    on_f = (sigma * 0.5) ** 2 / (sigma**2 + 0.5**2) ** 2
    found = SoftMinSNR(4.0).weight(alpha_t, sigma, alpha_t)
    torch.testing.assert_close(found, on_f * EDM(0.5).precision(alpha_t, sigma), rtol=1e-12, atol=0)
    hard = MinSNR(4.0).weight(alpha_t, sigma, alpha_t)
    assert (found < hard).all()
    assert (found >= hard / 2 * (1 - 1e-12)).all()


def test_diffusers_weighs_the_straight_path_alike():
    """Its tables for SD3; cosmap there stands on flow's error."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    s = torch.linspace(0.01, 1, 100)
    theirs = {name: compute_loss_weighting_for_sd3(name, s) for name in ("sigma_sqrt", "cosmap")}
    found = InverseVariance().weight(1 - s, s, s)
    torch.testing.assert_close(found, theirs["sigma_sqrt"], rtol=1e-6, atol=0)
    found = CosMap().weight(1 - s, s, s) / Flow().precision(1 - s, s)
    torch.testing.assert_close(found, theirs["cosmap"], rtol=1e-6, atol=0)


def test_cosmap_gives_flow_the_density_of_the_cosine_schedules_levels():
    """Uniform u has log-SNR 2 log cot(pi u/2); on the straight path those levels have the density that weighs."""
    u = torch.linspace(1e-3, 1 - 1e-3, 2001).double()
    s = 1 / (1 + 1 / torch.tan(math.pi * u / 2))
    weight = CosMap().weight(1 - s, s, s) / Flow().precision(1 - s, s)
    slope = torch.gradient(s, spacing=(u,), edge_order=2)[0]
    torch.testing.assert_close(weight * slope, torch.ones_like(u), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_diffusers_has_the_same_snr_weights(name):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    reference = DDPMScheduler(beta_schedule=name, beta_start=1e-4, beta_end=0.02)
    index = torch.arange(50, 999)
    snr = compute_snr(reference, index)
    found = make("schedule", {"linear": "linear"}.get(name, "cosine"))
    t = index.double() / 999
    theirs = {
        "min_snr": snr.clamp_max(5),
        "snr_plus_one": snr + 1,
        "truncated_snr": snr.clamp_min(1),
        "p2": snr / (1 + snr),
        "soft_min_snr": 1 / (1 / snr + 1 / 4),
    }
    for weighting, expected in theirs.items():
        mine = weights(make("weighting", weighting), found, t)
        torch.testing.assert_close(mine, expected.double(), rtol=1e-4, atol=0, msg=weighting)


def beta_table(name: str) -> Tensor:
    if name == "linear":
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    u = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp_max(0.999)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_of_ddpms_bound(name, dtype):
    """beta^2/(2 sigma^2 alpha (1 - abar)) on eps, from betas alone; times T and the SNR."""
    beta = beta_table(name)
    abar = (1 - beta).cumprod(0)
    beta_tilde = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    snr, found = abar / (1 - abar), make("schedule", name)
    t = torch.linspace(0, 1, 1000, dtype=dtype)
    precision = 1e-4 if dtype == torch.float32 else 1e-9
    on_eps = beta**2 / (2 * beta * (1 - beta) * (1 - abar))
    mine = weights(VLBBeta(found), found, t).double()
    torch.testing.assert_close(mine, 1000 * snr * on_eps, rtol=precision, atol=0)
    assert mine[0].item() / 1000 / snr[0].item() == pytest.approx(1 / (2 * (1 - beta[0].item())), rel=1e-5)
    on_eps = beta[1:] ** 2 / (2 * beta_tilde * (1 - beta[1:]) * (1 - abar[1:]))
    mine = weights(VLBBetaTilde(found), found, t).double()
    torch.testing.assert_close(mine[1:], 1000 * snr[1:] * on_eps, rtol=precision, atol=0)
    torch.testing.assert_close(mine[1:], 500 * (snr[:-1] - snr[1:]), rtol=precision, atol=0)
    assert mine[0] == 0


@every("schedule")
def test_the_bounds_weights_add_up_to_the_drop_of_the_snr(schedule):
    """Over uniform t, and over the points of a table: half the SNR at the start less half that at the end."""
    found = make("schedule", schedule)
    ends = torch.tensor([found.earliest, 1.0]).double()
    first, last = found.log_snr(ends).tolist()
    t = found.inverse(torch.linspace(first, last, 20_001).double())
    total = torch.trapezoid(weights(make("weighting", "vlb"), found, t), t).item()
    assert total == pytest.approx((math.exp(first) - math.exp(last)) / 2, rel=2e-3)
    if found.points is not None:
        points = torch.linspace(0, 1, found.points, dtype=torch.float64)
        total = weights(VLBBetaTilde(found), found, points).mean().item()
        assert total == pytest.approx((math.exp(first) - math.exp(last)) / 2, rel=1e-9)


@every("schedule")
@pytest.mark.parametrize("weighting", TABLES)
def test_between_points_the_step_is_as_long(schedule, weighting):
    """Their ratio to the continuous bound is continuous, and tends to 1 where a step is short."""
    found = make("schedule", schedule)
    (_, weigh), *_ = weighings(weighting, found)
    t = torch.linspace(0.2, 0.8, 5001).double()
    ratio = weights(weigh, found, t) / weights(make("weighting", "vlb"), found, t)
    assert abs(ratio.log()).max() < 0.02


@every("schedule")
@pytest.mark.parametrize("weighting", TABLES)
def test_a_table_is_asked_for_in_a_line(schedule, weighting):
    found = make("schedule", schedule)
    if found.points is None:
        with pytest.raises(UserError, match=r"^weighting\.schedule=\w+: need a table of points[^\n]*$"):
            make("weighting", weighting, schedule=found)


@every("schedule", "weighting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_and_not_negative_up_to_both_ends(schedule, weighting, dtype):
    found = make("schedule", schedule)
    for _, weigh in weighings(weighting, found):
        weight = weights(weigh, found, torch.linspace(found.earliest, 1, 1001, dtype=dtype))
        assert weight.dtype == dtype
        assert weight.isfinite().all()
        assert (weight >= 0).all()
        assert (weight > 0).any()


@every("schedule", "weighting")
def test_weights_do_not_know_the_scale_of_the_level(schedule, weighting):
    found = make("schedule", schedule)
    t, alpha_t, sigma_t = noisy_levels(found)
    for _, weigh in weighings(weighting, found):
        scaled = weigh.weight(80 * alpha_t, 80 * sigma_t, found.rate(t))
        torch.testing.assert_close(scaled, weights(weigh, found, t), rtol=1e-10, atol=0)


@every("schedule", "weighting")
def test_the_formula_is_the_weight(schedule, weighting):
    """The text that people read, evaluated."""
    found = make("schedule", schedule)
    for target, weigh in weighings(weighting, found):
        t, alpha_t, sigma_t = (v[2:] for v in telling_levels(found, target))
        snr = (alpha_t / sigma_t) ** 2
        names = {"SNR": snr, "log_snr": snr.log(), "rate": found.rate(t), "pi": math.pi}
        names |= {"min": lambda a, b: a.clamp_max(b), "max": lambda a, b: a.clamp_min(b)}
        names |= {"sqrt": torch.sqrt, "exp": torch.exp, "sigmoid": torch.sigmoid}
        if found.points is not None:
            alpha_s, sigma_s = found(t - 1 / (found.points - 1))
            names["SNR_s"] = (alpha_s / sigma_s) ** 2
        if isinstance(weigh, Uncertainty):
            nn.init.normal_(weigh.readout, generator=torch.Generator().manual_seed(0))
            names["u"] = weigh.u(alpha_t, sigma_t)
        value = eval(weigh.formula.replace("^", "**"), names) + torch.zeros_like(alpha_t)
        torch.testing.assert_close(weights(weigh, found, t), value, rtol=1e-9, atol=0)


@every("target", "weighting")
def test_the_formula_is_told(target, weighting):
    weigh = make("weighting", weighting, target=make("target", target))
    assert weigh.formula
    assert weigh.formula in WeightedLoss(weigh).formula


REFUSED = {
    "min_snr": {"gamma": (0, -1, math.nan)},
    "soft_min_snr": {"gamma": (0, -1, math.nan)},
    "p2": {"k": (0, -1, math.nan), "gamma": (-1, math.nan)},
    "edm": {"sigma_data": (0, -1, math.nan)},
    "uncertainty": {"channels": (0, -3), "sigma_data": (0,)},
}


@pytest.mark.parametrize(
    ("weighting", "name", "value"), [(w, n, v) for w, a in REFUSED.items() for n in a for v in a[n]]
)
def test_a_bad_value_is_refused_in_a_line(weighting, name, value):
    with pytest.raises(UserError, match=rf"^weighting\.{name}={value}: need [^\n]*$"):
        make("weighting", weighting, **{name: value})
