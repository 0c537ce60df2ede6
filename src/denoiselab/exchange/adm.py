"""The U-Net from a checkpoint of OpenAI's guided-diffusion, the code of ADM (arXiv:2105.05233)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange.renaming import layers, renamed, skeleton, tensors, with_null
from denoiselab.models import UNet
from denoiselab.models.unet_blocks import Attention

BLOCK = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "modulation": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "shortcut": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}


def from_adm(
    arguments: Mapping[str, Any], state: Mapping[str, Tensor], new_attention_order: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(arguments, state) of the U-Net that a checkpoint's weights are of.

    Such a file holds weights alone, so the arguments must come from elsewhere, such as model=unet_adm64. num_classes,
    low_res, outputs and scale_shift are read off the weights, and "embedding" is set to "adm". The rest must be as it
    was in training; heads, head_channels, eps and the side cannot be told from the weights.

    The published models know no null class: they are guided by a classifier. The network's own null class gets a row
    of zeros, which was never trained, so it should be asked with labels only, and not with guidance=cfg.

    Args:
        arguments: of UNet.
        state: the checkpoint's weights.
        new_attention_order: the flag use_new_attention_order that the model was made with (the published one for
            64x64 was): rows of the attention matrices are in the order q, k, v and then by head. Without it they are
            by head, and then q, k, v.

    Raises:
        CheckpointError: the weights are not of these arguments.
    """
    if arguments.get("vector"):
        raise CheckpointError(f"vector={arguments['vector']}: need 0, such a model has labels only")
    for key in ("input_blocks.0.0.weight", "input_blocks.1.0.emb_layers.1.weight", "out.2.weight"):
        if key not in state:
            raise CheckpointError(f"{key}: the weights have no such tensor; need a U-Net of guided-diffusion")
    image, label = arguments["shape"][0], state.get("label_emb.weight")
    given, told = state["input_blocks.0.0.weight"].shape[1], state["out.2.weight"].shape[0]
    need = f"{image} channels of x, and maybe more for an image to be enlarged"
    if given < image or told % image:
        raise CheckpointError(
            f"shape={tuple(arguments['shape'])}: the weights take {given} channels and give {told}; need {need}"
        )
    block = state["input_blocks.1.0.emb_layers.1.weight"], state["input_blocks.1.0.out_layers.0.weight"]
    arguments = {
        **arguments,
        "num_classes": 0 if label is None else len(label),
        "low_res": given - image,
        "outputs": told // image,
        "scale_shift": len(block[0]) == 2 * len(block[1]),
        "embedding": "adm",
    }
    net, state = skeleton(arguments), dict(state)
    if label is not None:
        state["label_emb.weight"] = with_null(label)
    found = renamed(net, tensors(net, _modules(net)), state)
    if not new_attention_order:
        for name, module in net.named_modules():
            if isinstance(module, Attention):
                for key in (f"{name}.qkv.weight", f"{name}.qkv.bias"):
                    rows = found[key].unflatten(0, (module.heads, 3, -1))  # (heads, 3, C/heads, ...)
                    found[key] = rows.transpose(0, 1).flatten(0, 2)
    return arguments, found


def _modules(net: UNet) -> dict[str, tuple[str, ...]]:
    """Our modules, and theirs."""
    modules = {
        "condition.mlp.0": "time_embed.0",
        "condition.mlp.2": "time_embed.2",
        "condition.label": "label_emb",
        "first": "input_blocks.0.0",
        "last.0": "out.0",
        "last.2": "out.2",
    }

    def add(ours: str, block: str, attention: str) -> None:
        modules.update({f"{ours}.{name}": f"{block}.{theirs}" for name, theirs in BLOCK.items()})
        modules.update({f"{ours}.attention.{name}": f"{attention}.{theirs}" for name, theirs in ATTENTION.items()})

    last = ""
    for part, ours, level, place in layers(net):
        if part == "down":  # each layer is an input block; the convolution before them is the first
            number = int(ours.removeprefix("down.")) + 1
            add(ours, f"input_blocks.{number}.0", f"input_blocks.{number}.1")
            modules[f"{ours}.conv"] = f"input_blocks.{number}.0.op"
        elif place is not None:
            last = f"output_blocks.{level * (net.blocks + 1) + place}"
            add(ours, f"{last}.0", f"{last}.1")
        else:  # the end of the last block of a level
            end = f"{last}.{2 if net.attends[-1 - level] else 1}"
            add(ours, end, "")
            modules[f"{ours}.conv"] = f"{end}.conv"
    add("middle.0", "middle_block.0", "middle_block.1")
    add("middle.1", "middle_block.2", "")
    return {ours: (theirs,) for ours, theirs in modules.items()}
