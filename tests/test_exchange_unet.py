"""The U-Net is the same function as diffusers' UNet2DModel, with its weights, both ways."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange.unet import DEFAULTS, from_diffusers, to_diffusers
from denoiselab.models import ADM, DDPM, Dead, LogSNR, UNet
from denoiselab.schedule import Cosine, Linear
from exact import normals, relative
from networks import build

UNet2DModel = pytest.importorskip("diffusers").UNet2DModel

LINEAR = Linear()
EMBEDDINGS = {"ddpm": DDPM, "adm": ADM}
TIMES = torch.tensor([0, 1, 417, 999])
C_NOISE = LINEAR.log_snr(torch.linspace(0, 1, 1000, dtype=torch.float64)) / -8


def theirs(config: dict, seed: int = 0) -> UNet2DModel:
    """A random UNet2DModel in float64 whose parameters are all away from 0 and 1."""
    torch.manual_seed(seed)
    model = UNet2DModel(**config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def ours(arguments: dict, state: dict[str, Tensor], schedule=LINEAR) -> UNet:
    embedding = EMBEDDINGS[arguments["embedding"]](schedule)
    net = UNet(**{**arguments, "embedding": embedding}).double().eval()
    net.load_state_dict(state)
    return net


def perturbed(net: UNet) -> UNet:
    """In float64, with nothing left at zero."""
    net = net.double().eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


SMALL = {"sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4}
DOWN, UP = ["DownBlock2D"] * 2, ["UpBlock2D"] * 2
PLAIN = {**SMALL, "down_block_types": DOWN, "up_block_types": UP}
FIRST = {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}
SCALED = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}
RESIDUAL = {"downsample_type": "resnet", "upsample_type": "resnet"}
SMALLER, LARGER = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"

CONFIGS = {
    "plain": PLAIN,
    "as DDPM": {
        **SMALL,
        "sample_size": 16,
        "block_out_channels": [8, 16, 16, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "dropout": 0.1,
    },
    "as ADM": {
        **SMALL,
        **SCALED,
        **RESIDUAL,
        "block_out_channels": [8, 16, 16],
        "down_block_types": [SMALLER, "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", LARGER],
        "num_class_embeds": 4,
        "layers_per_block": 1,
    },
    "no attention": {**SMALL, "down_block_types": [SMALLER] * 2, "up_block_types": [LARGER] * 2},
    "scale and shift": {**PLAIN, **SCALED},
    "heads": {**SMALL, **FIRST, "attention_head_dim": 4},
    "labels": {**PLAIN, "num_class_embeds": 3, "layers_per_block": 1},
    "one level": {
        **SMALL,
        "block_out_channels": [8],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
        "layers_per_block": 3,
    },
    "no attention in the middle": {**PLAIN, "add_attention": False, "resnet_time_scale_shift": "scale_shift"},
    "cosines first, frequencies of DDPM": {**PLAIN, "flip_sin_to_cos": True, "freq_shift": 1},
    "sines first, frequencies of ADM": {**PLAIN, "flip_sin_to_cos": False, "freq_shift": 0},
    "fractions": {**PLAIN, "block_out_channels": [8, 12], "attention_head_dim": 4},
    "further channels": {**PLAIN, "in_channels": 5, "act_fn": "swish"},
    "two outputs": {**PLAIN, "in_channels": 2, "out_channels": 4, "sample_size": [8, 8]},
    "former names": {**SMALL, "down_block_types": ["UNetResDownBlock2D"] * 2, "up_block_types": UP},
}


def asked(config: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, n, label): every time with every label."""
    labels = config.get("num_class_embeds") or 1
    n, label = TIMES.repeat(labels), torch.arange(labels).repeat_interleave(len(TIMES))
    side = 16 if config["sample_size"] == 16 else 8
    return normals(len(n), config.get("in_channels", 3), side, side), n, label if labels > 1 else None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_of_diffusers_is_one_of_ours(name):
    """The same output at every time and label, to rounding in float64; and back, bit for bit."""
    config = CONFIGS[name]
    model, (x, n, label) = theirs(config), asked(config)
    arguments, state = from_diffusers({"_class_name": "UNet2DModel", **config}, model.state_dict())
    net = ours(json.loads(json.dumps(arguments)), state)
    image, low_res = x.split([x.shape[1] - net.low_res, net.low_res], dim=1)
    null = net.condition.num_classes
    with torch.no_grad():
        expected = model(x, n, class_labels=label).sample
        found = net(image, C_NOISE[n], None if label is None else label.where(label < null, -1), low_res=low_res)
    assert expected.std() > 0.01
    assert relative(found, expected) < 1e-10

    config, back = to_diffusers(net, C_NOISE)
    model_again = UNet2DModel(**config).double().eval()
    model_again.load_state_dict(back)
    with torch.no_grad():
        assert relative(model_again(x, n, class_labels=label).sample, expected) < 1e-10
    if "first" not in name and model.config["add_attention"]:
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(value, back[key]) for key, value in model.state_dict().items())


