"""The DiT is the same function as diffusers' DiTTransformer2DModel and as the published code's, with their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from denoiselab.errors import CheckpointError
from denoiselab.exchange.dit import DEFAULTS, HEADS, from_diffusers, from_dit, to_diffusers
from denoiselab.models import ADM, DDPM, DiT, LogSNR
from denoiselab.schedule import Cosine, Linear
from exact import OPTIONS, normals, relative
from networks import node, perturbed

DiTTransformer2DModel = pytest.importorskip("diffusers").DiTTransformer2DModel

LINEAR = Linear()
EMBEDDINGS = {"ddpm": DDPM, "adm": ADM}
TIMES = torch.tensor([0, 1, 417, 999])
C_NOISE = LINEAR.log_snr(torch.linspace(0, 1, 1000, dtype=torch.float64)) / -8
FIXTURE = Path(__file__).parent / "fixtures" / "dit.safetensors"

SMALL = {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 3}
CONFIGS = {
    "plain": SMALL,
    "learned variance": {**SMALL, "in_channels": 3, "out_channels": 6},
    "three heads, patches of 4": {**SMALL, "in_channels": 1, "out_channels": 3, "patch_size": 4},
    "published eps": {**SMALL, "norm_eps": 1e-6},
    "large eps": {**SMALL, "norm_eps": 0.1, "patch_size": 1, "sample_size": 4},
    "narrow heads": {**SMALL, "num_attention_heads": 6, "attention_head_dim": 4, "num_layers": 3},
    "no classes": {**SMALL, "num_embeds_ada_norm": 0, "num_layers": 1},
}
CASES = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def theirs(config: dict, seed: int = 0) -> DiTTransformer2DModel:
    """A random model in float64 whose parameters are all away from 0, and whose blocks have one embedder."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    embedders = [block.norm1.emb for block in model.transformer_blocks]
    for embedder in embedders:
        embedder.load_state_dict(embedders[0].state_dict())
    return model


def ours(arguments: dict, state: dict[str, Tensor], schedule=LINEAR) -> DiT:
    net = DiT(**{**arguments, "embedding": EMBEDDINGS[arguments["embedding"]](schedule)}).double().eval()
    net.load_state_dict(state)
    return net


def made(num_classes: int = 3, embedding=None, **arguments) -> DiT:
    """One of ours with nothing left at zero, in float64."""
    given = {"shape": (2, 8, 8), "width": 16, "depth": 2, "heads": 2, **arguments}
    net = perturbed(DiT(num_classes=num_classes, embedding=embedding or DDPM(LINEAR), **given), 0.1)
    assert isinstance(net, DiT)
    return net


