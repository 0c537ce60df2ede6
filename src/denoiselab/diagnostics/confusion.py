"""Is a sample of the class that it was asked for? Asked against recognised class, beside the same of real samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.accuracy import accuracy, counted, recogniser
from denoiselab.metrics.base import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from denoiselab.experiment import Parts

NEEDED = 0.9
"""Of real samples that the classifier has not seen, it must recognise this share."""

MOST = 100
"""Classes."""

LIMIT = 4.0
"""Standard errors beyond the control."""

WORTH = 0.02
"""The excess that is worth an alarm, as a share of the samples asked for."""


class Confusion(Diagnostic):
    """P(recognised = j | asked = i) of n samples, every class asked for in turn, and the same of real samples that the
    classifier has not seen (``Recogniser``): the held-out ones, and training ones by cross-validation.

    A share off the diagonal is z = (q - p)/sqrt(s (1 - s)(1/n_i + 1/m_i)) beyond the control's, s being both together.
    Alarms: a cell off the diagonal (concept leakage: asked for i, the model draws j), or all of them together (labels
    that are wrong or not looked at), more than 4 such standard errors and 2 % of the samples asked for beyond the
    control. Wrong labels in the training data at a rate r appear with that rate.

    It is refused, before a run begins, where the classifier recognises less than 90 % of unseen real samples, as on
    photographs: its own confusions would be in the way.

    Table, a row per pair of classes: asked, recognised, count, share, control_share, z.

    Args:
        n: samples, at least 1.
    """

    def __init__(self, n: int = 1000, every: int = 2000, budget: str | None = "5%"):
        super().__init__(every, budget)
        if n < 1:
            raise ValueError(f"n={n}: need at least 1")
        self.n = n

    def check(self, parts: Parts) -> None:
        if not parts.num_classes:
            raise ValueError("the model knows no classes, so none can be asked for")
        if parts.num_classes > MOST:
            raise ValueError(f"there are {parts.num_classes} classes; the classifier is for at most {MOST}")
        told = recogniser(parts.images)
        right = accuracy(told.unseen)
        if right < NEEDED:
            raise ValueError(
                f"the classifier ({told.kind} on {told.looked_at}) recognises {right:.1%} of real samples that it has "
                f"not seen; need {NEEDED:.0%}"
            )

    def look(self, subject: Subject) -> Finding:
        data, cond = subject.images, subject.cond(self.n)
        told = recogniser(data)
        control, classes = told.unseen, data.num_classes
        samples, _ = subject.draw(len(cond["label"]), cond=cond)
        found = counted(cond["label"], told(samples), classes)
        z, excess = beyond(found, control)
        shares, real = (shares_of(counts) for counts in (found, control))
        index = torch.cartesian_prod(torch.arange(classes), torch.arange(classes))
        own = {
            "classifier": f"{told.kind}, fitted on training samples",
            "preprocessing": told.looked_at,
            "n_real": int(control.sum()),
        }
        record = Measurement(
            "off_diagonal",
            1 - accuracy(found),
            "lower",
            {"unseen_real": 1 - accuracy(control)},
            own,
            {"confusion": found.tolist()},
        )
        return Finding(
            table={
                "asked": index[:, 0].tolist(),
                "recognised": index[:, 1].tolist(),
                "count": found.flatten().tolist(),
                "share": shares.flatten().tolist(),
                "control_share": real.flatten().tolist(),
                "z": z.flatten().tolist(),
            },
            protocol=subject.protocol(len(samples), **own),
            records=[record],
            alarms=alarms(found, control, z, excess),
        )

    def draw(self, finding: Finding) -> Image.Image:
        classes = round(len(finding.table["share"]) ** 0.5)
        cells = [torch.tensor(finding.table[name]).view(classes, -1) for name in ("share", "control_share")]
        record = finding.records[0]
        real, n_real = record.controls["unseen_real"], record.protocol["n_real"]
        figure, axes = sheet(1, 2, 5.2, 5.0)
        titles = [
            f"samples: {record.value:.1%} off the diagonal",
            f"real, not seen by the classifier: {real:.1%} (n = {n_real:,})",
        ]
        for one, share, title in zip(axes, cells, titles, strict=True):
            matrix(one, share, title)
        axes[0].set_ylabel("class asked for (% of each row)")
        axes[1].set_ylabel("label (% of each row)")
        return render(figure)


def shares_of(counts: Tensor) -> Tensor:
    """Each row divided by its sum; 0 where a class never occurred."""
    return counts.double() / counts.sum(1, keepdim=True).clamp(min=1)


def beyond(found: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """z and excess (K, K) of each share over the control's; 0 where a class was never asked for."""
    n, m = (counts.sum(1, keepdim=True).double() for counts in (found, control))
    excess = torch.where((n > 0) & (m > 0), shares_of(found) - shares_of(control), 0.0)
    pooled = (found + control) / (n + m).clamp(min=1)
    spread = (pooled * (1 - pooled) * (1 / n.clamp(min=1) + 1 / m.clamp(min=1))).sqrt()
    return torch.where(spread > 0, excess / spread, 0.0), excess


def alarms(found: Tensor, control: Tensor, z: Tensor, excess: Tensor) -> list[str]:
    said = []
    off = ~torch.eye(len(found), dtype=torch.bool)
    leaks = (off & (z > LIMIT) & (excess > WORTH)).nonzero().tolist()
    shares, real = shares_of(found), shares_of(control)
    if leaks:
        leaks.sort(key=lambda cell: -excess[tuple(cell)].item())
        named = ", ".join(f"{i} drawn as {j} ({shares[i, j]:.1%}, control {real[i, j]:.1%})" for i, j in leaks[:5])
        more = f" and {len(leaks) - 5} more" if len(leaks) > 5 else ""
        said.append(
            f"classes leak into others, more than {LIMIT:g} standard errors beyond real samples: {named}{more}; wrong "
            "labels in the data, or classes that the model does not tell apart"
        )
    # All that was asked for as one row against all that is real, recognised as asked or not.
    wrong = [int(counts.sum() - counts.diagonal().sum()) for counts in (found, control)]
    totals = [int(counts.sum()) for counts in (found, control)]
    pairs = torch.tensor([[total - k, k] for total, k in zip(totals, wrong, strict=True)])
    all_z, all_excess = (values[0, 1].item() for values in beyond(pairs[:1], pairs[1:]))
    if all_z > LIMIT and all_excess > WORTH:
        said.append(
            f"{wrong[0] / totals[0]:.1%} of the samples are not recognised as what was asked for, and "
            f"{wrong[1] / totals[1]:.1%} of real ones ({all_z:.1f} standard errors, threshold {LIMIT:g}): labels that "
            "are wrong or are not looked at, or samples that look like nothing"
        )
    return said


def matrix(axes: Axes, share: Tensor, title: str) -> None:
    """Shares as a matrix, small ones coloured as clearly as large ones, and in digits where there is room."""
    k = len(share)
    axes.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    axes.set(xlabel="class recognised", title=title)
    if k <= 20:
        axes.set_xticks(range(k))
        axes.set_yticks(range(k))
        for i, j in (share >= 0.0005).nonzero().tolist():
            value = share[i, j].item()
            text = "100" if value > 0.9995 else f"{100 * value:.1f}"
            colour = "white" if value > 0.4 else "black" if i == j else "#b00000"
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.spines[:].set_visible(False)
