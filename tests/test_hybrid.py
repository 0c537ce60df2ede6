"""The hybrid losses and the learned variance."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from denoiselab.denoiser import Denoiser, LearnedVariance
from denoiselab.errors import UserError
from denoiselab.gaussian import (
    discretised_gaussian_nll,
    gaussian_kl,
    gaussian_nll,
)
from denoiselab.loss import Hybrid, LearnedHybrid, WeightedLoss
from denoiselab.schedule import Cosine, Linear, Schedule
from denoiselab.target import Eps
from denoiselab.weighting import SNR, VLBBeta, VLBBetaTilde
from exact import Scaled, White, every, make, normals, parts


class Heads(nn.Module):
    """A network that answers (y, v) whatever it is asked."""

    def __init__(self, *heads: Tensor):
        super().__init__()
        self.heads = nn.ParameterList([head.clone() for head in heads])

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.cat([head.expand_as(x) for head in self.heads], 1)


def points(schedule: Schedule, *index: int) -> Tensor:
    """Times of 1-indexed points, (n, 1)."""
    last = (schedule.points or 1000) - 1
    return torch.tensor([(i - 1) / last for i in index], dtype=torch.float64)[:, None]


def learned(**arguments) -> LearnedHybrid:
    return LearnedHybrid(SNR(), **arguments)


def betas(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """beta_t, abar_t, beta_tilde_t of a table, whose first beta_tilde is its second."""
    abar = schedule.log_snr_table.sigmoid()
    before = torch.cat([torch.ones(1).double(), abar[:-1]])
    beta = 1 - abar / before
    beta_tilde = beta * (1 - before) / (1 - abar)
    beta_tilde[0] = beta_tilde[1]
    return beta, abar, beta_tilde


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_the_hybrid_as_taught(schedule):
    """mean(mse) + 0.001 mean(w mse), w = beta/(2 alpha (1 - abar)) from betas alone, for eps."""
    found = make("schedule", schedule)
    beta, abar, _ = betas(found)
    w = beta / (2 * (1 - beta) * (1 - abar))
    index = torch.tensor([1, 2, 3, 10, 100, 500, 999, 1000])
    t = points(found, *index.tolist())
    x_0, eps, output = (normals(8, 6, seed=seed) for seed in (1, 2, 3))
    loss, told = Hybrid(Eps())(Denoiser(Heads(output), Eps()), found, x_0, eps, t)
    mse = (output - eps).square().mean(1)
    torch.testing.assert_close(told["simple"], mse, rtol=1e-9, atol=0)
    torch.testing.assert_close(told["vlb"], w[index - 1] * mse, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, mse + 1e-3 * w[index - 1] * mse, rtol=1e-9, atol=0)
    clamped = Hybrid(Eps(), clamp=0.1).weight(found, t[:, 0])
    torch.testing.assert_close(clamped, w[index - 1].clamp_max(0.1), rtol=1e-9, atol=0)


def test_the_hybrid_as_taught_changes_next_to_nothing():
    """All weights of the linear schedule within 0.05%; on the cosine schedule only the last point moves."""
    t = torch.linspace(0, 1, 1000, dtype=torch.float64)
    total = 1 + 1e-3 * Hybrid(Eps()).weight(Linear(), t)
    assert 1.0000045 < total.min() < total.max() < 1.00051
    assert total.argmax() == 0
    cosine = Hybrid(Eps()).weight(Cosine(), t)
    assert cosine[-1].item() == pytest.approx(499.5, rel=1e-3)
    assert (cosine[:-1] < 1.6).all()
    assert Hybrid(Eps(), clamp=100).weight(Cosine(), t).max() == 100


@every("schedule", "target")
def test_the_hybrid_weighs_each_targets_own_mse_alike(schedule, target):
    found, y = make("schedule", schedule), make("target", target)
    t = points(found, 10, 300, 900)
    x_0, eps, output = (normals(3, 6, seed=seed) for seed in (1, 2, 3))
    _, told = Hybrid(y, scale=0.5)(Denoiser(Heads(output), y), found, x_0, eps, t)
    plain = (output - y(x_0, eps, *found(t))).square().mean(1)
    torch.testing.assert_close(told["simple"], plain, rtol=1e-9, atol=0)
    torch.testing.assert_close(told["vlb"] / told["simple"], Hybrid(y).weight(found, t[:, 0]), rtol=1e-9, atol=0)


def test_the_learned_variance_is_the_second_output():
    """0 is half way between the bounds in log space, as for a network that has not learned yet."""
    y, v = normals(3, 4, 2, 2, seed=1), normals(3, 4, 2, 2, seed=2)
    x_t, (alpha_t, sigma_t) = normals(3, 4, 2, 2, seed=3), Linear()(torch.full((3, 1, 1, 1), 0.4).double())
    says = LearnedVariance(Heads(y, v), Eps()).outputs(x_t, alpha_t, sigma_t)
    assert torch.equal(says.x_0, Denoiser(Heads(y), Eps())(x_t, alpha_t, sigma_t))
    assert torch.equal(says.variance, (v + 1) / 2)
    assert torch.equal(LearnedVariance(Heads(y, v), Eps())(x_t, alpha_t, sigma_t), says.x_0)
    assert LearnedVariance.has_variance
    assert not Denoiser.has_variance


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_the_bound_from_betas_alone(schedule):
    """KL(q(x_s | x_t, x_0) || p) from DDPM's means and variances, in bits per dimension, times T."""
    found = make("schedule", schedule)
    beta, abar, beta_tilde = betas(found)
    index = torch.tensor([2, 3, 10, 100, 500, 900, 999])
    x_0, eps = normals(7, 6, seed=1), normals(7, 6, seed=2)
    output, v = normals(7, 6, seed=3), normals(7, 6, seed=4)
    t = points(found, *index.tolist())
    net = Heads(output, v)
    loss, told = learned()(LearnedVariance(net, Eps()), found, x_0, eps, t)

    b, a, tilde = (table[index - 1][:, None] for table in (beta, abar, beta_tilde))
    a_s = abar[index - 2][:, None]
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    x_0_hat = (x_t - (1 - a).sqrt() * output) / a.sqrt()

    def mean(clean: Tensor) -> Tensor:
        return a_s.sqrt() * b / (1 - a) * clean + (1 - b).sqrt() * (1 - a_s) / (1 - a) * x_t

    u = (v + 1) / 2
    scale = (u * b.log() + (1 - u) * tilde.log()).div(2).exp()
    nats = kl_divergence(Normal(mean(x_0), tilde.sqrt().expand_as(x_0)), Normal(mean(x_0_hat), scale)).mean(1)
    torch.testing.assert_close(told["vlb"], 1000 * nats / math.log(2), rtol=1e-7, atol=0)
    mse = (output - eps).square().mean(1)
    torch.testing.assert_close(told["simple"], mse, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, mse + nats / math.log(2), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_diffusers_reads_the_variance_alike(name):
    """Its learned_range, against what minimises and measures the bound here: with x_0_hat = x_0 the divergence is
    that of two variances."""
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule=name, beta_start=1e-4, beta_end=0.02, variance_type="learned_range")
    found = make("schedule", {"linear": "linear"}.get(name, "cosine"))
    x_0 = eps = normals(1, 6, seed=1)
    for index in (2, 3, 5, 20):
        v = normals(1, 6, seed=index)
        log_variance = theirs._get_variance(index - 1, predicted_variance=v.float()).double()
        fixed = DDPMScheduler(beta_schedule=name, beta_start=1e-4, beta_end=0.02, variance_type="fixed_small")
        log_tilde = fixed._get_variance(index - 1).double().log()
        nats = gaussian_kl(torch.zeros(()).double(), log_tilde, torch.zeros(()).double(), log_variance).mean()
        net = Heads(eps, v)
        _, told = learned()(LearnedVariance(net, Eps()), found, x_0, eps, points(found, index))
        assert told["vlb"].item() == pytest.approx(1000 * nats.item() / math.log(2), rel=5e-3)