def answers(net: DiT, model: DiTTransformer2DModel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(ours, theirs) at several indices, with labels and without."""
    x, classes = normals(4, *net.shape).to(dtype), net.condition.num_classes
    label = torch.arange(4) % (classes + 1)
    with torch.no_grad():
        expected = model.to(dtype)(x, TIMES, label).sample
        asked = torch.where(label == classes, -1, label) if classes else None
        return net.to(dtype)(x, C_NOISE[TIMES], asked), expected


@CASES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_model_of_diffusers_is_imported_exactly(config, dtype, tolerance):
    model = theirs(config)
    found = answers(ours(*from_diffusers(model.config, model.state_dict())), model, dtype)
    assert relative(*found) < tolerance


@CASES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_network_of_ours_is_exported_exactly(config, dtype, tolerance):
    """Into a new model of diffusers, strictly."""
    arguments, _ = from_diffusers(config, theirs(config).state_dict())
    net = made(**{**arguments, "embedding": DDPM(LINEAR)})
    said, state = to_diffusers(net, C_NOISE)
    assert said.items() >= config.items()
    model = DiTTransformer2DModel.from_config(said).double().eval()
    model.load_state_dict(state, strict=True)
    assert relative(*answers(net, model, dtype)) < tolerance


@CASES
def test_there_and_back_is_the_same_bit_for_bit(config):
    model = theirs(config)
    arguments, state = from_diffusers(model.config, model.state_dict())
    said, back = to_diffusers(ours(arguments, state))
    again, once_more = from_diffusers(said, back)
    assert again == arguments
    assert {key: model.config[key] for key in said if key in CONFIGS["plain"]}.items() <= said.items()
    assert state.keys() == once_more.keys()
    assert all(torch.equal(state[key], once_more[key]) for key in state)
    if arguments["num_classes"]:  # else the only class's row has become part of a bias
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


def test_an_export_shares_no_memory_with_the_network():
    net = made()
    _, state = to_diffusers(net)
    places = {value.untyped_storage().data_ptr() for value in state.values()}
    assert len(places) == len(state)
    assert places.isdisjoint(p.untyped_storage().data_ptr() for p in net.parameters())
    assert all(value.is_contiguous() for value in state.values())


def test_only_the_norms_before_mlps_have_the_eps_of_a_configuration():
    """In diffusers' model, whatever it is set to."""
    model = theirs({**SMALL, "norm_eps": 0.1})
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert {name for name, eps in found.items() if eps == 0.1} == {f"transformer_blocks.{i}.norm3" for i in (0, 1)}
    assert set(found.values()) == {0.1, 1e-6}
    arguments, _ = from_diffusers(SMALL, theirs(SMALL).state_dict())
    assert arguments["mlp_eps"] == 1e-5


def test_defaults_are_those_of_diffusers():
    assert (
        dict(DiTTransformer2DModel(num_layers=1, num_attention_heads=1).config).items()
        >= {key: value for key, value in DEFAULTS.items() if key not in ("num_layers", "num_attention_heads")}.items()
    )


def test_a_file_of_the_former_class_is_read_the_same():
    model = theirs(SMALL)
    former = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "only_cross_attention": False}
    arguments, state = from_diffusers({**model.config, **former}, model.state_dict())
    expected, same = from_diffusers(model.config, model.state_dict())
    assert arguments == expected
    assert all(torch.equal(state[key], same[key]) for key in state)


@pytest.mark.parametrize(
    ("net", "line"),
    [
        ({"embedding": ADM(LINEAR)}, "embedding=ADM: need embedding=ddpm, the sinusoids of DiTTransformer2DModel"),
        ({"embedding": LogSNR()}, "embedding=LogSNR: need embedding=ddpm, the sinusoids of DiTTransformer2DModel"),
        ({"qk_norm": True}, "qk_norm=True: need it off, DiTTransformer2DModel has no such thing"),
        ({"rope": True}, "rope=True: need it off, DiTTransformer2DModel has no such thing"),
        ({"swiglu": True}, "swiglu=True: need it off, DiTTransformer2DModel has no such thing"),
        ({"rms_norm": True}, "rms_norm=True: need it off, DiTTransformer2DModel has no such thing"),
        ({"low_res": 1}, "low_res=1: need it off, DiTTransformer2DModel has no such thing"),
        ({"vector": 2}, "vector=True: need it off, DiTTransformer2DModel has no such thing"),
        ({"mlp_ratio": 2}, "mlp_ratio=2: need 4, as DiTTransformer2DModel has it"),
        ({"shape": (2, 8, 4)}, "shape=(2, 8, 4): need a square image, as DiTTransformer2DModel does"),
    ],
)
def test_what_diffusers_lacks_is_refused_in_a_line(net, line):
    with pytest.raises(CheckpointError) as refused:
        to_diffusers(made(**net))
    assert str(refused.value) == line


def test_timesteps_must_be_the_indices_that_the_network_counts_in():
    net = made()
    to_diffusers(net, C_NOISE)
    other = Cosine().log_snr(torch.linspace(0, 1, 1000, dtype=torch.float64)) / -8
    with pytest.raises(CheckpointError, match=r"^c_noise=1000 levels: need those of the schedule"):
        to_diffusers(net, other)


