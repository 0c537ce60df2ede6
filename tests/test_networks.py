"""What every network of conf/model has in common, in small with its own switches and at its own size on meta."""

import copy
import inspect
import io
import itertools

import pytest
import torch
from torch import nn

from denoiselab.ema import EMA
from denoiselab.errors import UserError
from denoiselab.models import MLP
from denoiselab.module import parameter_groups
from exact import normals
from networks import NETWORKS, SHAPES, alike, build, cases, inputs, natural_shape, node, perturbed, shrunk

CASES = cases()
MODELS = list(dict.fromkeys(model for model, _ in CASES))
FITTING = pytest.mark.parametrize(("model", "shape"), CASES)
SMALLEST = pytest.mark.parametrize(("model", "shape"), [next(c for c in CASES if c[0] == m) for m in MODELS])
CONSTRUCTORS = {model: inspect.signature(type(build(model, shape))).parameters for model, shape in CASES}


def taking(argument: str) -> pytest.MarkDecorator:
    """The networks, each at one shape, whose constructors have an argument."""
    return pytest.mark.parametrize(
        ("model", "shape"), [next(c for c in CASES if c[0] == m) for m in MODELS if argument in CONSTRUCTORS[m]]
    )


def network(model: str, shape: tuple[int, ...], **arguments) -> nn.Module:
    return perturbed(build(model, shape, **arguments))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_every_option_is_small_enough_to_be_tested():
    for model, shape in CASES:
        assert sum(p.numel() for p in build(model, shape).parameters()) < 2.5e6, model


@pytest.mark.parametrize("model", NETWORKS)
def test_an_option_in_small_keeps_its_switches(model):
    """Nothing is left out, a number or a list that says whether does not come to say otherwise, and it is tested."""
    own, small = node(model), shrunk(node(model))
    assert [shape for name, shape in CASES if name == alike(model)] == (SHAPES[:1] if model == "mlp" else SHAPES[1:])
    assert own.keys() <= small.keys()
    for key, value in own.items():
        assert bool(small[key]) == bool(value)
        assert type(small[key]) is type(value)
        if isinstance(value, bool | str):
            assert small[key] == value


# At their own size, on tensors without values


@pytest.fixture(scope="module", params=NETWORKS)
def full(request) -> tuple[str, tuple[int, ...], nn.Module]:
    shape = natural_shape(request.param)
    with torch.device("meta"):
        return request.param, shape, build(request.param, shape, small=False)


def ask(net: nn.Module, shape: tuple[int, ...], n: int = 4) -> torch.Tensor:
    """Its answer on the meta device."""
    x, c_noise, label, more = inputs(net, shape, n)
    moved = [value.to("meta", torch.float32 if value.is_floating_point() else None) for value in (x, c_noise, label)]
    with torch.no_grad():
        return net(*moved, **{key: value.to("meta", torch.float32) for key, value in more.items()})


def test_a_network_gives_the_shape_of_what_it_gets(full):
    """And reads no value on the host, of which meta has none."""
    _, shape, net = full
    assert ask(net, shape, 2).shape == (2, *shape)


def test_units_are_disjoint_parts_that_are_called_once_each_in_order(full):
    """What is compiled, recomputed and sharded as one; of a network that has units, they hold most."""
    model, shape, net = full
    if not hasattr(net, "units"):
        assert model == "mlp"
        return
    units, called = net.units, []
    assert len(units) > 1 or "experts" in model
    owned = [id(p) for unit in units for p in unit.parameters()]
    assert len(owned) == len(set(owned))
    assert len(owned) > len(list(net.parameters())) / 2
    assert {id(unit) for unit in units} <= {id(module) for module in net.modules()}
    handles = [unit.register_forward_pre_hook(lambda module, _: called.append(module)) for unit in units]
    ask(net, shape, 2)
    for handle in handles:
        handle.remove()
    assert called == units[: len(called)]
    assert len(called) == len(units) or "experts" in model  # on meta, the first expert answers


def test_weight_decay_spares_embeddings_norms_and_biases(full):
    """And nothing that is none of these; each parameter is in one group."""
    *_, net = full
    names = {id(p): name for name, p in net.named_parameters()}
    embeddings = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    groups = {group.get("weight_decay"): {id(p) for p in group["params"]} for group in parameter_groups(net)}
    assert groups[None].isdisjoint(groups[0.0])
    assert groups[None] | groups[0.0] == set(names)
    for key, name in names.items():
        flat = dict(net.named_parameters())[name].ndim < 2
        assert (key in groups[0.0]) == (flat or key in embeddings), name
        assert (key in groups[0.0]) or not any(word in name for word in ("norm", "bias", "label")), name


