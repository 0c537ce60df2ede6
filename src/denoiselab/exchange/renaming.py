"""What reading a U-Net's weights under other names takes, whoever gave the names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.models import UNet


def skeleton(arguments: Mapping[str, Any]) -> UNet:
    """The U-Net of these arguments without memory for its weights."""
    try:
        with torch.device("meta"):
            return UNet(**{key: value for key, value in arguments.items() if key != "embedding"})
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def layers(net: UNet) -> Iterator[tuple[str, str, int, int | None]]:
    """Each layer on the way down and up: (part, its name, which level of that part, place in the level); the place
    is None for a layer that changes the side."""
    last = len(net.widths) - 1
    for part, blocks in (("down", net.blocks), ("up", net.blocks + 1)):
        count = 0
        for level in range(last + 1):
            for place in (*range(blocks), *([] if level == last else [None])):
                yield part, f"{part}.{count}", level, place
                count += 1


def renamed(net: UNet, names: Mapping[str, tuple[str, ...]], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state from another library's.

    Args:
        net: whose state it is to be.
        names: of our tensors, and of those that are stacked in each.
        state: theirs, each used once. Weights of a 1x1 convolution may stand for a matrix.
    """
    left, found = dict(state), {}
    for name, ours in net.state_dict().items():
        missing = [key for key in names[name] if key not in left]
        if missing:
            raise CheckpointError(f"{missing[0]}: the weights have no such tensor, and the configuration wants it")
        wanted, parts = (len(ours) // len(names[name]), *ours.shape[1:]), []
        for key in names[name]:
            has = tuple(left[key].shape)
            if has != wanted + (1,) * (len(has) - len(wanted)):
                raise CheckpointError(f"{key}: has {has}, the configuration wants {wanted}")
            parts.append(left.pop(key).reshape(wanted))
        found[name] = torch.cat(parts)
    if left:
        raise CheckpointError(f"{min(left)}: the configuration has no such tensor")
    return found


def with_null(label: Tensor) -> Tensor:
    """A table of labels with a row of zeros for no label."""
    return torch.cat([label, torch.zeros_like(label[:1])])


def tensors(net: UNet, modules: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Names of tensors from names of modules."""
    return {
        name: tuple(f"{theirs}.{name.rpartition('.')[2]}" for theirs in modules[name.rpartition(".")[0]])
        for name in net.state_dict()
    }