FIRST = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name=UNet2DModel: need DiTTransformer2DModel"),
        ({"nonsense": 1}, "nonsense=1: need a key of DiTTransformer2DModel that is known here"),
        ({"activation_fn": "geglu"}, "activation_fn=geglu: need gelu-approximate"),
        ({"attention_bias": False}, "attention_bias=False: need True"),
        ({"dropout": 0.1}, "dropout=0.1: need 0.0"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True: need False"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8: need null, a DiT has no such thing"),
        ({"sample_size": [8, 8]}, "sample_size=[8, 8]: need a whole number > 0"),
        ({"sample_size": 9}, "patch=2: need a divisor of the images' sides 9 and 9"),
        ({"out_channels": 5}, "out_channels=5: need a multiple of in_channels=4"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None: need a number of classes"),
        ({"num_embeds_ada_norm": 5}, "class_embedder.embedding_table.weight: has (4, 16), the configuration wants"),
        ({"num_layers": 1}, "transformer_blocks.1."),
        ({"num_layers": 3}, "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight="),
    ],
)
def test_a_configuration_that_is_no_dit_is_refused_in_a_line(change, line):
    model = theirs(SMALL)
    with pytest.raises(CheckpointError) as refused:
        from_diffusers({**model.config, **change}, model.state_dict())
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_embedders_that_differ_between_blocks_are_refused():
    state = theirs(SMALL).state_dict()
    state[FIRST] = state[FIRST] + 1e-6
    with pytest.raises(CheckpointError, match=f"^{FIRST}=.*: need the same values in every block"):
        from_diffusers(SMALL, state)


def test_positions_in_a_file_must_be_the_fixed_ones():
    model = theirs(SMALL)
    state = {**model.state_dict(), "pos_embed.pos_embed": model.pos_embed.pos_embed}
    from_diffusers(SMALL, state)
    state["pos_embed.pos_embed"] = state["pos_embed.pos_embed"] + 0.01
    with pytest.raises(CheckpointError, match=r"^pos_embed.pos_embed=\(1, 16, 16\): need the fixed sines and cosines"):
        from_diffusers(SMALL, state)


def test_every_weight_is_used_and_needed():
    state = theirs(SMALL).state_dict()
    for key in state:
        with pytest.raises(CheckpointError):
            from_diffusers(SMALL, {name: value for name, value in state.items() if name != key})
    with pytest.raises(CheckpointError, match=r"^other: the configuration has no such tensor$"):
        from_diffusers(SMALL, {**state, "other": torch.zeros(1)})


# The published code's


def published() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state, inputs and output) of a small model of facebookresearch/DiT."""
    found = load_file(FIXTURE)
    state = {key.removeprefix("state."): found.pop(key).double() for key in list(found) if key.startswith("state.")}
    return state, found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_published_model_is_read_exactly(dtype, tolerance):
    state, given = published()
    arguments, converted = from_dit(state, heads=2)
    assert arguments == {
        "shape": [3, 8, 8],
        "num_classes": 3,
        "embedding": "adm",
        "patch": 2,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "mlp_ratio": 4.0,
        "outputs": 2,
    }
    net = ours(arguments, converted).to(dtype)
    label = torch.where(given["label"] == 3, -1, given["label"])
    with torch.no_grad():
        found = net(given["x"].to(dtype), C_NOISE[given["t"]], label)
    assert relative(found.double(), given["y"]) < tolerance


def test_heads_of_the_published_widths_are_the_options():
    published_sizes = [name for name in OPTIONS["model"] if name.startswith("dit_") and "digits" not in name]
    assert len(published_sizes) == 12
    assert {node(name)["width"]: node(name)["heads"] for name in published_sizes} == HEADS


@pytest.mark.parametrize(
    ("without", "extra", "heads", "line"),
    [
        ("pos_embed", {}, 2, "pos_embed: the weights have no such tensor; need a DiT of facebookresearch/DiT"),
        ("blocks.1.attn.qkv.bias", {}, 2, "blocks.1.attn.qkv.bias: the weights have no such tensor"),
        (
            "",
            {"blocks.0.attn.q_norm.weight": torch.ones(8)},
            2,
            "blocks.0.attn.q_norm.weight: the configuration has no",
        ),
        ("", {"pos_embed": torch.zeros(1, 16, 16)}, 2, "pos_embed=(1, 16, 16): need the fixed sines and cosines"),
        ("", {}, None, "heads=None: need a number, 16 is none of the published widths [384, 768, 1024, 1152]"),
        ("", {}, 3, "heads=3: need a divisor of width=16"),
    ],
)
def test_weights_that_are_no_dit_are_refused_in_a_line(without, extra, heads, line):
    state = {key: value for key, value in published()[0].items() if key != without}
    with pytest.raises(CheckpointError) as refused:
        from_dit({**state, **extra}, heads)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)
