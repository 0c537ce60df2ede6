"""The DiT: its mathematics written out a second time, its published sizes and initialisation, and its switches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from denoiselab.errors import UserError
from denoiselab.models import DiT
from denoiselab.models.dit import positions
from exact import make, normals
from networks import build, node, perturbed

SWITCHES = ("qk_norm", "rope", "swiglu", "rms_norm")
EACH = [{}, *({switch: True} for switch in SWITCHES), dict.fromkeys(SWITCHES, True)]
SMALL = {"width": 16, "depth": 2, "heads": 2}

PUBLISHED = {
    "s_2": (33, 6.06),
    "s_4": (33, 1.41),
    "s_8": (33, 0.36),
    "b_2": (130, 23.01),
    "b_4": (130, 5.56),
    "b_8": (131, 1.42),
    "l_2": (458, 80.71),
    "l_4": (458, 19.70),
    "l_8": (459, 5.01),
    "xl_2": (675, 118.64),
    "xl_4": (675, 29.05),
    "xl_8": (676, 7.39),
}
"""Millions of parameters and 10^9 multiply-adds (arXiv:2212.09748, table 4)."""

NAMES = pytest.mark.parametrize("name", PUBLISHED)


def of_size(name: str) -> DiT:
    with torch.device("meta"):
        net = build(f"dit_{name}", (4, 32, 32), small=False, num_classes=1000, outputs=2)
    assert isinstance(net, DiT)
    return net


def small(shape: tuple[int, ...] = (2, 4, 8), num_classes: int = 3, **arguments) -> DiT:
    """Rectangular, in float64, with nothing left at zero."""
    torch.manual_seed(0)
    net = perturbed(DiT(shape, num_classes, **{**SMALL, **arguments}), 0.2)
    assert isinstance(net, DiT)
    return net


def inputs(net: DiT, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return normals(n, *net.shape), torch.linspace(-1, 1, n, dtype=torch.float64), torch.arange(n) % 4 - 1


# Published sizes


@NAMES
def test_parameters_are_the_published_number(name):
    """In millions, with the null class's row of the table as published."""
    assert round(sum(p.numel() for p in of_size(name).parameters()) / 1e6) == PUBLISHED[name][0]


