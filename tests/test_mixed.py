import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.ema import EMA
from denoiselab.loss import Common, Mixed, Own, SoftMin, Standardised, ThreeHeads, Uncertainty, WeightedLoss, Winner
from denoiselab.loss.mixed import HEADS, Binned
from denoiselab.models import MLP
from denoiselab.schedule import Schedule
from denoiselab.weighting import Unit
from exact import every, make, normals, times
from losses import Says

NAMES = ("x_0", "v", "eps")


class Only(nn.Module):
    """Always the same head."""

    def __init__(self, head: int):
        super().__init__()
        self.head = head

    def __call__(self, compared: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(compared),), self.head), 3).to(compared)


def tied(schedule: Schedule, t: Tensor, x_0: Tensor, eps: Tensor, x_0_hat: Tensor) -> ThreeHeads:
    """Three heads that agree on x_0_hat, each in its own words."""
    alpha_t, sigma_t = schedule(t)
    eps_hat = (alpha_t * (x_0 - x_0_hat) + sigma_t * eps) / sigma_t
    answers = [target(x_0_hat, eps_hat, alpha_t, sigma_t) for target in HEADS.values()]
    return ThreeHeads(Says(torch.cat(answers, 1)), HEADS["v"])


def draws(n: int = 400, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return normals(n, dim, seed=1), normals(n, dim, seed=2), times(n)


def saying(n: int, dim: int = 4, seed: int = 3) -> ThreeHeads:
    return ThreeHeads(Says(normals(n, 3 * dim, seed=seed)), HEADS["v"])


@every("schedule")
def test_with_its_own_errors_compared_the_winner_is_read_off_the_snr(schedule):
    """Equal estimates of x_0: eps wins where SNR < 1, x_0 where SNR > 1, and v never."""
    found, (x_0, eps, t) = make("schedule", schedule), draws()
    denoiser = tied(found, t, x_0, eps, normals(400, 4, seed=3))
    _, told = Mixed(Own(), Winner())(denoiser, found, x_0, eps, t)
    log_snr = found.log_snr(t).flatten()
    told = told["head"][log_snr.abs() > 1e-6]
    expected = torch.where(log_snr > 0, 0, 2)[log_snr.abs() > 1e-6]
    assert torch.equal(told.long(), expected)
    assert {0, 2} == set(told.long().tolist())


def test_equal_estimates_tie_in_x_0_and_the_winner_is_uniform():
    """By the chi-square of the three counts, and in both halves of the range of noise."""
    torch.manual_seed(0)
    schedule, (x_0, eps, t) = make("schedule", "linear"), draws(6000)
    denoiser = tied(schedule, t, x_0, eps, normals(6000, 4, seed=3))
    _, told = Mixed(Common(), Winner())(denoiser, schedule, x_0, eps, t)
    for part in (told["head"], told["head"][:3000], told["head"][3000:]):
        counts = part.long().bincount(minlength=3).double()
        due = len(part) / 3
        assert ((counts - due).square() / due).sum() < 13.8  # 0.1 % of draws are above, for 2 degrees of freedom


def test_the_errors_of_x_0_eps_and_v_choose_alike():
    schedule, (x_0, eps, t) = make("schedule", "cosine"), draws()
    denoiser, winners = saying(400), []
    snr = schedule.log_snr(t).exp()
    for factor in (1, snr, snr + 1):

        class Scaled(Common):
            def forward(self, own: Tensor, x_0: Tensor, log_snr: Tensor, factor=factor) -> tuple[Tensor, Tensor]:
                return factor * x_0, own

        winners.append(Mixed(Scaled(), Winner())(denoiser, schedule, x_0, eps, t)[1]["head"])
    assert torch.equal(winners[0], winners[1])
    assert torch.equal(winners[0], winners[2])


@pytest.mark.parametrize("criterion", [Common, Own, Standardised, Uncertainty])
def test_only_the_winner_gets_a_gradient(criterion):
    schedule, (x_0, eps, t) = make("schedule", "cosine"), draws()
    denoiser = saying(400)
    loss, told = Mixed(criterion(), Winner())(denoiser, schedule, x_0, eps, t)
    loss.sum().backward()
    gradient = denoiser.net.y.grad.view(400, 3, 4).abs().sum(2)
    assert torch.equal((gradient > 0).long(), nn.functional.one_hot(told["head"].long(), 3))
    assert set(told["head"].long().tolist()) == {0, 1, 2}
    assert not any(part.requires_grad for part in told.values())
    assert told["head"].shape == told["mse"].shape == loss.shape == (400,)


def test_the_winner_has_the_least_x_0_error():
    schedule, (x_0, eps, t) = make("schedule", "cosine"), draws()
    denoiser = saying(400).eval()
    heads = denoiser.outputs(schedule(t).alpha * x_0 + schedule(t).sigma * eps, *schedule(t)).heads
    error = (heads - x_0[:, None]).square().mean(2)
    _, told = Mixed(Common(), Winner())(denoiser, schedule, x_0, eps, t)
    assert torch.equal(told["head"].long(), error.argmin(1))


@every("schedule")
@pytest.mark.parametrize("head", [0, 1, 2])
def test_a_head_alone_has_the_loss_of_a_network_of_its_own(schedule, head):
    found, (x_0, eps, t) = make("schedule", schedule), draws()
    denoiser, target = saying(400), HEADS[NAMES[head]]
    loss, _ = Mixed(Common(), Only(head))(denoiser, found, x_0, eps, t)
    alone = Denoiser(Says(denoiser.net.y.detach().chunk(3, 1)[head]), target)
    expected, told = WeightedLoss(Unit(target))(alone, found, x_0, eps, t)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    (own,) = torch.autograd.grad(loss.sum(), denoiser.net.y)
    (theirs,) = torch.autograd.grad(expected.sum(), alone.net.y)
    torch.testing.assert_close(own.chunk(3, 1)[head], theirs, rtol=1e-7, atol=1e-12)
    heads = denoiser.outputs(found(t).alpha * x_0 + found(t).sigma * eps, *found(t)).heads
    torch.testing.assert_close((heads[:, head] - x_0).square().mean(1), told["mse"], rtol=1e-9, atol=0)


class TestTable:
    schedule = make("schedule", "cosine")

    def taught(self) -> tuple[ThreeHeads, Tensor]:
        """Heads of which one in each third of the range of log-SNR is right, after training on them."""
        x_0, eps, t = draws(3000)
        alpha_t, sigma_t = self.schedule(t)
        right = (self.schedule.log_snr(t).flatten() + 20).div(5).long() % 3
        answers = [target(x_0, eps, alpha_t, sigma_t) for target in HEADS.values()]
        for k, answer in enumerate(answers):
            answer[right != k] += 1.0
        denoiser = ThreeHeads(Says(torch.cat(answers, 1)), HEADS["v"]).train()
        Mixed(Common(), Winner())(denoiser, self.schedule, x_0, eps, t)
        return denoiser, right

    def test_before_training_it_is_v(self):
        denoiser, x_t = saying(50), normals(50, 4, seed=4)
        says = denoiser.outputs(x_t, *self.schedule(times(50)))
        assert torch.equal(says.x_0, says.heads[:, 1])

    def test_after_training_it_is_what_was_best_at_that_noise(self):
        denoiser, right = self.taught()
        log_snr = self.schedule.log_snr(times(3000)).flatten()
        assert torch.equal(denoiser.best(log_snr), right)

    def test_the_truth_is_not_asked(self):
        """The estimate is a function of x_t and its level; other data and noise of the same x_t change nothing."""
        denoiser, _ = self.taught()
        denoiser.eval()
        x_0, eps, t = draws(3000)
        alpha_t, sigma_t = self.schedule(t)
        x_t = alpha_t * x_0 + sigma_t * eps
        other = x_0 + normals(3000, 4, seed=9)
        loss = Mixed(Common(), Winner())
        found = [
            loss(denoiser, self.schedule, data, (x_t - alpha_t * data) / sigma_t, t)[1]["mse"] for data in (x_0, other)
        ]
        x_0_hat = denoiser(x_t, alpha_t, sigma_t)
        for mse, data in zip(found, (x_0, other), strict=True):
            torch.testing.assert_close(mse, (x_0_hat - data).square().mean(1), rtol=1e-4, atol=1e-6)

    def test_it_is_saved_and_copied_to_the_average(self):
        denoiser, right = self.taught()
        log_snr = self.schedule.log_snr(times(3000)).flatten()
        again = saying(3000)
        again.load_state_dict(denoiser.state_dict())
        assert torch.equal(again.best(log_snr), right)
        average = EMA(saying(3000), decay=0.5)
        average.update(denoiser)
        assert torch.equal(average.model.best(log_snr), right)
        assert average.model.errors.sums.dtype == torch.float64
        assert not torch.equal(saying(3000).best(log_snr), right)

    def test_evaluation_teaches_it_nothing(self):
        denoiser, _ = self.taught()
        before = denoiser.errors.sums.clone()
        x_0, eps, t = draws(3000)
        criterion = Standardised()
        Mixed(criterion, Winner())(denoiser.eval(), self.schedule, x_0, eps, t)
        assert torch.equal(denoiser.errors.sums, before)
        assert torch.equal(criterion.squares.sums, Standardised().squares.sums)


def test_running_means_forget_only_where_there_is_something_new():
    found = Binned((1.0, 2.0, 3.0), decay=0.5)
    assert torch.equal(found.means, torch.tensor([1.0, 2.0, 3.0]).double().expand(40, 3))
    value = torch.tensor([4.0, 5.0, 6.0]).double()
    found.add(torch.tensor([0.5, 0.5]), torch.stack([value, 3 * value]))
    found.add(torch.tensor([-50.0, 50.0]), torch.stack([value, value]))
    torch.testing.assert_close(found.means[20], 2 * value)
    torch.testing.assert_close(found.means[[0, 39]], value.expand(2, 3))
    found.add(torch.tensor([0.9]), 10 * value[None])
    torch.testing.assert_close(found.means[20], (0.5 * 4 + 10) / 2 * value)  # weights 0.5 of two, and 1
    torch.testing.assert_close(found.means[[0, 39]], value.expand(2, 3))
    assert torch.equal(found.means[[5]], torch.tensor([[1.0, 2.0, 3.0]]).double())


def test_standardised_errors_do_not_know_their_units():
    """Each head at its usual error has the same score, whatever its scale at this level of noise."""
    criterion = Standardised()
    own = torch.tensor([1e-4, 1.0, 300.0]).double() * (1 + 0.1 * normals(5000, 3).clamp(-3, 3))
    log_snr = torch.full((5000,), 3.3).double()
    criterion.learn(own, log_snr)
    compared, trained = criterion(own, own, log_snr)
    torch.testing.assert_close(compared.square().mean(0), torch.ones(3).double(), rtol=1e-9, atol=0)
    share = Winner()(compared).mean(0)
    assert (share - 1 / 3).abs().max() < 0.03
    assert torch.equal(trained, own)


def test_learned_uncertainty_ends_at_the_logarithm_of_the_error():
    """Where u = log own, own e^-u + u is least; only the winner's u moves."""
    criterion = Uncertainty().double()
    own = torch.tensor([[0.2, 5.0, 9.0]]).double()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        compared, trained = criterion(own, own, torch.zeros(1))
        assert compared is trained
        (Winner()(compared.detach()) * trained).sum().backward()
        optimizer.step()
    assert criterion.u.tolist() == pytest.approx([math.log(0.2), 0.0, 0.0], abs=1e-4)


def test_soft_shares_go_from_even_to_the_winner():
    compared = normals(200, 3).square()
    for temperature in (0.1, 1.0):
        expected = (-compared / temperature).exp()
        torch.testing.assert_close(SoftMin(temperature)(compared), expected / expected.sum(1, keepdim=True))
    torch.testing.assert_close(SoftMin(1e6)(compared), torch.full((200, 3), 1 / 3).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(SoftMin(1e-6)(compared), Winner()(compared), rtol=0, atol=1e-6)


def test_soft_shares_pass_on_no_gradient_of_their_own():
    """The gradient is that of the losses at fixed shares, and every head has some."""
    schedule, (x_0, eps, t) = make("schedule", "cosine"), draws(64)
    denoiser = saying(64)
    (got,) = torch.autograd.grad(Mixed(Own(), SoftMin(1.0))(denoiser, schedule, x_0, eps, t)[0].sum(), denoiser.net.y)
    expected, own = torch.zeros_like(got), []
    for head in range(3):
        loss, _ = Mixed(Own(), Only(head))(denoiser, schedule, x_0, eps, t)
        own.append(loss)
    shares = (-torch.stack(own, 1).detach()).softmax(1)
    for head in range(3):
        expected += torch.autograd.grad((shares[:, head] * own[head]).sum(), denoiser.net.y)[0]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (got != 0).any(0).all()


def learned(selection, schedule: Schedule) -> float:
    """The mean x_0 error of the sampled estimate of points on four spots, after 200 steps."""
    torch.manual_seed(0)
    loss = Mixed(Common(), selection)
    denoiser = ThreeHeads(MLP((2,), width=64, depth=2, outputs=3), HEADS["v"])
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    t, errors = times(256).float(), []
    for _ in range(200):
        x_0 = torch.randint(2, (256, 2)).mul(2).sub(1).float()
        value, told = loss(denoiser, schedule, x_0, torch.randn(256, 2), t)
        optimizer.zero_grad()
        value.mean().backward()
        optimizer.step()
        errors.append(told["mse"].mean().item())
    return sum(errors[-20:]) / 20


def test_even_shares_make_three_denoisers_and_a_winner_that_takes_all_makes_none():
    """The winner is chosen by the truth, so that each head settles on ends of its own and none on the mean of all:
    its error is far above what is possible, E[(x_0 - tanh(x_t alpha/sigma^2))^2] for x_0 = 1 or -1."""
    schedule = make("schedule", "cosine")
    r = (schedule.log_snr(times(256)) / -2).exp()
    optimum = (((1 + r * normals(256, 2000)) / r**2).tanh() - 1).square().mean().item()
    assert learned(SoftMin(1e6), schedule) < 1.06 * optimum
    assert learned(Winner(), schedule) > 1.4 * optimum


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (lambda: SoftMin(0.0), "temperature=0.0: need"),
        (lambda: SoftMin(math.nan), "temperature=nan: need"),
        (lambda: Standardised(1.0), "decay=1.0: need"),
    ],
)
def test_bad_arguments_are_refused_in_a_line(made, line):
    with pytest.raises(ValueError, match=rf"^{line}[^\n]*$"):
        made()