@pytest.mark.parametrize("bins", [None, 256, 17])
def test_the_first_point_is_the_decoder(bins):
    """-log p(x_0 | x_1), with the variance between beta_1 and beta_tilde_2."""
    found = Linear()
    beta, _, beta_tilde = betas(found)
    x_0 = (torch.randint(0, bins or 9, (5, 6)) / ((bins or 9) - 1) * 2 - 1).double()
    eps, output, v = (normals(5, 6, seed=seed) for seed in (2, 3, 4))
    t = points(found, *[1] * 5)
    _, told = learned(bins=bins)(LearnedVariance(Heads(output, v), Eps()), found, x_0, eps, t)
    alpha_t, sigma_t = found(t)
    x_0_hat = x_0 + sigma_t / alpha_t * (eps - output)
    u = (v + 1) / 2
    log_variance = u * beta[0].log() + (1 - u) * beta_tilde[1].log()
    if bins is None:
        nats = gaussian_nll(x_0, x_0_hat, log_variance)
    else:
        nats = discretised_gaussian_nll(x_0, x_0_hat, log_variance, bins)
    torch.testing.assert_close(told["vlb"], 1000 * nats.mean(1) / math.log(2), rtol=1e-6, atol=0)


@every("schedule", "target")
def test_the_bound_trains_the_variance_alone(schedule, target):
    """Its gradient with respect to the estimate is exactly 0, and with respect to the variance that of finite
    differences, at the first point too."""
    found, says = make("schedule", schedule), make("target", target)
    t = points(found, 1, 2, 3, 30, 500, 990).clamp_min(found.earliest)
    x_0, eps, output, v = (normals(6, 4, seed=seed) for seed in (1, 2, 3, 4))
    x_0 = x_0.clamp(-1, 1)
    output = says(x_0 + 0.01 * output, eps, *found(t))
    net = Heads(output, v)
    denoiser, loss = LearnedVariance(net, says), learned()

    def bound(shift: Tensor | float = 0.0) -> Tensor:
        with torch.no_grad():
            net.heads[1].copy_(v + shift)
        alpha_t, sigma_t = found(t)
        told = denoiser.outputs(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t)
        return loss.bound(found, t, x_0, told.x_0.detach(), told.variance)

    whole, told = loss(denoiser, found, x_0, eps, t)
    of_mean = torch.autograd.grad(whole.sum(), net.heads[0], retain_graph=True)[0]
    simple, _ = WeightedLoss(SNR())(Denoiser(Heads(output), says), found, x_0, eps, t)
    torch.testing.assert_close(whole.detach(), simple + 1e-3 * told["vlb"], rtol=1e-10, atol=0)
    plain = Heads(output)
    WeightedLoss(SNR())(Denoiser(plain, says), found, x_0, eps, t)[0].sum().backward()
    assert torch.equal(of_mean, plain.heads[0].grad)

    bound().sum().backward()
    h = 1e-5
    slope = (bound(h) - bound(-h)) / (2 * h)
    torch.testing.assert_close(net.heads[1].grad.sum(1), slope, rtol=1e-5, atol=1e-5)
    assert (net.heads[1].grad[1:] != 0).all()
    if found.log_snr(t[0]) < 11:  # else a level's bin holds all of the decoder's mass
        assert (net.heads[1].grad[0] != 0).all()


