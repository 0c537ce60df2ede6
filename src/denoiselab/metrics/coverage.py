"""Which parts of the data do samples cover? Histograms over clusters of real data, compared by tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.features import Features
from denoiselab.metrics.space import Space, space_of, vectors_of
from denoiselab.rng import generator

ALPHA = 0.05
"""Of the test in each bin."""

Z = 1.959964
"""Its two-sided quantile."""

UNLABELLED = 20
"""Clusters of data without classes, unless told otherwise."""

FITTED = 20_000
"""Most real samples that clusters are fitted to."""


class Clusters:
    """k-means of real vectors (scikit-learn, k-means++, best of 10 starts, fixed seed); a vector belongs to the
    nearest centre.

    Args:
        vectors: (N, D), N >= k.
        k: clusters, >= 2.
    """

    def __init__(self, vectors: Tensor, k: int):
        from sklearn.cluster import KMeans

        if not 2 <= k <= len(vectors):
            raise ValueError(f"clusters={k}: need at least 2, and at most the {len(vectors)} real samples")
        self.k = k
        index = torch.randperm(len(vectors), generator=generator(0, "clusters"))[:FITTED]
        fitted = KMeans(k, n_init=10, random_state=0).fit(vectors[index].numpy())  # pyright: ignore[reportArgumentType]
        self.centres = torch.as_tensor(fitted.cluster_centers_, dtype=torch.float64)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The cluster of each vector, (N,)."""
        return torch.cat([torch.cdist(part, self.centres).argmin(1) for part in vectors.double().split(4096)])

    def counts(self, cluster: Tensor) -> Tensor:
        """How many belong to each, (k,)."""
        return cluster.bincount(minlength=self.k)

    def medoids(self, vectors: Tensor) -> Tensor:
        """The positions of the vectors that are nearest to the centres, (k,)."""
        best = [torch.cdist(self.centres, part).min(1) for part in vectors.split(4096)]
        distance = torch.stack([found.values for found in best])  # (parts, k)
        part = distance.argmin(0)
        within = torch.stack([found.indices for found in best])
        return part * 4096 + within.gather(0, part[None])[0]


@dataclass
class Compared:
    """Two histograms over the same bins, as two samples of one distribution or not."""

    z: Tensor
    """Two-sample z of each bin's share, (K,), positive where the second has more; 0 where both have none."""
    different: int
    """Bins where |z| > 1.96: NDB of Richardson and Weiss 2018 (arXiv:1805.12462, section 3)."""
    js: float
    """Jensen-Shannon divergence of the histograms in nats, in [0, log 2]; biased upwards by about
    (K - 1)(1/n + 1/m)/8."""
    chi2: float
    """Pearson's statistic of homogeneity, over bins that either has."""
    degrees: int
    log10_p: float
    """Of chi2; finite however small p is."""


def compare(real: Tensor, found: Tensor) -> Compared:
    """Compare counts (K,) and (K,).

    With m and n in all, shares p and q, and pooled share s = (m p + n q)/(m + n)::

        z = (q - p) / sqrt(s (1 - s) (1/m + 1/n)),   chi2 = sum over bins and sets of (count - expected)^2 / expected
    """
    a, b = real.double(), found.double()
    m, n = a.sum(), b.sum()
    p, q, pooled = a / m, b / n, (a + b) / (m + n)
    spread = (pooled * (1 - pooled) * (1 / m + 1 / n)).sqrt()
    z = torch.where(spread > 0, (q - p) / spread, 0.0)
    used = pooled > 0
    chi2 = sum(((x - t * pooled)[used].square() / (t * pooled)[used]).sum().item() for x, t in ((a, m), (b, n)))
    middle = (p + q) / 2
    js = sum((torch.xlogy(s, s) - torch.xlogy(s, middle)).sum().item() / 2 for s in (p, q))
    degrees = int(used.sum()) - 1
    different = int((z.abs() > Z).sum())
    return Compared(z, different, max(0.0, js), chi2, degrees, log10_sf(chi2, degrees))


def log10_sf(chi2: float, degrees: int) -> float:
    """log10 P(X > chi2), X of a chi-square distribution; 0 for none of the degrees.

    Where the tail is less than what a float64 holds, by the continued fraction of the incomplete gamma function
    (Abramowitz and Stegun 6.5.31), which converges quickly there.
    """
    from scipy.special import gammaincc

    if degrees < 1:
        return 0.0
    a, x = degrees / 2, chi2 / 2
    tail = float(gammaincc(a, x))
    if tail > 1e-290:
        return math.log10(tail)
    fraction = x + 201 - a
    for m in range(100, 0, -1):
        fraction = x + 2 * m - 1 - a - m * (m - a) / fraction
    return (a * math.log(x) - x - math.lgamma(a) - math.log(fraction)) / math.log(10)