def test_no_weight_is_a_scalar(full):
    """Which FSDP cannot shard."""
    *_, net = full
    assert [name for name, p in net.named_parameters() if p.ndim == 0] == []


# In small, with values


@FITTING
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_new_network_says_nothing(model, shape, num_classes):
    """Its output is zero, so that the loss on eps starts at 1."""
    net = build(model, shape, num_classes=num_classes)
    x, c_noise, label, more = inputs(net, shape)
    more = {key: value.float() for key, value in more.items()}
    y = net(x.float(), c_noise.float(), label if num_classes else None, **more)
    assert torch.equal(y, torch.zeros_like(x.float()))
    assert y.is_contiguous()


@FITTING
def test_every_parameter_learns(model, shape):
    """After one optimizer step away from zero, each has a gradient, in float64 where rounding is no gradient."""
    torch.manual_seed(0)
    net = build(model, shape).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    *asked, more = inputs(net, shape)
    for _ in range(2):
        optimizer.zero_grad()
        (net(*asked, **more) - normals(4, *shape, seed=1)).square().mean().backward()
        gradients = {name: p.grad.abs().max().item() for name, p in net.named_parameters()}
        optimizer.step()
    largest = max(gradients.values())
    assert [name for name, value in gradients.items() if value < 1e-9 * largest] == []


@SMALLEST
def test_a_new_network_starts_to_learn(model, shape):
    """From zero: a few steps bring the loss on a constant target down."""
    net = build(model, shape)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    x, c_noise, label, more = inputs(net, shape)
    more = {key: value.float() for key, value in more.items()}
    for _ in range(13):
        loss = (net(x.float(), c_noise.float(), label, **more) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == 1
    assert losses[-1] < 0.3


@SMALLEST
def test_the_output_depends_on_noise_level_label_and_input(model, shape):
    net = network(model, shape)
    x, c_noise, label, more = inputs(net, shape)
    with torch.no_grad():
        y = net(x, c_noise, label, **more)
        assert y.shape == x.shape
        for other in (
            net(x, c_noise + 0.01, label, **more),
            net(x, c_noise, (label + 2) % 4 - 1, **more),
            net(x + 0.1, c_noise, label, **more),
        ):
            assert ((other - y).flatten(1).abs().max(1).values > 1e-6).all()


@SMALLEST
def test_no_label_is_the_null_label(model, shape):
    net = network(model, shape)
    x, c_noise, _, more = inputs(net, shape)
    with torch.no_grad():
        nothing = net(x, c_noise, **more)
        close(net(x, c_noise, torch.full((4,), -1), **more), nothing, 1e-12)
        for label in range(3):
            other = net(x, c_noise, torch.full((4,), label), **more)
            assert ((other - nothing).flatten(1).abs().max(1).values > 1e-6).all()


@SMALLEST
def test_samples_do_not_see_each_other(model, shape):
    net = network(model, shape)
    x, c_noise, label, more = inputs(net, shape)
    with torch.no_grad():
        whole = net(x, c_noise, label, **more)
        for i in range(4):
            own = slice(i, i + 1)
            close(net(x[own], c_noise[own], label[own], **{k: v[own] for k, v in more.items()}), whole[own])


@SMALLEST
def test_a_network_without_labels_is_smaller(model, shape):
    net, labelled = build(model, shape, num_classes=0), build(model, shape)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in labelled.parameters())


@SMALLEST
def test_dropout_is_for_training_only(model, shape):
    net = network(model, shape)
    *asked, more = inputs(net, shape)
    with torch.no_grad():
        assert torch.equal(net(*asked, **more), net(*asked, **more))
        dropout = any(isinstance(module, nn.Dropout) and module.p for module in net.modules())
        net.train()
        assert torch.equal(net(*asked, **more), net(*asked, **more)) == (not dropout)


@FITTING
def test_the_memory_format_does_not_matter(model, shape):
    net = network(model, shape)
    x, c_noise, label, more = inputs(net, shape)
    with torch.no_grad():
        expected = net(x, c_noise, label, **more)
        assert expected.is_contiguous()
        if len(shape) == 3:
            strided = x.to(memory_format=torch.channels_last)
            close(net(strided, c_noise, label, **more), expected, 1e-12)
        plain = copy.deepcopy(net)
        for parameter in plain.parameters():
            parameter.data = parameter.data.contiguous()
        close(plain(x, c_noise, label, **more), expected)


