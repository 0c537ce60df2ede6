"""Whether the network uses the noise level that it is told."""

from __future__ import annotations

import copy
import math

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from denoiselab.data.base import Batch
from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.figure import COLOURS, render, sheet
from denoiselab.diagnostics.subject import Subject
from denoiselab.metrics.base import Measurement
from denoiselab.rng import Noise
from denoiselab.schedule import RATIO

DEAD, WEAK = 1e-8, 1e-2
"""Sensitivity below which the network is not told, and below which it hardly listens."""

LISTENS = "modulation"
"""The name of the layers that make scales and shifts of the embedding, in every network of this package."""

READS = ("condition.mlp.0.weight", "embedding.noise.weight")
"""The matrices that read the features of the noise level."""


class EmbeddingHealth(Diagnostic):
    """S = E|f(x, c_t) - f(x, c_s)|^2 / E|f(x, c_t)|^2: how much the network's answer f changes where its input x stays
    and only the noise level that it is told becomes another.

    A network that is not told can still fall in loss, and sample well with noisy samplers, since x_t itself gives the
    level away; deterministic ones suffer (Sun et al. 2025, arXiv:2502.13129). So the loss does not show it, and this
    does, without training and without samples. Alarms: S < 1e-8, the level does not arrive; S < 1e-2, it hardly
    matters. Where a network is one of several that share the levels among them, levels of the same one are compared.

    Also: the effective rank of what arrives at the layers that make scales and shifts of it,
    exp(-sum p log p), p = s_i/sum s of the singular values over levels about their mean (Roy and Vetterli 2007,
    EUSIPCO); the variance over levels of what each such layer makes; and the share of the gradient of the squared
    error, in units of what the network predicts, that goes into the matrix which reads the level's features. They are
    left out for networks in which no such layers are found.

    Args:
        n: held-out samples.
        levels: times, the middles of as many parts of [0, 1], >= 2.
    """

    def __init__(self, n: int = 64, levels: int = 8, every: int = 2000, budget: str | None = "5%"):
        super().__init__(every, budget)
        if n < 1:
            raise ValueError(f"n={n}: need at least 1")
        if levels < 2:
            raise ValueError(f"levels={levels}: need at least 2")
        self.n, self.levels = n, levels

    def look(self, subject: Subject) -> Finding:
        batch = subject.real(self.n)
        t = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / self.levels
        change, power = self.changes(subject, batch, t)
        compared = self.same_network(subject, t) & ~torch.eye(self.levels, dtype=torch.bool)
        scale = power.mean().item()
        s = (change[compared].mean() / scale).item() if scale > 0 and bool(compared.any()) else 0.0
        layers = self.layers(subject, batch)
        share = self.gradient(subject, batch)
        alarms = []
        if scale == 0:
            alarms.append("the network answers 0 to everything; it is new, or its last layer gets no gradient")
        elif s < DEAD:
            alarms.append(
                f"S = {s:.2g} (alarm below {DEAD:g}): the noise level that the network is told changes nothing in what "
                "it answers; its embedding does not arrive"
            )
        elif s < WEAK:
            alarms.append(
                f"S = {s:.2g} (alarm below {WEAK:g}): the noise level that the network is told hardly changes what it "
                "answers; deterministic samplers need it"
            )
        rows = [(i, j) for i in range(self.levels) for j in range(self.levels) if compared[i, j]]
        columns = {
            "t_of_x": [t[i].item() for i, _ in rows],
            "t_told": [t[j].item() for _, j in rows],
            "change": [(change[i, j] / scale).item() if scale else 0.0 for i, j in rows],
        }
        limits = {"dead": DEAD, "weak": WEAK}
        records = [Measurement("embedding_sensitivity", s, "none", limits, {"n": len(batch["id"])})]
        if layers:
            rank, most = min((rank, most) for rank, most, _ in layers.values())
            records.append(Measurement("embedding_rank", rank, "none", {"most": float(most)}))
        if share is not None:
            records.append(Measurement("embedding_gradient_share", share, "none", {"dead": 0.0}))
        return Finding(
            table=columns,
            protocol=subject.protocol(len(batch["id"]), sampled=False, levels=self.levels),
            records=records,
            alarms=alarms,
            facts={
                "t": t.tolist(),
                "layers": {name: variance for name, (_, _, variance) in layers.items()},
                "sensitivity": s,
            },
        )

    def changes(self, subject: Subject, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """mean |f(x_i, c_j) - f(x_i, c_i)|^2, (levels, levels), and mean |f(x_i, c_i)|^2, (levels,)."""
        tell = subject.progress("the embedding", self.levels)
        change, power = torch.zeros(self.levels, self.levels, dtype=torch.float64), torch.zeros(self.levels).double()
        for i in range(self.levels):
            answers = [self.answer(subject, batch, t[i], t[j]).double() for j in range(self.levels)]
            power[i] = answers[i].square().mean()
            change[i] = torch.stack([(answer - answers[i]).square().mean() for answer in answers]).cpu()
            tell(1)
        return change, power

    @torch.no_grad()
    def answer(self, subject: Subject, batch: Batch, t: Tensor, told: Tensor) -> Tensor:
        """What the network says to x_t while it is told another time."""
        x, cond = inputs(subject, batch, t)
        net = subject.denoiser.net
        return net(x, c_noise(subject, told.expand(len(x))), **cond)

    @staticmethod
    def same_network(subject: Subject, t: Tensor) -> Tensor:
        """Which levels the same one of several networks answers for, (levels, levels)."""
        route = getattr(subject.denoiser.net, "route", None)
        number = torch.zeros(len(t)) if route is None else route(c_noise(subject, t)).cpu()
        return number[:, None] == number

    @torch.no_grad()
    def layers(self, subject: Subject, batch: Batch) -> dict[str, tuple[float, int, float]]:
        """By layer: the effective rank of what arrives, the most that it could be, and the variance over levels of what
        is made of it, a mean over its values."""
        net, heard, made = subject.denoiser.net, {}, {}
        named = {name: module for name, module in net.named_modules() if name.rpartition(".")[2] == LISTENS}

        def note(name: str):
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
                heard[name], made[name] = inputs[0].double().cpu(), output.double().cpu()

            return hook

        hooks = [module.register_forward_hook(note(name)) for name, module in named.items()]
        try:
            levels = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
            x, cond = inputs(subject, {**batch, "x_0": batch["x_0"][:1]}, torch.tensor(0.5).double())
            one = {key: value[:1].repeat_interleave(64, 0) for key, value in cond.items()}
            net(x[:1].repeat_interleave(64, 0), c_noise(subject, levels), **one)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            name: (rank(heard[name]), min(heard[name].shape) - 1, made[name].var(0).mean().item())
            for name in named
            if name in heard and len(heard[name]) > 1
        }

    def gradient(self, subject: Subject, batch: Batch) -> float | None:
        """|dL/dW|/|dL/d(all weights)|, W being what reads the level's features, L the mean over levels of the squared
        error in units of what the network predicts; of a copy. None where there is no W, or where
        weights are divided over devices."""
        if isinstance(subject.denoiser.net, FSDPModule):
            return None
        denoiser = copy.deepcopy(subject.denoiser).requires_grad_(True)
        readers = [p for name, p in denoiser.net.named_parameters() if name.endswith(READS)]
        if not readers:
            return None
        with torch.enable_grad():
            x_0 = batch["x_0"].to(subject.device)
            t = (torch.arange(len(x_0), dtype=torch.float64, device=subject.device) + 0.5) / len(x_0)
            alpha_t, sigma_t = (v.to(x_0.dtype) for v in subject.schedule(t.view(-1, *[1] * (x_0.ndim - 1))))
            eps = Noise(subject.seed, batch["id"].tolist(), x_0.shape[1:], subject.device)()
            cond = {key: value.to(subject.device) for key, value in batch["cond"].items()}
            x_0_hat = denoiser(alpha_t * x_0 + sigma_t * eps, alpha_t, sigma_t, **cond)
            (denoiser.target.precision(alpha_t, sigma_t) * (x_0_hat - x_0).square()).mean().backward()
        whole = norm([p.grad for p in denoiser.parameters() if p.grad is not None])
        return norm([p.grad for p in readers if p.grad is not None]) / whole if whole else 0.0

    def draw(self, finding: Finding) -> Image.Image:
        table, facts = finding.table, finding.facts
        figure, axes = sheet(1, 2 if facts["layers"] else 1, 4.6, 3.6)
        times = facts["t"]
        grid = [[float("nan")] * len(times) for _ in times]
        for of_x, told, change in zip(*table.values(), strict=True):
            grid[times.index(of_x)][times.index(told)] = math.log10(max(change, 1e-12))
        image = axes[0].imshow(grid, cmap="cividis", origin="lower", extent=(0, 1, 0, 1), aspect="equal")
        figure.colorbar(image, ax=axes[0], label="log10 of |change of f|² / |f|²")
        axes[0].set(
            xlabel="t that the network is told",
            ylabel="t of its input x_t (white: not compared)",
            title=f"told another level: mean change S = {facts['sensitivity']:.2g} (alarm below {WEAK:g})",
        )
        axes[0].grid(False)
        if facts["layers"]:
            names, values = [*facts["layers"]], [*facts["layers"].values()]
            axes[1].bar(range(len(names)), values, color=COLOURS[0])
            axes[1].set(xlabel="layer, in order", ylabel="variance over t", title="scales and shifts made of the level")
            if min(values) > 0 and max(values) > 30 * min(values):
                axes[1].set_yscale("log")
            axes[1].set_xticks(range(0, len(names), max(1, len(names) // 8)))
        return render(figure)


def inputs(subject: Subject, batch: Batch, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """c_in x_t of these samples, and their condition, as the network gets them."""
    denoiser = subject.denoiser
    dtype = next(denoiser.net.parameters()).dtype
    x_0 = batch["x_0"].to(subject.device)
    alpha_t, sigma_t = subject.schedule(t.to(subject.device))
    eps = Noise(subject.seed, batch["id"][: len(x_0)].tolist(), x_0.shape[1:], subject.device)()
    c_in = 1 / torch.hypot(denoiser.sigma_data * alpha_t, sigma_t)
    cond = {key: value.to(subject.device) for key, value in batch["cond"].items()}
    return (c_in * (alpha_t * x_0 + sigma_t * eps)).to(dtype), cond


def c_noise(subject: Subject, t: Tensor) -> Tensor:
    """log(sigma_t/alpha_t)/4, (B,), as the network gets it."""
    alpha_t, sigma_t = subject.schedule(t.to(subject.device))
    dtype = next(subject.denoiser.net.parameters()).dtype
    return ((sigma_t / alpha_t).clamp(1 / RATIO, RATIO).log() / 4).to(torch.promote_types(dtype, torch.float32))


def rank(rows: Tensor) -> float:
    """exp(entropy) of the singular values of rows about their mean; 0 where they are all the same."""
    values = torch.linalg.svdvals(rows - rows.mean(0))
    values = values[values > 1e-7 * max(1e-30, rows.abs().max().item()) * math.sqrt(rows.numel())]
    p = values / values.sum()
    return (-(p * p.log()).sum()).exp().item() if len(p) else 0.0


def norm(gradients: list[Tensor]) -> float:
    """Of all together."""
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))
