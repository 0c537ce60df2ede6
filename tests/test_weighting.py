import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from denoiselab.compose import conf_dir
from denoiselab.data import Samples
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.loss import WeightedLoss
from denoiselab.metrics.loss_by_t import PANELS, Buckets, held_out_losses
from denoiselab.schedule import Schedule
from denoiselab.target import EDM, Eps, Flow, V
from denoiselab.weighting import CosMap, InverseVariance, MinSNR, SoftMinSNR, Uncertainty, VLBBeta, VLBBetaTilde
from exact import OPTIONS, ExactNet, Mixture, eight_gaussians, every, make, noisy_levels, normals, parts, triangle
from test_target import telling_levels

OWN = ("WeightedLoss", "Hybrid", "LearnedHybrid")
LOSSES = [
    name
    for name in OPTIONS["loss"]
    if any(f"_target_: denoiselab.loss.{own}\n" in (conf_dir() / "loss" / f"{name}.yaml").read_text() for own in OWN)
]
"""Losses of one level at a time and any target; consistency, distillation and mixed prediction have their own tests."""

TABLES = ("vlb_beta", "vlb_beta_tilde")
"""Weightings of tables, which other schedules do not have."""


class Says(nn.Module):
    """A network that answers y whatever it is asked."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = nn.Parameter(y)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.y


class Told(nn.Module):
    """A network that answers y, made of something else."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.answer, self.dtype_like = y, nn.Parameter(torch.zeros((), dtype=y.dtype))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.answer


def weights(weighting, found: Schedule, t: Tensor) -> Tensor:
    alpha_t, sigma_t = found(t)
    return weighting.weight(alpha_t, sigma_t, found.rate(t))


def weighings(weighting: str, schedule: Schedule) -> Iterator:
    """The option on a schedule: with every target as the run's where it follows the run's."""
    if weighting in TABLES and schedule.points is None:
        pytest.skip("has no table")
    for name in OPTIONS["target"] if weighting == "unit" else ["v"]:
        target = make("target", name, sigma_data=0.5)
        yield target, make("weighting", weighting, target=target, schedule=schedule, sigma_data=0.5)


@every("schedule", "weighting")
def test_the_loss_and_its_gradient_are_the_same_whichever_target_expresses_them(schedule, weighting):
    """A common x_0_hat, told in every target to the loss of one run."""
    found = make("schedule", schedule)
    speakers = [make("target", name, sigma_data=0.5) for name in OPTIONS["target"]]
    t, alpha_t, sigma_t = telling_levels(found, *speakers)
    x_0, eps, said = (normals(len(t), 16, seed=seed) for seed in (1, 2, 3))
    for _, weigh in weighings(weighting, found):
        weight, error = weights(weigh, found, t), (said - x_0).square().mean(1)
        assert (weight > 0).any()
        slope = weight * 2 * (said - x_0) / 16
        for speaks in speakers:
            x_0_hat = said.clone().requires_grad_()
            eps_hat = (alpha_t * x_0 + sigma_t * eps - alpha_t * x_0_hat) / sigma_t
            denoiser = Denoiser(Told(speaks(x_0_hat, eps_hat, alpha_t, sigma_t)), speaks)
            loss, told = WeightedLoss(weigh)(denoiser, found, x_0, eps, t)
            torch.testing.assert_close(loss, weight[:, 0] * error, rtol=1e-10, atol=0)
            torch.testing.assert_close(told["mse"], error, rtol=1e-10, atol=0)
            assert not told["mse"].requires_grad
            loss.sum().backward()
            assert ((x_0_hat.grad - slope).abs() / (1 + sigma_t / alpha_t) <= 1e-10 * weight).all()


