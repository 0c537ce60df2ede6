"""Are samples copies of training data? The nearest training sample of each, beside those of held-out samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, GREY, render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.metrics.features import Features
from denoiselab.metrics.neighbours import Pool, copies
from denoiselab.metrics.space import space_of
from denoiselab.pictures import stacked, tiles

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

ALPHA = 1e-3
"""Of the test for copies."""

MOST_HELD_OUT = 10_000


class NearestNeighbours(Diagnostic):
    """d_i = min_j |sample_i - train_j| of n samples and of the held-out ones, and the samples of the smallest d_i above
    what they are nearest to.

    Alarm (memorisation): more samples are nearer to a training sample than the 1st percentile of the held-out
    distances than new real samples would be, with probability below 0.001 (``copies``). Samples that are copies of
    training data, also with a little noise, give it; so do blurred averages, and strong guidance towards the typical.

    Table, a row per sample, the nearest first: distance, ratio (to the median of the held-out distances), training_id
    (of the nearest training sample, in the whole data set).

    Args:
        n: samples.
        shown: images of each kind in the picture, at least 1.
        space, features: as of ``space_of``; pixels, unless told otherwise.
    """

    def __init__(
        self,
        n: int = 1000,
        shown: int = 10,
        space: str = "pixels",
        features: Features | None = None,
        every: int = 2000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        for name, value in (("n", n), ("shown", shown)):
            if value < 1:
                raise ValueError(f"{name}={value}: need at least 1")
        self.n, self.shown, self.space = n, shown, (space, features)

    def check(self, parts: Parts) -> None:
        space_of(parts.images, *self.space)

    def look(self, subject: Subject) -> Finding:
        data, cond = subject.images, subject.cond(self.n)
        n = len(next(iter(cond.values()))) if cond else self.n
        samples, _ = subject.draw(n, cond=cond)
        real = data.codec.decode(data.held_out.draw(MOST_HELD_OUT)["x_0"]).float()
        pool = Pool(data, space_of(data, *self.space))
        tell = subject.progress("looking for the nearest", len(pool.index))
        distance, position = pool.nearest(torch.cat([samples, real]), tell)
        found, control = distance[:n], distance[n:]
        test, median = copies(found, control), control.median().item()
        train, order = data.train, found.argsort(stable=True)
        near, real_near = order[: self.shown], control.argsort(stable=True)[: self.shown]
        beside = [train.batch(position[index])["x_0"] for index in (near, n + real_near)]
        tensors = {"generated": samples[near], "generated_nearest": data.codec.decode(beside[0]).float()}
        tensors |= {"held_out": real[real_near], "held_out_nearest": data.codec.decode(beside[1]).float()}
        if samples.ndim == 2:
            tensors |= {"points": samples[order]}
        own = {**pool.space.protocol, "distance": "L2", "n_real": len(pool.index), "n_held_out": len(real)}
        share = Measurement(
            "near_training_share",
            test.share,
            better="none",
            controls={"new_real": test.expected},
            protocol=own,
            details={"p": test.p, "threshold": test.threshold},
        )
        return Finding(
            table={
                "distance": found[order].tolist(),
                "ratio": (found[order] / median).tolist(),
                "training_id": train.ids[position[order]].tolist(),
            },
            protocol=subject.protocol(n, **own),
            records=[share],
            alarms=alarms(test.share, test.expected, test.p),
            facts={
                "held_out_ratio": (control / median).tolist(),
                "median": median,
                "threshold": test.threshold / median,
            },
            tensors=tensors,
        )

    def draw(self, finding: Finding) -> Image.Image:
        points = "points" in finding.tensors
        figure, axes = sheet(1, 2 if points else 1, 4.4 if points else 8.6, 3.4 if points else 2.9)
        histogram(axes[0], finding)
        if points:
            plane(axes[1], finding)
            return render(figure)
        kept = finding.tensors
        ratios = [finding.table["ratio"], sorted(finding.facts["held_out_ratio"])]
        blocks = [
            block(kept[name], kept[f"{name}_nearest"], ratio, name.replace("_", "-"))
            for name, ratio in zip(("generated", "held_out"), ratios, strict=True)
        ]
        return stacked([render(figure), *blocks])


def alarms(share: float, expected: float, p: float) -> list[str]:
    if p >= ALPHA:
        return []
    return [
        f"{share:.1%} of the samples are nearer to a training sample than {expected:.1%} of new real ones are "
        f"(p = {p:.1g}, threshold {ALPHA:g}): copies of training data, if the rows show the same picture twice; "
        "otherwise blurred or very typical samples, as strong guidance makes them"
    ]


def block(samples: Tensor, nearest: Tensor, ratios: list[float], name: str) -> Image.Image:
    """Images above their nearest training images, and under each pair its distance."""
    k = len(samples)
    shown = tiles(torch.cat([samples, nearest]), k)
    width = min(8.6, 0.86 * k + 1.4)
    figure, (axes,) = sheet(1, 1, width, 0.9 + (width - 1.4) * shown.height / shown.width)
    axes.imshow(shown)
    axes.grid(False)
    axes.set_xticks([(i + 0.5) * shown.width / k for i in range(k)], [f"{ratio:.2f}" for ratio in ratios[:k]])
    axes.set_yticks([shown.height / 4, shown.height * 3 / 4], [name, "nearest training"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="distance / median of held out", title=f"the {name} samples that are nearest to training samples")
    return render(figure)


def histogram(axes: Axes, finding: Finding) -> None:
    ratio, control = torch.tensor(finding.table["ratio"]), torch.tensor(finding.facts["held_out_ratio"])
    top = max(control.quantile(0.99).item() * 1.25, 1.5)
    bins = torch.linspace(0, top, 51).tolist()
    record = finding.records[0]
    for values, colour, name, filled in (
        (control, GREY, f"held out, {len(control):,}", True),
        (ratio, COLOURS[0], f"generated, {len(ratio):,}", False),
    ):
        style = "stepfilled" if filled else "step"
        weights = torch.full((len(values),), 1 / len(values)).numpy()
        shown = values.clamp(max=top).numpy()
        axes.hist(shown, bins, weights=weights, color=colour, label=name, histtype=style, linewidth=1.6, alpha=0.9)
    axes.axvline(finding.facts["threshold"], color=COLOURS[3], linestyle="--", label="1st percentile of held out")
    axes.set(
        xlabel="distance to the nearest training sample / median of held out",
        ylabel="share",
        title=f"{record.value:.2%} of samples are near; new real ones: {record.controls['new_real']:.2%} "
        f"(p = {record.details['p']:.2g})",
    )
    axes.legend()


def plane(axes: Axes, finding: Finding) -> None:
    """Points, those that are near to a training point marked."""
    points, ratio = finding.tensors["points"], torch.tensor(finding.table["ratio"])
    near: Tensor = ratio < finding.facts["threshold"]
    for chosen, colour, size, name in ((~near, GREY, 3, "generated"), (near, COLOURS[3], 10, "near a training point")):
        x, y = points[chosen][:, :2].T.tolist()
        axes.scatter(x, y, s=size, color=colour, linewidths=0, label=f"{name}, {int(chosen.sum()):,}")
    axes.set(xlabel="x", ylabel="y", aspect="equal", title="where they lie")
    axes.margins(y=0.2)
    axes.legend(loc="upper center", ncols=2, columnspacing=1, handletextpad=0.2)