OURS = {
    "defaults": {},
    "as DDPM": {"resample": "conv_after", "scale_shift": False, "eps": 1e-6, "attention": [4], "dropout": 0.1},
    "as ADM": {"resample": "residual", "attention": [4, 2], "head_channels": 4, "multipliers": [1, 2, 2], "outputs": 2},
    "attention everywhere": {"attention": [8, 4], "multipliers": [1, 1], "heads": 2},
    "shift by residual blocks": {"resample": "residual", "scale_shift": False, "num_classes": 0},
    "one level": {"multipliers": [1], "attention": [8], "blocks": 3},
    "an image to be enlarged": {"low_res": 2, "resample": "residual", "blocks": 2},
    "a width of 1.5": {"multipliers": [1, 1.5, 2], "groups": 2, "attention": [4]},
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("embedding", [DDPM(LINEAR), ADM(LINEAR), LogSNR(), Dead()], ids=lambda e: type(e).__name__)
def test_our_network_is_one_of_diffusers(name, embedding):
    """The same output at every time and label, and back with the same arguments and the same bits."""
    torch.manual_seed(0)
    given = {"channels": 8, "groups": 4, "blocks": 1, "num_classes": 2, "outputs": 1, **OURS[name]}
    net = perturbed(UNet((3, 8, 8), embedding=embedding, **given))
    config, state = to_diffusers(net, C_NOISE)
    model = UNet2DModel(**json.loads(json.dumps(config))).double().eval()
    model.load_state_dict(state)
    classes = given["num_classes"] + 1
    n, label = TIMES.repeat(classes), torch.arange(classes).repeat_interleave(len(TIMES))
    x, low_res = normals(len(n), 3, 8, 8), normals(len(n), net.low_res, 8, 8, seed=1)
    with torch.no_grad():
        expected = net(x, C_NOISE[n], label.where(label < classes - 1, -1), low_res=low_res)
        found = model(torch.cat([x, low_res], 1), n, class_labels=label if classes > 1 else None).sample
    assert expected.std() > 0.01
    assert relative(found, expected) < 1e-10
    assert all(value.is_contiguous() for value in state.values())
    if isinstance(embedding, DDPM | ADM):
        arguments, back = from_diffusers(config, state)
        assert arguments["embedding"] == type(embedding).__name__.lower()
        assert arguments.items() >= {key: value for key, value in given.items() if key != "heads"}.items()
        assert all(torch.equal(value, back.pop(key)) for key, value in net.state_dict().items())
        assert not back


def test_the_index_of_another_table_is_a_table_of_features():
    """A network that counts in one schedule's table, told of the levels of another's."""
    torch.manual_seed(0)
    net = perturbed(UNet((1, 4, 4), embedding=ADM(LINEAR), channels=8, multipliers=[1], groups=4))
    c_noise = Cosine().log_snr(torch.linspace(0.1, 0.9, 20, dtype=torch.float64)) / -8
    assert to_diffusers(net)[0]["time_embedding_type"] == "positional"
    assert to_diffusers(net, C_NOISE[:500])[0]["time_embedding_type"] == "positional"
    config, state = to_diffusers(net, c_noise)
    assert (config["time_embedding_type"], config["num_train_timesteps"]) == ("learned", 20)
    model = UNet2DModel(**config).double().eval()
    model.load_state_dict(state)
    x = normals(20, 1, 4, 4)
    with torch.no_grad():
        assert relative(model(x, torch.arange(20)).sample, net(x, c_noise)) < 1e-10


def test_the_published_cifar10_network_is_the_preset():
    """google/ddpm-cifar10-32, as its config.json says it."""
    published = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "dropout": 0.1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
    with torch.device("meta"):
        model = UNet2DModel(**published)
        preset = build("unet_cifar10", (3, 32, 32), small=False, num_classes=0, embedding=DDPM(LINEAR))
        arguments, state = from_diffusers(published, model.state_dict())
        assert sum(value.numel() for value in state.values()) == 35_746_307
        again, back = to_diffusers(preset)
        assert from_diffusers(again, back)[0] == arguments
        assert repr(UNet(**{**arguments, "embedding": DDPM(LINEAR)})) == repr(preset)
    assert {key: value.shape for key, value in back.items()} == {k: v.shape for k, v in model.state_dict().items()}
    complete = {**DEFAULTS, **again}
    assert {key: complete.get(key) for key in published} == {**published, "_diffusers_version": None}


def test_older_names_of_attention_are_known():
    config = {**SMALL, **FIRST}
    model = theirs(config)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(key: str) -> str:
        for new, name in former.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    state = {old(key): value for key, value in model.state_dict().items()}
    assert state.keys() != model.state_dict().keys()
    expected, found = from_diffusers(config, model.state_dict())[1], from_diffusers(config, state)[1]
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_every_class_of_a_network_without_a_null_class_is_a_label():
    config = {**PLAIN, "num_class_embeds": 3}
    model, (x, n, label) = theirs(config), asked(config)
    arguments, state = from_diffusers(config, model.state_dict(), null_class=False)
    net = ours(arguments, state)
    with torch.no_grad():
        assert relative(net(x, C_NOISE[n], label), model(x, n, class_labels=label).sample) < 1e-10
    assert arguments["num_classes"] == 3
    assert not net.condition.label.weight[3].any()
    with pytest.raises(CheckpointError, match=r"^class_embedding\.weight: the weights have no such tensor"):
        from_diffusers(config, theirs(PLAIN).state_dict(), null_class=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name=UNet2DConditionModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "time_embedding_type=learned"),
        ({"time_embedding_dim": 16}, "time_embedding_dim=16"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"freq_shift": 2}, "freq_shift=2"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2"),
        ({"act_fn": "gelu"}, "act_fn=gelu"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ({"class_embed_type": "identity"}, "class_embed_type=identity"),
        ({"num_class_embeds": 1}, "num_class_embeds=1"),
        ({"block_out_channels": []}, "block_out_channels=[]"),
        ({"block_out_channels": [8, 0]}, "block_out_channels=[8, 0]"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        ({"attn_norm_num_groups": 2}, "attn_norm_num_groups=2"),
        ({"sample_size": None}, "sample_size=None"),
        ({"sample_size": [8, 16]}, "sample_size=[8, 16]"),
        ({"sample_size": 7}, "multipliers=[1, 2]"),
        ({"out_channels": 4}, "out_channels=4"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "down_block_types=['SkipDownBlock2D', 'SkipDownBlock2D']"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types=['UpBlock2D']"),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, "up_block_types=['AttnUpBlock2D', 'UpBlock2D']"),
        ({"up_block_types": [LARGER] * 2}, "upsample_type=conv"),
        ({**FIRST, "downsample_type": "resnet"}, "upsample_type=conv"),
        ({**FIRST, "downsample_type": "pool"}, "downsample_type=pool"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"attention_head_dim": 5}, "attention_head_dim=5"),
        ({"attention_head_dim": 0}, "attention_head_dim=0"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim=8"),
    ],
)
def test_what_our_network_cannot_be_is_refused_in_a_line(change, named):
    with pytest.raises(CheckpointError) as refused:
        from_diffusers({**PLAIN, **change}, {})
    assert str(refused.value).startswith(f"{named}: ")
    assert " need " in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"vector": 3}, "vector=3"),
        ({"multipliers": [2, 2]}, "multipliers[0]=2"),
        ({"multipliers": [1, 2], "heads": 2, "attention": [8]}, "heads=2"),
        ({}, "embedding=LogSNR"),
    ],
)
def test_what_diffusers_network_cannot_be_is_refused_in_a_line(arguments, named):
    with pytest.raises(CheckpointError, match="need") as refused:
        to_diffusers(UNet((1, 8, 8), **{"channels": 8, "multipliers": [1], "groups": 4, **arguments}))
    assert str(refused.value).startswith(f"{named}: ")


def test_weights_of_another_configuration_are_refused_by_name():
    state, to_k = theirs(PLAIN).state_dict(), "mid_block.attentions.0.to_k.weight"
    for wrong, named in (
        ({k: v for k, v in state.items() if k != "conv_out.bias"}, "conv_out.bias: the weights have no such tensor"),
        ({**state, "encoder.weight": torch.zeros(1)}, "encoder.weight: the configuration has no such tensor"),
        ({**state, "conv_in.bias": torch.zeros(9)}, "conv_in.bias: has (9,), the configuration wants (8,)"),
        ({**state, "conv_in.bias": torch.zeros(())}, "conv_in.bias: has (), the configuration wants (8,)"),
        ({**state, to_k: torch.zeros(16, 8)}, f"{to_k}: has (16, 8), the configuration wants (16, 16)"),
    ):
        with pytest.raises(CheckpointError) as refused:
            from_diffusers(PLAIN, wrong)
        assert str(refused.value).startswith(named)