def best_variance(schedule: Schedule, t: Tensor, x_0: Tensor, eps: Tensor, exact, loss: LearnedHybrid) -> Tensor:
    """v at which the mean bound over samples is least, by Newton's method on one number."""
    alpha_t, sigma_t = schedule(t)
    x_0_hat = exact(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t)
    v = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for _ in range(12):
        value = loss.bound(schedule, t.expand(len(x_0), 1), x_0, x_0_hat, v.expand_as(x_0)).mean()
        (slope,) = torch.autograd.grad(value, v, create_graph=True)
        (curve,) = torch.autograd.grad(slope, v)
        v = (v - (slope / curve).clamp(-1, 1)).detach().requires_grad_()
    return v.detach()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("index", [2, 10, 300, 900])
def test_the_best_variance_of_white_data_is_beta_and_of_a_single_point_beta_tilde(schedule, index):
    """The two ends that the variance lies between (Ho et al. 2020, section 3.2)."""
    found = make("schedule", schedule)
    t, eps = points(found, index), normals(5000, 2, seed=1)
    white = best_variance(found, t, normals(5000, 2, seed=2), eps, White(), learned())
    beta, _, beta_tilde = (table[index - 1] for table in betas(found))
    width = (beta / beta_tilde).log().item()
    assert abs(white.item() - 1) * width < 0.02
    point = torch.full((5000, 2), 0.3).double()
    single = best_variance(found, t, point, eps, lambda x_t, *level: point, learned())
    assert abs(single.item()) < 1e-9


