"""What every set of points has: draws, a fixed split, and where it is known the density at every noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Standardise
from denoiselab.models.layers import require

AT_ONCE = 64
"""Points whose density is computed together: the components of so many stay in a cache, and memory is bounded."""


class Points(Data):
    """Points in the plane, drawn by a formula; a subclass writes ``draw``.

    The sets are those of FFJORD (Grathwohl et al. 2019, arXiv:1810.01367, section 4.1) in its units, but every
    coordinate is drawn at random, where FFJORD shuffles angles at equal distances. n + n // 5 points are one draw of
    seed 0, whatever the run's seed: the first n to train on, the rest held out.

    Args:
        batch_size: the global batch.
        workers: loader processes.
        n: training points, at least 5 and one per class; a fifth as many again are held out.
    """

    shape = (2,)

    def __init__(self, batch_size: int = 512, workers: int = 0, n: int = 50_000):
        super().__init__(batch_size, workers)
        least = max(5, self.num_classes)
        require("n", n, n >= least, f"at least {least} points")
        points, label = self.draw(n + n // 5)
        self.codec = Standardise.of(points[:n])
        x_0, ids = self.codec.encode(points), torch.arange(len(points))
        self.train, self.held_out = (
            Samples(x_0[part], None if label is None else label[part], ids[part])
            for part in (slice(None, n), slice(n, None))
        )

    def draw(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """n fresh points (n, 2), float32, in their own units, and their labels (n,) or None; by the seed alone."""
        raise NotImplementedError


class Known(Points):
    """Points whose density is known at every noise level, as a mixture: p(y) = sum_k w_k p_k(y) and
    grad log p(y) = sum_k P(k | y) grad log p_k(y); a subclass writes ``components``.

    y = alpha point + sigma eps is in the units of the points: alpha = 1 and sigma = 0 (the default) are the points
    themselves. Alpha and sigma are numbers, or tensors that broadcast against (..., 1).

    What a run diffuses is standardised, x_0 = (point - mean)/std, and x_t = alpha_t x_0 + sigma_t eps. So
    std x_t + alpha_t mean is a point noised to alpha = alpha_t and sigma = std sigma_t, and the density of x_t is
    std^2 times its density. ``score_of`` does this for the score.

    All is computed in float64 and returned in the dtype of what is asked about.
    """

    codec: Standardise

    def components(self, points: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(w_k p_k(y)), (N, K), and grad log p_k(y), (N, K, 2), for y (N, 2), alpha and sigma (N, 1), float64."""
        raise NotImplementedError

    def log_density(self, points: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """log p(y) in nats, (...), at y = points (..., 2)."""
        return self._read(lambda log_p, gradient: log_p.logsumexp(-1), points, alpha, sigma)

    def score(self, points: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """grad log p(y), (..., 2), at y = points (..., 2); NaN where the density is 0."""
        return self._read(
            lambda log_p, gradient: (log_p.softmax(-1).unsqueeze(-1) * gradient).sum(-2), points, alpha, sigma
        )

    def score_of(self, x_t: Tensor, alpha_t: float | Tensor, sigma_t: float | Tensor) -> Tensor:
        """grad log p(x_t), (..., 2), of what this set's runs diffuse; E[x_0 | x_t] is then
        (x_t + sigma_t^2 score)/alpha_t (Efron 2011, doi:10.1198/jasa.2011.tm11181)."""
        y, mean, std = x_t.double(), self.codec.mean.to(x_t.device).double(), self.codec.std
        return (std * self.score(std * y + alpha_t * mean, alpha_t, std * sigma_t)).to(x_t.dtype)

    def _read(
        self,
        read: Callable[[Tensor, Tensor], Tensor],
        points: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
    ) -> Tensor:
        """What is read off the components at each point, a part of the points at a time."""
        like = points.double()[..., :1]
        levels = [
            torch.as_tensor(level, dtype=like.dtype, device=like.device).expand_as(like).reshape(-1, 1)
            for level in (alpha, sigma)
        ]
        parts = zip(*(rows.split(AT_ONCE) for rows in (points.double().reshape(-1, 2), *levels)), strict=True)
        found = torch.cat([read(*self.components(*part)) for part in parts])
        return found.reshape(points.shape[:-1] + found.shape[1:]).to(points.dtype)
