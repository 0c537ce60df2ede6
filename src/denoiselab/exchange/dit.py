"""The DiT as diffusers' DiTTransformer2DModel, and from a checkpoint of the published code: the same function, under
other names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange.renaming import renamed
from denoiselab.models import DDPM, DiT
from denoiselab.models.dit import positions

DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
"""What a configuration means where it leaves a key out."""

NEEDED: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
"""The values that can be followed exactly, of keys that can have others."""

FORMER = (
    *("cross_attention_dim", "num_vector_embeds", "only_cross_attention", "double_self_attention", "attention_type"),
    *("use_linear_projection", "caption_channels", "interpolation_scale", "use_additional_conditions"),
)
"""Keys of Transformer2DModel, the class of older files, that are of other networks: false, null or "default" here."""

EMBEDDERS = {
    "condition.mlp.0": "timestep_embedder.linear_1",
    "condition.mlp.2": "timestep_embedder.linear_2",
    "condition.label": "class_embedder.embedding_table",
}
"""Ours, and theirs in the first norm of each block."""

DIFFUSERS = {"first": ("pos_embed.proj",), "modulation": ("proj_out_1",), "last": ("proj_out_2",)}
DIFFUSERS_BLOCK = {
    "modulation": ("norm1.linear",),
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.out": ("attn1.to_out.0",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
}

PUBLISHED = {
    "condition.mlp.0": ("t_embedder.mlp.0",),
    "condition.mlp.2": ("t_embedder.mlp.2",),
    "condition.label": ("y_embedder.embedding_table",),
    "first": ("x_embedder.proj",),
    "modulation": ("final_layer.adaLN_modulation.1",),
    "last": ("final_layer.linear",),
}
PUBLISHED_BLOCK = {
    "modulation": ("adaLN_modulation.1",),
    "attention.qkv": ("attn.qkv",),
    "attention.out": ("attn.proj",),
    "mlp.0": ("mlp.fc1",),
    "mlp.2": ("mlp.fc2",),
}

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""By width, of the published sizes S, B, L and XL."""