def test_the_best_variance_of_white_data_at_the_first_point_is_beta():
    """As a density: the variance of x_0 given x_1."""
    t = points(Linear(), 1)
    x_0, eps = normals(5000, 2, seed=2), normals(5000, 2, seed=1)
    white = best_variance(Linear(), t, x_0, eps, White(), learned(bins=None))
    beta, _, beta_tilde = betas(Linear())
    assert abs(white.item() - 1) * (beta[0] / beta_tilde[0]).log().item() < 0.02


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_fixed_variances_give_the_weights_of_ddpms_bound(schedule):
    """At v = 0 the divergence is the squared error weighted with beta_tilde, at v = 1 with beta, plus a constant."""
    found = make("schedule", schedule)
    t = points(found, 2, 3, 50, 500, 999)
    x_0, noise = normals(5, 6, seed=1), normals(5, 6, seed=2)
    alpha_t, sigma_t = found(t)
    for v, weighting in ((0.0, VLBBetaTilde(found)), (1.0, VLBBeta(found))):
        value, constant = (
            learned().bound(found, t, x_0, x_0 + scale * noise, torch.full_like(x_0, v)) for scale in (1, 0)
        )
        weight = weighting.weight(alpha_t, sigma_t, alpha_t)[:, 0]
        nats = weight * noise.square().mean(1)
        torch.testing.assert_close((value - constant) * math.log(2), nats, rtol=1e-7, atol=1e-9)


@every("schedule")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_is_finite_with_its_gradient_at_every_time(schedule, dtype):
    """For an estimate that is far off, too."""
    found = make("schedule", schedule)
    t = torch.linspace(found.earliest, 1, 4001, dtype=dtype)[:, None]
    x_0, off, v = (normals(4001, 2, seed=seed).to(dtype) for seed in (1, 2, 3))
    v = (v.sigmoid() * 2 - 0.5).requires_grad_()
    value = learned().bound(found, t, x_0.clamp(-1, 1), 100 * off, v)
    value.sum().backward()
    assert value.isfinite().all()
    assert value.dtype == dtype
    assert v.grad.isfinite().all()


@every("schedule")
def test_float32_bounds_are_those_of_float64(schedule):
    found = make("schedule", schedule)
    t = points(found, 2, 3, 30, 500, 999).clamp_min(found.earliest)
    x_0, off, v = (normals(5, 8, seed=seed) for seed in (1, 2, 3))
    x_0_hat = x_0 + 0.1 * off
    exact = learned().bound(found, t, x_0, x_0_hat, v)
    rounded = learned().bound(found, t.float(), x_0.float(), x_0_hat.float(), v.float())
    torch.testing.assert_close(rounded.double(), exact, rtol=2e-3, atol=0)


@every("schedule")
@pytest.mark.parametrize("k", [0.1, 80.0])
def test_the_hybrids_do_not_know_the_scale_of_the_level(schedule, k):
    found = make("schedule", schedule)
    scaled = Scaled(found, k)
    t = points(found, 1, 2, 3, 30, 500, 990).clamp_min(found.earliest)
    x_0, off, v = (normals(6, 8, seed=seed) for seed in (1, 2, 3))
    values = [learned().bound(s, t, x_0.clamp(-1, 1), x_0.clamp(-1, 1) + 0.1 * off, v) for s in (found, scaled)]
    torch.testing.assert_close(*values, rtol=1e-7, atol=0)
    weights = [Hybrid(Eps()).weight(s, t[:, 0]) for s in (found, scaled)]
    torch.testing.assert_close(*weights, rtol=1e-7, atol=0)


def test_the_formulas_are_told():
    assert "beta/(2 alpha (1 - abar))" in Hybrid(Eps()).formula
    assert "100" in Hybrid(Eps(), clamp=100).formula
    assert "L_vlb" in learned().formula
    assert "SNR" in learned().formula


REFUSED = {
    "hybrid": {"scale": (-1, math.nan), "clamp": (0, -1, math.nan), "points": (1,)},
    "learned_hybrid": {"scale": (-1, math.nan), "bins": (1, 0), "points": (1,)},
}


@pytest.mark.parametrize(("loss", "name", "value"), [(o, n, v) for o, a in REFUSED.items() for n in a for v in a[n]])
def test_a_bad_value_is_refused_in_a_line(loss, name, value):
    with pytest.raises(UserError, match=rf"^loss\.{name}={value}: need [^\n]*$"):
        make("loss", loss, **{name: value})


def test_the_option_of_the_network_follows_the_loss():
    """Whichever the loss: as many outputs as its denoiser wants."""
    for loss in ("simple", "hybrid", "learned_hybrid", "edm"):
        found = parts(f"loss={loss}")
        assert found.outputs == found.denoiser_class.net_outputs
    learns = parts("loss=learned_hybrid")
    assert isinstance(learns.denoiser, LearnedVariance)
    assert learns.outputs == 2
