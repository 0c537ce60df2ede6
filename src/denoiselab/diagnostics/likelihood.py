"""How likely the model makes held-out data: bits per dimension by its ODE and by two bounds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from denoiselab.data.points import Known, Mixture
from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.classes import CLASSES, asked, check_classes
from denoiselab.diagnostics.figure import COLOURS, DASHES, GREY, render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.likelihood import VARIANCES, bits_per_dim, continuous_vlb, ode, vlb
from denoiselab.metrics.base import Measurement
from denoiselab.rng import Noise, generator

if TYPE_CHECKING:
    from denoiselab.experiment import Parts

BATCH = 64

FEW = 16
"""Values of a sample up to which the trace is exact unless asked otherwise."""

NAMES = {"ode": "ODE", "continuous_vlb": "bound,\ncontinuous", "vlb": "bound,\nT points"}


class Likelihood(Diagnostic):
    """bits_per_dim_ode = -log p(x_0)/(D log 2) of held-out samples by the probability-flow ODE; bits_per_dim_vlb and
    bits_per_dim_continuous_vlb, the variational bounds with T points and with infinitely many; see
    ``denoiselab.likelihood``. Without guidance.

    Of x_0, as it is diffused. Where its values are levels (``data.bins``), probabilities of levels, the ODE's of values
    with uniform noise of a level's width added, which is a bound on them; elsewhere densities, which may be negative.
    The ODE and the bounds are of two models that share a network: the bounds' is sampled with noise.

    Records: means over samples with ``low`` and ``high``, their 95 % interval (1.96 standard errors over samples), the
    terms of the bounds, and ``calls``, what a sample costs in network calls. Control ``exact`` where the density of the
    data is known: the mean of the same samples under it, below which no model is but by chance; ``above_exact`` is the
    difference, with its own interval.

    Args:
        n: held-out samples, at least 2; always the same ones.
        points: T of the discrete bound, and midpoints of the continuous one, at least 2.
        variance: of the discrete bound's reverse steps: fixed_small, fixed_large or learned.
        probes: of Hutchinson's estimate of the ODE's divergence (random signs), at least 1; None for the exact trace of
            samples of up to 16 values, and 1 for larger ones.
        tolerance: of the ODE's solver, relative and absolute; at 1e-4 single samples are off by up to 0.05 bits.
        classes: own, as the samples' are; none, without.
    """

    def __init__(
        self,
        n: int = 256,
        points: int = 100,
        variance: str = "fixed_large",
        probes: int | None = None,
        tolerance: float = 1e-5,
        classes: str = "own",
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        if n < 2:
            raise ValueError(f"n={n}: need at least 2 samples for an interval")
        if points < 2:
            raise ValueError(f"points={points}: need at least 2")
        if variance not in VARIANCES:
            raise ValueError(f"variance={variance}: need one of {', '.join(VARIANCES)}")
        if probes is not None and probes < 1:
            raise ValueError(f"probes={probes}: need at least 1, or null for the exact trace of small samples")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance}: need a number between 0 and 1")
        if classes not in CLASSES:
            raise ValueError(f"classes={classes}: need one of {', '.join(CLASSES)}")
        self.n, self.points, self.variance, self.probes = n, points, variance, probes
        self.tolerance, self.classes = tolerance, classes

    def check(self, parts: Parts) -> None:
        check_classes(parts, self.classes)
        if self.variance == "learned" and not parts.denoiser_class.net_outputs > 1:
            raise ValueError("variance=learned: this network says no variance; need loss=learned_hybrid")

    def look(self, subject: Subject) -> Finding:
        batch = subject.real(self.n)
        ids, x_0 = batch["id"].tolist(), batch["x_0"]
        cond = asked(batch["cond"], self.classes, subject)
        found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        terms: dict[str, list[Tensor]] = {"prior": [], "steps": [], "decoder": [], "by_level": []}
        calls = 0
        tell = subject.progress("bits per dimension", len(ids))
        for index in torch.arange(len(ids)).split(BATCH):
            part = [ids[i] for i in index.tolist()]
            one = x_0[index].to(subject.device)
            given = {name: value[index.to(value.device)] for name, value in cond.items()}
            density, bound, limit = self._of(subject, one, part, given)
            calls += len(part) * density[1]
            found["ode"].append(density[0].cpu())
            found["vlb"].append(bound.total.cpu())
            found["continuous_vlb"].append(limit.total.cpu())
            terms["by_level"].append(limit.steps.cpu())
            for name, value in (("prior", bound.prior), ("steps", bound.steps.sum(1)), ("decoder", bound.decoder)):
                terms[name].append(value.cpu())
            tell(len(part))
        values = {name: torch.cat(rows).double() for name, rows in found.items()}
        exact = self._exact(subject, x_0, batch["cond"].get("label"))
        protocol = subject.protocol(
            len(ids),
            sampled=False,
            points=self.points,
            variance=self.variance,
            probes=self._probes(x_0) or "exact trace",
            tolerance=self.tolerance,
            classes=self.classes if batch["cond"] else "none",
            bins=subject.data.bins,
            of="x_0, probabilities of levels" if subject.data.bins else "x_0, densities",
        )
        cost = {"ode": calls / len(ids), "vlb": float(self.points), "continuous_vlb": self.points + 1.0}
        means = {name: torch.cat(rows).double().mean(0) for name, rows in terms.items()}
        parts = {name: means[name].item() for name in ("prior", "steps", "decoder")}
        records = [
            Measurement(
                f"bits_per_dim_{name}",
                value.mean().item(),
                "lower",
                controls={} if exact is None else {"exact": exact.mean().item()},
                protocol=protocol,
                details={
                    **interval(value),
                    **above(value, exact),
                    "calls": cost[name],
                    **(parts if name == "vlb" else {}),
                },
            )
            for name, value in values.items()
        ]
        log_snr, width = midpoints(subject, self.points)
        table = {"id": ids, **{f"{name} (bits/dim)": value.tolist() for name, value in values.items()}}
        table["exact (bits/dim)"] = [None] * len(ids) if exact is None else exact.tolist()
        facts = {"log_snr": log_snr, "bits_by_level": (means["by_level"] / width).tolist(), "calls": cost}
        return Finding(table=table, protocol=protocol, records=records, facts=facts)

    def _of(self, subject: Subject, x_0: Tensor, ids: list[int], cond: dict[str, Tensor]) -> tuple[Any, Any, Any]:
        """((bits by the ODE, its calls), the bound with T points, the continuous one)."""
        shape, bins, dims = x_0.shape[1:], subject.data.bins, x_0[0].numel()
        noise = Noise(subject.seed, ids, shape, subject.device)
        common = {"points": self.points, "bins": bins, **cond}
        bound = vlb(subject.denoiser, subject.schedule, x_0, noise, variance=self.variance, **common)
        noise = Noise(subject.seed, ids, shape, subject.device)
        limit = continuous_vlb(subject.denoiser, subject.schedule, x_0, noise, **common)
        if bins:
            g = [generator(subject.seed, "dequantise", i) for i in ids]
            between = torch.stack([torch.rand(shape, generator=one) for one in g]).to(x_0) - 0.5
            x_0 = x_0 + between * (2 / (bins - 1))
        signs = Noise(subject.seed + 1, ids, shape, subject.device)
        probes = self._probes(x_0)
        density = ode(
            subject.denoiser,
            subject.schedule,
            x_0,
            torch.stack([signs().sign() for _ in range(probes)]) if probes else None,
            subject.denoiser.sigma_data,
            self.tolerance,
            self.tolerance,
            **cond,
        )
        return (bits_per_dim(density.nats, dims, bins), density.calls), bound, limit

    def _probes(self, x_0: Tensor) -> int:
        """0 for the exact trace."""
        return self.probes or int(x_0[0].numel() > FEW)

    def _exact(self, subject: Subject, x_0: Tensor, label: Tensor | None) -> Tensor | None:
        """-log p(x_0)/(D log 2) of the data's own density, (N,), float64; None where it is not known."""
        data = subject.data
        if not isinstance(data, Known):
            return None
        points = data.codec.decode(x_0).double()
        if label is None or self.classes == "none":
            log_p = data.log_density(points)
        elif isinstance(data, Mixture):
            levels = torch.ones(len(points), 1).double(), torch.zeros(len(points), 1).double()
            weighted = data.components(points, *levels)[0]
            log_p = weighted.gather(1, label[:, None])[:, 0] - data.weights.log()[label]
        else:
            return None
        dims = x_0.shape[1]
        return bits_per_dim(-(log_p + dims * math.log(data.codec.std)), dims)

    def draw(self, finding: Finding) -> Image.Image:
        table = {name.removesuffix(" (bits/dim)"): column for name, column in finding.table.items()}
        known = table["exact"][0] is not None
        figure, (means, levels, each) = sheet(1, 3, 3.4, 3.0)
        for place, record in enumerate(finding.records):
            value, low = (
                (record.details[name] for name in ("above_exact", "above_exact_low"))
                if known
                else (
                    record.value,
                    record.details["low"],
                )
            )
            means.errorbar(place, value, yerr=value - low, fmt="o", color=COLOURS[place], capsize=4)
            means.annotate(f"{value:.3f}", (place, value), (7, 0), textcoords="offset points", va="center")
        if known:
            means.axhline(0, color=GREY, linestyle="--", label="the data's own density")
            means.legend(loc="upper left")
            means.margins(y=0.25)
            means.set(ylabel="bits per dimension above the data's", title="mean of held-out samples, 95% intervals")
        else:
            means.set(ylabel="bits per dimension", title="mean of held-out samples, 95% intervals")
        means.set_xlim(-0.5, 2.9)
        means.set_xticks(range(3), [NAMES[record.name.removeprefix("bits_per_dim_")] for record in finding.records])
        levels.plot(finding.facts["log_snr"], finding.facts["bits_by_level"], color=COLOURS[1])
        levels.set(
            xlabel="log SNR (nats)", ylabel="bits per dimension, per nat", title="where the continuous bound's are"
        )
        if known:
            each.scatter(table["exact"], table["ode"], s=6, color=COLOURS[0], alpha=0.6, linewidths=0, label="a sample")
            ends = [min(table["exact"]), max(table["exact"])]
            each.plot(ends, ends, color=GREY, linestyle="--", label="equal")
            each.set(xlabel="by the data's density (bits/dim)", ylabel="by the ODE (bits/dim)", title="each sample")
        else:
            for place, name in enumerate(NAMES):
                values = sorted(table[name])
                share = [(i + 0.5) / len(values) for i in range(len(values))]
                each.plot(values, share, DASHES[place], color=COLOURS[place], label=NAMES[name].replace("\n", " "))
            each.set(xlabel="bits per dimension", ylabel="share of samples below", title="each sample", ylim=(0, 1.5))
            each.set_yticks([0, 0.25, 0.5, 0.75, 1])
        each.legend(loc="upper left")
        return render(figure)


def interval(values: Tensor) -> dict[str, float]:
    """The 95 % interval of the mean, and its standard error."""
    mean, error = values.mean().item(), values.std().item() / math.sqrt(len(values))
    return {"low": mean - 1.96 * error, "high": mean + 1.96 * error, "standard_error": error}


def above(values: Tensor, exact: Tensor | None) -> dict[str, float]:
    """By how much more than the data's density says, sample by sample, which varies less than either."""
    if exact is None:
        return {}
    found = interval(values - exact)
    return {"above_exact": (values - exact).mean().item(), **{f"above_exact_{name}": found[name] for name in found}}


def midpoints(subject: Subject, points: int) -> tuple[list[float], float]:
    """The log-SNRs at which the continuous bound looks, and the distance between them."""
    schedule = subject.schedule
    ends = torch.tensor([schedule.earliest, 1.0], dtype=torch.float64, device=subject.device)
    start, end = schedule.log_snr(ends).tolist()
    width = (start - end) / points
    return [start - width * (i + 0.5) for i in range(points)], width
