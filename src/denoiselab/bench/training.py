"""Training speed against a bare PyTorch loop: same network, batches, noise, EMA and optimizer, in one run.

The bare loop is what a researcher would write for this one configuration; ours runs with every per-step part on
(Lightning, buckets, EMA, metrics, progress, signal and finiteness checks), with its periodic evaluations (held-out
loss, pictures) timed apart. And the share of a step that the accounting of losses by their time takes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from denoiselab.bench.record import Record, need, ratio, times
from denoiselab.bench.timing import Contender
from denoiselab.bench.trainer import Turns, train
from denoiselab.data.stream import Stream
from denoiselab.metrics.loss_by_t import Buckets
from denoiselab.module import Diffusion


class BareLoop:
    """v-prediction with labels on a schedule that is a table, written out for data in memory."""

    def __init__(self, module: Any):
        self.device = module.device
        self.net = copy.deepcopy(module.denoiser.net)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.optimizer = module.make_optimizer(params=list(self.net.parameters()))
        train = module.trainer.datamodule.data.train
        self.x_0, self.label = train.x_0.to(self.device), train.label.to(self.device)
        self.batches = iter(Stream(len(self.x_0), module.batch_size, seed=0))
        self.log_snr = module.schedule.log_snr_table.float().to(self.device)
        self.sigma_data = module.denoiser.sigma_data
        self.clip, self.decay = module.gradient_clip, module.ema.decay
        self.loss = torch.zeros((), device=self.device)

    def step(self) -> None:
        index = torch.tensor([i for _, i in next(self.batches)], device=self.device)
        x_0, label = self.x_0[index], self.label[index]
        u = torch.rand(2, len(x_0), device=self.device)
        label = torch.where(u[0] < 0.1, -1, label)
        position = u[1] * (len(self.log_snr) - 1)
        at = torch.lerp(self.log_snr[position.long()], self.log_snr[position.long() + 1], position.frac())
        alpha, sigma = (v.sqrt().view(-1, 1, 1, 1) for v in (at.sigmoid(), (-at).sigmoid()))
        eps = torch.randn_like(x_0)
        c_in = (alpha**2 * self.sigma_data**2 + sigma**2).rsqrt()
        v_hat = self.net(c_in * (alpha * x_0 + sigma * eps), at / -8, label)
        loss = (v_hat - (alpha * eps - sigma * x_0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.ema.parameters()], [*self.net.parameters()], 1 - self.decay)
        self.loss += loss.detach()


def accounting(module: Diffusion, steps: int) -> Contender:
    """What ``LossBuckets`` adds to a training step, so many times: the errors of a batch into ten buckets."""
    buckets = Buckets(10)
    t, mse = torch.rand(2, module.batch_size, device=module.device)
    return Contender("buckets", lambda: [buckets.add(module.schedule, t, mse) for _ in range(steps)], per=steps)


def measure(options: dict[str, Any], device: torch.device) -> list[Record]:
    """The time of a training step, and the share of it that buckets take.

    Args:
        options: rounds, steps (per turn), options (as for ``denoiselab train``), at_least (what must be kept of the
            bare loop's steps per second), buckets (of a step's time at most).
        device: where to.
    """
    loops: list[BareLoop] = []

    def others(module: Diffusion) -> list[Contender]:
        loops.append(BareLoop(module))
        bare = Contender("bare", lambda: [loops[0].step() for _ in range(options["steps"])], per=options["steps"])
        return [bare, accounting(module, options["steps"])]

    turns = Turns("training", options["rounds"], options["steps"], others)
    placed = [*options["options"], f"trainer.accelerator={'cpu' if device.type == 'cpu' else 'gpu'}"]
    last = train(placed, turns, lambda own: [*own, turns])
    losses = {"ours": float(turns.loss) / turns.max_steps, "bare": float(loops[0].loss) / turns.max_steps}
    ours, bare, buckets = turns.ours, *turns.others
    name = " ".join(options["options"])
    return [
        Record(
            "training",
            name,
            "a step",
            options["rounds"],
            times([ours, bare]),
            ratio(bare, ours),
            need(options, "at_least"),
            {
                "steps_per_round": options["steps"],
                "mean_loss": losses,
                "evaluation_share": last.get("speed/evaluation_share"),
            },
        ),
        Record(
            "training",
            f"losses by time, {name}",
            "a step",
            options["rounds"],
            times([ours, buckets]),
            ratio(buckets, ours),
            need({"at_most": options["buckets"]}, "at_most"),
            {"buckets": 10},
        ),
    ]
