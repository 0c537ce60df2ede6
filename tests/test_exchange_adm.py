"""The U-Net is the same function as the models of guided-diffusion, with their weights."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange.adm import from_adm
from denoiselab.models import ADM, UNet
from denoiselab.schedule import Linear
from exact import relative

LINEAR = Linear()
C_NOISE = LINEAR.log_snr(torch.linspace(0, 1, 1000, dtype=torch.float64)) / -8

FIXTURE = Path(__file__).parent / "fixtures" / "adm.safetensors"
SETTINGS = {
    "labels": {"multipliers": [1, 2], "attention": [8], "head_channels": 32, "resample": "residual"},
    "order": {"multipliers": [1, 1], "blocks": 2, "attention": [8, 4], "heads": 4},
    "low_res": {"multipliers": [1, 1, 2], "attention": [8, 4], "heads": 4, "resample": "residual"},
    "halved": {"channels": 128, "multipliers": [0.5, 1], "attention": [4], "head_channels": 64, "resample": "residual"},
}


def drawn(name: str, shape: list[int]) -> Tensor:
    """The weights that the fixture's outputs were made with: a hash of each place, the same on every machine."""
    place = torch.arange(torch.Size(shape).numel()) + zlib.crc32(name.encode())
    for _ in range(2):
        place = ((place ^ (place >> 16)) * 0x45D9F3B) % 2**32
    uniform = ((place ^ (place >> 16)) / 2**31 - 1).float().view(shape)
    if len(shape) == 1:
        return 0.2 * uniform + ("weight" in name)  # of norms around 1; biases
    return uniform if "label" in name else uniform * (3 / uniform[0].numel()) ** 0.5


def of_adm(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state, inputs and output) of one of guided-diffusion's models."""
    with safe_open(FIXTURE, "pt") as file:
        shapes = json.loads(file.metadata()[name])
        found = {key.partition(".")[2]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
    return {key: drawn(key, shape) for key, shape in shapes.items()}, found


def from_case(name: str, **changed) -> UNet:
    state, given = of_adm(name)
    settings = {"shape": given["x"].shape[1:], "channels": 64, "blocks": 1, **SETTINGS[name]}
    arguments, state = from_adm(settings, state, **{"new_attention_order": name == "order", **changed})
    assert arguments["embedding"] == "adm"
    net = UNet(**{**arguments, "embedding": ADM(LINEAR)}).double().eval()
    net.load_state_dict(state)
    return net


def answer(net: UNet, given: dict[str, Tensor]) -> Tensor:
    low_res = given["low_res"].double() if "low_res" in given else None
    with torch.no_grad():
        return net(given["x"].double(), C_NOISE[given["t"]], given.get("y"), low_res=low_res)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_network_of_guided_diffusion_is_one_of_ours(name):
    given = of_adm(name)[1]
    assert given["out"].std() > 0.1
    torch.testing.assert_close(answer(from_case(name), given).float(), given["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_order_of_attention_matters(name):
    given = of_adm(name)[1]
    wrong = answer(from_case(name, new_attention_order=name != "order"), given)
    assert relative(wrong.float(), given["out"]) > 1e-2


def test_its_null_class_is_a_row_of_zeros():
    net = from_case("labels")
    assert torch.equal(net.condition.label.weight[:-1].float(), of_adm("labels")[0]["label_emb.weight"])
    assert not net.condition.label.weight[-1].any()
    assert net.condition.num_classes == 5


@pytest.mark.parametrize(
    ("arguments", "weights", "named"),
    [
        ({"blocks": 2}, {}, "input_blocks.3.0.in_layers.2.weight"),
        ({"attention": []}, {}, "output_blocks.1.1.in_layers.0.weight: the weights have no such tensor"),
        ({"resample": "conv"}, {}, "input_blocks.2.0.op"),
        ({"shape": (4, 16, 16)}, {}, "shape=(4, 16, 16)"),
        ({"vector": 2}, {}, "vector=2"),
        ({"channels": 32}, {}, "time_embed.0.weight: has (256, 64)"),
        ({}, {"out.2.weight": None}, "out.2.weight"),
        ({}, {"more": torch.zeros(1)}, "more"),
    ],
)
def test_other_weights_than_the_arguments_say_are_refused_by_name(arguments, weights, named):
    state, given = of_adm("labels")
    state = {key: value for key, value in {**state, **weights}.items() if value is not None}
    settings = {"shape": given["x"].shape[1:], "channels": 64, "blocks": 1, **SETTINGS["labels"], **arguments}
    with pytest.raises(CheckpointError) as refused:
        from_adm(settings, state)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