@every("schedule", "target")
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_option_is_finite_per_sample_with_a_gradient(schedule, target, loss):
    found = parts(f"loss={loss}").make("loss")
    levels, says = make("schedule", schedule), make("target", target)
    net, t = (
        Says(normals(16, 4 * found.denoiser.net_outputs, seed=1)),
        (torch.arange(16).double()[:, None] + 0.5) / 16,
    )
    value, told = found(found.denoiser(net, says), levels, normals(16, 4, seed=2), normals(16, 4, seed=3), t)
    assert value.shape == (16,)
    assert "mse" in told
    for part in told.values():
        assert part.shape == (16,)
        assert part.isfinite().all()
        assert not part.requires_grad
    (value * torch.arange(16)).sum().backward()
    assert net.y.grad.isfinite().all()
    assert (net.y.grad[1:].abs().sum(1) > 0).all()
    assert found.formula


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (3, 2, 4, 4), (2, 1, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_option_takes_any_batch_and_rank(loss, shape, dtype):
    found = parts(f"loss={loss}").make("loss")
    target, levels = parts(f"loss={loss}").target, make("schedule", "cosine")
    net = Says(normals(shape[0], found.denoiser.net_outputs * shape[1], *shape[2:], seed=1).to(dtype))
    x_0, eps = (normals(*shape, seed=seed).to(dtype) for seed in (2, 3))
    t = torch.linspace(0.1, 0.9, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    value, told = found(found.denoiser(net, target), levels, x_0, eps, t)
    for tensor in (value, *told.values()):
        assert tensor.shape == shape[:1]
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_option_falls_in_training(loss):
    """On the eight Gaussians, twenty steps of a small network."""
    run = parts(f"loss={loss}", "data=8gaussians", "model=mlp", "model.width=32", "model.depth=1")
    torch.manual_seed(0)
    found = run.make("loss")
    denoiser = run.denoiser_class(run.make("model"), run.target, run.sigma_data)
    x_0, eps = run.data.train.x_0[:256], torch.randn(256, 2)
    t = ((torch.arange(256) + 0.5) / 256)[:, None].clamp_min(run.schedule.earliest)
    label = run.data.train.label[:256]
    optimizer = torch.optim.Adam([*denoiser.parameters(), *found.parameters()], lr=1e-2)
    losses = []
    for step in range(20):
        found.advance(256 * step)
        loss_now = found(denoiser, run.schedule, x_0, eps, t, label=label)[0].mean()
        optimizer.zero_grad()
        loss_now.backward()
        optimizer.step()
        found.after_step(denoiser)
        losses.append(loss_now.item())
    assert losses[-1] < losses[0]


@every("schedule", "target")
def test_unit_is_the_plain_mse_of_the_target(schedule, target):
    found, y = make("schedule", schedule), make("target", target)
    t, alpha_t, sigma_t = telling_levels(found, y)
    x_0, eps, output = (normals(len(t), 16, seed=seed) for seed in (1, 2, 3))
    loss, _ = WeightedLoss(make("weighting", "unit", target=y))(Denoiser(Says(output), y), found, x_0, eps, t)
    plain = (output - y(x_0, eps, alpha_t, sigma_t)).square().mean(1)
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=0)


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


def levels_of(log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt(), torch.ones_like(log_snr)


def test_uncertainty_learns_the_expected_weighted_error():
    """Where the weighted error is e^(2 sin), u becomes 2 sin, and every level then weighs alike."""
    weigh = Uncertainty(0.5)
    log_snr = torch.linspace(-8, 8, 128)
    level = levels_of(log_snr)
    error = (2 * (log_snr / 2).sin()).exp() / weigh.base.weight(*level)
    optimizer = torch.optim.Adam(weigh.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        weigh.apply(error, *level).mean().backward()
        optimizer.step()
    assert (weigh.u(*level[:2]) - 2 * (log_snr / 2).sin()).abs().max() < 0.1
    assert (weigh.weight(*level) * error - 1).abs().max() < 0.1
    assert weigh.apply(error, *level).mean().item() == pytest.approx(
        1 + (2 * (log_snr / 2).sin()).mean().item(), abs=0.01
    )


def test_uncertainty_trains_with_the_loss_and_is_part_of_its_state():
    loss = WeightedLoss(make("weighting", "uncertainty"))
    assert [name for name, _ in loss.named_parameters()] == ["weighting.readout"]
    x_0, eps, t = normals(16, 4, seed=1), normals(16, 4, seed=2), torch.linspace(0.1, 0.9, 16).double()[:, None]
    value, _ = loss(Denoiser(Says(normals(16, 4, seed=3)), V()), make("schedule", "cosine"), x_0, eps, t)
    value.mean().backward()
    assert (loss.weighting.readout.grad.abs() > 0).all()
    nn.init.normal_(loss.weighting.readout)
    again = WeightedLoss(make("weighting", "uncertainty"))
    again.load_state_dict(loss.state_dict())
    level = levels_of(torch.linspace(-8, 8, 9))
    assert torch.equal(again.weighting.u(*level[:2]), loss.weighting.u(*level[:2]))
    assert "exp(-u)" in loss.formula
    assert loss.formula.endswith("+ u")


def test_uncertainty_stays_float32_in_half_precision():
    weigh = Uncertainty()
    nn.init.normal_(weigh.readout, generator=torch.Generator().manual_seed(0))
    level = levels_of(torch.linspace(-8, 8, 9))
    expected = weigh.u(*level[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weigh.u(*level[:2]), expected)
    assert torch.equal(weigh.bfloat16().u(*level[:2]), expected)


def test_uncertainty_takes_another_base():
    level = levels_of(torch.linspace(-8, 8, 9))
    assert torch.equal(Uncertainty(base=MinSNR(3.0)).weight(*level), MinSNR(3.0).weight(*level))


def filled(schedule: Schedule, denoiser: Denoiser, mixture: Mixture, n: int) -> tuple[Buckets, Tensor, Tensor]:
    """The errors of n fresh samples in ten buckets; t and x_t."""
    x_0, _ = mixture.draw(n, seed=1)
    t, eps = (torch.arange(n).double() + 0.5)[:, None] / n, normals(n, x_0.shape[1], seed=2)
    loss = WeightedLoss(make("weighting", "min_snr"))
    with torch.no_grad():
        _, told = loss(denoiser, schedule, x_0, eps, t)
    found = Buckets(10)
    found.add(schedule, t[:, 0], told["mse"])
    alpha_t, sigma_t = schedule(t)
    return found, t, alpha_t * x_0 + sigma_t * eps


@every("schedule")
def test_saying_nothing_costs_1_at_every_level(schedule):
    """A network whose output is zero, on eps: the loss is the variance of eps."""
    net = Says(torch.zeros((), dtype=torch.float64))
    row = filled(make("schedule", schedule), Denoiser(net, Eps()), triangle(), 40_000)[0].row("zero")
    assert row["zero/count"] == [4000] * 10
    for mean, error in zip(row["zero/eps"], row["zero/eps_se"], strict=True):
        assert error == pytest.approx(1 / math.sqrt(4000), rel=0.15)  # the mean of two squares has variance 1
        assert abs(mean - 1) < 3 * error


@every("schedule", "target")
@pytest.mark.parametrize("data", [triangle, eight_gaussians])
def test_the_exact_denoiser_reaches_the_optimal_loss(schedule, target, data):
    """The expected squared error of E[x_0 | x_t] is the mean posterior variance, in every bucket and unit; the
    network knows nothing but c_in x_t and c_noise."""
    found, y, mixture = make("schedule", schedule), make("target", target), data()
    denoiser = Denoiser(ExactNet(mixture, y, 1.3), y, 1.3)
    buckets, t, x_t = filled(found, denoiser, mixture, 20_000)
    _, variance = mixture.posterior(x_t, *found(t))
    row = buckets.row("exact")
    snr = found.log_snr(t[:, 0]).exp()
    for panel, factor in zip(PANELS, (1, snr, snr + 1), strict=True):
        optimal = (factor * variance / 2).view(10, -1).mean(1)
        for k in range(10):
            assert abs(row[f"exact/{panel}"][k] - optimal[k]) < 3 * row[f"exact/{panel}_se"][k] + 1e-12


def test_buckets_give_mean_and_standard_error():
    """Against the sample statistics of the same numbers; the middle bucket is empty, the last holds one."""
    schedule = make("schedule", "cosine")
    t = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0]).double()
    mse = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).double()
    found = Buckets(3)
    for part in ([0, 3], [1, 2, 4]):
        found.add(schedule, t[part], mse[part])
    row = found.row("b")
    snr = schedule.log_snr(t).exp()
    assert row["b/count"] == [4, 0, 1]
    for panel, factor in zip(PANELS, (torch.ones(5), snr, snr + 1), strict=True):
        values = factor * mse
        first, empty, one = row[f"b/{panel}"]
        assert first == pytest.approx(values[:4].mean().item(), rel=1e-12)
        assert one == pytest.approx(values[4].item(), rel=1e-12)
        assert row[f"b/{panel}_se"][0] == pytest.approx(values[:4].std().item() / 2, rel=1e-12)
        assert empty is None
        assert row[f"b/{panel}_se"][1:] == [None, None]
    again = Buckets.of(found.sums)
    assert again.row("b") == row
    assert again.count == 3


def digits(n: int = 37) -> Samples:
    return Samples(normals(n, 1, 8, 8).float(), torch.arange(n) % 10, 5 * torch.arange(n) + 3)


def small_unet() -> Denoiser:
    torch.manual_seed(0)
    net = make("model", "unet_digits", shape=(1, 8, 8), num_classes=10, dropout=0.3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return Denoiser(net, V())


def measured(denoiser: Denoiser, held_out: Samples, **arguments) -> tuple[Buckets, Tensor]:
    loss = WeightedLoss(make("weighting", "min_snr"))
    return held_out_losses(denoiser, make("schedule", "cosine"), held_out, loss=loss, **arguments)


def test_the_held_out_loss_is_the_same_again_and_without_dropout():
    denoiser, held_out = small_unet(), digits()
    for training in (True, False):
        denoiser.train(training)
        torch.manual_seed(int(training))
        buckets, total = measured(denoiser, held_out)
        assert denoiser.training == denoiser.net.training == training
        if training:
            first, sum_of_losses = buckets, total
    assert torch.equal(first.sums, buckets.sums)
    assert torch.equal(sum_of_losses, total)
    assert not torch.equal(measured(denoiser, held_out, seed=1)[0].sums, buckets.sums)


def test_the_training_mode_comes_back_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            raise RuntimeError("broken")

    denoiser = Denoiser(Fails(), V()).train()
    with pytest.raises(RuntimeError, match="broken"):
        measured(denoiser, digits())
    assert denoiser.training


def test_the_held_out_loss_does_not_depend_on_the_batch():
    denoiser, held_out = small_unet(), digits()
    whole, total = measured(denoiser, held_out, batch=512)
    for batch in (1, 7, 64):
        part, sum_of_losses = measured(denoiser, held_out, batch=batch)
        torch.testing.assert_close(part.sums, whole.sums, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sum_of_losses, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_held_out_loss_does_not_depend_on_the_ranks(world):
    """Ranks of an odd number of samples add up to one rank, nothing left out and nothing twice."""
    denoiser, held_out = small_unet(), digits()
    whole, total = measured(denoiser, held_out, repeats=3)
    ranks = [measured(denoiser, held_out, repeats=3, rank=rank, world=world) for rank in range(world)]
    torch.testing.assert_close(sum(b.sums for b, _ in ranks), whole.sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum(t for _, t in ranks), total, rtol=1e-6, atol=0)
    assert total[1] == whole.sums[:, 0].sum() == 37 * 3


def test_more_ranks_than_samples_are_fine():
    denoiser, held_out = small_unet(), digits(2)
    _, total = measured(denoiser, held_out)
    ranks = [measured(denoiser, held_out, rank=rank, world=3)[1] for rank in range(3)]
    torch.testing.assert_close(sum(ranks), total, rtol=1e-6, atol=0)


def test_each_sample_is_seen_once_in_every_part_of_the_range():
    denoiser, held_out = small_unet(), digits()
    buckets, _ = measured(denoiser, held_out, repeats=5, buckets=5)
    assert buckets.sums[:, 0].tolist() == [37] * 5


def test_samples_have_times_and_noise_of_their_own():
    """A network that says nothing of equal data: only the noise tells samples apart."""
    held_out = Samples(torch.zeros(37, 1, 8, 8), torch.zeros(37, dtype=torch.int64), torch.arange(37))

    class Nothing(Says):
        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            return 0 * x

    denoiser = Denoiser(Nothing(torch.zeros(())), Eps())
    row = measured(denoiser, held_out, repeats=1, buckets=20)[0].row("own")
    assert sum(n > 0 for n in row["own/count"]) > 10
    (error,) = measured(denoiser, held_out, repeats=1, buckets=1)[0].row("own")["own/eps_se"]
    assert error == pytest.approx(math.sqrt(2 / 64 / 37), rel=0.4)


def test_a_samples_noise_is_addressed_by_its_id():
    """A subset of the samples in another order has the errors that they have in the whole."""
    denoiser, held_out = small_unet(), digits()
    order = torch.tensor([30, 4, 11])
    subset = Samples(held_out.x_0[order], held_out.label[order], held_out.ids[order])
    alone = [
        Samples(held_out.x_0[i : i + 1], held_out.label[i : i + 1], held_out.ids[i : i + 1]) for i in order.tolist()
    ]
    expected = sum(measured(denoiser, one)[0].sums for one in alone)
    torch.testing.assert_close(measured(denoiser, subset)[0].sums, expected, rtol=1e-6, atol=1e-6)
