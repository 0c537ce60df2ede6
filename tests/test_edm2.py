"""EDM2's U-Net: its formulas by a second implementation, magnitudes, and weights that keep their length."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from denoiselab.checks import check_used
from denoiselab.compose import compose
from denoiselab.ema import EMA
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.models import EDM2, edm2
from exact import make, normals
from networks import build, inputs, node, perturbed
from runs import differences, last

SHAPE = (1, 8, 8)


def small(**more) -> EDM2:
    """Two levels with attention at the second, float64, its output's gain 1."""
    sizes = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4], "head_channels": 8}
    torch.manual_seed(0)
    net = EDM2(SHAPE, **{"num_classes": 3, **sizes, **more}).double()
    net.gain.data.fill_(1.0)
    return net


def products(net: nn.Module) -> dict[str, nn.Module]:
    """Its layers with normalised weights, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, edm2._Product | edm2._Labels)}


def lengths(net: nn.Module) -> Tensor:
    """|w|^2 over the number of weights, of every output channel of every layer."""
    return torch.cat([m.weight.square().mean(tuple(m.inputs)).flatten() for m in products(net).values()]).detach()


# The formulas


def reference(state: dict[str, Tensor], x: Tensor, c_noise: Tensor, label: Tensor, head: int = 8) -> Tensor:
    """small() written out in other operations, from the paper: appendix B, table 6 and figure 21."""

    def silu(h: Tensor) -> Tensor:
        return h / (1 + (-h).exp()) / 0.596

    def dense(name: str, h: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = state[f"{name}.weight"]
        return gain * h @ (w / w.square().sum(1, keepdim=True).sqrt()).T

    def conv(name: str, h: Tensor) -> Tensor:
        w = state[f"{name}.weight"]
        kernel = (w / w.square().sum((1, 2, 3), keepdim=True).sqrt()).flatten(1)
        patches = nn.functional.unfold(h, w.shape[-1], padding=w.shape[-1] // 2)
        return torch.einsum("oi,bip->bop", kernel, patches).unflatten(2, h.shape[2:])

    def mix(a: Tensor, b: Tensor, t: float) -> Tensor:
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    def cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
        n_a, n_b = a.shape[1], b.shape[1]
        c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
        return torch.cat([c * (1 - t) / math.sqrt(n_a) * a, c * t / math.sqrt(n_b) * b], 1)

    def attend(name: str, h: Tensor) -> Tensor:
        b, c, side, _ = h.shape
        q, k, v = conv(f"{name}.qkv", h).reshape(b, 3, c // head, head, side * side).unbind(1)  # (B, heads, head, N)
        q, k, v = (u / u.square().mean(2, keepdim=True).sqrt() for u in (q, k, v))
        scores = (torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(head)).exp()
        out = torch.einsum("bhij,bhcj->bhci", scores / scores.sum(3, keepdim=True), v)
        return mix(h, conv(f"{name}.out", out.reshape(h.shape)), 0.3)

    def block(name: str, h: Tensor, encodes: bool, attends: bool) -> Tensor:
        y = conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in state else h
        if encodes:
            y = h = y / y.square().mean(1, keepdim=True).sqrt()
        scale = 1 + dense(f"{name}.modulation", told, state[f"{name}.gain"])
        r = conv(f"{name}.second", silu(conv(f"{name}.first", silu(h)) * scale[:, :, None, None]))
        y = mix(y, r, 0.3)
        return attend(name, y) if attends else y

    fourier = [state[f"embedding.fourier.{name}"].double() for name in ("frequency", "phase")]
    features = math.sqrt(2) * torch.cos(2 * math.pi * (c_noise[:, None] * fourier[0] + fourier[1]))
    table = state["embedding.label.weight"]
    one_hot = nn.functional.one_hot(label % len(table), len(table)).double() * math.sqrt(len(table))
    labels = one_hot @ (table / table.square().sum(0).sqrt())
    told = silu(mix(dense("embedding.noise", features), labels, 0.5))

    h = conv("first", torch.cat([x, torch.ones_like(x)], 1))
    skips = [h]
    for i, (halve, attends) in enumerate([(False, False), (True, False), (False, True)]):
        h = h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)) if halve else h
        h = block(f"down.{i}", h, True, attends)
        skips.append(h)
    h = block("up.1", block("up.0", h, False, True), False, False)
    for i, (double, attends) in enumerate([(0, 1), (0, 1), (1, 0), (0, 0), (0, 0)], start=2):
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3) if double else cat(h, skips.pop())
        h = block(f"up.{i}", h, False, bool(attends))
    assert not skips
    return state["gain"] * conv("last", h)


def test_the_network_is_a_second_implementation_of_it():
    net = perturbed(small(), 0.3)
    x, c_noise, label, _ = inputs(net, SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(
            net(x, c_noise, label), reference(net.state_dict(), x, c_noise, label), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("n_a", "n_b"), [(4, 4), (2, 6), (9, 1)])
def test_shares_of_sums_and_concatenations(n_a, n_b):
    """Unit variance from unit variances; both sides of a concatenation carry the same, whatever their channels."""
    a, b = normals(50, n_a, 40, 40), normals(50, n_b, 40, 40, seed=1)
    whole = edm2.joined(a, b)
    assert whole.square().mean().item() == pytest.approx(1, abs=0.01)
    for side in (whole[:, :n_a], whole[:, n_a:]):
        assert side.square().sum().item() / whole.square().sum().item() == pytest.approx(0.5, abs=0.005)
    mixed = edm2.mixed(a[:, :1], b[:, :1])
    assert mixed.square().mean().item() == pytest.approx(1, abs=0.01)
    assert (mixed * b[:, :1]).mean().item() == pytest.approx(0.3 / math.sqrt(0.58), abs=0.01)


def test_silu_keeps_the_variance_of_a_normal():
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    assert torch.trapezoid(edm2.silu(z).square() * density, z).item() == pytest.approx(1, abs=2e-3)


def test_fourier_features_have_unit_variance_and_are_float32():
    features = edm2._Fourier(20_000)
    found = features(torch.tensor([-3.0, 0.0, 0.5]))
    assert found.square().mean(1) == pytest.approx(torch.ones(3), abs=0.02)
    low = copy.deepcopy(features).bfloat16()
    assert low.frequency.dtype == torch.float32
    assert torch.equal(low(torch.tensor([-3.0, 0.0, 0.5])), found)
    assert features.frequency.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("channels", "millions"), [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5)])
def test_parameters_are_the_published_ones(channels, millions):
    """EDM2-XS, S, M and L for ImageNet's 1,000 classes in latents of 64x64."""
    presets = {128: "edm2_xs", 192: "edm2_s"}
    with torch.device("meta"):
        net = EDM2((4, 64, 64), 1000, channels=channels)
        if channels in presets:
            assert node(presets[channels])["channels"] == channels
            net = build(presets[channels], (4, 64, 64), small=False, num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


# Magnitudes


def test_every_layer_keeps_the_variance_of_a_new_network(monkeypatch):
    """1 in the mean over networks, on images without borders; the outputs of blocks within a few per cent."""

    def around(x: Tensor, w: Tensor, padding: int) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, [padding] * 4, mode="circular"), w)

    fake = type("F", (), {**vars(nn.functional), "conv2d": staticmethod(around)})
    monkeypatch.setattr(edm2, "F", fake)
    found: dict[str, list[float]] = {}
    for seed in range(24):
        torch.manual_seed(seed)
        net = EDM2((3, 8, 8), 3, channels=48, multipliers=[1, 2], blocks=1, attention=[])
        net.gain.data.fill_(1.0)
        for name, module in net.named_modules():
            if isinstance(module, edm2._Product | edm2._Block) and "modulation" not in name:
                module.register_forward_hook(
                    lambda *io, name=name: found.setdefault(name, []).append(io[2].square().mean().item())
                )
        with torch.no_grad():
            net(torch.randn(4, 3, 8, 8), torch.randn(4), torch.tensor([0, 1, 2, -1]))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert len(means) == 38
    assert {name for name, value in means.items() if abs(value - 1) > 0.1} == set()
    blocks = {name: value for name, value in means.items() if name.count(".") == 1 and name[0] in "du"}
    assert {name for name, value in blocks.items() if abs(value - 1) > 0.05} == set()
    assert sum(means.values()) / len(means) == pytest.approx(1, abs=0.015)


