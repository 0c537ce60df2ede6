"""`denoiselab summary`: counts by hand, the profiler as a second implementation, and the published sizes."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from denoiselab.cli import run
from denoiselab.cli.summary import summary_of
from denoiselab.compose import compose, plain
from denoiselab.ema import EMA
from denoiselab.models import MLP, UNet
from denoiselab.models.layers import Conditioner, unmixed
from denoiselab.summary import NARROW, WIDE, WIDEST, Summary, summarise

PIXELS, CHANNELS = 16, 8


class Block(nn.Module):
    def __init__(self, norm: bool):
        super().__init__()
        self.norm = nn.GroupNorm(2, CHANNELS) if norm else nn.Identity()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return F.silu(self.conv(self.norm(h)))


class Tiny(nn.Module):
    """Four sides of four pixels: small enough to count by hand."""

    def __init__(self, norm: bool = False, blocks: int = 3):
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(blocks))
        self.last = nn.Conv2d(CHANNELS, 2, 1)

    @property
    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return self.last(h)


IMAGE = 4 * CHANNELS * PIXELS
"""Bytes of a sample inside the network, in float32."""

X = 4 * 2 * PIXELS
"""Bytes of a sample."""


def tiny(device: str = "meta", precision: str = "32-true", batch: int = 2, **arguments) -> Summary:
    with torch.device(device):
        net = Tiny(**arguments)
    return summarise(net, (2, 4, 4), batch=batch, precision=precision)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_network_that_was_counted_by_hand(device):
    found = tiny(device)
    assert found.parameters == (2 * 9 + 1) * 8 + 3 * (8 * 9 + 1) * 8 + (8 + 1) * 2
    assert found.multiply_adds == PIXELS * (2 * 9 * 8 + 3 * 8 * 9 * 8 + 8 * 2)
    # Each convolution keeps its input, each SiLU too; the SiLU's output is the next convolution's input.
    assert found.activations == X + 3 * (IMAGE + IMAGE) + IMAGE
    # x, each unit's input, the last convolution's; and inside the unit that is computed again, what its SiLU keeps.
    assert found.recomputed == X + 3 * IMAGE + IMAGE + IMAGE
    weights = 4 * found.parameters
    assert found.memory == {"weights": weights, "gradients": weights, "optimizer": 0, "ema": 0, "autocast": 0}
    assert found.total() == 2 * weights + 2 * found.activations
    assert found.total(recompute=True) == 2 * weights + 2 * found.recomputed


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_changes_totals_only(batch):
    one, some = tiny(batch=1), tiny(batch=batch)
    assert (some.multiply_adds, some.activations, some.recomputed) == (
        one.multiply_adds,
        one.activations,
        one.recomputed,
    )
    assert some.parts == one.parts
    assert some.total() - one.total() == (batch - 1) * one.activations


def test_parts_are_the_whole_and_equal_neighbours_share_a_row():
    found = tiny()
    assert [(part.name, part.times, part.unit) for part in found.parts] == [
        ("first", 1, False),
        ("blocks.0 to blocks.2", 3, True),
        ("last", 1, False),
    ]
    assert [part.output for part in found.parts] == [[8, 4, 4], [8, 4, 4], [2, 4, 4]]
    assert [part.activations for part in found.parts] == [X, 6 * IMAGE, IMAGE]
    for key in ("parameters", "multiply_adds", "activations"):
        assert sum(getattr(part, key) for part in found.parts) == getattr(found, key)


@pytest.mark.parametrize("model", ["unet_digits", "experts_digits", "edm2_digits"])
def test_parts_are_the_whole_of_shipped_networks(model):
    found = described(f"model={model}")
    assert len(found.parts) > 5
    for key in ("parameters", "multiply_adds", "activations"):
        assert sum(getattr(part, key) for part in found.parts) == pytest.approx(getattr(found, key))


def test_autocast_keeps_half_of_products_and_all_of_norms():
    half, plain_, normed = tiny(precision="bf16-mixed"), tiny(), tiny(precision="bf16-mixed", norm=True)
    assert half.activations == plain_.activations / 2
    assert half.memory["autocast"] == 2 * half.parameters
    assert half.memory["weights"] == plain_.memory["weights"]
    # first: x. Each block: the norm's input in float32 and two moments per group in float32; the convolution's input
    # and the SiLU's input halved. last: its input.
    block = IMAGE + 2 * 2 * 4 + IMAGE / 2 + IMAGE / 2
    assert normed.activations == X / 2 + 3 * block + IMAGE / 2
    assert normed.memory["autocast"] == 2 * half.parameters


@pytest.mark.parametrize(("precision", "size"), [("bf16-true", 2), ("64-true", 8)])
def test_true_precisions_change_everything(precision, size):
    found, single = tiny(precision=precision), tiny()
    assert found.activations == single.activations * size / 4
    assert found.memory["weights"] == found.memory["gradients"] == size * found.parameters
    assert found.memory["autocast"] == 0


def test_autocast_casts_what_torch_says():
    """The header that torch is built from, and ships."""
    header = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text()
    renamed = {"interpolate": "upsample_nearest2d", "grid_sample": "grid_sampler", "rmatmul": "matmul", "rpow": "pow"}
    spaces = {"multi_dot": "linalg_multi_dot", "vecdot": "linalg_vecdot", "norm": "linalg_vector_norm"}
    spaces |= {"vector_norm": "linalg_vector_norm", "matrix_norm": "linalg_matrix_norm"}
    lists = {
        "LOWER_PRECISION_FP": NARROW,
        "FP32": WIDE - {"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod", *spaces},
        "FP32_SET_OPT_DTYPE": {"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod", "vector_norm"},
        "PROMOTE": WIDEST,
    }
    for name, ours in lists.items():
        body = re.search(rf"#define AT_FORALL_{name}\(_\)((?:.*\\\n)+.*)", header)
        assert body is not None
        theirs = set(re.findall(r"_\((\w+)", body[1]))
        assert {{**renamed, **spaces}.get(op, op) for op in ours} <= theirs, name
    assert not NARROW & WIDE
    assert not WIDEST & (NARROW | WIDE)


class Told(nn.Module):
    """A product under autocast, and one that must not be: what conditions a network is float32."""

    def __init__(self):
        super().__init__()
        self.condition, self.last = Conditioner(8, 16), nn.Linear(2, 2)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        with unmixed(c_noise.device.type):
            told = self.condition(c_noise)
        return self.last(x) + told.sum()


def test_what_a_network_keeps_in_float32_stays_so_under_autocast():
    with torch.device("meta"):
        net = Told()
    assert summarise(net, (2,), precision="bf16-mixed").memory["autocast"] == 2 * (2 * 2 + 2)
    autocast = torch.autocast
    assert torch.autocast is autocast, "it is put back"
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


class Attends(nn.Module):
    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, width/heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_attention_counts_both_products_and_keeps_no_matrix():
    n, width, heads = 64, 32, 4
    with torch.device("meta"):
        net = Attends(heads, width)
    found = summarise(net, (n, width))
    assert found.multiply_adds == n * width * 3 * width + 2 * n * n * width
    kept = 4 * (n * width + 3 * n * width + n * width + heads * n)  # x; q, k, v in one storage; output; one per row
    assert kept <= found.activations <= kept + 64  # and the two numbers of a random generator
    assert found.activations < 4 * heads * n * n


NETWORKS = {
    "unet": lambda: (UNet((3, 16, 16), num_classes=3, channels=32, attention=(8,)), (3, 16, 16)),
    "mlp": lambda: (MLP((2,), num_classes=3, width=64), (2,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_profiler_finds_the_same_memory(name):
    """What is allocated in a forward pass, its inputs among it, and not freed is what was kept, and y."""
    torch.manual_seed(0)
    net, shape = NETWORKS[name]()
    given = torch.randn(4, *shape), torch.randn(4), torch.zeros(4, dtype=torch.int64)

    def forward() -> Tensor:
        x, c_noise, label = (value.clone() for value in given)
        return net(x, c_noise, label=label)

    forward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = forward()
    live = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert live == summarise(net, shape, num_classes=3, batch=4).activations * 4 + 4 * y.numel()


def test_adamw_has_two_moments_and_the_ema_is_float32():
    with torch.device("meta"):
        net = MLP((2,), width=32)
    found = summarise(net, (2,), precision="bf16-true", optimizer=torch.optim.AdamW, ema=lambda model: EMA(model))
    n, tensors = found.parameters, len(list(net.parameters()))
    assert found.memory["optimizer"] == 2 * 2 * n + 4 * tensors  # and the number of steps of each tensor
    assert found.memory["ema"] == 4 * n + 8
    assert summarise(net, (2,), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)).memory["optimizer"] == 0


class Looks(torch.optim.SGD):
    def step(self, closure=None):
        float(self.param_groups[0]["params"][0].sum())


def test_an_optimizer_that_looks_at_values_is_unknown():
    with torch.device("meta"):
        net = MLP((2,), width=32)
    found = summarise(net, (2,), optimizer=lambda parameters: Looks(parameters, lr=1.0))
    assert found.memory["optimizer"] is None
    assert found.total() == 2 * found.memory["weights"] + found.activations


@functools.cache
def described(*options: str) -> Summary:
    return summary_of(plain(compose("summary", options)), list(options))


def test_facts_are_the_data_sets_unless_given():
    own = described()
    assert own == described("shape=[1,8,8]", "num_classes=10", "batch=128")
    assert own.batch == 128
    assert described("trainer.accumulate=4", "trainer.devices=2").batch == 16  # of 128
    assert described("num_classes=0").parameters < own.parameters
    assert described("shape=[1,8,8]").parameters == described("num_classes=0").parameters
    assert described("loss=learned_hybrid") == described("outputs=2")
    assert described("vector=5").parameters == own.parameters + (128 + 1) * 5 + 128


def test_no_data_set_is_needed_with_a_shape(monkeypatch):
    monkeypatch.setattr("denoiselab.experiment.Parts.data", property(lambda parts: pytest.fail("looked at the data")))
    assert described.__wrapped__("shape=[1,16,16]", "num_classes=7", "embedding=adm", "schedule=linear").parameters > 0


def test_one_network_is_a_table(capsys, tmp_path: Path):
    assert run(["summary", "model.channels=64", f"output={tmp_path / 'made' / 'summary.json'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "made" / "summary.json").read_text())
    assert found["options"][0] == "model.channels=64"
    assert found["parameters"] > described().parameters
    assert lines[0].split() == ["part", "output", "parameters", "multiply-adds", "activations"]
    (total,) = (line.split() for line in lines if line.startswith("total"))
    assert total[1] == f"{found['parameters'] / 1e6:.2f}"
    assert f"in all {found['total'] / 2**20:.1f} MiB" in " ".join("\n".join(lines).split())
    assert "128 samples at a time, 32-true" in "\n".join(lines)


def test_a_sweep_is_a_row_per_network(capsys, tmp_path: Path):
    file = tmp_path / "summary.json"
    options = ["model=mlp", "shape=[2]", "model.width=32,64", f"output={file}"]
    assert run(["summary", "-m", *options]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:2] == ["options", "parameters"]
    assert [row.split()[0] for row in rows[1:3]] == ["model.width=32", "model.width=64"]
    assert [found["parameters"] for found in json.loads(file.read_text())] == [
        sum(p.numel() for p in MLP((2,), width=width).parameters()) for width in (32, 64)
    ]


MISTAKES = {
    "shape=4": "shape=4: need a list of whole numbers or null",
    "shape=[1,0,8]": "shape=[1, 0, 8]: need whole numbers > 0",
    "shape=[1,7,8]": "square",
    "num_classes=-1": "num_classes=-1: need a whole number >= 0",
    "batch=0": "batch=0: need a number of samples >= 1",
    "trainer.precision=8-true": "trainer.precision=8-true: need one of 32-true",
    "model=mlp": "model.shape=(1, 8, 8)",
    "model=unet_cifar": "did you mean unet_cifar10?",
    "embedding=adm model=edm2_digits": "does not use it",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(options, capsys):
    assert run(["summary", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert MISTAKES[options] in err
    assert err.count("\n") == 1


def test_help_says_whose_options_it_takes(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(["summary", "--help"])
    out = capsys.readouterr().out
    assert "every option of `denoiselab train`" in out
    assert "shape: null" in out


# Parameters in millions and multiply-adds in thousand millions. DiT: Peebles and Xie 2023 (arXiv:2212.09748, table 4)
# at 4 x 32 x 32; its section 5.1 has ADM's. DDPM: arXiv:2006.11239, appendix B. ADM: arXiv:2105.05233, appendix I.
DIT = ["shape=[4,32,32]", "num_classes=1000", "outputs=2"]
PUBLISHED = {
    "dit_s_8": (DIT, 33, 0.36),
    "dit_s_4": (DIT, 33, 1.41),
    "dit_s_2": (DIT, 33, 6.06),
    "dit_b_8": (DIT, 131, 1.42),
    "dit_b_4": (DIT, 130, 5.56),
    "dit_b_2": (DIT, 130, 23.01),
    "dit_l_8": (DIT, 459, 5.01),
    "dit_l_4": (DIT, 458, 19.70),
    "dit_l_2": (DIT, 458, 80.71),
    "dit_xl_8": (DIT, 676, 7.39),
    "dit_xl_4": (DIT, 675, 29.05),
    "dit_xl_2": (DIT, 675, 118.64),
    "unet_cifar10": (["shape=[3,32,32]"], 35.7, None),
    "unet_adm64": (["shape=[3,64,64]", "num_classes=1000", "outputs=2"], 296, None),
    "unet_adm256": (["shape=[3,256,256]", "num_classes=1000", "outputs=2"], 554, 1120),
    "unet_sr64_256": (["shape=[3,256,256]", "num_classes=1000", "outputs=2", "low_res=3"], 312, None),
}


def rounded(value: float, published: float) -> bool:
    """Whether a value becomes the published one when it is rounded to as many digits, or is off by 0.03%: norms and
    biases are counted by some."""
    digits = len(str(published).partition(".")[2].rstrip("0")) if isinstance(published, float) else 0
    return abs(value - published) <= 0.5 * 10**-digits + 3e-4 * published


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes(model):
    options, parameters, multiply_adds = PUBLISHED[model]
    found = described(f"model={model}", *options, "batch=1")
    assert rounded(found.parameters / 1e6, parameters), found.parameters
    assert multiply_adds is None or rounded(found.multiply_adds / 1e9, multiply_adds), found.multiply_adds


def test_published_cost_of_making_64_pixels_and_enlarging_them():
    """ADM-U's two networks have 742 thousand million multiply-adds (arXiv:2212.09748, section 5.1)."""
    small, large = (
        described(f"model={model}", *PUBLISHED[model][0], "batch=1") for model in ("unet_adm64", "unet_sr64_256")
    )
    assert round(small.multiply_adds / 1e9) + round(large.multiply_adds / 1e9) == 742