def to_diffusers(net: DiT, c_noise: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state) of a DiTTransformer2DModel whose sample at timestep n is net(x, c_noise[n]).

    Its blocks have a copy each of the noise level's MLP and of the labels. Its timesteps are told by [cos, sin] with
    DDPM's frequencies, which is embedding=ddpm with the first matrix's columns in another order. It counts the null
    class after the others. A network without classes becomes one whose only class, 0, adds nothing.

    Args:
        net: of any device and dtype.
        c_noise: log(sigma/alpha)/4 at the T indices, (T,); None for the table of the network's embedding.

    Raises:
        CheckpointError: DiTTransformer2DModel cannot be what an option of the network made it.
    """
    condition, (channels, height, side) = net.condition, net.shape
    width, embedding = net.first.out_features, condition.embedding
    for name, value in {**net.switches, "low_res": net.low_res, "vector": condition.vector is not None}.items():
        _need(name, value, not value, "it off, DiTTransformer2DModel has no such thing")
    _need("mlp_ratio", net.mlp_ratio, net.mlp_ratio == 4, "4, as DiTTransformer2DModel has it")
    _need("shape", net.shape, height == side, "a square image, as DiTTransformer2DModel does")
    if not isinstance(embedding, DDPM):
        name = type(embedding).__name__
        raise CheckpointError(f"embedding={name}: need embedding=ddpm, the sinusoids of DiTTransformer2DModel")
    if c_noise is not None:
        index = embedding.index(c_noise)
        same = torch.equal(index, torch.arange(len(index), device=index.device).to(index))
        _need("c_noise", f"{len(index)} levels", same, "those of the schedule that the network's embedding counts in")

    config = {
        "_class_name": "DiTTransformer2DModel",
        **DEFAULTS,
        "num_attention_heads": net.heads,
        "attention_head_dim": width // net.heads,
        "in_channels": channels,
        "out_channels": net.outputs * channels,
        "num_layers": len(net.blocks),
        "sample_size": side,
        "patch_size": net.patch,
        "num_embeds_ada_norm": condition.num_classes,
        "norm_eps": net.mlp_eps,
    }
    ours = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    ours["first.weight"] = ours["first.weight"].unflatten(1, (channels, net.patch, net.patch))
    ours["condition.mlp.0.weight"] = _swapped(ours["condition.mlp.0.weight"])
    ours.setdefault("condition.label.weight", ours["first.bias"].new_zeros(1, width))
    state = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if module in EMBEDDERS:
            for i in range(len(net.blocks)):
                state[f"transformer_blocks.{i}.norm1.emb.{EMBEDDERS[module]}.{kind}"] = tensor.clone()
        else:
            theirs = _name(module, DIFFUSERS, DIFFUSERS_BLOCK, "transformer_blocks")
            for key, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
                state[f"{key}.{kind}"] = part.clone()
    return config, state


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(arguments, state) of the DiT that is a DiTTransformer2DModel; the inverse of to_diffusers.

    ``arguments`` are DiT's, with "embedding": "ddpm". norm_eps, 1e-5 by default, is of the norms before MLPs only; the
    others have the published 1e-6 whatever it says. So it becomes mlp_eps, and nothing is rounded.

    Args:
        config: as in its config.json; keys that are left out have DiTTransformer2DModel's defaults.
        state: its weights.

    Raises:
        CheckpointError: the DiT cannot be that model, or the weights are not of that configuration.
    """
    kind = config.get("_class_name", "DiTTransformer2DModel")
    _need("_class_name", kind, kind in ("DiTTransformer2DModel", "Transformer2DModel"), "DiTTransformer2DModel")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in FORMER:
        value = given.pop(key, None)
        _need(key, value, value in (None, False, "default"), "null, a DiT has no such thing")
    for key, value in given.items():
        _need(key, value, key in DEFAULTS, "a key of DiTTransformer2DModel that is known here")
    config = {**DEFAULTS, **given}
    for key, value in NEEDED.items():
        _need(key, config[key], config[key] == value, f"{value}")
    for key in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size"):
        _need(key, config[key], type(config[key]) is int and config[key] > 0, "a whole number > 0")
    classes, channels, outputs = config["num_embeds_ada_norm"], config["in_channels"], config["out_channels"]
    _need("num_embeds_ada_norm", classes, type(classes) is int and classes >= 0, "a number of classes")
    outputs = channels if outputs is None else outputs
    fit = type(outputs) is int and outputs > 0 and outputs % channels == 0
    _need("out_channels", outputs, fit, f"a multiple of in_channels={channels}")

    arguments = {
        "shape": [channels, config["sample_size"], config["sample_size"]],
        "num_classes": classes,
        "embedding": "ddpm",
        "patch": config["patch_size"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": 4.0,
        "mlp_eps": config["norm_eps"],
        "outputs": outputs // channels,
    }
    net, left = _skeleton(arguments), _checked(state, "pos_embed.pos_embed", "pos_embed.proj.weight", arguments)
    names = _names(net, DIFFUSERS | {ours: (theirs,) for ours, theirs in EMBEDDERS.items()}, DIFFUSERS_BLOCK)
    for theirs in EMBEDDERS.values():
        for kind in ("weight", "bias"):
            _merge(left, f"{theirs}.{kind}", arguments["depth"])
    row = left.pop("class_embedder.embedding_table.weight", None) if classes == 0 else None
    found = renamed(net, names, left)
    if row is not None:  # its only class
        _need("num_embeds_ada_norm", 0, row.shape == (1, arguments["width"]), "a table of one row")
        found["condition.mlp.2.bias"] = found["condition.mlp.2.bias"] + row[0]
    found["condition.mlp.0.weight"] = _swapped(found["condition.mlp.0.weight"])
    return arguments, found


def from_dit(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(arguments, state) of the DiT that a checkpoint of facebookresearch/DiT (arXiv:2212.09748) holds.

    All but the number of heads is read off the weights. ``arguments`` are DiT's, with "embedding": "adm". The last
    row of the labels' table is taken for the null class, which the published models have.

    Args:
        state: its weights.
        heads: of each attention; None for the published number at this width.

    Raises:
        CheckpointError: the weights are not of such a model.
    """
    keys = (
        *("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.bias", "pos_embed"),
        "final_layer.linear.bias",
    )
    for key in keys:
        if key not in state:
            raise CheckpointError(f"{key}: the weights have no such tensor; need a DiT of facebookresearch/DiT")
    first, table, hidden, places, last = (state[key] for key in keys)
    _need("x_embedder.proj.weight", tuple(first.shape), first.ndim == 4, "(width, channels, patch, patch)")
    width, channels, patch = first.shape[:3]
    if heads is None:
        heads = HEADS.get(width)
        _need("heads", heads, heads, f"a number, {width} is none of the published widths {sorted(HEADS)}")
    side = math.isqrt(places.shape[-2]) * patch
    arguments = {
        "shape": [channels, side, side],
        "num_classes": len(table) - 1,
        "embedding": "adm",
        "patch": patch,
        "width": width,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "heads": heads,
        "mlp_ratio": len(hidden) / width,
        "outputs": len(last) // (patch**2 * channels),
    }
    net, left = _skeleton(arguments), _checked(state, "pos_embed", "x_embedder.proj.weight", arguments)
    return arguments, renamed(net, _names(net, PUBLISHED, PUBLISHED_BLOCK), left)


def _skeleton(arguments: Mapping[str, Any]) -> Any:
    """The DiT of these arguments without memory for its weights."""
    try:
        with torch.device("meta"):
            return DiT(**{key: value for key, value in arguments.items() if key != "embedding"})
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _name(module: str, outside: Mapping[str, Any], inside: Mapping[str, Any], blocks: str) -> tuple[str, ...]:
    """Their modules that are stacked in one of ours."""
    if not module.startswith("blocks."):
        return outside[module]
    _, i, name = module.split(".", 2)
    return tuple(f"{blocks}.{i}.{theirs}" for theirs in inside[name])


def _names(net: DiT, outside: Mapping[str, Any], inside: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Our tensors, and theirs that are stacked in each."""
    blocks, found = "blocks" if "x_embedder.proj" in outside["first"] else "transformer_blocks", {}
    for name in net.state_dict():
        module, _, kind = name.rpartition(".")
        found[name] = tuple(f"{theirs}.{kind}" for theirs in _name(module, outside, inside, blocks))
    return found


def _checked(state: Mapping[str, Tensor], table: str, first: str, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Their state with the patches' matrix as one, and without the positions, which must be the fixed ones."""
    left = dict(state)
    found = left.pop(table, None)
    if found is not None:
        count = arguments["shape"][1] // arguments["patch"]
        fixed = positions(count, count, arguments["width"])
        same = found.numel() == fixed.numel() and torch.allclose(found.reshape(fixed.shape).to(fixed), fixed, atol=1e-5)
        _need(table, tuple(found.shape), same, "the fixed sines and cosines of the patches' places")
    if first in left:
        left[first] = left[first].flatten(1)
    return left


def _merge(state: dict[str, Tensor], name: str, depth: int) -> None:
    """Replace the blocks' copies of an embedder's tensor by one, at its own name."""
    keys = [f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(depth)]
    copies = [state.pop(key) for key in keys if key in state]
    if not copies:
        return
    for key, copy in zip(keys, copies, strict=False):
        same = len(copies) == depth and torch.equal(copy, copies[0])
        _need(key, tuple(copy.shape), same, "the same values in every block, a DiT has one embedder")
    state[name] = copies[0]


def _swapped(first: Tensor) -> Tensor:
    """The columns for [cos, sin] of a matrix for [sin, cos], and the reverse."""
    return first.roll(first.shape[1] // 2, dims=1)


def _need(key: str, value: Any, ok: Any, need: str) -> None:
    if not ok:
        raise CheckpointError(f"{key}={value}: need {need}")
