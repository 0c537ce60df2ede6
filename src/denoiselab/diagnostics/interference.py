"""Does training at some times raise the loss at others?"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from denoiselab.curve import Curve
from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import render, sheet
from denoiselab.diagnostics.objective import AT_ONCE, Objective
from denoiselab.diagnostics.subject import Subject, Told
from denoiselab.metrics.base import Measurement
from denoiselab.rng import Noise, generator
from denoiselab.timesteps import Place, Slot

RESAMPLES = 1000
GROUPS = 8
"""Of samples, whose gradients' products are compared."""
EVERY = "all t"
"""The control: as many steps on all times."""


class Interference(Diagnostic):
    """M_ij = (L_j after - L_j before)/L_j before: for each slot i of t a copy of the weights is trained on times of
    slot i alone, and the held-out loss of every slot j is measured at fixed times and noise (the conflicts between
    times of Hang et al. 2023, arXiv:2303.09556, section 3; negative transfer, Go et al. 2023, arXiv:2306.00354).

    Training late times raises early losses where the sum of M_ij over slots i noisier than j is above 0 with its whole
    interval. Steps alone cost something where the weights were averaged, so the last row is the control: as many steps,
    on the same samples and noise, at all times. The weights that are measured are the mean over the second half of the
    steps, as an EMA's are. The optimizer is the run's, from its first step, at its learning rate without a schedule.

    The second matrix is the cosine between the mean gradients of slots before, cos_ij = D_ij/sqrt(D_ii D_jj), where D
    is the mean of the products of gradients of different groups of samples, so that their noise does not bias it. It is
    left open where D_ii is not above 0 with its whole interval: that slot's gradient is lost in its noise.

    Slots are equal in t, or given, or of equal loss by a curve; they depend on which loss cuts them, and training on
    one slot has another objective than training on all. Intervals are 95% bootstrap intervals over held-out samples and
    over orders of the data (``seeds``), which are too short where orders are few; the cosine's are over groups.

    Args:
        slots: K, where they are equal in t or cut by a curve, >= 2.
        boundaries, curve, panel: as for the ``slots`` option of timesteps; without either, slots are equal in t.
        steps: optimizer steps on each slot, >= 1.
        batch_size: of these steps.
        seeds: orders of the data, each from the same weights, >= 1.
        n: held-out samples per slot.
        gradient_n: training samples per slot behind its mean gradient, a multiple of 8. Eight gradients per slot are
            held in memory.
        lr: learning rate of these steps, > 0; None for the run's.
    """

    copies = True

    def __init__(
        self,
        slots: int = 5,
        boundaries: Sequence[float] | None = None,
        curve: Curve | str | None = None,
        panel: str = "eps",
        steps: int = 30,
        batch_size: int = 64,
        seeds: int = 2,
        n: int = 256,
        gradient_n: int = 1024,
        lr: float | None = None,
        every: int = 1_000_000,
        budget: str | None = "5%",
    ):
        super().__init__(every, budget)
        for name, value, least in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 8),
            ("seeds", seeds, 1),
            ("n", n, 8),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: need at least {least}")
        if gradient_n < 2 * GROUPS or gradient_n % GROUPS:
            raise ValueError(f"gradient_n={gradient_n}: need a multiple of {GROUPS}, at least {2 * GROUPS}")
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"lr={lr}: need a number > 0, or null for the run's")
        equal = boundaries is None and curve is None
        self.cut = {
            "boundaries": boundaries,
            "curve": Curve([0], [1]) if equal else curve,
            "slots": slots,
            "panel": panel,
        }
        first = Slot(0, **self.cut)
        self.edges: list[float] = first.edges.tolist()
        self.kind = "equal in t" if equal else "given" if curve is None else f"of equal {panel} loss"
        self.steps, self.batch_size, self.seeds, self.n, self.lr = steps, batch_size, seeds, n, lr
        self.gradient_n = gradient_n

    def look(self, subject: Subject) -> Finding:
        count = len(self.edges) - 1
        names = [*range(count), EVERY]
        tell = subject.progress("training on slots", len(names) * self.seeds + count + 1)
        objective = Objective(subject)
        held = Held(subject, objective, self.edges, self.n)
        before = held.losses(objective.denoiser)  # (K, n)
        tell(1)
        after = torch.zeros(len(names), self.seeds, *before.shape, dtype=torch.float64)
        for i, slot in enumerate(names):
            for seed in range(self.seeds):
                after[i, seed] = held.losses(self.trained(subject, objective, slot, seed))
                tell(1)
        groups = torch.stack([self.gradients(objective, slot, tell) for slot in range(count)])  # (K, G, G', ...)
        cosine, low, high = cosines(groups, subject.seed)
        matrix = relative(before, after.mean(1))
        resampled = bootstrap(before, after, subject.seed)  # (R, K + 1, K)
        ends = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        rows = []
        for i, slot in enumerate(names):
            for j in range(count):
                row = {"trained": str(slot), "measured": j, "t_from": self.edges[j], "t_to": self.edges[j + 1]}
                row |= {"loss_before": before[j].mean().item(), "change": matrix[i, j].item()}
                row |= {"change_low": ends[0, i, j].item(), "change_high": ends[1, i, j].item()}
                of_slot = slot != EVERY
                row |= {"cosine": number(cosine[i, j]) if of_slot else None}
                row |= {"cosine_low": number(low[i, j]) if of_slot else None}
                rows.append(row | {"cosine_high": number(high[i, j]) if of_slot else None})
        facts = verdict(matrix[:count], resampled[:, :count])
        return Finding(
            table={column: [row[column] for row in rows] for column in rows[0]},
            protocol=subject.protocol(
                before.shape[1],
                sampled=False,
                slots=f"{count}, {self.kind}",
                edges=self.edges,
                steps=self.steps,
                batch_size=self.batch_size,
                seeds=self.seeds,
                lr=self.rate(subject),
            ),
            records=self.records(facts, matrix),
            facts={**facts, "kind": self.kind, "steps": self.steps},
        )

    def rate(self, subject: Subject) -> float:
        return subject.run.parts.config["optimizer"]["lr"] if self.lr is None else self.lr

    def trained(self, subject: Subject, objective: Objective, slot: int | str, seed: int) -> Denoiser:
        """A copy of the weights, some steps later; samples and noise do not depend on the slot."""
        from denoiselab.module import parameter_groups  # with it comes lightning, which measuring does not need

        learner = copy.copy(objective)
        learner.denoiser = copy.deepcopy(objective.denoiser).train()
        node = {**subject.run.parts.config["optimizer"], "lr": self.rate(subject)}
        optimizer = subject.run.parts.make("optimizer", node, params=parameter_groups(learner.denoiser))
        sums = [torch.zeros_like(p) for p in learner.denoiser.parameters()]
        half = self.steps // 2
        for k in range(self.steps):
            t = self.times(objective, slot, self.batch_size, k + seed * self.steps)
            optimizer.zero_grad()
            learner.losses(t, "interference", seed, k).mean().backward()
            optimizer.step()
            if k >= half:
                torch._foreach_add_(sums, [p.detach() for p in learner.denoiser.parameters()])
        with torch.no_grad():
            for parameter, total in zip(learner.denoiser.parameters(), sums, strict=True):
                parameter.copy_(total / (self.steps - half))
        return learner.denoiser

    def times(self, objective: Objective, slot: int | str, n: int, k: int) -> Tensor:
        """Times of a slot, or of all, stratified; the same uniforms for every slot."""
        place = Place(objective.seed, k * n)
        if isinstance(slot, int):
            return Slot(slot, **self.cut).to(objective.device)(n, objective.schedule, place)[0]
        return Slot(0, **self.cut).to(objective.device).uniforms(n, place, objective.device)

    def gradients(self, objective: Objective, slot: int, tell: Told) -> Tensor:
        """The mean gradients of groups of samples at times of a slot, (groups, parameters)."""
        found = []
        for group in range(GROUPS):
            t = self.times(objective, slot, self.gradient_n // GROUPS, group)
            parts = enumerate(t.split(AT_ONCE))
            losses = (objective.losses(part, "cosine", slot, group, k).sum() / len(t) for k, part in parts)
            found.append(sum(objective.gradient(loss).float() for loss in losses))
        tell(1)
        return torch.stack(found)

    def records(self, facts: dict, matrix: Tensor) -> list[Measurement]:
        protocol = {"slots": f"{len(self.edges) - 1}, {self.kind}", "steps": self.steps, "interval": "95% bootstrap"}
        own = matrix[:-1].diagonal()
        return [
            Measurement(
                "interference_late_on_early",
                facts["late_on_early"],
                "lower",
                {"none": 0.0},
                protocol,
                {"interval": facts["interval"], "early_on_late": facts["early_on_late"]},
            ),
            Measurement(
                "interference_own_slot",
                own.mean().item(),
                "lower",
                {"trained on all t": matrix[-1].mean().item()},
                protocol,
                {"per_slot": own.tolist()},
            ),
        ]

    def draw(self, finding: Finding) -> Image.Image:
        table, facts = finding.table, finding.facts
        count = max(table["measured"]) + 1
        change = torch.tensor(table["change"], dtype=torch.float64).view(-1, count)
        certain = torch.tensor(
            [low > 0 or high < 0 for low, high in zip(table["change_low"], table["change_high"], strict=True)]
        ).view(-1, count)
        cosine = torch.tensor(
            [math.nan if value is None else value for value in table["cosine"]], dtype=torch.float64
        ).view(-1, count)[:count]
        figure, (left, right) = sheet(1, 2, 1.6 + 0.75 * count, 1.6 + 0.55 * count)
        edges = [*table["t_from"][:count], table["t_to"][count - 1]]
        slots = [f"{a:.2g}–{b:.2g}" for a, b in itertools.pairwise(edges)]
        reach = max(100 * change.abs().max().item(), 1e-9)
        marks = [["" if sure else " ?" for sure in row] for row in certain.tolist()]
        squares(left, 100 * change, reach, "{:+.1f}", marks)
        left.set_yticks(range(count + 1), [*slots, EVERY])
        squares(right, cosine, 1.0, "{:+.2f}", [[""] * count] * count)
        right.set_yticks(range(count), slots)
        left.set_title("change of the held-out loss, %\n(?: the interval holds 0)")
        right.set_title("cosine between mean gradients\n(?: lost in their noise)")
        for axis, ylabel in ((left, "trained on t in"), (right, "t in")):
            axis.set_xticks(range(count), slots)
            axis.set(xlabel="measured on t in" if axis is left else "t in", ylabel=ylabel)
            axis.grid(visible=False)
        low, high = (100 * value for value in facts["interval"])
        says = "raises" if low > 0 else "does not raise" if high < 0 else "is not seen to raise"
        figure.suptitle(
            f"{facts['steps']} steps on one slot ({facts['kind']}): training late t {says} early losses "
            f"(sum {100 * facts['late_on_early']:+.1f}% [{low:+.1f}, {high:+.1f}])"
        )
        return render(figure)


class Held:
    """The losses of held-out samples in every slot, at fixed times and noise.

    Args:
        subject: whose held-out samples.
        objective: whose loss.
        edges: of the slots.
        n: samples.
    """

    def __init__(self, subject: Subject, objective: Objective, edges: list[float], n: int):
        batch = subject.real(n)
        self.x_0 = batch["x_0"].to(subject.device)
        self.cond = {key: value.to(subject.device) for key, value in batch["cond"].items()}
        ids = batch["id"].tolist()
        self.eps = Noise(subject.seed, ids, self.x_0.shape[1:], subject.device, self.x_0.dtype)()
        u = torch.rand(len(ids), generator=generator(subject.seed, "held-out slots"), dtype=torch.float64)
        ends = torch.tensor(edges, dtype=torch.float64)
        self.t = torch.lerp(ends[:-1, None], ends[1:, None], u).clamp_min(objective.schedule.earliest)  # (K, n)
        self.loss = copy.deepcopy(objective.loss).eval()
        self.schedule = objective.schedule

    @torch.no_grad()
    def losses(self, denoiser: Denoiser) -> Tensor:
        """(K, n), float64 on the CPU; the denoiser asked in evaluation mode."""
        training = denoiser.training
        denoiser.eval()
        rows = []
        for times in self.t:
            parts = []
            for index in torch.arange(len(self.x_0), device=self.x_0.device).split(AT_ONCE):
                x_0 = self.x_0[index]
                t = times[index.cpu()].to(x_0.device, torch.promote_types(x_0.dtype, torch.float32))
                cond = {key: value[index] for key, value in self.cond.items()}
                shaped = t.view(-1, *[1] * (x_0.ndim - 1))
                parts.append(self.loss(denoiser, self.schedule, x_0, self.eps[index], shaped, **cond)[0])
            rows.append(torch.cat(parts))
        denoiser.train(training)
        return torch.stack(rows).double().cpu()


def relative(before: Tensor, after: Tensor) -> Tensor:
    """M (K + 1, K) of losses before (K, n) and after (K + 1, K, n)."""
    return after.mean(-1) / before.mean(-1) - 1


def bootstrap(before: Tensor, after: Tensor, seed: int) -> Tensor:
    """M (R, K + 1, K) of resampled held-out samples and orders of the data; after is (K + 1, seeds, K, n)."""
    g = generator(seed, "bootstrap")
    found = []
    for _ in range(RESAMPLES):
        samples = torch.randint(before.shape[-1], (before.shape[-1],), generator=g)
        orders = torch.randint(after.shape[1], (after.shape[1],), generator=g)
        count = torch.bincount(samples, minlength=before.shape[-1]).double() / before.shape[-1]
        mean = (after @ count)[:, orders].mean(1)
        found.append(mean / (before @ count) - 1)
    return torch.stack(found)


def verdict(matrix: Tensor, resampled: Tensor) -> dict:
    """The sums of M over slots that are noisier than those measured, and over those that are cleaner."""
    late = torch.ones_like(matrix).tril(-1)
    sums = (resampled * late).sum((1, 2))
    ends = sums.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    found = {"late_on_early": (matrix * late).sum().item(), "interval": ends}
    return found | {"early_on_late": (matrix * late.T).sum().item()}


def cosines(gradients: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cosines (K, K) between the mean gradients of slots, and the ends of their 95% bootstrap intervals over
    groups, of gradients (K, groups, parameters); NaN where a gradient is lost in its noise."""
    count, groups = gradients.shape[:2]
    flat = gradients.flatten(0, 1)
    gram = (flat @ flat.T).double().cpu().view(count, groups, count, groups)

    def products(weights: Tensor) -> Tensor:
        """D: products of different groups, a group taken as often as it was drawn."""
        pairs = weights[:, None] * weights * (1 - torch.eye(groups, dtype=torch.float64))
        return torch.einsum("iajb,ab->ij", gram, pairs) / pairs.sum()

    g = generator(seed, "bootstrap groups")
    draws = [torch.bincount(torch.randint(groups, (groups,), generator=g), minlength=groups) for _ in range(RESAMPLES)]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    drawn = torch.stack([products(draw.double()) for draw in draws if draw.max() < groups])
    lost = drawn.diagonal(dim1=1, dim2=2).quantile(ends[0], dim=0) <= 0  # (K,)
    lost = lost[:, None] | lost

    def cosine(d: Tensor) -> Tensor:
        size = d.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        return d / (size[..., :, None] * size[..., None, :])

    low, high = cosine(drawn).nanquantile(ends, dim=0)
    found = cosine(products(torch.ones(groups, dtype=torch.float64)))
    return tuple(value.masked_fill(lost, math.nan) for value in (found, low, high))  # pyright: ignore


def number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def squares(axis: Axes, values: Tensor, reach: float, form: str, marks: list[list[str]]) -> None:
    """A matrix as coloured squares with its numbers; blue below 0, red above."""
    axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            dark = abs(value) > 0.6 * reach
            text = "?" if math.isnan(value) else form.format(value) + marks[i][j]
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
