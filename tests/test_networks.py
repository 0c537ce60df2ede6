import copy
import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.models import MLP, UNet
from denoiselab.models.embedding import NOISE_SCALE
from denoiselab.models.layers import Conditioner
from denoiselab.schedule import Cosine
from exact import OPTIONS, Scaled, White, every, make, noisy_levels, normals

SHAPES = [(2,), (1, 8, 8), (1, 16, 16), (3, 32, 32)]


def accepts(model: str, shape: tuple[int, ...]) -> bool:
    try:
        make("model", model, shape=shape, num_classes=3)
    except UserError:
        return False
    return True


CASES = [(model, shape) for model in OPTIONS["model"] for shape in SHAPES if accepts(model, shape)]
FITTING = pytest.mark.parametrize(("model", "shape"), CASES)
SMALLEST = pytest.mark.parametrize(("model", "shape"), [next(c for c in CASES if c[0] == m) for m in OPTIONS["model"]])


def network(model: str, shape: tuple[int, ...], num_classes: int = 3, **arguments) -> nn.Module:
    """An option in float64 and evaluation mode, with nothing left at zero."""
    torch.manual_seed(0)
    net = make("model", model, shape=shape, num_classes=num_classes, **arguments).double().eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def inputs(shape: tuple[int, ...], n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return normals(n, *shape), torch.linspace(-2, 2, n, dtype=torch.float64), torch.arange(n) % 4 - 1


def embedded(net: nn.Module, *arguments, autocast: bool = False) -> Tensor:
    """The sinusoids that reach the conditioner's first layer."""
    (conditioner,) = (module for module in net.modules() if isinstance(module, Conditioner))
    seen = []
    handle = conditioner.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net(*arguments)
    handle.remove()
    return seen[0]


def test_every_model_has_data_that_fits():
    assert {model for model, _ in CASES} == set(OPTIONS["model"])
    assert {shape for model, shape in CASES if model == "mlp"} == {(2,)}
    assert {shape for model, shape in CASES if model == "unet_digits"} == set(SHAPES[1:])


@FITTING
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_new_network_says_nothing(model, shape, num_classes):
    """Its output is zero, so that the loss on eps starts at 1."""
    torch.manual_seed(0)
    net = make("model", model, shape=shape, num_classes=num_classes)
    x, c_noise, label = inputs(shape)
    y = net(x.float(), c_noise.float(), label=label if num_classes else None)
    assert torch.equal(y, torch.zeros_like(x.float()))
    assert y.is_contiguous()


@FITTING
def test_every_parameter_learns(model, shape):
    """After one optimizer step away from zero, each has a gradient, in float64 where rounding is no gradient."""
    torch.manual_seed(0)
    net = make("model", model, shape=shape, num_classes=3).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for _ in range(2):
        optimizer.zero_grad()
        (net(*inputs(shape)) - normals(4, *shape, seed=1)).square().mean().backward()
        gradients = {name: p.grad.abs().max().item() for name, p in net.named_parameters()}
        optimizer.step()
    largest = max(gradients.values())
    assert [name for name, value in gradients.items() if value < 1e-9 * largest] == []


@SMALLEST
def test_a_new_network_starts_to_learn(model, shape):
    """From zero: a few steps bring the loss on a constant target down."""
    torch.manual_seed(0)
    net = make("model", model, shape=shape, num_classes=3)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    x, c_noise, label = inputs(shape)
    for _ in range(8):
        loss = (net(x.float(), c_noise.float(), label) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == 1
    assert losses[-1] < 0.5


@FITTING
def test_the_output_depends_on_noise_level_label_and_input(model, shape):
    net = network(model, shape)
    x, c_noise, label = inputs(shape)
    with torch.no_grad():
        y = net(x, c_noise, label)
        assert y.shape == x.shape
        for other in (
            net(x, c_noise + 0.01, label),
            net(x, c_noise, (label + 2) % 4 - 1),
            net(x + 0.1, c_noise, label),
        ):
            assert ((other - y).flatten(1).abs().max(1).values > 1e-6).all()


@FITTING
def test_no_label_is_the_null_label(model, shape):
    net = network(model, shape)
    x, c_noise, _ = inputs(shape)
    with torch.no_grad():
        torch.testing.assert_close(net(x, c_noise), net(x, c_noise, torch.full((4,), -1)), rtol=1e-12, atol=1e-12)
        for label in range(3):
            assert (net(x, c_noise) - net(x, c_noise, torch.full((4,), label))).abs().max() > 1e-6


@FITTING
def test_samples_do_not_see_each_other(model, shape):
    net, (x, c_noise, label) = network(model, shape), inputs(shape)
    with torch.no_grad():
        whole = net(x, c_noise, label)
        for i in range(4):
            alone = net(x[i : i + 1], c_noise[i : i + 1], label[i : i + 1])
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-10, atol=1e-10)


@FITTING
def test_a_network_without_labels_works(model, shape):
    net, (x, c_noise, _) = network(model, shape, num_classes=0), inputs(shape)
    assert net(x, c_noise).shape == x.shape
    labelled = network(model, shape)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in labelled.parameters())


