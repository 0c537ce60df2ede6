import itertools
import math

import pytest
import torch
from torch import Tensor

from denoiselab.denoiser import Outputs
from denoiselab.likelihood import Bound, Density, bits_per_dim, continuous_vlb, ode, vlb
from denoiselab.rng import Noise
from denoiselab.sampler import Rung
from denoiselab.schedule import Cosine, Discrete, Linear, Schedule
from exact import Mixture, Scaled, White, every, make, normals, solve, triangle


def density(x: Tensor, mean: float, std: float) -> Tensor:
    """log N(x; mean, std^2 I) of each row."""
    z = (x - mean) / std
    return (-z.square() / 2 - math.log(std) - math.log(2 * math.pi) / 2).flatten(1).sum(1)


def mixed(mixture: Mixture, y: Tensor, r: float = 0.0) -> Tensor:
    """log density of a mixture's data with noise of standard deviation r added."""
    variance = mixture.std**2 + r**2
    squared = (y[:, None] - mixture.centres).square().sum(-1)
    log_normal = -squared / (2 * variance) - y.shape[1] / 2 * math.log(2 * math.pi * variance)
    return log_normal.logsumexp(1) - math.log(len(mixture.centres))


def ends(schedule: Schedule) -> tuple[float, float]:
    """sigma/alpha at the earliest time and at 1."""
    return tuple((schedule.log_snr(torch.tensor([schedule.earliest, 1.0]).double()) / -2).exp().tolist())


def addressed(n: int, *shape: int, seed: int = 0) -> Noise:
    return Noise(seed, range(n), shape, dtype=torch.float64)


def paired(n: int, *shape: int):
    """Noise whose rows n to 2n are minus its first n, all +1 or -1: the mean of each pair is the exact expectation of
    a quadratic function of noise whose values do not mix."""

    def draw() -> Tensor:
        one = normals(n, *shape).sign()
        return torch.cat([one, -one])

    return draw


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class Wrong:
    """A denoiser far from right, with a variance of its own."""

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        r = sigma_t / alpha_t
        return torch.tanh(x_t / alpha_t / (1 + r**2)) + 0.1 * torch.sin(3 * x_t / alpha_t)

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Outputs:
        return Outputs(self(x_t, alpha_t, sigma_t), variance=(2 * x_t / alpha_t).sigmoid())


@every("schedule")
@pytest.mark.parametrize(("shape", "estimated"), [((2,), False), ((1, 8, 8), True)])
def test_the_ode_of_gaussian_data_gives_its_density(schedule, shape, estimated):
    """Exactly that which follows from the prior; whose signs as probes are exact, the derivative being diagonal."""
    found, mean, std = make("schedule", schedule), 0.2, 0.7
    low, high = ends(found)
    x_0 = mean + std * normals(8, *shape)
    probes = normals(1, *x_0.shape, seed=1).sign() if estimated else None
    z = (x_0 - mean) / math.hypot(std, low)
    noisy = mean + math.hypot(std, high) * z
    expected = density(noisy, 0, high) + x_0[0].numel() * math.log(math.hypot(std, high) / math.hypot(std, low))
    result = ode(White(mean, std), found, x_0, probes)
    close(result.bits, bits_per_dim(-expected, x_0[0].numel()), 2e-5)
    torch.testing.assert_close(result.latent, noisy / high, rtol=1e-4, atol=1e-4)


def test_the_exact_trace_of_images_is_their_density_too():
    x_0 = 0.7 * normals(4, 1, 8, 8)
    found = ode(White(0, 0.7), Cosine(), x_0)
    close(found.bits, bits_per_dim(-density(x_0, 0, 0.7), 64), 1e-3)
    close(found.bits, ode(White(0, 0.7), Cosine(), x_0, torch.ones(1, *x_0.shape).double()).bits, 1e-9)


@every("schedule")
def test_the_density_of_gaussian_data_is_the_closed_form_on_average(schedule):
    x_0 = 0.7 * normals(512, 2)
    found = ode(White(0, 0.7), make("schedule", schedule), x_0).bits.mean()
    assert found.item() == pytest.approx(bits_per_dim(-density(x_0, 0, 0.7), 2).mean().item(), abs=1e-3)


