"""The U-Net as diffusers' UNet2DModel: the same function, under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange.renaming import layers, renamed, skeleton, tensors, with_null
from denoiselab.models import ADM, DDPM, UNet
from denoiselab.models.unet_blocks import Attention

BLOCK = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "modulation": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
}
ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}
FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of an attention's matrices in older files."""

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""What a configuration means where it leaves a key out."""

NEEDED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
"""The values that can be followed exactly, of keys that can have others."""


def to_diffusers(net: UNet, c_noise: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state) of a UNet2DModel whose sample at timestep n is net(x, c_noise[n]).

    If the network's features are those of DDPM or ADM and c_noise is the table that they count in, they are the
    model's own (time_embedding_type "positional"). Else it gets a table of features ("learned"), whose row n is what
    the network's embedding makes of c_noise[n]; such a model takes whole timesteps only.

    The null class is the last of the class embeddings. A network that enlarges an image becomes a model that takes
    it, enlarged, as further channels of its input.

    Args:
        net: of any device and dtype.
        c_noise: log(sigma/alpha)/4 at the T indices, (T,); None for the table of the network's embedding.

    Raises:
        CheckpointError: UNet2DModel cannot be what an option of the network made it.
    """
    condition, widths = net.condition, net.widths
    block: Any = net.middle[0]
    norm, first = block.norm_1, net.first.weight
    if condition.vector is not None:
        raise CheckpointError(f"vector={condition.vector.in_features}: need 0, UNet2DModel has labels only")
    if condition.channels != widths[0]:
        raise CheckpointError(
            f"multipliers[0]={widths[0] / condition.channels:g}: need 1, UNet2DModel's first level is as wide as the "
            "features of the noise level"
        )
    residual = net.resample == "residual"
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": net.shape[1],
        "in_channels": net.first.in_channels,
        "out_channels": net.last[2].out_channels,
        "down_block_types": ["AttnDownBlock2D" if attends else down for attends in net.attends],
        "up_block_types": ["AttnUpBlock2D" if attends else up for attends in reversed(net.attends)],
        "block_out_channels": list(widths),
        "layers_per_block": net.blocks,
        "downsample_padding": 0 if net.resample == "conv_after" else 1,
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "dropout": block.dropout.p,
        "attention_head_dim": _head_dim(net),
        "norm_num_groups": norm.num_groups,
        "attn_norm_num_groups": norm.num_groups,
        "norm_eps": norm.eps,
        "resnet_time_scale_shift": "scale_shift" if block.scale_shift else "default",
        "num_class_embeds": condition.num_classes + 1 if condition.num_classes else None,
    }
    ours, state = net.state_dict(), {}
    for name, theirs in _names(net).items():
        for key, tensor in zip(theirs, ours[name].chunk(len(theirs)), strict=True):
            state[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    features = _positional(condition.embedding, c_noise)
    if features is None:
        if c_noise is None:
            embedding = type(condition.embedding).__name__
            raise CheckpointError(f"embedding={embedding}: need c_noise, the noise levels of the timesteps")
        features = {"time_embedding_type": "learned", "num_train_timesteps": len(c_noise)}
        table = condition.embedding(c_noise.to(first.device), condition.channels)
        state["time_proj.weight"] = table.to(first.dtype)
    return {**config, **features}, state


def from_diffusers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], null_class: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(arguments, state) of the U-Net that is a UNet2DModel; the inverse of to_diffusers.

    ``arguments`` are UNet's, with "embedding" the name of the convention that its timesteps were told by, "ddpm" or
    "adm". What ``in_channels`` has beyond ``out_channels`` is taken for an image that is to be enlarged. Sines and
    cosines in another order than the convention's become columns of the first matrix in another order, and a middle
    without attention one whose attention adds nothing.

    Args:
        config: as in its config.json; keys that are left out have UNet2DModel's defaults.
        state: its weights.
        null_class: the last of the class embeddings is that of no label. Else each is a label's, and no label gets a
            row of zeros, which was never trained.

    Raises:
        CheckpointError: the U-Net cannot be that model, or the weights are not of that configuration.
    """
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise CheckpointError(f"_class_name={config['_class_name']}: need UNet2DModel")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in given.items():
        _need(key, value, key in DEFAULTS, "a key of UNet2DModel that is known here")
    config = {**DEFAULTS, **given}
    for key, values in NEEDED.items():
        _need(key, config[key], config[key] in values, " or ".join(map(str, values)))

    side, widths, classes = config["sample_size"], list(config["block_out_channels"]), config["num_class_embeds"]
    if isinstance(side, (list, tuple)) and len(set(side)) == 1:
        side = side[0]
    _need("sample_size", side, _whole(side), "the side of square images")
    _need("block_out_channels", widths, widths and all(map(_whole, widths)), "whole numbers > 0")
    fit = classes is None or classes > null_class
    _need("num_class_embeds", classes, fit, "at least one class" + " beside the null class" * null_class)
    width = config["time_embedding_dim"]
    _need("time_embedding_dim", width, width in (None, 4 * widths[0]), f"{4 * widths[0]}, four times the first width")
    image, outputs = config["in_channels"], config["out_channels"]
    _need("in_channels", image, _whole(image), "a whole number > 0")
    _need("out_channels", outputs, _whole(outputs), "a whole number > 0")
    low_res = image - outputs if image > outputs else 0
    _need("out_channels", outputs, outputs % (image - low_res) == 0, f"a multiple of in_channels={image}, or fewer")
    groups, middle = config["norm_num_groups"], config["attn_norm_num_groups"]
    if middle is None and config["resnet_time_scale_shift"] == "default":
        middle = groups
    _need("attn_norm_num_groups", middle, middle == groups or not config["add_attention"], f"{groups}, norm_num_groups")
    attends, dim = _attends(config), config["attention_head_dim"]
    fit = _whole(dim) and all(w % dim == 0 for w, has in zip(widths, [*attends[:-1], True], strict=True) if has)
    _need(
        "attention_head_dim",
        dim,
        fit or dim is None,
        f"a divisor of the widths with attention, among them {widths[-1]}",
    )

    arguments = {
        "shape": [image - low_res, side, side],
        "num_classes": classes - null_class if classes else 0,
        "low_res": low_res,
        "embedding": "ddpm" if config["freq_shift"] else "adm",
        "channels": widths[0],
        "multipliers": [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths],
        "blocks": config["layers_per_block"],
        "attention": [side // 2**level for level, has in enumerate(attends) if has],
        "head_channels": dim,
        "resample": _resample(config),
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
        "groups": groups,
        "eps": config["norm_eps"],
        "dropout": config["dropout"],
        "outputs": outputs // (image - low_res),
    }
    net = skeleton(arguments)
    state = {_present(key): tensor for key, tensor in state.items()}
    if classes and not null_class and "class_embedding.weight" in state:
        state["class_embedding.weight"] = with_null(state["class_embedding.weight"])
    if not config["add_attention"]:
        state.update(_no_attention("mid_block.attentions.0", widths[-1]))
    found = renamed(net, _names(net), state)
    if config["flip_sin_to_cos"] == bool(config["freq_shift"]):
        first = found["condition.mlp.0.weight"]
        found["condition.mlp.0.weight"] = first.roll(first.shape[1] // 2, dims=1)
    return arguments, found


def _names(net: UNet) -> dict[str, tuple[str, ...]]:
    """Our tensors, and those of a UNet2DModel that are stacked in each."""
    modules: dict[str, tuple[str, ...]] = {
        "condition.mlp.0": ("time_embedding.linear_1",),
        "condition.mlp.2": ("time_embedding.linear_2",),
        "condition.label": ("class_embedding",),
        "first": ("conv_in",),
        "last.0": ("conv_norm_out",),
        "last.2": ("conv_out",),
    }

    def add(ours: str, block: str, attention: str) -> None:
        modules.update({f"{ours}.{name}": (f"{block}.{theirs}",) for name, theirs in BLOCK.items()})
        for name, theirs in ATTENTION.items():
            modules[f"{ours}.attention.{name}"] = tuple(f"{attention}.{each}" for each in theirs)

    for part, ours, level, place in layers(net):
        level = f"{part}_blocks.{level}"
        if place is None:
            modules[f"{ours}.conv"] = (f"{level}.{part}samplers.0.conv",)
            add(ours, f"{level}.{part}samplers.0", "")
        else:
            add(ours, f"{level}.resnets.{place}", f"{level}.attentions.{place}")
    for place in (0, 1):
        add(f"middle.{place}", f"mid_block.resnets.{place}", f"mid_block.attentions.{place}")
    return tensors(net, modules)


def _present(key: str) -> str:
    """Today's name of a tensor."""
    module, _, tensor = key.rpartition(".")
    block, _, matrix = module.rpartition(".")
    return f"{block}.{FORMER.get(matrix, matrix)}.{tensor}" if ".attentions." in key else key


