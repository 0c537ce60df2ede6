"""Which parts of the data do samples cover? Their shares in clusters of real data, beside the real shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy.stats import norm
from torch import Tensor

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.coverage import ClusterCoverage, Z, compare
from denoiselab.metrics.features import Features
from denoiselab.metrics.space import MOST, positions
from denoiselab.pictures import captioned, stacked, tiles

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

FEWER = 0.5
"""A cluster is missed if it has less than this part of its due,"""

LEVEL = 1e-3
"""and that has a smaller probability, over all clusters together."""

SHOWN = 30
"""Most clusters whose pictures stand under their bars; of more they stand in a grid."""


class Coverage(Diagnostic):
    """Shares p_k of real and q_k of generated samples in K clusters of the training set, and the z of q_k - p_k, as
    ``ClusterCoverage`` makes and compares them, over the real sample that is nearest to each centre. Held-out samples,
    the control, are in the same figure.

    Alarm: a cluster with less than half of its due, where that has a probability below 0.001/K (one side, normal
    approximation of the two-sample z). Classes that the model dropped look like this.

    Table, a row per cluster, the largest first: real_count, real_share, generated_count, generated_share,
    held_out_share, z.

    Args:
        n: samples, at least 2.
        clusters, space, features: as of ``ClusterCoverage``.
    """

    def __init__(
        self,
        n: int = 1000,
        clusters: int | None = None,
        space: str = "features",
        features: Features | None = None,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2")
        self.n, self.metric = n, ClusterCoverage(clusters, space, features)

    def check(self, parts: Parts) -> None:
        self.metric.check(parts.images)

    def look(self, subject: Subject) -> Finding:
        data, cond = subject.images, subject.cond(self.n)
        n = len(next(iter(cond.values()))) if cond else self.n
        train = data.train
        space, clusters, vectors, _ = self.metric.fitted(
            data, subject.progress("reading the data", min(MOST, len(train)))
        )
        samples, _ = subject.draw(n, cond=cond)
        records = self.metric.measure(samples, cond.get("label"), data)
        real, found = self.metric.counts(samples, cond.get("label"), data)
        held_out = data.held_out.draw(len(data.held_out))
        _, control = self.metric.counts(data.codec.decode(held_out["x_0"]), None, data)

        order = real.argsort(descending=True, stable=True)
        z = compare(real, found).z[order]
        real, found, control = real[order], found[order], control[order]
        shares = [(counts.double() / counts.sum()).tolist() for counts in (real, found, control)]
        columns = [real.tolist(), shares[0], found.tolist(), shares[1], shares[2], z.tolist()]
        names = ["real_count", "real_share", "generated_count", "generated_share", "held_out_share", "z"]
        index = positions(train)[clusters.medoids(vectors)[order]]
        tensors = {"medoids": data.codec.decode(train.batch(index)["x_0"]).float()}
        if samples.ndim == 2:
            tensors |= {"samples": samples, "cluster": order.argsort()[clusters(space.vectors(samples))]}
        return Finding(
            table={"cluster": [*range(1, len(z) + 1)], **dict(zip(names, columns, strict=True))},
            protocol=subject.protocol(n, **records[0].protocol),
            records=[Measurement(**{**vars(record), "details": {}}) for record in records],
            alarms=alarms(real, found, z),
            tensors=tensors,
        )

    def draw(self, finding: Finding) -> Image.Image:
        table, medoids = finding.table, finding.tensors["medoids"]
        k = len(table["z"])
        figure, (shares, z) = sheet(2, 1, 9, 2.9, sharex=True)
        generated = finding.protocol["n"]
        x = torch.arange(1, k + 1).double().numpy()
        sd = [1.96 * (q * (1 - q) / generated) ** 0.5 for q in table["generated_share"]]
        shares.bar(x - 0.2, table["real_share"], 0.4, color=GREY, label=f"real, {finding.protocol['n_real']:,} samples")
        shares.bar(x + 0.2, table["generated_share"], 0.4, color=COLOURS[0], yerr=sd, label="generated, ± 1.96 sd")
        shares.plot(x, table["held_out_share"], "_", color=COLOURS[3], markersize=10, label="held out")
        values = {record.name: record for record in finding.records}
        p, ndb = values["cluster_log10_p"], values["ndb"]
        shares.set(
            ylabel="share of the samples",
            title=f"{values['clusters_covered'].value:.0f} of {k} clusters covered; equal shares: "
            f"p = {power(p.value)} (held out: {power(p.controls['held_out'])})",
        )
        shares.legend(ncols=3, loc="upper right")
        shares.set_ylim(0, 1.25 * shares.get_ylim()[1])
        if k <= SHOWN:
            shares.set_xticks(x, [str(number) for number in table["cluster"]])
            shares.tick_params(axis="x", labelbottom=True)
        colours = [COLOURS[3] if abs(value) > Z else COLOURS[0] for value in table["z"]]
        z.bar(x, table["z"], 0.6, color=colours)
        z.axhspan(-Z, Z, color=GREY, alpha=0.2, zorder=0)
        z.set(
            xlabel="cluster of real samples, the largest first",
            ylabel="z of generated − real\n(standard errors)",
            title=f"{ndb.value:.0%} of the clusters differ at the 5% level (grey: |z| < 1.96); "
            f"held out {ndb.controls['held_out']:.0%}, expected of new real samples 5%",
        )
        if medoids.ndim == 4 and k <= SHOWN:
            z.tick_params(axis="x", bottom=False, labelbottom=False)
            z.xaxis.labelpad = 52
            under(z, medoids)
            return render(figure)
        bars = render(figure)
        if medoids.ndim == 4:
            grid = captioned([tiles(medoids, 20)], ["1, 2, ..."], "the real sample nearest to each centre")
            return stacked([bars, grid])
        return stacked([bars, plane(finding)])


def alarms(real: Tensor, found: Tensor, z: Tensor) -> list[str]:
    """A sentence for the clusters, the largest first, that are missed."""
    due, share = real.double() / real.sum(), found.double() / found.sum()
    missed = (share < FEWER * due) & (torch.from_numpy(norm.cdf(z.numpy())) < LEVEL / len(z))
    if not missed.any():
        return []
    which = missed.nonzero().flatten()
    named = ", ".join(f"{int(i) + 1} ({share[i]:.1%} of the samples, {due[i]:.1%} due)" for i in which[:5])
    more = f" and {len(which) - 5} more" if len(which) > 5 else ""
    return [
        f"clusters {named}{more} have less than half of their due (z below {norm.ppf(LEVEL / len(z)):.1f}): the model "
        "dropped these samples, or was asked for too few of them; guidance that is too strong does this as well"
    ]


def power(log10_p: float) -> str:
    """A p-value in few characters, however small."""
    return f"{10**log10_p:.2g}" if log10_p > -3 else f"1e{log10_p:.0f}"


def under(axes: Axes, images: Tensor) -> None:
    """Images under the places 1, 2, ... of an x-axis."""
    size = 9 * 72 * 0.8 / len(images)  # points that each has
    for i, image in enumerate(images):
        shown = tiles(image[None], 1)
        box = OffsetImage(shown, zoom=min(42.0, 0.9 * size) / shown.height)  # pyright: ignore[reportArgumentType]
        axes.add_artist(
            AnnotationBbox(
                box,
                (i + 1, 0),
                xybox=(0, -3),
                xycoords=("data", "axes fraction"),
                boxcoords="offset points",
                box_alignment=(0.5, 1),
                frameon=False,
                pad=0,
                annotation_clip=False,
            )
        )


def plane(finding: Finding) -> Image.Image:
    """Generated points in the colour of their cluster, and the clusters' numbers."""
    points, cluster, medoids = (finding.tensors[name] for name in ("samples", "cluster", "medoids"))
    figure, (axes,) = sheet(1, 1, 5, 4.6)
    x, y = points[:, :2].T.tolist()
    axes.scatter(x, y, s=4, c=[COLOURS[int(k) % len(COLOURS)] for k in cluster], linewidths=0)
    for number, (u, v) in enumerate(medoids[:, :2].tolist()):
        halo = [withStroke(linewidth=2.5, foreground="white")]
        axes.text(u, v, str(number + 1), ha="center", va="center", fontsize=10, weight="bold", path_effects=halo)
    axes.set(xlabel="x (data units)", ylabel="y (data units)", aspect="equal")
    axes.set_title("generated points; numbers stand at the clusters' middles")
    return render(figure)