def test_queries_keys_and_values_have_unit_entries(monkeypatch):
    """Whatever the activations are; so a score is the cosine times sqrt(channels of a head)."""
    seen, attend = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *qkv: seen.append(qkv) or attend(*qkv))
    net = small()
    x, c_noise, label, _ = inputs(net, SHAPE)
    net(30 * x, c_noise, label)
    assert len(seen) == 4
    for q, k, v in seen:
        for tensor in (q, k, v):
            assert tensor.shape == (4, 4, 16, 8)
            torch.testing.assert_close(tensor.square().mean(3), torch.ones(4, 4, 16).double(), rtol=1e-9, atol=1e-9)


# Weights


def test_output_channels_have_weights_of_unit_length():
    """What a layer does to unit vectors, one entry at a time, has squares that sum to 1 in every output channel."""
    torch.manual_seed(0)
    for side in (0, 1, 3):
        layer = edm2._Product(5, 7, side).double()
        layer.weight.data *= 3 * torch.rand(7, *[1] * (layer.weight.ndim - 1))
        entries = torch.eye(5).double() if not side else torch.eye(5 * side**2).double().view(-1, 5, side, side)
        middle = layer(entries) if not side else layer(entries)[:, :, side // 2, side // 2]
        torch.testing.assert_close(middle.square().sum(0), torch.ones(7).double(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(entries, 0.3), 0.3 * layer(entries), rtol=1e-12, atol=1e-12)


def test_gradients_are_orthogonal_to_weights():
    """Of each output channel; and the output does not depend on their lengths."""
    net = perturbed(small())
    x, c_noise, label, _ = inputs(net, SHAPE)
    y = net(x, c_noise, label)
    (y * normals(*y.shape, seed=4)).sum().backward()
    for name, layer in products(net).items():
        w, g = layer.weight.detach(), layer.weight.grad
        dot = (w * g).sum(tuple(layer.inputs))
        assert dot.abs().max() < 1e-12 * w.norm() * g.norm(), name
        layer.weight.data *= 0.1 + 5 * torch.rand(tuple(1 if d in layer.inputs else n for d, n in enumerate(w.shape)))
    with torch.no_grad():
        torch.testing.assert_close(net(x, c_noise, label), y, rtol=1e-9, atol=1e-9)


def test_training_calls_set_the_lengths_and_no_others_do():
    net = small().train()
    x, c_noise, label, _ = inputs(net, SHAPE)
    torch.testing.assert_close(lengths(net), torch.ones_like(lengths(net)), rtol=1e-6, atol=1e-6)  # a new network
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.3)
    net(x, c_noise, label).square().sum().backward()
    optimizer.step()
    longer = lengths(net)
    assert ((longer - 1).abs() > 1e-3).float().mean() > 0.9
    with torch.no_grad():
        net(x, c_noise, label)
    net.eval()(x, c_noise, label)
    assert torch.equal(lengths(net), longer)
    net.train()(x, c_noise, label)
    torch.testing.assert_close(lengths(net), torch.ones_like(longer), rtol=1e-12, atol=1e-12)


def test_without_forced_lengths_they_would_only_grow():
    """A gradient step is orthogonal: |w|^2 grows by its square, which normalising takes back."""
    net = small().eval()
    x, c_noise, label, _ = inputs(net, SHAPE)
    net(x, c_noise, label).square().sum().backward()
    before = lengths(net)
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    step = torch.cat([m.weight.grad.square().mean(tuple(m.inputs)).flatten() for m in products(net).values()])
    torch.testing.assert_close(lengths(net), before + step, rtol=1e-9, atol=1e-9)


def test_an_average_is_normalised_as_it_is_used_and_never_in_place():
    net = small().float().train()
    ema, (x, c_noise, label, _) = EMA(net, decay=0.5), inputs(net, SHAPE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x.float(), c_noise.float(), label).square().mean().backward()
        optimizer.step()
        ema.update(net)
    before = copy.deepcopy(ema.model.state_dict())
    ema.train()
    y = ema.model(x.float(), c_noise.float(), label)
    assert all(torch.equal(before[key], value) for key, value in ema.model.state_dict().items())
    assert (lengths(ema.model) - 1).abs().max() > 1e-4
    expected = reference({k: v.double() for k, v in before.items()}, x, c_noise, label)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-5)


