"""Mixed prediction: one network estimates x_0, v and eps, and each sample trains the estimate that is best."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.buffers import ExactBuffers
from denoiselab.denoiser import Denoiser, Outputs
from denoiselab.loss.base import Loss
from denoiselab.schedule import RATIO, Schedule, log_snr
from denoiselab.target import X0, Eps, Target, V

HEADS: dict[str, Target] = {"x_0": X0(), "v": V(), "eps": Eps()}
"""The three estimates, in the order of the network's outputs."""


class Binned(ExactBuffers):
    """Running means of what each head scores, per bin of one nat of log-SNR from -20 to 20, the outermost bins also
    for what lies beyond. A bin decays only where a batch has samples in it, so that what it knows stays.

    Args:
        start: the means before anything is seen, which count next to nothing afterwards.
        decay: per batch, in [0, 1).
    """

    sums: Tensor
    edge, bins = 20.0, 40

    def __init__(self, start: tuple[float, ...], decay: float = 0.99):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: need a number in [0, 1), such as 0.99")
        self.decay = decay
        weighted = 1e-30 * torch.tensor((*start, 1.0), dtype=torch.float64)
        self.register_buffer("sums", weighted.repeat(self.bins, 1))  # (bins, heads + 1), the last the count

    def bin(self, log_snr: Tensor) -> Tensor:
        """The bin of each log-SNR, (B,)."""
        share = (log_snr.detach().double() + self.edge) / (2 * self.edge)
        return (share * self.bins).long().clamp(0, self.bins - 1)

    @property
    def means(self) -> Tensor:
        """(bins, heads)."""
        return self.sums[:, :-1] / self.sums[:, -1:]

    @torch.no_grad()
    def add(self, log_snr: Tensor, values: Tensor) -> None:
        """Take in values (B, heads) at log-SNRs (B,), of every rank. No host synchronisation."""
        bins = F.one_hot(self.bin(log_snr), self.bins).double()
        # A product with the one-hot matrix: index_add_ is not deterministic on GPUs.
        new = bins.T @ F.pad(values.double(), (0, 1), value=1.0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(new)
        self.sums.mul_(torch.where(new[:, -1:] > 0, self.decay, 1.0)).add_(new)


class ThreeHeads(Denoiser):
    """x_0_hat of the head that was best at this level of noise while training: the one with the smallest running mean
    of squared x_0 errors in its bin of log-SNR. The table is part of the state, and the truth is never asked.

    Where nothing was measured it is v's estimate, whose x_0 error is at most that of the other two where all heads
    are off by as much in what they predict (1/(SNR + 1) of it, where theirs are 1 and 1/SNR of it).

    Args:
        net, target, sigma_data: as for Denoiser; target is not used, since each head has its own.
    """

    net_outputs: ClassVar[int] = len(HEADS)
    has_target: ClassVar[bool] = False

    def __init__(self, net: nn.Module, target: Target, sigma_data: float = 1.0):
        super().__init__(net, target, sigma_data)
        self.errors = Binned(start=(1.0, 0.0, 1.0))

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        """x_0 and heads, the estimates of x_0 from x_0, v and eps."""
        alpha_t = torch.maximum(alpha_t, sigma_t / RATIO)  # where there is nothing but noise, eps tells nothing of x_0
        answers = self.ask(x_t, alpha_t, sigma_t, **cond).chunk(len(HEADS), 1)
        told = [y.to_x_0(answer, x_t, alpha_t, sigma_t) for y, answer in zip(HEADS.values(), answers, strict=True)]
        heads = torch.stack(told, dim=1)  # (B, 3, ...)
        best = self.best(log_snr(alpha_t, sigma_t).flatten())
        return Outputs(heads[torch.arange(len(heads), device=heads.device), best], heads=heads)

    def best(self, log_snr: Tensor) -> Tensor:
        """The head to ask at each log-SNR, (B,)."""
        return self.errors.means.argmin(1)[self.errors.bin(log_snr)]


class Criterion(nn.Module):
    """What is compared between the heads of a sample, and what is then trained."""

    def forward(self, own: Tensor, x_0: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """(compared, trained), (B, 3) each.

        Args:
            own: each head's squared error in what it predicts, (B, 3).
            x_0: each head's squared x_0 error, (B, 3).
            log_snr: (B,).
        """
        raise NotImplementedError

    def learn(self, own: Tensor, log_snr: Tensor) -> None:
        """Take in the errors of a training batch, without gradient."""


class Common(Criterion):
    """The x_0 errors are compared. Those of eps and of v are the same times SNR and SNR + 1, so they choose alike."""

    def forward(self, own: Tensor, x_0: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return x_0, own


class Own(Criterion):
    """Each head's own error is compared, as published. It says more of units than of heads: with equal estimates of
    x_0 they are 1, SNR + 1 and SNR times one number, so that eps wins where SNR < 1, x_0 where SNR > 1, and v never."""

    def forward(self, own: Tensor, x_0: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return own, own


class Standardised(Criterion):
    """Each head's own error over its root mean square at this noise level so far: the head that does best by its own
    measure.

    Args:
        decay: of the running mean, per batch, in [0, 1).
    """

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.squares = Binned((1.0, 1.0, 1.0), decay)

    def forward(self, own: Tensor, x_0: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return own / self.squares.means[self.squares.bin(log_snr)].sqrt().to(own), own

    def learn(self, own: Tensor, log_snr: Tensor) -> None:
        self.squares.add(log_snr, own.square())


class Uncertainty(Criterion):
    """own e^-u + u, with u learned per head (Kendall et al. 2018, arXiv:1705.07115, eq. 8, up to a factor), is both
    compared and trained."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(len(HEADS)))

    def forward(self, own: Tensor, x_0: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        value = own * (-self.u).exp() + self.u
        return value, value


class Winner:
    """All of a sample's gradient to the smallest; one at random of those that are equal up to rounding."""

    def __call__(self, compared: Tensor) -> Tensor:
        """Shares (B, 3) that sum to 1."""
        least = compared.amin(1, keepdim=True)
        tied = compared - least <= math.sqrt(torch.finfo(compared.dtype).eps) * least.abs()
        return F.one_hot(((1 - torch.rand_like(compared)) * tied).argmax(1), len(HEADS)).to(compared)


class SoftMin:
    """Shares softmax(-compared/temperature): no head starves.

    Args:
        temperature: > 0.
    """

    def __init__(self, temperature: float = 0.1):
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: need a number > 0, such as 0.1")
        self.temperature = temperature

    def __call__(self, compared: Tensor) -> Tensor:
        """Shares (B, 3) that sum to 1."""
        return (compared / -self.temperature).softmax(1)


class Mixed(Loss):
    """sum over heads of share_h(sample) own_h, own_h = mean((y_h - y)^2) for y = x_0, v and eps, the shares without
    gradient: with Winner, the minimum of three losses, through which alone the gradient flows (arXiv:2502.01990,
    mixed prediction).

    The choice uses the truth, so it is no rule to sample by; ThreeHeads has one. It also makes the heads something
    else than denoisers: as in k-means, each moves to the mean of the x_0 for which it is nearest, not of all that x_t
    leaves possible, and the smallest of three errors says little of any one of them. SoftMin at a high temperature does
    without this, and without heads that starve. parts: mse of the estimate that
    sampling would take, and ``head``, the index of the chosen one.

    Args:
        criterion: what is compared and what is trained.
        selection: from what is compared, (B, 3), to shares, (B, 3).
    """

    denoiser: ClassVar[type[Denoiser]] = ThreeHeads

    def __init__(self, criterion: Criterion, selection: Winner | SoftMin):
        super().__init__()
        self.criterion, self.selection = criterion, selection
        self.formula = f"{type(selection).__name__}({type(criterion).__name__}) of mean |x_0|^2, |v|^2, |eps|^2 errors"

    def forward(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alpha_t, sigma_t = schedule(t)
        says = denoiser.outputs(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
        assert isinstance(denoiser, ThreeHeads)
        assert says.heads is not None
        at = log_snr(alpha_t, sigma_t).flatten()
        error = (says.heads - x_0[:, None]).square().flatten(2).mean(2)  # (B, 3)
        own = error * torch.stack([y.precision(alpha_t, sigma_t).flatten() for y in HEADS.values()], dim=1)
        if denoiser.training:
            denoiser.errors.add(at, error)
            self.criterion.learn(own, at)
        compared, trained = self.criterion(own, error, at)
        shares = self.selection(compared.detach())
        mse = (says.x_0.detach() - x_0).square().flatten(1).mean(1)
        return (shares * trained).sum(1), {"mse": mse, "head": shares.argmax(1).to(mse.dtype)}