def _positional(embedding: Any, c_noise: Tensor | None) -> dict[str, Any] | None:
    """The sinusoids of UNet2DModel that are an embedding of the indices of c_noise, if any are."""
    if not isinstance(embedding, (DDPM, ADM)):
        return None
    if c_noise is not None:
        index = embedding.index(c_noise)
        if not torch.equal(index, torch.arange(len(index), device=index.device).to(index)):
            return None
    ddpm = isinstance(embedding, DDPM)
    return {"time_embedding_type": "positional", "freq_shift": int(ddpm), "flip_sin_to_cos": not ddpm}


def _head_dim(net: UNet) -> int | None:
    """Channels per head in every attention; None for one head in each."""
    attentions = [module for module in net.modules() if isinstance(module, Attention)]
    heads, dims = ({getattr(a, name) for a in attentions} for name in ("heads", "head_channels"))
    if heads != {1} and len(dims) > 1:
        raise CheckpointError(f"heads={max(heads)}: need 1 or head_channels, UNet2DModel's heads are of one width")
    return None if heads == {1} else dims.pop()


def _attends(config: Mapping[str, Any]) -> list[bool]:
    """Which levels have attention."""
    found = {}
    for key, names in (("down_block_types", DOWN), ("up_block_types", UP)):
        kinds = [kind.removeprefix("UNetRes") for kind in config[key]]
        _need(key, list(config[key]), all(kind in names for kind in kinds), f"{', '.join(names)} only")
        _need(
            key, list(config[key]), len(kinds) == len(config["block_out_channels"]), "one for each block_out_channels"
        )
        found[key] = [kind == names[0] for kind in kinds]
    down, up = found["down_block_types"], found["up_block_types"][::-1]
    _need("up_block_types", list(config["up_block_types"]), down == up, "attention at the levels of down_block_types")
    return down