@every("schedule")
def test_the_ode_of_a_mixture_gives_its_density(schedule):
    """At the earliest level; but for the prior's error, which is put right."""
    found, mixture = make("schedule", schedule), triangle()
    low, high = ends(found)
    x_0, _ = mixture.draw(64)
    result = ode(mixture, found, x_0)
    y = high * result.latent
    prior_error = density(y, 0, high) - mixed(mixture, y, high)
    close(result.bits, bits_per_dim(-mixed(mixture, x_0, low) - prior_error, 2), 3e-4)
    close(result.bits, bits_per_dim(-mixed(mixture, x_0, low), 2), 3e-4 + 2 / high)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "vp"])
def test_the_ode_of_a_mixture_gives_its_density_without_corrections(schedule):
    mixture = triangle()
    x_0, _ = mixture.draw(64)
    close(ode(mixture, make("schedule", schedule), x_0).bits, bits_per_dim(-mixed(mixture, x_0), 2), 1e-3)


def test_the_ode_leads_to_the_noise_that_samplers_make_it_of():
    mixture, schedule = triangle(), Cosine()
    low, high = ends(schedule)
    x_0, _ = mixture.draw(16)
    latent = ode(mixture, schedule, x_0, rtol=1e-7, atol=1e-7).latent
    back = solve(mixture, high * latent, Rung(1.0, high), Rung(1.0, low), steps=2000)
    close(back, x_0, 1e-4)


def test_probes_with_unit_covariance_give_the_exact_trace():
    """(1, 1) and (1, -1), or the basis times sqrt(2)."""
    mixture, schedule = triangle(), Cosine()
    x_0, _ = mixture.draw(16)
    exact = ode(mixture, schedule, x_0).nats
    for probes in (torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), math.sqrt(2) * torch.eye(2).double()):
        each = probes[:, None].expand(2, 16, 2)
        close(ode(mixture, schedule, x_0, each).nats, exact, 1e-9)
    one = ode(mixture, schedule, x_0, each[:1]).nats
    assert (one - exact).abs().max() > 0.1
    many = ode(mixture, schedule, x_0.repeat(200, 1), normals(1, 3200, 2).sign()).nats.view(200, 16)
    assert ((many.mean(0) - exact).abs() < 4.5 * many.std(0) / math.sqrt(200) + 1e-3).all()


def test_sigma_data_changes_the_steps_and_not_the_density():
    mixture, x_0 = triangle(), triangle().draw(16)[0]
    usual, other = (ode(mixture, Cosine(), x_0, sigma_data=s, rtol=1e-8, atol=1e-8) for s in (1.0, 0.5))
    close(usual.nats, other.nats, 1e-5)
    assert usual.calls != other.calls


def test_the_density_counts_its_calls_and_follows_the_data_type():
    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, *, label: Tensor) -> Tensor:
        calls.append((x_t.dtype, alpha_t.dtype, alpha_t.shape))
        return White(0, 0.5)(x_t, alpha_t, sigma_t)

    calls = []
    result = ode(denoiser, Cosine(), 0.5 * normals(3, 1, 4, 4).float(), label=torch.arange(3))
    assert result.calls == len(calls)
    assert set(calls) == {(torch.float32, torch.float32, (3, 1, 1, 1))}
    assert result.nats.dtype == torch.float32
    assert not result.nats.requires_grad


def plain_bound(betas: list[float], x_0: Tensor, draws: list[Tensor], variance: str, bins: int | None) -> Bound:
    """The bound written out for a table of betas, point by point, from torch's own distributions."""
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    abar, steps, decoder, mse = 1.0, [], torch.zeros(()), []
    for index, (beta, eps) in enumerate(zip(betas, draws, strict=True)):
        before, abar = abar, abar * (1 - beta)
        alpha, sigma = (x_0.new_full((len(x_0), 1), value) for value in (abar**0.5, (1 - abar) ** 0.5))
        x_t = alpha * x_0 + sigma * eps
        x_0_hat, v, _ = Wrong().outputs(x_t, alpha, sigma)
        mse.append((x_0_hat - x_0).square().mean(1))
        if index > 0:
            small, large = beta * (1 - before) / (1 - abar), beta
        else:  # what stands in for a beta_tilde of 0 is that of the second point
            small = large = beta / abar
            if variance == "learned":
                small = betas[1] * beta / (1 - abar * (1 - betas[1])) / abar
        share = {"fixed_small": 0 * v, "fixed_large": 0 * v + 1, "learned": v}[variance]
        std = ((share * math.log(large) + (1 - share) * math.log(small)) / 2).exp()
        if index > 0:
            of_x_0, of_x_t = before**0.5 * beta / (1 - abar), (1 - beta) ** 0.5 * (1 - before) / (1 - abar)
            q = normal(of_x_0 * x_0 + of_x_t * x_t, math.sqrt(small))
            steps.append(kl(q, normal(of_x_0 * x_0_hat + of_x_t * x_t, std)).sum(1))
        elif bins is None:
            decoder = -normal(x_0_hat, std).log_prob(x_0).sum(1)
        else:
            half, p = 1 / (bins - 1), normal(x_0_hat, std)
            upper = torch.where(x_0 > 1 - half, 1.0, p.cdf(x_0 + half))
            lower = torch.where(x_0 < half - 1, 0.0, p.cdf(x_0 - half))
            decoder = -(upper - lower).log().sum(1)
    last = normal(abar**0.5 * x_0, (1 - abar) ** 0.5)
    prior = kl(last, normal(0 * x_0, (1 - abar) ** 0.5)).sum(1)
    bits = math.log(2) * x_0.shape[1]
    return Bound(prior / bits, torch.stack(steps, 1) / bits, decoder / bits, torch.stack(mse, 1))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("bins", [None, 5, 256])
