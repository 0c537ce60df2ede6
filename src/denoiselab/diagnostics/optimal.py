"""The least loss that any network can reach, as a function of the noise level: in closed form for families of data, and
for data whose density is known.

The mean squared error of E[x_0 | x_t] is the least there is. It depends on the signal-to-noise ratio alone
(Guo, Shamai and Verdu 2005, arXiv:cs/0412108). In units of eps it is SNR times, in units of v (SNR + 1) times as much;
so curves of the same model fall, rise or have a valley depending on the unit, and it takes a family's curve to say
what is high. A model can stay above its data's own, never below on new samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from denoiselab.data.points import Known
from denoiselab.schedule import Schedule

if TYPE_CHECKING:
    from denoiselab.diagnostics.subject import Subject

Family = Callable[[Tensor, Tensor], Tensor]
"""The least mean squared error of x_0, per value, at levels (alpha_t, sigma_t) of any shape; in float64."""

AT_ONCE = 500
"""Levels for which a spectrum's errors are computed together."""


def white(alpha_t: Tensor, sigma_t: Tensor, variance: float = 1.0) -> Tensor:
    """v sigma_t^2/(alpha_t^2 v + sigma_t^2): values that are independent N(m, v).

    >>> print(f"{white(torch.tensor(0.6), torch.tensor(0.8)):.4f}")            # sigma_t^2
    0.6400
    """
    alpha_t, sigma_t = alpha_t.double(), sigma_t.double()
    return variance * sigma_t**2 / (alpha_t**2 * variance + sigma_t**2)


class Spectrum:
    """mean_k P_k sigma_t^2/(alpha_t^2 P_k + sigma_t^2): a Gaussian whose variances along orthogonal directions are P_k.

    Args:
        variances: P_k >= 0, a row each.
    """

    def __init__(self, variances: Tensor):
        found, count = variances.double().flatten().unique(return_counts=True)
        self.variances, self.share = found, count.double() / count.sum()

    def __call__(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        levels = zip(*(level.double().reshape(-1, 1).split(AT_ONCE) for level in (alpha_t, sigma_t)), strict=True)
        p, share = self.variances.to(alpha_t.device), self.share.to(alpha_t.device)
        found = [(p * sigma**2 / (alpha**2 * p + sigma**2)) @ share for alpha, sigma in levels]
        return torch.cat(found).reshape(alpha_t.shape)

    @classmethod
    def natural(cls, shape: Sequence[int], variance: float = 1.0) -> Spectrum:
        """Images whose power falls as 1/k^2, k being the spatial frequency in cycles per side, as that of natural
        images does (Field 1987, doi:10.1364/JOSAA.4.002379), channels independent.

        Args:
            shape: of an image, (C, H, W).
            variance: of a value.
        """
        *_, height, width = shape
        rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) * side for side in (height, width))
        power = 1 / (rows[:, None] ** 2 + columns**2).clamp_min(1)
        return cls((variance * power / power.mean()).flatten())


