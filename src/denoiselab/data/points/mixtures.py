"""Mixtures of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from denoiselab.data.points.base import Known
from denoiselab.models.layers import require
from denoiselab.rng import generator


class Mixture(Known):
    """p(y) = sum_k w_k N(y; m_k, C_k); noised, N(y; alpha m_k, alpha^2 C_k + sigma^2 I). The label is the mode k.

    Args:
        batch_size, workers, n: as for ``Points``.
        means: m_k, one pair of numbers per mode.
        covariances: C_k, one symmetric positive-definite 2 x 2 matrix per mode; None where ``stds`` are given.
        stds: in the place of covariances, one number > 0 per mode: C_k = std_k^2 I.
        weights: w_k up to a factor, one number > 0 per mode; None for equal ones.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        covariances: Sequence[Sequence[Sequence[float]]] | None = None,
        stds: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        batch_size: int = 512,
        workers: int = 0,
        n: int = 50_000,
    ):
        k = self.num_classes = len(means)
        self.means = _numbers("means", means, (k, 2), "one pair of numbers per mode, as in [[0,0],[1,2]]")
        if stds is not None:
            std = _numbers("stds", stds, (k,), f"{k} numbers > 0, one per mode")
            require("stds", stds, bool((std > 0).all()), f"{k} numbers > 0, one per mode")
            self.covariances = (std**2)[:, None, None] * torch.eye(2, dtype=torch.float64)
        else:
            need = f"{k} symmetric positive-definite 2 x 2 matrices, one per mode, or stds"
            self.covariances = _numbers("covariances", covariances, (k, 2, 2), need)
            require("covariances", covariances, _positive(self.covariances), need)
        need = f"{k} numbers > 0, one per mode"
        w = _numbers("weights", [1.0] * k if weights is None else weights, (k,), need)
        require("weights", weights, bool((w > 0).all()), need)
        self.weights = w / w.sum()
        self.variances, self.axes = torch.linalg.eigh(self.covariances)  # C_k = axes diag(variances) axes^T
        super().__init__(batch_size, workers, n)

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh points (n, 2) and their modes (n,)."""
        g = generator(seed, "mixture")
        label = torch.multinomial(self.weights, n, replacement=True, generator=g)
        root = torch.linalg.cholesky(self.covariances)[label]  # (n, 2, 2)
        eps = torch.randn(n, 2, generator=g).double()
        return (self.means[label] + torch.einsum("nij,nj->ni", root, eps)).float(), label

    def components(self, points: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        axes, variances = self.axes.to(points), self.variances.to(points)
        away = points[:, None] - alpha[..., None] * self.means.to(points)  # (N, K, 2)
        along = torch.einsum("nki,kij->nkj", away, axes)
        variance = (alpha**2)[..., None] * variances + (sigma**2)[..., None]  # (N, K, 2)
        log_p = -(along**2 / variance + (2 * math.pi * variance).log()).sum(-1) / 2
        return log_p + self.weights.to(points).log(), -torch.einsum("kij,nkj->nki", axes, along / variance)

    def nearest(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest mode of each of points (N, 2), and how many standard deviations it is from that mode's mean
        (Mahalanobis' distance), (N,) each."""
        points = points.double()
        one = torch.ones_like(points[:, :1])
        mode = self.components(points, one, 0 * one)[0].argmax(1)
        along = torch.einsum("ni,nij->nj", points - self.means.to(points)[mode], self.axes.to(points)[mode])
        return mode, (along**2 / self.variances.to(points)[mode]).sum(1).sqrt()


class EightGaussians(Mixture):
    """Eight Gaussians on a circle: radius 4/1.414, standard deviation 0.5/1.414; the label is the mode (Grathwohl
    et al. 2019, arXiv:1810.01367, FFJORD's toy data).

    Args:
        batch_size: the global batch.
        workers: loader processes.
        n: training points, >= 8; a fifth as many again are held out.
    """

    radius = 4 / 1.414
    std = 0.5 / 1.414

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000):
        super().__init__(self.centres.tolist(), None, [self.std] * 8, None, batch_size, workers, n)

    @property
    def centres(self) -> Tensor:
        """The modes' means, (8, 2), label k at angle k pi/4."""
        angle = torch.arange(8) * math.pi / 4
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh points (n, 2) and their modes (n,)."""
        g = generator(seed, "8gaussians")
        label = torch.randint(0, 8, (n,), generator=g)
        return self.centres[label] + self.std * torch.randn(n, 2, generator=g), label


def _numbers(name: str, values: object, shape: tuple[int, ...], need: str) -> Tensor:
    """The finite numbers of that shape, or the one-line error of the option."""
    try:
        found = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={values}: need {need}") from None
    require(name, values, 0 not in shape and found.shape == shape and bool(found.isfinite().all()), need)
    return found


def _positive(matrices: Tensor) -> bool:
    """Whether all are symmetric and positive definite."""
    return torch.equal(matrices, matrices.mT) and not torch.linalg.cholesky_ex(matrices).info.any()