def test_every_term_of_the_bound_is_that_of_a_plain_implementation(variance, bins):
    betas = torch.linspace(0.002, 0.3, 12, dtype=torch.float64)
    x_0 = normals(4, 6).tanh()
    x_0[0, :2] = torch.tensor([-1.0, 1.0])
    if bins is not None:
        x_0 = ((x_0 + 1) / 2 * (bins - 1)).round() / (bins - 1) * 2 - 1
    noise = addressed(4, 6)
    draws = [noise() for _ in betas]
    expected = plain_bound(betas.tolist(), x_0, draws, variance, bins)
    found = vlb(Wrong(), Discrete(betas), x_0, addressed(4, 6), variance=variance, bins=bins)
    assert found.steps.shape == (4, 11)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.total, expected.prior + expected.steps.sum(1) + expected.decoder)


def exact_gap(schedule: Schedule, std: float, variance: str, points: int | None, bound=vlb) -> float:
    """What the bound of Gaussian data with its own denoiser exceeds its entropy by, in bits/dim."""
    x_0 = std * normals(200, 2).repeat(2, 1)
    arguments = {"points": points, "bins": None} | ({"variance": variance} if bound is vlb else {})
    found = bound(White(0, std), schedule, x_0, paired(200, 2), **arguments).total
    return (found - bits_per_dim(-density(x_0, 0, std), 2)).mean().item()


@every("schedule")
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_gap_of_the_bound_closes_with_the_number_of_steps(schedule, variance):
    gaps = [exact_gap(make("schedule", schedule), 0.5, variance, points) for points in (25, 100, 400)]
    assert all(later < earlier / 2 + 2e-3 for earlier, later in itertools.pairwise(gaps))
    assert gaps[2] > -2e-3
    if variance == "fixed_large":
        assert gaps[2] < 0.15


def test_white_data_has_no_gap_at_any_number_of_steps():
    """beta is its exact variance; what remains is the prior and the decoder's width."""
    for points in (3, 10, 100):
        assert exact_gap(Cosine(), 1.0, "fixed_large", points) == pytest.approx(0, abs=2e-4)


@every("schedule")
def test_the_continuous_bound_of_gaussian_data_has_no_gap(schedule):
    assert exact_gap(make("schedule", schedule), 0.5, "", 400, continuous_vlb) == pytest.approx(0, abs=4e-3)


def test_the_continuous_bound_is_the_limit_of_many_steps():
    def distance(points: int) -> float:
        x_0 = triangle().draw(100)[0].repeat(2, 1)
        found = vlb(White(0.1, 0.8), Cosine(), x_0, paired(100, 2), points, "fixed_large", None)
        limit = continuous_vlb(White(0.1, 0.8), Cosine(), x_0, paired(100, 2), 1000, None)
        torch.testing.assert_close(found.prior, limit.prior)
        torch.testing.assert_close(found.decoder, limit.decoder)
        return (found.total - limit.total).mean().abs().item()

    assert distance(1000) < distance(200) / 3 < distance(40) / 9
    assert distance(1000) < 0.03


