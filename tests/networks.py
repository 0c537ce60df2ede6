"""Every network option: in small with the same switches, and at its own size on the meta device."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import yaml
from hydra.utils import get_class
from torch import Tensor, nn

from denoiselab.compose import conf_dir
from denoiselab.errors import UserError
from denoiselab.models import Autoencoder
from exact import OPTIONS, normals, parts

SHAPES = [(2,), (1, 8, 8), (3, 16, 16)]
NATURAL = [(2,), (1, 8, 8), (3, 32, 32), (4, 32, 32), (3, 64, 64), (4, 64, 64), (3, 256, 256)]

SMALL = {
    "width": lambda width: min(width, 32),
    "channels": lambda channels: min(channels, 16),
    "head_channels": lambda channels: channels and min(channels, 16),
    "heads": lambda heads: min(heads, 2),
    "depth": lambda depth: min(depth, 2),
    "blocks": lambda blocks: 1,
    "multipliers": lambda multipliers: [1, 2][: len(multipliers)],
    "attention": lambda sides: [4, 8] if sides else [],
    "groups": lambda groups: min(groups, 8),
}
"""What makes a network small, by the name of the argument; all other arguments stay. Attention is at the second level
of sides of 8 and of 16, and norms see several channels at once, without which some biases have no effect."""


def shrunk(node: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an option in small, defaults among them; those of nested networks too."""
    signature = inspect.signature(get_class(node["_target_"])).parameters if "_target_" in node else {}
    defaults = {key: signature[key].default for key in SMALL if key in signature}
    return {
        key: shrunk(value) if isinstance(value, dict) else SMALL.get(key, lambda same: same)(value)
        for key, value in {**defaults, **node}.items()
    }


@cache
def node(model: str) -> dict[str, Any]:
    """An option's arguments, composed only where it is made of others: composing takes long."""
    own = yaml.safe_load((conf_dir() / "model" / f"{model}.yaml").read_text())
    return parts(f"model={model}").config["model"] if "defaults" in own else own


def build(model: str, shape: tuple[int, ...], small: bool = True, num_classes: int = 3, **arguments: Any) -> nn.Module:
    """An option, float32 and in training mode, without a condition but the label unless told otherwise."""
    torch.manual_seed(0)
    own = shrunk(node(model)) if small else node(model)
    shared = {"shape": shape, "num_classes": num_classes, "vector": 0, "low_res": 0, "outputs": 1, **arguments}
    return parts().make("model", {**own, **{k: v for k, v in arguments.items() if k in own}}, **shared)


def accepts(model: str, shape: tuple[int, ...], small: bool = True) -> bool:
    try:
        with torch.device("meta"):
            build(model, shape, small)
    except UserError:
        return False
    return True


NETWORKS = [model for model in OPTIONS["model"] if not issubclass(get_class(node(model)["_target_"]), Autoencoder)]
"""Options that predict; autoencoders, which are trained by a loss of their own, are tested in test_autoencoder."""


def cases() -> list[tuple[str, tuple[int, ...]]]:
    """Options and shapes that fit, one option of those that are the same in small."""
    return [(model, shape) for model in dict.fromkeys(map(alike, NETWORKS)) for shape in fitting(model)]


def alike(model: str) -> str:
    """The first option that is the same in small."""
    return next(other for other in NETWORKS if shrunk(node(other)) == shrunk(node(model)))


def fitting(model: str) -> list[tuple[int, ...]]:
    return [shape for shape in SHAPES if accepts(model, shape)]


@cache
def natural_shape(model: str) -> tuple[int, ...]:
    """The largest shape that an option is for."""
    return next(shape for shape in reversed(NATURAL) if accepts(model, shape, small=False))


def perturbed(net: nn.Module, size: float = 0.05) -> nn.Module:
    """In float64 and evaluation mode, with nothing left at zero."""
    torch.manual_seed(1)
    net = net.double().eval()
    for parameter in net.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return net


def inputs(net: nn.Module, shape: tuple[int, ...], n: int = 4) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """x, c_noise at levels from data to noise, label, and what else the network must have."""
    low_res = getattr(net, "low_res", 0)
    more = {"low_res": normals(n, low_res, shape[1] // 2, shape[2] // 2, seed=2)} if low_res else {}
    c_noise = torch.tensor([-2.0, -0.1, 0.1, 2.0], dtype=torch.float64).repeat(-(-n // 4))[:n]
    return normals(n, *shape), c_noise, torch.arange(n) % 4 - 1, more