class Filter:
    """The best linear filter of some samples about their mean, or about the mean of their class: of points along the
    axes of their covariance, of images the best among convolutions.

    A denoiser like any other, with a gain alpha_t P_k/(alpha_t^2 P_k + sigma_t^2) in each direction. Its error,
    ``Spectrum(filter.power)``, is above the optimum of the data at every level, and within reach of any network that
    learned anything. Of Gaussian data it is the optimum.

    Args:
        x_0: (N, D) or (N, C, H, W).
        label: what the model is told, (N,) in 0..C-1, or None.
        classes: C.
    """

    def __init__(self, x_0: Tensor, label: Tensor | None = None, classes: int = 0):
        x = x_0.double()
        overall = x.mean(0, keepdim=True)
        own = [x[label == k].mean(0, keepdim=True) if (label == k).any() else overall for k in range(classes)]
        self.means = torch.cat([*own, overall])  # the last is that of no label
        x = x - (overall if label is None else self.means[label])
        freedom = max(1, len(x) - (1 if label is None else len(label.unique())))
        if x.ndim == 2:
            power, self.axes = torch.linalg.eigh(x.T @ x / freedom)
            self.power = power.clamp_min(0)
        else:
            self.power, self.axes = torch.fft.fft2(x, norm="ortho").abs().square().sum(0) / freedom, None

    def __call__(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        means = self.means.to(x_t.device)
        mean = means[-1:] if label is None or len(means) == 1 else means[label]
        x, alpha, sigma = x_t.double() - alpha_t * mean, alpha_t.double(), sigma_t.double()
        power = self.power.to(x.device)
        gain = alpha * power / (alpha**2 * power + sigma**2)
        if self.axes is None:
            made = torch.fft.ifft2(gain * torch.fft.fft2(x, norm="ortho"), norm="ortho").real
        else:
            axes = self.axes.to(x.device)
            made = (gain * (x @ axes)) @ axes.T
        return (mean + made).to(x_t.dtype)


Z = torch.linspace(-12, 12, 2401, dtype=torch.float64)
"""Where the integral over a standard normal is read; the trapezoid rule is exact to 14 digits for these integrands."""


def binary(alpha_t: Tensor, sigma_t: Tensor, variance: float = 1.0) -> Tensor:
    """v (1 - E tanh(s + sqrt(s) z)), s = v SNR, z ~ N(0, 1): independent values +-sqrt(v), as likely (Guo, Shamai and
    Verdu 2005, arXiv:cs/0412108, eq. 17). In units of eps it has a peak.

    Where the values are further from 0 than their noise, what is left falls as e^(-s/2).
    """
    snr = variance * (alpha_t.double() / sigma_t.double()).square()
    z = Z.to(snr.device)
    density = (-z.square() / 2).exp() * ((z[1] - z[0]) / math.sqrt(2 * math.pi))
    s = snr.reshape(-1, 1).clamp_max(1e4).split(AT_ONCE)  # beyond, nothing is left
    return variance * torch.cat([(2 * (-2 * (v + v.sqrt() * z)).sigmoid()) @ density for v in s]).reshape(snr.shape)


class Optimum:
    """E[x_0 | x_t] = (x_t + sigma_t^2 grad log p(x_t))/alpha_t of points whose density is known (Efron 2011,
    doi:10.1198/jasa.2011.tm11181): the denoiser that no network can beat. Of all classes together, or of one where a
    label >= 0 names it.

    A denoiser like any other, but that alpha_t is held at sigma_t/1000, below which x_t says nothing of x_0.

    Args:
        data: its components come in as many equal blocks as there are labels, in their order.
    """

    def __init__(self, data: Known):
        self.data = data

    def score(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor | None = None) -> Tensor:
        """grad log p(x_t), or grad log p(x_t | label), (N, 2); levels (N, 1)."""
        data, x = self.data, x_t.double()
        mean, std = data.codec.mean.to(x), data.codec.std
        alpha, sigma = alpha_t.double(), std * sigma_t.double()
        found = []
        for rows in torch.arange(len(x), device=x.device).split(AT_ONCE):
            log_p, gradient = data.components(std * x[rows] + alpha[rows] * mean, alpha[rows], sigma[rows])
            if label is not None:
                asked = label[rows][:, None]
                block = torch.arange(log_p.shape[1], device=x.device) // (log_p.shape[1] // data.num_classes)
                log_p = log_p.masked_fill((asked >= 0) & (block != asked), -math.inf)
            found.append(std * (log_p.softmax(1)[..., None] * gradient).sum(1))
        return torch.cat(found).to(x_t.dtype)

    def __call__(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        x, sigma = x_t.double(), sigma_t.double()
        alpha = torch.maximum(alpha_t.double(), sigma / 1e3)
        return ((x + sigma**2 * self.score(x, alpha, sigma, label)) / alpha).to(x_t.dtype)


def control(subject: Subject) -> Optimum | Filter:
    """What a model is held against: the optimum of its data where their density is known, else the best linear
    filter."""
    if isinstance(subject.data, Known):
        return Optimum(subject.data)
    train = subject.real(4000, train=True)
    return Filter(train["x_0"], train["cond"].get("label"), subject.run.parts.num_classes)


class Memorised:
    """E[x_0 | x_t] where the data are the training samples themselves, each as likely: sum_i softmax_i(-|x_t - alpha_t
    x_i|^2/(2 sigma_t^2)) x_i. It is what the training loss asks for; its error on training samples falls to 0 at low
    noise, and a model that nears it there has memorised them.

    Args:
        x_0: (N, ...).
        label: what the model is told, (N,), or None.
    """

    def __init__(self, x_0: Tensor, label: Tensor | None = None):
        self.x_0, self.label = x_0.double().flatten(1), label
        self.half = self.x_0.square().sum(1) / 2

    def to(self, device: torch.device) -> Memorised:
        self.x_0, self.half = self.x_0.to(device), self.half.to(device)
        self.label = None if self.label is None else self.label.to(device)
        return self

    def __call__(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, label: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        x, alpha, sigma = (value.double().flatten(1) for value in (x_t, alpha_t, sigma_t))
        near = (x @ self.x_0.T - alpha * self.half) * (alpha / sigma**2)  # (B, N)
        if self.label is not None and label is not None:
            near = near.masked_fill((label[:, None] >= 0) & (self.label != label[:, None]), -math.inf)
        return (near.softmax(1) @ self.x_0).view_as(x_t).to(x_t.dtype)


def in_panels(mmse: Tensor, schedule: Schedule, t: Tensor) -> dict[str, Tensor]:
    """The same error in units of x_0, eps and v: times 1, SNR and SNR + 1."""
    snr = schedule.log_snr(t.double()).exp()
    return {"x_0": mmse, "eps": snr * mmse, "v": (snr + 1) * mmse}