@pytest.mark.parametrize("schedule", [Cosine(), Linear()], ids=["cosine", "linear"])
@pytest.mark.parametrize("k", [3.0, None])
def test_likelihoods_depend_on_the_ratio_of_sigma_to_alpha_alone(schedule, k):
    mixture = triangle()
    x_0, _ = mixture.draw(4)
    scaled = Scaled(schedule, k)
    for bound in (vlb, continuous_vlb):
        small = {"variance": "fixed_small"} if bound is vlb else {}
        found, expected = (bound(mixture, s, x_0, addressed(4, 2), 20, bins=None, **small) for s in (scaled, schedule))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    close(ode(mixture, scaled, x_0).nats, ode(mixture, schedule, x_0).nats, 1e-6)


def test_the_prior_of_cosine_costs_nothing_and_that_of_linear_little():
    x_0 = torch.ones(2, 1, 8, 8).double()  # no image costs more
    for schedule, snr in ((Cosine(), 2.429e-9), (Linear(), 4.036e-5)):
        found = vlb(White(), schedule, x_0, addressed(2, 1, 8, 8), points=2)
        assert found.prior.tolist() == pytest.approx([snr / 2 / math.log(2)] * 2, rel=1e-3)
    assert snr / 2 / math.log(2) == pytest.approx(2.912e-5, rel=1e-3)


def test_the_bound_of_levels_exceeds_their_entropy_by_little():
    """Four equally likely levels hold two bits; the denoiser that knows them comes near."""

    def denoiser(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        levels = torch.linspace(-1, 1, 4).double()
        weight = (-((x_t[..., None] - alpha_t[..., None] * levels) ** 2) / (2 * sigma_t[..., None] ** 2)).softmax(-1)
        return (weight * levels).sum(-1)

    x_0 = torch.randint(4, (200, 16), generator=torch.Generator().manual_seed(0)).double() * 2 / 3 - 1
    for found in (
        vlb(denoiser, Cosine(), x_0, addressed(200, 16), points=200, variance="fixed_small", bins=4),
        continuous_vlb(denoiser, Cosine(), x_0, addressed(200, 16), points=200, bins=4),
    ):
        assert found.decoder.abs().max() < 1e-9
        error = (found.total.std() / math.sqrt(200)).item()
        assert 2 - 4 * error < found.total.mean().item() < 2.1 + 4 * error


def test_a_sample_has_the_same_bound_in_any_batch():
    mixture = triangle()
    x_0, label = mixture.draw(6)
    for bound in (vlb, continuous_vlb):
        whole = bound(mixture, Cosine(), x_0, addressed(6, 2), points=5, bins=None, label=label)
        part = bound(
            mixture, Cosine(), x_0[4:], Noise(0, [4, 5], (2,), dtype=torch.float64), 5, bins=None, label=label[4:]
        )
        for ours, theirs in zip(part, whole, strict=True):
            torch.testing.assert_close(ours, theirs[4:], rtol=1e-10, atol=1e-10)
        unlabelled = bound(mixture, Cosine(), x_0, addressed(6, 2), points=5, bins=None)
        assert (unlabelled.mse - whole.mse).abs().max() > 0.01


def test_a_table_is_bounded_at_its_own_points():
    x_0 = normals(2, 2)
    assert vlb(White(), Cosine(points=7), x_0, addressed(2, 2), bins=None).steps.shape == (2, 6)
    assert vlb(White(), make("schedule", "flow"), x_0, addressed(2, 2), bins=None).steps.shape == (2, 999)


def test_bits_of_uniform_density_over_256_levels_are_8():
    """Levels of width 2/255 cover [-256/255, 256/255]."""
    nats = torch.tensor([3 * math.log(512 / 255)], dtype=torch.float64)
    assert bits_per_dim(nats, 3, bins=256).item() == pytest.approx(8, abs=1e-12)
    assert Density(nats, torch.zeros(1, 3), 0).bits.item() == pytest.approx(math.log2(512 / 255), abs=1e-12)


@pytest.mark.parametrize(
    ("bound", "arguments", "message"),
    [
        (vlb, {"variance": "wide"}, r"variance=wide: need one of fixed_small, fixed_large, learned"),
        (vlb, {"variance": "learned"}, r"variance=learned: this denoiser says no variance"),
        (vlb, {"points": 1}, r"points=1: need at least 2"),
        (continuous_vlb, {"points": 0}, r"points=0: need at least 1"),
    ],
)
def test_what_cannot_be_bounded_is_refused_in_a_line(bound, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        bound(White(), Cosine(), normals(2, 2), addressed(2, 2), **arguments)
