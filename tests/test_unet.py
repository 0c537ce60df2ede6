"""The U-Net's options; what all networks have in common is in test_networks.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.errors import UserError
from denoiselab.models import UNet
from denoiselab.models.unet import RESAMPLING
from denoiselab.models.unet_blocks import Attention, Block
from exact import normals
from networks import build

C_NOISE = torch.tensor([-2.0, 0.1, 2.0], dtype=torch.float64)


def small(side: int = 8, **arguments) -> UNet:
    """In float64 and evaluation mode, with nothing left at zero."""
    torch.manual_seed(0)
    given = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "groups": 4, **arguments}
    net = UNet((1, side, side), **given).double().eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# The presets


@pytest.mark.parametrize(
    ("model", "side", "shared", "millions", "exactly"),
    [
        ("unet_cifar10", 32, {}, "35.7", 35_746_307),
        ("unet_adm64", 64, {"num_classes": 1000, "outputs": 2}, "296", 295_904_454),
        ("unet_adm256", 256, {"num_classes": 1000, "outputs": 2}, "554", 553_838_086),
        ("unet_sr64_256", 256, {"num_classes": 1000, "low_res": 3, "outputs": 2}, "312", 311_795_910),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(model, side, shared, millions, exactly):
    """DDPM's as its authors and diffusers count them, ADM's as OpenAI's code makes them; these have no null class,
    which is a row of 4 x channels."""
    with torch.device("meta"):
        net = build(model, (3, side, side), small=False, **{"num_classes": 0, **shared})
    null = 4 * net.condition.channels if net.condition.num_classes else 0
    assert count(net) - null == exactly
    assert f"{exactly / 1e6:.{len(millions.partition('.')[2])}f}" == millions


def test_the_digits_preset_is_for_three_sizes():
    """Attention at a side of 4 is beyond the levels of larger images; the middle has it at all of them."""
    nets = [build("unet_digits", (1, side, side), small=False, num_classes=10) for side in (8, 16, 32)]
    assert [count(net) for net in nets] == [756_417, 706_113, 706_113]
    assert [sum(isinstance(m, Attention) for m in net.modules()) for net in nets] == [4, 1, 1]


# Where things are


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("sides", "at"), [([], []), ([8], [8]), ([16], [16]), ([4, 16, 64], [4, 16]), ([2], [])])
def test_attention_follows_the_blocks_at_its_sides_and_is_in_the_middle(blocks, sides, at):
    """``blocks`` times on the way down and once more on the way up."""
    net, seen = small(16, multipliers=[1, 1, 2], blocks=blocks, attention=sides), []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    with torch.no_grad():
        net(normals(1, 1, 16, 16), C_NOISE[:1])
    down = [side for side in (16, 8, 4) if side in at for _ in range(blocks)]
    up = [side for side in (4, 8, 16) if side in at for _ in range(blocks + 1)]
    assert seen == [*down, 4, *up]


@pytest.mark.parametrize("resample", RESAMPLING)
def test_a_network_of_three_levels_block_by_block(resample):
    """The widths and sides that each layer gives, and what reaches each block from the way down."""
    net, given = small(16, channels=8, multipliers=[1, 2, 3], blocks=2, resample=resample), []
    for unit in net.units:
        unit.register_forward_hook(lambda _, args, out: given.append((args[0].shape[1], *out.shape[1:3])))
    with torch.no_grad():
        assert net(normals(2, 1, 16, 16), C_NOISE[:2]).shape == (2, 1, 16, 16)
    down = [(8, 8, 16), (8, 8, 16), (8, 8, 8), (8, 16, 8), (16, 16, 8), (16, 16, 4), (16, 24, 4), (24, 24, 4)]
    middle = [(24, 24, 4), (24, 24, 4)]
    skips = iter([24, 24, 16, 16, 16, 8, 8, 8, 8])
    up = [(24, 24, 4)] * 3 + [(24, 24, 8)] + [(24, 16, 8), (16, 16, 8), (16, 16, 8)] + [(16, 16, 16)]
    up += [(16, 8, 16), (8, 8, 16), (8, 8, 16)]
    up = [(c if i in (3, 7) else c + next(skips), *rest) for i, (c, *rest) in enumerate(up)]
    assert given == [*down, *middle, *up]


def test_units_hold_all_but_the_ends_and_the_conditions():
    net = small()
    rest = [*net.condition.parameters(), *net.first.parameters(), *net.last.parameters()]
    inside = [p for unit in net.units for p in unit.parameters()]
    assert {id(p) for p in net.parameters()} == {id(p) for p in rest} | {id(p) for p in inside}
    assert len(rest) + len(inside) == len(list(net.parameters()))


@pytest.mark.parametrize("resample", RESAMPLING)
@pytest.mark.parametrize("multipliers", [[1], [1, 2], [1, 2, 2]])
def test_skips_carry_the_image_past_the_middle(multipliers, resample):
    """What the network says still depends on the image, pixel by pixel, where the middle says nothing; and on the
    middle, where the rest is the same."""
    net, x = small(multipliers=multipliers, resample=resample), normals(3, 1, 8, 8)
    with torch.no_grad():
        whole = net(x, C_NOISE)
        handle = net.middle[-1].register_forward_hook(lambda module, arguments, output: 0 * output)
        without, changed = net(x, C_NOISE), net(x + normals(3, 1, 8, 8, seed=9), C_NOISE)
        handle.remove()
    assert (whole - without).abs().max() > 1e-6
    assert ((changed - without).abs().flatten(1).mean(1) > 1e-3).all()


# What a layer computes


@pytest.mark.parametrize("factor", [0.5, 1, 2])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_block_written_out(scale_shift, factor):
    torch.manual_seed(0)
    block = Block(8, 12, width=6, groups=4, eps=1e-3, scale_shift=scale_shift, dropout=0.5, factor=factor).double()
    for parameter in block.eval().parameters():
        nn.init.normal_(parameter, std=0.3)
    x, embedding = normals(2, 8, 6, 6), normals(2, 6, seed=1)

    def norm(h: Tensor, layer: nn.GroupNorm) -> Tensor:
        grouped = h.unflatten(1, (4, -1))
        mean, var = grouped.mean((2, 3, 4), keepdim=True), grouped.var((2, 3, 4), keepdim=True, correction=0)
        weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
        return ((grouped - mean) / (var + 1e-3).sqrt()).flatten(1, 2) * weight + bias

    def resized(h: Tensor) -> Tensor:
        if factor == 2:
            return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return h if factor == 1 else h.unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5))

    def conv(h: Tensor, layer: nn.Conv2d) -> Tensor:
        columns = F.unfold(h, layer.kernel_size, padding=layer.padding)
        return (layer.weight.flatten(1) @ columns + layer.bias[:, None]).unflatten(2, h.shape[2:])

    def silu(h: Tensor) -> Tensor:
        return h / (1 + (-h).exp())

    with torch.no_grad():
        told = (embedding @ block.modulation.weight.T + block.modulation.bias)[:, :, None, None]
        h = conv(resized(silu(norm(x, block.norm_1))), block.conv_1)
        shift = 0 if scale_shift else told
        h = norm(h + shift, block.norm_2)
        h = h * (1 + told[:, :12]) + told[:, 12:] if scale_shift else h
        expected = conv(resized(x), block.shortcut) + conv(silu(h), block.conv_2)
        torch.testing.assert_close(block(x, embedding), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("options", "heads"), [({}, 1), ({"heads": 4}, 4), ({"head_channels": 16}, 2)])
def test_attention_is_pytorchs_multi_head_attention(options, heads):
    """Over all pixels, beside the input; PyTorch keeps queries, keys and values in the same order."""
    attention = small(multipliers=[2], **options).middle[0].attention
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    reference = nn.MultiheadAttention(32, heads, batch_first=True).double()
    weights = ("in_proj_weight", attention.qkv.weight), ("in_proj_bias", attention.qkv.bias)
    for name, value in (*weights, ("out_proj.weight", attention.out.weight), ("out_proj.bias", attention.out.bias)):
        reference.get_parameter(name).data.copy_(value)
    h = normals(3, 32, 8, 8)
    tokens = attention.norm(h).flatten(2).transpose(1, 2)
    expected = h + reference(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view_as(h)
    with torch.no_grad():
        torch.testing.assert_close(attention(h), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("resample", "first"), [("conv", -1), ("conv_after", 0)])
def test_the_strided_convolution_begins_at_the_pixel_of_its_convention(resample, first):
    """Output pixel i sees rows first + 2i to first + 2i + 2: zeros go to both sides, or below and to the right only."""
    layer = next(unit for unit in small(resample=resample).units if unit.factor == 0.5)
    x = normals(1, 16, 8, 8)
    framed = F.pad(x, (1, 1, 1, 1))  # pixel p is at p + 1
    with torch.no_grad():
        found = layer(x, None)
        for i, j in ((0, 0), (0, 3), (3, 0), (2, 1)):
            top, left = first + 2 * i + 1, first + 2 * j + 1
            window = framed[0, :, top : top + 3, left : left + 3]
            expected = (layer.conv.weight * window).sum((1, 2, 3)) + layer.conv.bias
            torch.testing.assert_close(found[0, :, i, j], expected, rtol=1e-10, atol=1e-10)


# Images to be enlarged


@pytest.mark.parametrize("side", [2, 4, 5, 8])
def test_an_image_is_enlarged_bilinearly_and_set_beside_x(side):
    net, low_res = small(low_res=2), normals(3, 2, side, side, seed=1)
    plain = small()
    plain.first = net.first
    plain.load_state_dict({**net.state_dict()})
    x, centres = normals(3, 1, 8, 8), ((torch.arange(8) + 0.5) * side / 8 - 0.5).clamp(0, side - 1).double()
    hats = (1 - (centres[:, None] - torch.arange(side)).abs()).clamp_min(0)  # (8, side): linear interpolation
    enlarged = hats @ low_res @ hats.T
    with torch.no_grad():
        found = net(x, C_NOISE, low_res=low_res)
        torch.testing.assert_close(found, plain(torch.cat([x, enlarged], 1), C_NOISE), rtol=1e-10, atol=1e-10)
        assert (net(x, C_NOISE, low_res=low_res + 0.1) - found).abs().flatten(1).max(1).values.min() > 1e-4


def test_an_image_to_be_enlarged_must_be_given():
    with pytest.raises(AssertionError, match="needs low_res"):
        small(low_res=1)(normals(1, 1, 8, 8), C_NOISE[:1])


# What is refused


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"shape": (1, 8, 16)}, "shape=(1, 8, 16)"),
        ({"shape": (2,)}, "shape=(2,)"),
        ({"shape": (1, 9, 9)}, "multipliers=[1, 2]"),
        ({"multipliers": [1, 1, 1, 1, 1]}, "multipliers=[1, 1, 1, 1, 1]"),
        ({"multipliers": []}, "multipliers=[]"),
        ({"multipliers": [0]}, "multipliers=[0]"),
        ({"multipliers": [-1]}, "multipliers=[-1]"),
        ({"multipliers": [1.3]}, "multipliers=[1.3]"),
        ({"multipliers": [math.nan]}, "multipliers=[nan]"),
        ({"channels": 36}, "channels=36"),
        ({"channels": 0}, "channels=0"),
        ({"channels": 33}, "channels=33"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 7}, "channels=32"),
        ({"blocks": 0}, "blocks=0"),
        ({"attention": [5]}, "attention=[5]"),
        ({"attention": [0]}, "attention=[0]"),
        ({"resample": "pool"}, "resample=pool"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"head_channels": 24}, "head_channels=24"),
        ({"head_channels": 0}, "head_channels=0"),
        ({"head_channels": -32}, "head_channels=-32"),
        ({"head_channels": None, "heads": 0}, "heads=0"),
        ({"head_channels": None, "heads": 3}, "heads=3"),
        ({"heads": 2}, "heads=2"),
    ],
)
def test_bad_options_are_refused_in_a_line(bad, named):
    with pytest.raises(UserError) as refused, torch.device("meta"):
        build("unet_digits", **{"shape": (1, 8, 8), "small": False, **bad})
    line = str(refused.value)
    assert line.startswith(f"model.{named}: ")
    assert "need" in line
    assert "\n" not in line


@pytest.mark.parametrize("multipliers", [[1.5], [0.5, 1, 1.25]])
def test_widths_may_be_fractions_of_channels(multipliers):
    net = small(multipliers=multipliers)
    assert net.first.out_channels == 16 * multipliers[0]
    assert net.middle[0].conv_1.in_channels == 16 * multipliers[-1]
    assert net.condition.channels == 16