@NAMES
def test_multiply_adds_are_the_published_number(name):
    """Products alone are within 0.0065 of the printed 10^9, once the norms count one operation per value; they are
    exactly those of the layers, counted by hand."""
    net = of_size(name)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long))
    options = node(f"dit_{name}")
    width, depth, patch = options["width"], options["depth"], options["patch"]
    tokens = (32 // patch) ** 2
    block = 12 * width**2 * tokens + 2 * tokens**2 * width + 6 * width**2
    ends = (4 + 8) * patch**2 * width * tokens + (256 + width) * width + 2 * width**2
    assert counter.get_total_flops() / 2 == depth * block + ends
    norms = (2 * depth + 1) * tokens * width
    assert abs((depth * block + ends + norms) / 1e9 - PUBLISHED[name][1]) < 0.0065


# The network, a second time


def written_out(net: DiT, x: Tensor, c_noise: Tensor, label: Tensor, switches: dict[str, bool]) -> Tensor:
    """The output by loops over patches, with complex numbers for rotations and a softmax written out."""
    w = {**net.state_dict()}
    rows, columns, p = x.shape[2] // net.patch, x.shape[3] // net.patch, net.patch
    places = [(row, column) for row in range(rows) for column in range(columns)]
    width, head = w["first.bias"].numel(), w["first.bias"].numel() // net.heads

    def linear(name: str, h: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", h, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def norm(h: Tensor, eps: float) -> Tensor:
        h = h if switches.get("rms_norm") else h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + eps).sqrt()

    def turned(h: Tensor) -> Tensor:
        quarter = head // 4
        pairs = torch.complex(h[..., : head // 2], h[..., head // 2 :])  # (B, N, head/2)
        angles = torch.tensor(
            [[at * 10_000.0 ** (-i / quarter) for at in place for i in range(quarter)] for place in places],
            dtype=torch.float64,
        )
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    def attention(name: str, h: Tensor) -> Tensor:
        heads = []
        for i in range(net.heads):
            q, k, v = (part[..., i * head : (i + 1) * head] for part in linear(f"{name}.qkv", h).chunk(3, -1))
            if switches.get("qk_norm"):
                q, k = (
                    y * w[f"{name}.{kind}_norm.weight"] / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                    for y, kind in ((q, "q"), (k, "k"))
                )
            if switches.get("rope"):
                q, k = turned(q), turned(k)
            heads.append((q @ k.mT / head**0.5).softmax(-1) @ v)
        return linear(f"{name}.out", torch.cat(heads, -1))

    def mlp(name: str, h: Tensor) -> Tensor:
        if switches.get("swiglu"):
            a, b = linear(f"{name}.first", h).chunk(2, -1)
            return linear(f"{name}.last", a * a.sigmoid() * b)
        h = linear(f"{name}.0", h)
        return linear(f"{name}.2", h / 2 * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh()))

    condition = net.condition(c_noise, label)
    condition = condition * condition.sigmoid()
    h = torch.stack([linear("first", x[:, :, r * p : r * p + p, c * p : c * p + p].flatten(1)) for r, c in places], 1)
    h = h + positions(rows, columns, width).double()
    for i in range(len(net.blocks)):
        changes = linear(f"blocks.{i}.modulation", condition)[:, None].chunk(6, -1)
        for branch, (shift, scale, gate), eps in (
            (attention, changes[:3], 1e-6),
            (mlp, changes[3:], net.mlp_eps),
        ):
            name = f"blocks.{i}.{branch.__name__}"
            h = h + gate * branch(name, norm(h, eps) * (1 + scale) + shift)
    shift, scale = linear("modulation", condition)[:, None].chunk(2, -1)
    tokens = linear("last", norm(h, 1e-6) * (1 + scale) + shift)
    y = torch.zeros(len(x), tokens.shape[2] // p**2, *x.shape[2:], dtype=x.dtype)
    for token, (r, c) in enumerate(places):
        patch = tokens[:, token].view(len(x), p, p, -1).permute(0, 3, 1, 2)  # channels are the fastest
        y[:, :, r * p : r * p + p, c * p : c * p + p] = patch
    return y


@pytest.mark.parametrize("switches", EACH, ids=lambda switches: "+".join(switches) or "plain")
@pytest.mark.parametrize("patch", [1, 2])
def test_the_network_is_what_its_formulas_say(switches, patch):
    """mlp_eps large, so that a norm that had another's would be seen."""
    net = small(patch=patch, outputs=2, mlp_eps=0.1, **switches)
    asked = inputs(net)
    with torch.no_grad():
        torch.testing.assert_close(net(*asked), written_out(net, *asked, switches), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns", "width"), [(4, 4, 16), (1, 3, 8), (3, 5, 32), (16, 16, 384)])
def test_positions_in_closed_form(rows, columns, width):
    """Columns first, then rows; of each, sines and then cosines."""
    found, quarter = positions(rows, columns, width), width // 4
    for row in range(rows):
        for column in range(columns):
            angles = [[at * 10_000 ** (-i / quarter) for i in range(quarter)] for at in (column, row)]
            expected = [f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis]
            assert found[row * columns + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_are_those_of_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    for side, width in ((16, 384), (4, 96), (2, 1152)):
        theirs = embeddings.get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()
        assert torch.equal(positions(side, side, width), theirs)


def test_rotations_leave_differences_of_rows_and_of_columns():
    """A score of two features is that of two patches as far apart, and lengths stay."""
    rotary = small((1, 8, 12), heads=1, rope=True).rotary
    assert rotary is not None
    q, k = (normals(16, seed=seed).expand(1, 1, 24, 16) for seed in (1, 2))
    scores = (rotary(q) @ rotary(k).mT)[0, 0].view(4, 6, 4, 6)
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(rotary(q).norm(dim=-1), q.norm(dim=-1), rtol=1e-12, atol=1e-12)
    moved = (scores[0, 0] - scores[0, 0, 0, 0]).abs()
    assert moved[1:, 0].min() > 1e-3
    assert moved[0, 1:].min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotations_are_computed_in_full_whatever_the_weights(dtype):
    """Angles rounded to bfloat16 would be others."""
    net = small(rope=True).to(dtype)
    assert net.rotary is not None
    assert net.rotary.cos.dtype == torch.float64
    q = normals(1, 2, 8, 8).to(dtype)
    expected = net.rotary(q.double())
    torch.testing.assert_close(
        net.rotary(q), expected.to(dtype), rtol=8e-3 if dtype == torch.bfloat16 else 0, atol=1e-3
    )


def test_without_positions_patches_have_no_order():
    net = small((2, 4, 4))
    x, c_noise, label = inputs(net)
    swapped = x.roll(2, dims=3)
    with torch.no_grad():
        assert (net(swapped, c_noise, label) - net(x, c_noise, label).roll(2, dims=3)).abs().max() > 1e-3
        net.positions.zero_()
        torch.testing.assert_close(net(swapped, c_noise, label), net(x, c_noise, label).roll(2, dims=3))


# Initialisation


@pytest.mark.parametrize("switches", EACH, ids=lambda switches: "+".join(switches) or "plain")
def test_a_new_block_is_the_identity(switches):
    net = DiT((2, 4, 8), 3, **SMALL, **switches)
    h, condition = torch.randn(2, 8, 16), torch.randn(2, 16)
    assert len(net.units) == 2
    for block in net.units:
        assert torch.equal(block(h, condition, net.rotary), h)


@pytest.mark.parametrize("swiglu", [False, True])
def test_initialisation_is_the_published_one(swiglu):
    """Uniform within sqrt(6/(in + out)), the label table and the noise level's MLP with standard deviation 0.02, zero
    biases, and zeros where blocks and output start."""
    torch.manual_seed(0)
    net = DiT((4, 8, 8), 100, vector=3, width=128, depth=2, heads=2, swiglu=swiglu)
    seen = {"zero": 0, "normal": 0, "uniform": 0}
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        weight = module.weight.detach()
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
        if name.endswith("modulation") or name == "last":
            kind = "zero"
            assert not weight.any(), name
        elif name.startswith(("condition.mlp", "condition.label")):
            kind = "normal"
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert weight.abs().max() > 0.06, name
        else:
            kind, bound = "uniform", math.sqrt(6 / sum(weight.shape))
            assert weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        seen[kind] += 1
    assert seen == {"zero": 4, "normal": 3, "uniform": 2 + 2 * 4}


def test_swiglu_has_as_many_parameters():
    """But for biases: three matrices of 2/3 of the hidden width are two of all of it."""
    counts = []
    for swiglu in (False, True):
        net = DiT((4, 8, 8), width=384, depth=1, heads=6, swiglu=swiglu)
        counts.append(sum(p.numel() for p in net.blocks[0].mlp.parameters() if p.ndim == 2))
    assert counts[0] == counts[1] == 8 * 384**2


# What it is given, and what it returns


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_outputs_are_stacked_along_the_channels(outputs):
    """Each chunk is a tensor like x: what the last layer says of a channel is in that channel's pixels alone."""
    net = small((2, 4, 8), outputs=outputs)
    nn.init.zeros_(net.last.weight)
    with torch.no_grad():
        net.last.bias.copy_(torch.arange(2 * outputs).repeat(4))
        chunks = net(*inputs(net)).chunk(outputs, 1)
    for i, chunk in enumerate(chunks):
        expected = torch.tensor([2.0 * i, 2.0 * i + 1]).double().view(1, 2, 1, 1).expand(4, 2, 4, 8)
        assert torch.equal(chunk, expected)


def test_a_smaller_image_is_enlarged_bilinearly_beside_x():
    net = small((2, 4, 8), low_res=3)
    asked, image = inputs(net), normals(4, 3, 2, 4, seed=5)
    enlarged = F.interpolate(image, (4, 8), mode="bilinear")
    with torch.no_grad():
        assert torch.equal(net(*asked, low_res=image), net(*asked, low_res=enlarged))
        assert (net(*asked, low_res=image) - net(*asked, low_res=-image)).abs().max() > 1e-3
    assert net.first.in_features == (2 + 3) * 4


def test_a_free_vector_conditions_and_nan_is_none():
    net = small(vector=2)
    asked, vector = inputs(net), normals(4, 2, seed=5)
    with torch.no_grad():
        assert (net(*asked, vector=vector) - net(*asked)).flatten(1).abs().max(1).values.min() > 1e-3
        torch.testing.assert_close(net(*asked, vector=torch.full((4, 2), math.nan)), net(*asked))


@pytest.mark.parametrize("switches", EACH[:1] + EACH[-1:], ids=["plain", "all"])
def test_autocast_rounds_products_and_nothing_else(switches):
    """The answer is near float32's, and a scale far below bfloat16's 2^-8 around 1 still acts."""
    net = small(width=64, **switches).float()
    x, c_noise, label = (value.float() if value.is_floating_point() else value for value in inputs(net))
    with torch.no_grad():
        expected = net(x, c_noise, label)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x, c_noise, label).float()
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        for layer in (net.modulation, *(block.modulation for block in net.blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        seen = []
        handle = net.last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        for scale in (0.0, 2.0**-11):
            net.modulation.bias[64:] = scale
            with torch.autocast("cpu", torch.bfloat16):  # which keeps copies of weights while it lasts
                net(x, c_noise, label)
        handle.remove()
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[1], seen[0] * (1 + 2.0**-11), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"shape": (2,)}, "shape=(2,)"),
        ({"shape": (1, 9, 8)}, "patch=2"),
        ({"shape": (1, 8, 9)}, "patch=2"),
        ({"patch": 0}, "patch=0"),
        ({"patch": 3}, "patch=3"),
        ({"width": 98}, "width=98"),
        ({"width": 0}, "width=0"),
        ({"depth": 0}, "depth=0"),
        ({"heads": 5}, "heads=5"),
        ({"heads": 0}, "heads=0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"mlp_ratio": math.nan}, "mlp_ratio=nan"),
        ({"mlp_eps": 0}, "mlp_eps=0"),
        ({"rope": True, "heads": 16}, "rope=True"),
    ],
)
def test_bad_options_are_refused_in_a_line(bad, named):
    with pytest.raises(UserError) as refused:
        make("model", "dit_digits", **{"shape": (1, 8, 8), "num_classes": 3, **bad})
    line = str(refused.value)
    assert line.startswith(f"model.{named}: need ")
    assert "\n" not in line
