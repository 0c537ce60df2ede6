"""Our networks against diffusers': the same function with the same weights, exchanged and compared before anything is
timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.bench import memory
from denoiselab.bench.record import Record, need, ratio, times
from denoiselab.bench.refusal import Disagreement, difference, diffusers
from denoiselab.bench.timing import Contender, alternate
from denoiselab.compose import compose
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve

AGREEMENT = 1e-5
"""How far apart, over the largest value, the outputs of two networks with the same weights may be, in float32."""

EXCHANGE = {
    "UNet": ("denoiselab.exchange.unet", "UNet2DModel"),
    "DiT": ("denoiselab.exchange.dit", "DiTTransformer2DModel"),
}
"""By our class: the module that exchanges its weights, and diffusers' class."""

VARIANTS = {"cpu": ["fp32"], "cuda": ["bf16", "bf16 compiled"]}
"""How networks are run, by the kind of device; bf16 is autocast."""

WORK = ("forward", "forward+backward")

Step = Callable[[], Tensor]


class Pair:
    """One of our networks and diffusers', on the CPU in evaluation mode, and what both are given.

    Args:
        model: options (as for ``denoiselab train``), shape, num_classes.
        batch: samples.
    """

    def __init__(self, model: dict[str, Any], batch: int):
        torch.manual_seed(0)
        parts = ours_parts(model)
        self.ours = weighted(parts.model)
        schedule = parts.schedule
        t = torch.linspace(0, 1, schedule.points or 1000, dtype=torch.float64)
        table = (schedule.log_snr(t) / -8).float()  # c_noise by timestep
        self.config, state = exchange(self.ours).to_diffusers(self.ours, table)
        self.kind = EXCHANGE[type(self.ours).__name__][1]
        self.theirs = theirs(self.kind, self.config)
        self.theirs.load_state_dict(state, strict=True)
        self.index = torch.randint(len(table), (batch,))
        self.c_noise, self.x = table[self.index], torch.randn(batch, *parts.shape)
        self.label = torch.randint(parts.num_classes, (batch,)) if parts.num_classes else None
        with torch.no_grad():
            y = self.call(self.ours)()
        self.gradient = torch.randn_like(y)

    def call(self, net: nn.Module) -> Step:
        """One forward pass of one of the two."""
        if net is self.ours:
            return lambda: net(self.x, self.c_noise, label=self.label)
        return lambda: net(self.x, timestep=self.index, class_labels=self.label).sample

    def check(self) -> dict[str, Any]:
        """The two are the same: outputs, and parameters, copies of which count once.

        Raises:
            Disagreement: they are not.
        """
        with torch.no_grad():
            apart = difference(self.call(self.ours)(), self.call(self.theirs)())
        if not apart <= AGREEMENT:
            raise Disagreement(f"the networks' outputs are {apart:.1e} apart; nothing is reported")
        own, other = distinct(self.ours), distinct(self.theirs)
        if own != other:
            raise Disagreement(f"the networks have {own:,} and {other:,} parameters; nothing is reported")
        held = {"ours": count(self.ours), "diffusers": count(self.theirs)}
        return {"difference": apart, "parameters": own, "parameters_with_copies": held}

    def to(self, device: torch.device) -> None:
        for net in (self.ours, self.theirs):
            net.to(device)
        for name in ("index", "c_noise", "x", "label", "gradient"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))

    def contender(self, name: str, work: str, variant: str) -> Contender:
        """``ours`` or ``diffusers`` doing "forward" or "forward+backward"."""
        net = self.ours if name == "ours" else self.theirs
        call = self.call(torch.compile(net) if "compiled" in variant else net)  # pyright: ignore[reportArgumentType]
        return Contender(name, task(call, work, variant, self.gradient, net))


def task(call: Step, work: str, variant: str, gradient: Tensor, net: nn.Module) -> Callable[[], object]:
    """A forward pass without gradients, or one with a backward pass, from no gradients to all of them."""
    mixed = "bf16" in variant

    def forward() -> Tensor:
        with torch.autocast(gradient.device.type, torch.bfloat16) if mixed else nullcontext():
            return call()

    def both() -> None:
        net.zero_grad(set_to_none=True)
        y = forward()
        y.backward(gradient.to(y.dtype))

    return both if work == "forward+backward" else torch.no_grad()(forward)


def ours_parts(model: dict[str, Any]) -> Parts:
    """The parts of our network, without a data set."""
    facts = {"shape": model["shape"], "num_classes": model["num_classes"], "vector": 0, "low_res": 0}
    return Parts(resolve(compose("train", model["options"])), facts)


def exchange(net: nn.Module) -> Any:
    """The module that exchanges this network's weights."""
    name = type(net).__name__
    if name not in EXCHANGE:
        raise UserError(f"networks: {name} has no counterpart in diffusers; need {' or '.join(EXCHANGE)}")
    return importlib.import_module(EXCHANGE[name][0])


def theirs(kind: str, config: dict[str, Any]) -> nn.Module:
    """diffusers' network of that class and configuration, in evaluation mode: no dropout, of labels neither."""
    return getattr(diffusers(), kind).from_config(config).eval()


def weighted(net: nn.Module) -> nn.Module:
    """The network in evaluation mode with nothing left at zero, so that an output depends on every weight."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.eval()


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def distinct(net: nn.Module) -> int:
    """Parameters, tensors with the same values counted once: diffusers' DiT has a copy of its label embedding and of
    its noise-level MLP in each block."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    total = 0
    for parameter in net.parameters():
        alike = found.setdefault((*parameter.shape, parameter.double().sum().item()), [])
        if not any(torch.equal(parameter, other) for other in alike):
            alike.append(parameter)
            total += parameter.numel()
    return total


def measure(options: dict[str, Any], device: torch.device) -> list[Record]:
    """The times of forward, and of forward and backward together, of each pair.

    Args:
        options: rounds, batch, memory (whether to measure it), models: name -> options, shape, num_classes, at_most.
        device: a GPU, for what is measured there after the CPU.

    Raises:
        Disagreement: two networks are not the same.
        Unavailable: no diffusers.
    """
    diffusers()
    found = []
    for name, model in options["models"].items():
        pair = Pair(model, options["batch"])
        facts = {"batch": options["batch"], "shape": model["shape"], **pair.check()}
        for place in dict.fromkeys([torch.device("cpu"), device]):
            pair.to(place)
            for variant in VARIANTS[place.type]:
                found += [comparison(name, pair, work, variant, options, model, facts) for work in WORK]
    return found


def comparison(
    name: str,
    pair: Pair,
    work: str,
    variant: str,
    options: dict[str, Any],
    model: dict[str, Any],
    facts: dict[str, Any],
) -> Record:
    """One pair, one kind of work, one way to run it."""
    kind = pair.x.device.type
    title = f"{name} {work}, batch {options['batch']}, {kind} {variant}"
    contenders = [pair.contender(side, work, variant) for side in ("ours", "diffusers")]
    alternate(contenders, options["rounds"], f"networks {title}")
    peaks = memory.peaks(pair, contenders, model, work, options["batch"]) if options["memory"] else {}
    needed = need(model, "at_most") if work == "forward+backward" and kind == "cpu" else {}
    return Record(
        "networks", title, work, options["rounds"], times(contenders, peaks), ratio(*contenders), needed, {**facts}
    )