@SMALLEST
def test_precisions_agree(model, shape):
    """float32 to its rounding; bfloat16 weights, and autocast, to theirs."""
    net = network(model, shape)
    x, c_noise, label, more = inputs(net, shape)
    with torch.no_grad():
        expected = net(x, c_noise, label, **more)
        size = expected.square().mean().sqrt()

        def error(dtype: torch.dtype, autocast: bool = False) -> float:
            own = copy.deepcopy(net).to(dtype)
            given = {key: value.to(dtype) for key, value in more.items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = own(x.to(dtype), c_noise.float(), label, **given)
            assert found.dtype == (torch.bfloat16 if autocast else dtype)
            return ((found.double() - expected).square().mean().sqrt() / size).item()

        assert error(torch.float32) < 1e-4
        assert 1e-4 < error(torch.float32, autocast=True) < 0.1
        assert 1e-4 < error(torch.bfloat16) < 0.2


@SMALLEST
def test_a_copy_is_the_same_network(model, shape):
    """Copied, saved and loaded, averaged: nothing of it lies outside of its state."""
    net = network(model, shape)
    *asked, more = inputs(net, shape)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = build(model, shape).double().eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    whole = io.BytesIO()
    torch.save(net, whole)
    whole.seek(0)
    with torch.no_grad():
        expected = net(*asked, **more)
        for twin in (copy.deepcopy(net), other, torch.load(whole, weights_only=False), EMA(net).model.double()):
            close(twin(*asked, **more), expected, 1e-4)


# What else a network may be told, and what it may return


@taking("outputs")
@pytest.mark.parametrize("outputs", [2, 3])
def test_several_outputs_are_stacked_along_the_channels(model, shape, outputs):
    net = network(model, shape, outputs=outputs)
    *asked, more = inputs(net, shape)
    parts = net(*asked, **more).chunk(outputs, 1)
    assert {part.shape for part in parts} == {(4, *shape)}
    for a, b in itertools.pairwise(parts):
        assert (a - b).abs().max() > 1e-6


@taking("vector")
def test_a_vector_is_told_and_nan_is_none(model, shape):
    """Rows of NaN are the learned null vector, without a NaN in values or gradients; samples keep their own."""
    net = network(model, shape, vector=4)
    x, c_noise, label, more = inputs(net, shape)
    vector = normals(4, 4, seed=3)
    mixed = torch.where(torch.tensor([True, False, True, False])[:, None], vector, float("nan"))
    with torch.no_grad():
        told, nothing = net(x, c_noise, label, vector=vector, **more), net(x, c_noise, label, **more)
    assert ((told - nothing).flatten(1).abs().max(1).values > 1e-6).all()
    some = net(x, c_noise, label, vector=mixed, **more)
    close(some[::2], told[::2])
    close(some[1::2], nothing[1::2])
    some.square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    null = [gradient for name, gradient in gradients.items() if name.endswith("null_vector")]
    assert null
    assert any((gradient != 0).all() for gradient in null)


@taking("low_res")
def test_an_image_to_be_enlarged_is_enlarged_bilinearly(model, shape):
    if len(shape) != 3:
        pytest.fail("a network of points takes no image")
    net = network(model, shape, low_res=2)
    x, c_noise, label, _ = inputs(net, shape)
    low_res = normals(4, 2, shape[1] // 2, shape[2] // 2, seed=3)
    large = nn.functional.interpolate(low_res, shape[1:], mode="bilinear")
    with torch.no_grad():
        found = net(x, c_noise, label, low_res=low_res)
        close(net(x, c_noise, label, low_res=large), found)
        other = net(x, c_noise, label, low_res=low_res.roll(1, 0))
    assert found.shape == x.shape
    assert ((other - found).flatten(1).abs().max(1).values > 1e-6).all()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"shape": (1, 8, 8)}, "shape=(1, 8, 8)"),
        ({"width": 4}, "width=4"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_bad_options_of_an_mlp_are_refused_in_a_line(bad, named):
    with pytest.raises(UserError) as refused:
        build("mlp", bad.pop("shape", (2,)), **bad)
    line = str(refused.value)
    assert line.startswith(f"model.{named}: ")
    assert "need" in line
    assert "\n" not in line


def test_mlp_is_of_its_depth_and_width():
    net = MLP((3,), width=16, depth=5)
    assert len(net.blocks) == 5
    assert net.first.weight.shape == (16, 3)