def as_asked(real: Tensor | None, asked: Tensor | None, n: int) -> Tensor:
    """Positions of as many of n real samples as have the shares of classes that were asked for; all, where there are
    no classes or none were asked for.

    Samples are asked for class by class. Without this, uneven classes of the data alone would be a difference.

    Args:
        real: labels of the real samples, (n,), or None.
        asked: labels of what is compared with them, (m,), or None.
    """
    if real is None or asked is None:
        return torch.arange(n)
    classes = int(max(real.max(), asked.max())) + 1
    have, share = real.bincount(minlength=classes).double(), asked.bincount(minlength=classes).double() / len(asked)
    total = (have / share)[share > 0].min()  # as many as the class that is the scarcest allows
    keep = (total * share).round().clamp(max=have).long()
    order = torch.randperm(n, generator=generator(0, "as-asked"))
    picked = [order[real[order] == c][: int(keep[c])] for c in range(classes)]
    return torch.cat(picked).sort().values


class ClusterCoverage(Metric):
    """Do samples have the real data's shares of each of K clusters? The clusters are k-means of training data, in
    features of digits, coordinates of points, or averaged pixels of other images.

    ndb: the share of clusters whose shares differ between generated and real (two-sample z-test at 5 % in each; NDB/K
    of Richardson and Weiss 2018, arXiv:1805.12462). 0.05 is expected of new real samples, and more samples see smaller
    differences: compare values of the same n. js_divergence: of the two histograms, in nats. cluster_log10_p: log10 of
    the p-value of the chi-square test that both are of one distribution. clusters_covered: clusters that hold at least
    a tenth of their due.

    Where samples were asked for by class, the real ones are a part of the training set with the classes asked for. Such
    samples vary less than random ones do, so the tests then err towards equal shares.

    Control ``held_out``: the same of the held-out samples in the place of the generated ones, whatever their number.

    Args:
        clusters: K, >= 2; None for as many as classes, or 20 without classes.
        space, features: as of ``space_of``.
    """

    least = 2

    def __init__(self, clusters: int | None = None, space: str = "features", features: Features | None = None):
        if clusters is not None and clusters < 2:
            raise ValueError(f"clusters={clusters}: need at least 2, or null for as many as classes")
        self.clusters, self.space = clusters, (space, features)
        self._fitted: tuple[Data, Space, Clusters, Tensor, Tensor | None] | None = None

    def check(self, data: Data) -> None:
        space_of(data, *self.space)

    def fitted(
        self, data: Data, tell: Callable[[int], object] = lambda done: None
    ) -> tuple[Space, Clusters, Tensor, Tensor | None]:
        """The space, the clusters, and the training set's vectors and labels; kept for the next call.

        Args:
            tell: is told how many training samples each part added.
        """
        if self._fitted is None or self._fitted[0] is not data:
            space = space_of(data, *self.space)
            vectors, label = vectors_of(data.train, data, space, tell)
            clusters = Clusters(vectors, self.clusters or data.num_classes or UNLABELLED)
            self._fitted = (data, space, clusters, vectors, label)
        return self._fitted[1:]

    def counts(self, samples: Tensor, label: Tensor | None, data: Data) -> tuple[Tensor, Tensor]:
        """Counts per cluster of the real samples that these are compared with, and of these, (K,) each."""
        space, clusters, vectors, real_label = self.fitted(data)
        real = vectors[as_asked(real_label, label, len(vectors))]
        return clusters.counts(clusters(real)), clusters.counts(clusters(space.vectors(samples)))

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        space, clusters, *_ = self.fitted(data)
        held_out = data.held_out.draw(len(data.held_out))
        pairs = [
            self.counts(generated, label, data),
            self.counts(data.codec.decode(held_out["x_0"]), held_out["cond"].get("label"), data),
        ]
        found, control = (summary(*pair) for pair in pairs)
        protocol = {
            **space.protocol,
            "clusters": clusters.k,
            "test": f"two-sample z in each cluster, alpha {ALPHA:g}",
            "reference": "training samples" + (", with the classes asked for" if label is not None else ""),
            "n_real": int(pairs[0][0].sum()),
            "n_held_out": len(data.held_out),
        }
        shares = [(counts.double() / counts.sum()).tolist() for counts in pairs[0]]
        details = {"share_real": shares[0], "share_generated": shares[1]}
        better = {"ndb": "lower", "js_divergence": "lower", "cluster_log10_p": "none", "clusters_covered": "higher"}
        return [
            Measurement(
                name, found[name], direction, {"held_out": control[name]}, dict(protocol), details if i == 0 else {}
            )
            for i, (name, direction) in enumerate(better.items())
        ]


def summary(real: Tensor, found: Tensor) -> dict[str, float]:
    """The four numbers, by name, of counts (K,) of real and of generated samples."""
    both = compare(real, found)
    due = real.double() / real.sum()
    covered = float(((found / found.sum() >= due / 10) & (due > 0)).sum())
    return {
        "ndb": both.different / len(real),
        "js_divergence": both.js,
        "cluster_log10_p": both.log10_p,
        "clusters_covered": covered,
    }