def test_two_calls_before_one_backward_pass():
    """The second call's normalisation does not get in the way of the first one's gradient."""
    net = small().train()
    x, c_noise, label, _ = inputs(net, SHAPE)
    (net(x, c_noise, label).sum() + net(-x, c_noise, label).square().sum()).backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    net(x, c_noise, label).sum().backward()
    net(-x, c_noise, label).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-9)


def test_units_can_be_recomputed():
    net, other = small(dropout=0.3).train(), small(dropout=0.3).train()
    x, c_noise, label, _ = inputs(net, SHAPE)
    for unit in other.units:
        unit.forward = lambda *a, forward=unit.forward: checkpoint(forward, *a, use_reentrant=False)
    for each in (net, other):
        torch.manual_seed(3)
        each(x, c_noise, label).square().sum().backward()
    assert len(other.units) == 10
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_training_compiled_whole_is_training():
    """In place in a compiled graph too, and with an optimizer that takes all weights at once."""
    torch._dynamo.reset()
    nets = [small(blocks=1, multipliers=[1], attention=[]).float().train() for _ in range(2)]
    x, c_noise, label, _ = inputs(nets[0], SHAPE)
    calls = [nets[0], torch.compile(nets[1], backend="aot_eager", fullgraph=True)]
    for net, call in zip(nets, calls, strict=True):
        steps = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            steps.zero_grad()
            call(x.float(), c_noise.float(), label).square().sum().backward()
            steps.step()
        call(x.float(), c_noise.float(), label)
        torch.testing.assert_close(lengths(net), torch.ones_like(lengths(net)), rtol=1e-5, atol=1e-5)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(train):
    sizes = ["model=edm2_digits", "model.channels=16", "model.multipliers=[1]", "model.attention=[]"]
    options = [*sizes, "optimizer.lr=0.01", "callbacks=none", "data.batch_size=8", "trainer.checkpoint_every=1"]
    options += ["evaluation.n=1", "sampler.steps=1"]
    whole = train(*options, "trainer.max_steps=3")
    first = train(*options, "trainer.max_steps=1", "name=other")
    assert differences(last(whole)["state_dict"], last(first)["state_dict"])
    again = train(*options, "trainer.max_steps=3", "name=other")
    assert differences(last(whole)["state_dict"], last(again)["state_dict"]) == []


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"shape": (2,)}, "model.shape=(2,): need square images"),
        ({"shape": (1, 8, 16)}, "model.shape=(1, 8, 16): need square images"),
        (
            {"shape": (1, 9, 9)},
            "model.multipliers=[1, 2]: need whole numbers > 0, one per level, with the images'",
        ),
        ({"multipliers": []}, "model.multipliers=[]: need whole numbers > 0"),
        ({"multipliers": [1.5]}, "model.multipliers=[1.5]: need a list of whole numbers"),
        ({"multipliers": [1, 0]}, "model.multipliers=[1, 0]: need whole numbers > 0"),
        ({"channels": 0}, "model.channels=0: need at least 1"),
        ({"blocks": 0}, "model.blocks=0: need at least 1"),
        ({"dropout": 1.0}, "model.dropout=1.0: need a probability in [0, 1)"),
        ({"head_channels": 24}, "model.head_channels=24: need a divisor of each of the widths [32, 64]"),
        ({"head_channels": 0}, "model.head_channels=0: need a divisor"),
    ],
)
def test_bad_options_are_refused_in_a_line(bad, line):
    with pytest.raises(UserError) as refused:
        make("model", "edm2_digits", **{"shape": SHAPE, "num_classes": 3, **bad})
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_it_has_an_embedding_of_its_own():
    composed = compose("train", ["model=edm2_digits", "embedding=ddpm"])
    with pytest.raises(UserError, match=r"^embedding=ddpm: the model EDM2 does not use it; leave it out$"):
        check_used(Parts(resolve(composed)), composed.overrides)