DOWN = ("AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D")
UP = ("AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D")


def _resample(config: Mapping[str, Any]) -> str:
    """How the side changes, the same at all levels."""
    found = set()
    for key, names, way in (
        ("down_block_types", DOWN, "downsample_type"),
        ("up_block_types", UP, "upsample_type"),
    ):
        of = {names[0]: config[way] or "conv", names[1]: "conv", names[2]: "resnet"}
        found |= {of[kind.removeprefix("UNetRes")] for kind in config[key][:-1]}  # the last keeps its side
        _need(way, config[way], len(found) < 2 and found <= {"conv", "resnet"}, "conv at all levels, or resnet at all")
    if found == {"resnet"}:
        return "residual"
    padding = config["downsample_padding"]
    _need("downsample_padding", padding, padding in (0, 1), "0 or 1")
    return "conv" if padding else "conv_after"


def _no_attention(prefix: str, channels: int) -> dict[str, Tensor]:
    """An attention that adds nothing, and can learn."""
    one, zero = torch.eye(channels), torch.zeros(channels, channels)
    weights = {"group_norm": torch.ones(channels), "to_q": one, "to_k": one, "to_v": one, "to_out.0": zero}
    return {
        **{f"{prefix}.{name}.weight": weight for name, weight in weights.items()},
        **{f"{prefix}.{name}.bias": torch.zeros(channels) for name in weights},
    }


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _need(key: str, value: Any, ok: Any, need: str) -> None:
    if not ok:
        raise CheckpointError(f"{key}={value}: need {need}")
