"""Classifier guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoiselab.conditioning import NULL
from denoiselab.denoiser import Outputs
from denoiselab.guidance.base import DenoiserLike, Guidance, outputs_of, unguided

Classifying = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Any differentiable classifier(x_t, alpha_t, sigma_t) -> logits (B, K) of the label of noisy data."""


class Classifier(Guidance):
    """x_0_hat + scale (sigma_t^2/alpha_t) grad log p(label | x_t) (Dhariwal and Nichol 2021, arXiv:2105.05233,
    algorithm 2).

    By Bayes' rule x_0_cond = x_0_null + (sigma_t^2/alpha_t) grad log p(label | x_t). So on an unconditional denoiser
    an exact classifier at scale s is CFG at scale s, and on a conditional one at scale w it is CFG at scale 1 + w.
    With the DDPM sampler this moves the mean by variance x gradient / (alpha_t/alpha_s), which is algorithm 1 to
    first order in the step. Samples whose label is null, and calls without labels, are left alone.

    Args:
        denoiser: the denoiser to guide; it is told the label too, if it knows labels. ``guidance=CFG`` at scale 0
            makes a conditional one forget them.
        classifier: ``classifier(x_t, alpha_t, sigma_t) -> logits`` (B, K), differentiable.
        scale: any finite number; 0 is off.
        guidance: what guides the denoiser first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        classifier: Classifying,
        scale: float = 1.0,
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        super().__init__(denoiser, guidance)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: need a finite number; 0 is off")
        self.classifier, self.scale = classifier, scale

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        found = outputs_of(self.denoiser, x_t, alpha_t, sigma_t, **cond)
        label = cond.get("label")
        if self.scale == 0 or label is None:
            return found
        with torch.enable_grad():
            x = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
            log_p = self.classifier(x, alpha_t, sigma_t).log_softmax(1)  # (B, K)
            asked = log_p.gather(1, label.clamp_min(0)[:, None])[:, 0]
            asked = asked.masked_fill(label == NULL, 0).sum()
            (gradient,) = torch.autograd.grad(asked, x, create_graph=x_t.requires_grad)
        return found._replace(x_0=found.x_0 + self.scale * sigma_t**2 / alpha_t * gradient)


class KernelClassifier(Classifier):
    """Classifier guidance that needs no training: by the exact classifier of a kernel density of the training set.

    Args:
        denoiser: the denoiser to guide.
        data: whose training set; it must have labels.
        scale: as for Classifier.
        bandwidth: h of the kernels, > 0, in units of x_0.
        most: points per class to keep, >= 1, evenly spaced over the set.
        guidance: what guides the denoiser first.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        data: Any,
        scale: float = 1.0,
        bandwidth: float = 0.2,
        most: int = 200,
        guidance: Callable[[DenoiserLike], DenoiserLike] = unguided,
    ):
        if data.train.label is None:
            raise ValueError(f"data={type(data).__name__}: has no labels for a classifier to tell apart")
        classifier = KernelPosterior(data.train.x_0, data.train.label, bandwidth, most)
        super().__init__(denoiser, classifier, scale, guidance)


class KernelPosterior:
    """logits_y = log sum over the points x_i of class y of N(x_t; alpha_t x_i, sigma_t^2 + alpha_t^2 h^2), up to
    what all classes share: the posterior of the label under a kernel density, noised to the level.

    Classes keep their share of the set even where only some of their points are kept.

    Args:
        x_0: points (N, ...).
        label: their classes (N,), from 0.
        bandwidth: h > 0.
        most: points per class to keep, >= 1.
    """

    def __init__(self, x_0: Tensor, label: Tensor, bandwidth: float, most: int):
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth}: need a number > 0")
        if most < 1:
            raise ValueError(f"most={most}: need at least 1")
        if label.is_floating_point():
            raise ValueError(f"label: need whole numbers, not {label.dtype}")
        found = [(label == k).nonzero()[:, 0] for k in range(int(label.max()) + 1)]
        kept = [evenly(index, most) for index in found]
        self.bandwidth, self.counts = bandwidth, [len(index) for index in kept]
        self.points = x_0[torch.cat(kept)].flatten(1)  # (M, D), class by class
        shares = [math.log(len(whole) / len(part)) for whole, part in zip(found, kept, strict=True) for _ in part]
        self.log_share = torch.tensor(shares, dtype=torch.float64)  # (M,)

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Logits (B, K)."""
        self.points, self.log_share = self.points.to(x_t.device), self.log_share.to(x_t.device)
        points, log_share = self.points.to(x_t.dtype), self.log_share.to(x_t.dtype)
        alpha, sigma = (level.flatten(1)[:, :1] for level in (alpha_t, sigma_t))  # (B, 1)
        # |x_t - alpha x_i|^2 without |x_t|^2, which all classes share and which drowns the rest at high noise
        nearness = alpha * (x_t.flatten(1) @ points.T) - alpha**2 / 2 * points.square().sum(1)
        log_kernel = nearness / (sigma**2 + (alpha * self.bandwidth) ** 2) + log_share  # (B, M)
        return torch.stack([part.logsumexp(1) for part in log_kernel.split(self.counts, dim=1)], dim=1)


def evenly(index: Tensor, most: int) -> Tensor:
    """At most so many of them, evenly spaced."""
    n = min(most, len(index))
    return index[torch.arange(n) * len(index) // max(n, 1)]