@SMALLEST
def test_dropout_is_for_training_only(model, shape):
    net, asked = network(model, shape), inputs(shape)
    with torch.no_grad():
        assert torch.equal(net(*asked), net(*asked))
        dropout = any(isinstance(module, nn.Dropout) and module.p for module in net.modules())
        net.train()
        assert torch.equal(net(*asked), net(*asked)) == (not dropout)


@SMALLEST
def test_sinusoids_are_float32_under_autocast(model, shape):
    net = network(model, shape).float()
    asked = [value.float() if value.is_floating_point() else value for value in inputs(shape)]
    plain = embedded(net, *asked)
    assert plain.dtype == torch.float32
    assert torch.equal(embedded(net, *asked, autocast=True), plain)


@SMALLEST
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinusoids_are_float32_in_a_module_of_low_precision(model, shape, dtype):
    """Rounded once, after cosine and sine: an angle of 875 radians of rounded frequencies is another angle."""
    net = network(model, shape).float()
    x, c_noise, label = inputs(shape)
    expected = embedded(net, x.float(), c_noise.float(), label)
    found = embedded(copy.deepcopy(net).to(dtype), x.to(dtype), c_noise.float(), label)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


@SMALLEST
def test_sinusoids_in_closed_form(model, shape):
    net, (x, c_noise, label) = network(model, shape), inputs(shape)
    found = embedded(net, x, c_noise, label).double()
    half = found.shape[1] // 2
    angles = NOISE_SCALE * c_noise[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    torch.testing.assert_close(found, torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=2e-4)


@FITTING
def test_the_memory_format_does_not_matter(model, shape):
    net, (x, c_noise, label) = network(model, shape), inputs(shape)
    with torch.no_grad():
        expected = net(x, c_noise, label)
        if len(shape) == 3:
            strided = x.to(memory_format=torch.channels_last)
            torch.testing.assert_close(net(strided, c_noise, label), expected, rtol=1e-12, atol=1e-12)
        plain = copy.deepcopy(net)
        for parameter in plain.parameters():
            parameter.data = parameter.data.contiguous()
        torch.testing.assert_close(plain(x, c_noise, label), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "bad", "named"),
    [
        ("unet_digits", {"shape": (1, 8, 16)}, "shape=(1, 8, 16)"),
        ("unet_digits", {"shape": (2,)}, "shape=(2,)"),
        ("unet_digits", {"shape": (1, 9, 9)}, "multipliers=[1, 2]"),
        ("unet_digits", {"multipliers": [1, 1, 1, 1, 1]}, "multipliers=[1, 1, 1, 1, 1]"),
        ("unet_digits", {"multipliers": []}, "multipliers=[]"),
        ("unet_digits", {"multipliers": [0]}, "multipliers=[0]"),
        ("unet_digits", {"multipliers": [1.5]}, "multipliers=[1.5]"),
        ("unet_digits", {"channels": 48}, "channels=48"),
        ("unet_digits", {"channels": 0}, "channels=0"),
        ("unet_digits", {"blocks": 0}, "blocks=0"),
        ("unet_digits", {"dropout": 1.0}, "dropout=1.0"),
        ("unet_digits", {"dropout": math.nan}, "dropout=nan"),
        ("unet_digits", {"head_channels": 24}, "head_channels=24"),
        ("unet_digits", {"head_channels": 0}, "head_channels=0"),
        ("unet_digits", {"head_channels": -32}, "head_channels=-32"),
        ("mlp", {"shape": (1, 8, 8)}, "shape=(1, 8, 8)"),
        ("mlp", {"width": 4}, "width=4"),
        ("mlp", {"depth": 0}, "depth=0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_bad_options_are_refused_in_a_line(model, bad, named):
    with pytest.raises(UserError) as refused:
        make("model", model, **{"shape": (2,) if model == "mlp" else (1, 8, 8), "num_classes": 3, **bad})
    line = str(refused.value)
    assert line.startswith(f"model.{named}: ")
    assert "need" in line
    assert "\n" not in line


def test_attention_is_where_it_was_asked_for():
    """One block more than `blocks` on the way up, `blocks` on the way down, two in the middle."""

    def count(attention: list[int], side: int) -> int:
        net = UNet((1, side, side), channels=32, multipliers=[1, 2], blocks=1, attention=attention)
        return sum(type(module).__name__ == "_Attention" for module in net.modules())

    assert count([], 8) == 0
    assert count([4], 8) == 1 + 2 + 2
    assert count([8], 8) == 1 + 2
    assert count([4, 8], 8) == 8
    assert count([16], 32) == 1 + 2 + 2


def test_attention_is_pytorchs_multi_head_attention():
    """Over all pixels, in two heads, beside the input; PyTorch keeps queries, keys and values in the same order."""
    net = UNet((1, 8, 8), channels=32, multipliers=[2], blocks=1, attention=[8], head_channels=32).double().eval()
    attention = net.middle[0].attention
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    reference = nn.MultiheadAttention(64, 2, batch_first=True).double()
    weights = ("in_proj_weight", attention.qkv.weight), ("in_proj_bias", attention.qkv.bias)
    for name, value in (*weights, ("out_proj.weight", attention.out.weight), ("out_proj.bias", attention.out.bias)):
        reference.get_parameter(name).data.copy_(value)
    h = normals(3, 64, 8, 8)
    tokens = attention.norm(h).flatten(2).transpose(1, 2)
    expected = h + reference(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view_as(h)
    with torch.no_grad():
        torch.testing.assert_close(attention(h), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("multipliers", [[1], [1, 2], [1, 2, 2]])
def test_skips_carry_the_image_past_the_middle(multipliers):
    """What the network says still depends on the image, pixel by pixel, where the middle says nothing; and on the
    middle, where the rest is the same."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), channels=32, multipliers=multipliers, blocks=1, attention=[]).double().eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x, c_noise, _ = inputs((1, 8, 8))
    with torch.no_grad():
        whole = net(x, c_noise)
        handle = net.middle[-1].register_forward_hook(lambda module, arguments, output: 0 * output)
        without, changed = net(x, c_noise), net(x + normals(4, 1, 8, 8, seed=9), c_noise)
        handle.remove()
    assert (whole - without).abs().max() > 1e-6
    assert ((changed - without).abs().flatten(1).mean(1) > 1e-3).all()


def test_mlp_is_of_its_depth_and_width():
    net = MLP((3,), width=16, depth=5)
    assert len(net.blocks) == 5
    assert net.first.weight.shape == (16, 3)


# The network as a denoiser


class Seen(nn.Module):
    """A network that keeps what it was given and answers with zeros."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor, c_noise: Tensor, **cond: Tensor) -> Tensor:
        self.x, self.c_noise, self.cond = x, c_noise, cond
        return 0 * x


@every("schedule")
@pytest.mark.parametrize("std", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("k", [0.1, 1.0, None])
def test_inputs_have_unit_variance_at_every_level(schedule, std, k):
    alpha_t, sigma_t = Scaled(make("schedule", schedule), k)(torch.linspace(0, 1, 11, dtype=torch.float64)[:, None])
    net = Seen()
    x_t = alpha_t * std * normals(11, 20_000, seed=1) + sigma_t * normals(11, 20_000, seed=2)
    Denoiser(net, make("target", "v"), std)(x_t, alpha_t, sigma_t)
    torch.testing.assert_close(net.x.std(1), torch.ones(11).double(), rtol=0, atol=4 / math.sqrt(40_000))


@every("schedule")
def test_c_noise_is_a_quarter_of_log_sigma_over_alpha(schedule):
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule))
    net = Seen()
    Denoiser(net, make("target", "v"))(normals(len(alpha_t), 2), alpha_t, sigma_t, label=torch.arange(len(alpha_t)))
    assert net.c_noise.shape == (len(alpha_t),)
    torch.testing.assert_close(net.c_noise, (sigma_t / alpha_t).log().flatten() / 4, rtol=1e-12, atol=1e-12)
    assert torch.equal(net.cond["label"], torch.arange(len(alpha_t)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c_noise_is_finite_at_the_clean_level_and_at_pure_noise(dtype):
    net = Seen(dtype)
    alpha_t, sigma_t = torch.eye(2, dtype=dtype)[:, :, None]
    x_0_hat = Denoiser(net, make("target", "v"))(torch.ones(2, 1, dtype=dtype), alpha_t, sigma_t)
    assert net.c_noise.isfinite().all()
    assert net.c_noise.abs().max().item() == pytest.approx(math.log(1e6) / 4)
    assert x_0_hat.isfinite().all()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sample", [torch.bfloat16, torch.float32, torch.float64])
def test_the_estimate_has_the_type_of_x_t_and_the_network_its_own(weights, sample):
    net = Seen(weights)
    alpha_t, sigma_t = (value.to(sample) for value in Cosine()(torch.full((3, 1), 0.5)))
    x_0_hat = Denoiser(net, make("target", "v"))(torch.ones(3, 2, dtype=sample), alpha_t, sigma_t)
    assert x_0_hat.dtype == sample
    assert net.x.dtype == weights
    assert net.c_noise.dtype == torch.promote_types(weights, torch.float32)


@every("target", "schedule")
@pytest.mark.parametrize("k", [0.01, 0.1, 80.0, None])
def test_the_scale_of_x_t_and_its_level_does_not_matter(target, schedule, k):
    """None divides every sample by its own alpha_t."""
    denoiser = Denoiser(network("mlp", (2,)), make("target", target), 0.7)
    _, alpha_t, sigma_t = noisy_levels(make("schedule", schedule), 21)
    x_t = alpha_t * normals(len(alpha_t), 2, seed=1) + sigma_t * normals(len(alpha_t), 2, seed=2)
    scale = 1 / alpha_t if k is None else k
    with torch.no_grad():
        expected = denoiser(x_t, alpha_t, sigma_t)
        found = denoiser(scale * x_t, scale * alpha_t, scale * sigma_t)
    assert ((found - expected).abs() / (1 + expected.abs())).max() < 1e-9


@every("target", "schedule")
def test_a_denoiser_is_what_its_network_and_target_say(target, schedule):
    """Written out, for a network that answers tanh of its input."""

    class Tanh(Seen):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return x.tanh() + c_noise[:, None]

    y, (_, alpha_t, sigma_t) = make("target", target), noisy_levels(make("schedule", schedule))
    x_t = normals(len(alpha_t), 4)
    answer = (x_t / torch.hypot(0.7 * alpha_t, sigma_t)).tanh() + (sigma_t / alpha_t).log() / 4
    expected = y.to_x_0(answer, x_t, alpha_t, sigma_t)
    found = Denoiser(Tanh(), y, 0.7)(x_t, alpha_t, sigma_t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_zero_v_network_is_the_wiener_filter_of_unit_data():
    """v = 0 says x_0 = alpha_t x_t/(alpha_t^2 + sigma_t^2): exact for white data, at any scale of the level."""
    _, alpha_t, sigma_t = noisy_levels(Cosine())
    x_t = normals(len(alpha_t), 4)
    for k in (1.0, 80.0):
        found = Denoiser(Seen(), make("target", "v"))(k * x_t, k * alpha_t, k * sigma_t)
        torch.testing.assert_close(found, White()(k * x_t, k * alpha_t, k * sigma_t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_a_denoiser_wants_data_of_some_width(sigma_data):
    with pytest.raises(ValueError, match=r"^sigma_data=.*: need a number > 0$"):
        Denoiser(Seen(), make("target", "v"), sigma_data)
