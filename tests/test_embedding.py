"""How networks are told of the noise level: both published conventions, the index, and none."""

import copy
import math
import pickle

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from denoiselab.compose import compose
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.models import ADM, DDPM, MLP, Dead, LogSNR, NoiseEmbedding
from denoiselab.models.embedding import NOISE_SCALE
from denoiselab.models.layers import Conditioner
from denoiselab.schedule import Flow, Linear, Schedule
from exact import OPTIONS, make
from networks import build, cases, inputs, perturbed

TABLED = [name for name in OPTIONS["schedule"] if not make("schedule", name).learns]
TOLD = [case for case in dict(cases()).items() if hasattr(build(*case), "condition")]
"""One case per network that has this axis itself."""


def on_table(embedding: NoiseEmbedding, index: list[float]) -> Tensor:
    """c_noise at places of its table, between the points in proportion."""
    table = embedding.c_noise_table
    return torch.stack([torch.lerp(*table[int(i) : int(i) + 2], i % 1) if i % 1 else table[int(i)] for i in index])


# The two conventions


@pytest.mark.parametrize("channels", [4, 8, 64, 128])
@pytest.mark.parametrize("index", [0, 1, 10, 499, 999])
def test_ddpm_in_closed_form(channels, index):
    """[sin(index f_i), ..., cos(index f_i), ...], f from 1 down to exactly 1/10000."""
    half = channels // 2
    frequencies = [10_000 ** (-i / (half - 1)) for i in range(half)]
    expected = [math.sin(index * f) for f in frequencies] + [math.cos(index * f) for f in frequencies]
    embedding = DDPM(Linear())
    found = embedding(on_table(embedding, [index]), channels)
    assert found.shape == (1, channels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), torch.tensor(expected).double(), rtol=0, atol=6e-5)


@pytest.mark.parametrize("channels", [4, 8, 64, 256])
@pytest.mark.parametrize("index", [0, 1, 10, 499, 999])
def test_adm_in_closed_form(channels, index):
    """[cos(index f_i), ..., sin(index f_i), ...], f from 1 down to 10000^(-(half - 1)/half)."""
    half = channels // 2
    frequencies = [10_000 ** (-i / half) for i in range(half)]
    expected = [math.cos(index * f) for f in frequencies] + [math.sin(index * f) for f in frequencies]
    embedding = ADM(Linear())
    found = embedding(on_table(embedding, [index]), channels)
    torch.testing.assert_close(found[0].double(), torch.tensor(expected).double(), rtol=0, atol=6e-5)


@pytest.mark.parametrize("channels", [4, 6, 64, 256])
def test_log_snr_in_closed_form(channels):
    c_noise = torch.linspace(-3.4, 3.4, 41, dtype=torch.float64)
    half = channels // 2
    angles = NOISE_SCALE * c_noise[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    found = LogSNR()(c_noise, channels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=2e-4)
    twice = LogSNR(scale=2 * NOISE_SCALE)(c_noise / 2, channels)
    torch.testing.assert_close(twice, found, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("embedding", "flip", "shift"), [(DDPM, False, 1), (ADM, True, 0)])
@pytest.mark.parametrize("channels", [32, 128, 256])
def test_both_conventions_are_those_of_diffusers(embedding, flip, shift, channels):
    """At all 1,000 indices and between them; its other settings give something else."""
    told = embedding(Linear())
    index = torch.cat([torch.arange(1000.0), torch.tensor([0.25, 100.5, 998.75])])
    found = told(on_table(told, index.tolist()), channels)

    def theirs(flip: bool, shift: int) -> Tensor:
        return get_timestep_embedding(index, channels, flip_sin_to_cos=flip, downscale_freq_shift=shift)

    torch.testing.assert_close(found, theirs(flip, shift), rtol=0, atol=1e-5)
    for other in ((not flip, shift), (flip, 1 - shift)):
        assert (found - theirs(*other)).abs().max() > 0.5


# The index


class Seen(nn.Module):
    """A network that keeps the c_noise that it was given."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.c_noise = c_noise
        return 0 * x


def through_a_denoiser(schedule: Schedule, t: Tensor) -> Tensor:
    """c_noise as a network is given it in training, all in t's dtype."""
    net, (alpha_t, sigma_t) = Seen(t.dtype), schedule(t[:, None])
    Denoiser(net, make("target", "v"))(torch.zeros(len(t), 1, dtype=t.dtype), alpha_t, sigma_t)
    return net.c_noise


@pytest.mark.parametrize("schedule", TABLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_index_is_whole_at_every_point_of_every_schedule(schedule, dtype):
    """t = k/(T - 1) is index k, exactly, after c_noise went through a denoiser in float32 too."""
    schedule = make("schedule", schedule)
    t = torch.linspace(0, 1, schedule.points or 1000, dtype=torch.float64).to(dtype)
    found = DDPM(schedule).index(through_a_denoiser(schedule, t))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.arange(float(len(t))))


@pytest.mark.parametrize("points", [30, 250, 4000])
@pytest.mark.parametrize("name", ["linear", "flow"])
def test_the_index_of_a_table_of_another_length(name, points):
    """From 0 to T - 1, of the table's own T or, where the schedule has no table, of the T that is asked for."""
    tabled = name == "linear"
    schedule = make("schedule", name, points=points) if tabled else make("schedule", name)
    embedding = ADM(schedule) if tabled else ADM(schedule, points=points)
    t = torch.linspace(0, 1, points, dtype=torch.float64).float()
    assert torch.equal(embedding.index(through_a_denoiser(schedule, t)), torch.arange(float(points)))


@pytest.mark.parametrize("schedule", TABLED)
def test_the_index_between_points(schedule):
    """In proportion to c_noise, rising, and held at the ends."""
    embedding = ADM(make("schedule", schedule))
    table = embedding.c_noise_table
    for share in (0.1, 0.5, 0.9):
        found = embedding.index(torch.lerp(table[:-1], table[1:], share))
        torch.testing.assert_close(found, torch.arange(float(len(table) - 1)) + share, rtol=0, atol=1e-3)
    ramp = torch.linspace(table[0].item() - 0.1, table[-1].item() + 0.1, 20_001, dtype=torch.float64)
    index = embedding.index(ramp)
    assert (index.diff() >= 0).all()
    assert index[0] == 0
    assert index[-1] == len(table) - 1
    inside = (ramp > table[0]) & (ramp < table[-1])
    assert index[inside].unique().numel() > 0.9 * inside.sum()


@pytest.mark.parametrize("sampled", TABLED)
def test_the_index_along_another_schedule_is_that_of_the_same_log_snr(sampled):
    """A network that was trained along one schedule is told the same at the same level of another."""
    trained, other = Linear(), make("schedule", sampled)
    embedding = ADM(trained)
    t = torch.linspace(0, 1, 1000, dtype=torch.float64)[100:900]
    log_snr = trained.log_snr(t)
    ends = other.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    shared = (log_snr < ends[0]) & (log_snr > ends[1])
    assert shared.sum() > 100
    found = embedding.index(through_a_denoiser(other, other.inverse(log_snr[shared])))
    assert torch.equal(found, torch.arange(100.0, 900.0)[shared])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["schedule=adaptive"], "embedding.schedule=Adaptive: need one that does not learn"),
        (["schedule=ve", "schedule.sigma_min=1e-8"], "embedding.schedule=VE: need sigma/alpha between 1e-6 and 1e6"),
        (["+embedding.points=500"], "embedding.points=500: need the 1000 of its table"),
        (["schedule=flow", "+embedding.points=1"], "embedding.points=1: need at least 2"),
        (["embedding=log_snr", "embedding.scale=0"], "embedding.scale=0: need a number > 0"),
        (["embedding=log_snr", "embedding.scale=nan"], "embedding.scale=nan: need a finite number"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(overrides, line):
    with pytest.raises(UserError) as refused:
        _ = Parts(resolve(compose("train", ["embedding=ddpm", *overrides]))).denoiser
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("channels", [3, 2, 0])
def test_features_are_an_even_number(channels):
    with pytest.raises(ValueError, match=rf"^channels={channels}: need an even number >= 4$"):
        Conditioner(channels, 8)


# Precision, devices, copies


TABLE = Linear()
EVERY = {
    "log_snr": lambda schedule=TABLE: LogSNR(),
    "ddpm": lambda schedule=TABLE: DDPM(schedule),
    "adm": lambda schedule=TABLE: ADM(schedule),
    "dead": lambda schedule=TABLE: Dead(),
}
EMBEDDINGS = pytest.mark.parametrize("name", EVERY)


def test_every_option_is_tested_here():
    assert set(EVERY) == set(OPTIONS["embedding"])
    for name, made in EVERY.items():
        assert type(make("embedding", name)) is type(made())


def features(net: nn.Module, *arguments: Tensor, autocast: bool = False) -> Tensor:
    """What reaches the first layer of a network's conditioner."""
    (conditioner,) = (module for module in net.modules() if isinstance(module, Conditioner))
    seen = []
    handle = conditioner.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net(*arguments)
    handle.remove()
    return seen[0]


@EMBEDDINGS
@pytest.mark.parametrize(("model", "shape"), TOLD)
def test_features_are_float32_whatever_the_network_is(name, model, shape):
    """Under autocast; in modules of low precision, rounded once after cosine and sine (an angle of 875 radians of
    rounded frequencies is another angle); and where Lightning has set another default dtype."""
    net = build(model, shape, embedding=EVERY[name]())
    x, c_noise, label, _ = inputs(net, shape)
    x, c_noise = x.float(), c_noise.float()
    plain = features(net, x, c_noise, label)
    assert plain.dtype == torch.float32
    assert torch.equal(features(net, x, c_noise, label, autocast=True), plain)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(net).to(dtype)
        torch.set_default_dtype(dtype)
        try:
            found = features(low, x.to(dtype), c_noise, label)
            assert torch.equal(net.condition.embedding(c_noise, 64), EVERY[name]()(c_noise, 64))
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == dtype
        assert torch.equal(found, plain.to(dtype))


@EMBEDDINGS
def test_the_conditioner_is_float32_under_autocast(name):
    conditioner = Conditioner(16, 8, num_classes=3, vector=2, embedding=EVERY[name]())
    asked = torch.tensor([-1.0, 0.3]), torch.tensor([-1, 2]), torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = conditioner(*asked)
    assert found.dtype == torch.float32
    assert torch.equal(found, conditioner(*asked))


@EMBEDDINGS
def test_an_embedding_has_no_state_and_can_be_copied(name):
    embedding, c_noise = EVERY[name](), torch.linspace(-2, 2, 7)
    assert not embedding.state_dict()
    assert not list(embedding.parameters())
    expected = embedding(c_noise, 16)
    for twin in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding)), copy.deepcopy(embedding).bfloat16()):
        assert torch.equal(twin(c_noise, 16), expected)
        assert {buffer.dtype for buffer in twin.buffers()} <= {torch.float64}


@EMBEDDINGS
def test_an_embedding_follows_its_device_and_reads_no_value_on_the_host(name):
    """Moved to meta, and made there beside a schedule that is not: no value can be read."""
    moved = EVERY[name]().to("meta")
    schedule = Linear()
    with torch.device("meta"):
        made = EVERY[name](schedule)
        for embedding in (moved, made):
            found = embedding(torch.zeros(5), 16)
            assert (found.shape, found.dtype, found.device.type) == ((5, 16), torch.float32, "meta")


@EMBEDDINGS
def test_a_network_compiles_whole(name):
    torch._dynamo.reset()
    net = perturbed(MLP((2,), 3, vector=2, embedding=EVERY[name](), width=16, depth=1)).float()
    asked = torch.randn(4, 2), torch.linspace(-2, 2, 4), torch.tensor([-1, 0, 1, 2])
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*asked), net(*asked), rtol=1e-5, atol=1e-5)


# What the network makes of it


@EMBEDDINGS
@pytest.mark.parametrize(("model", "shape"), TOLD)
def test_the_noise_level_is_told_or_not(name, model, shape):
    """Dead: another level changes nothing, to the bit. The others: a nat of log-SNR changes the output by a hundredth
    of its size at least."""
    net = perturbed(build(model, shape, embedding=EVERY[name]()), 0.2)
    x, c_noise, label, more = inputs(net, shape)
    c_noise = c_noise.clamp(-1, 1)
    with torch.no_grad():
        y = net(x, c_noise, label, **more)
        for nats in (-1, 1, 8):
            change = net(x, c_noise + nats / 8, label, **more) - y
            if name == "dead":
                assert not change.any()
            else:
                assert change.norm() > 1e-2 * y.norm()


def test_a_dead_network_trains_all_the_same():
    """What the embedding feeds has no gradient from it; everything else learns."""
    net = perturbed(MLP((2,), 3, embedding=Dead(), width=16, depth=2))
    x, c_noise, label, _ = inputs(net, (2,))
    net(x, c_noise, label).square().mean().backward()
    gradients = {name: p.grad.abs().max().item() for name, p in net.named_parameters()}
    assert [name for name, value in gradients.items() if value == 0] == ["condition.mlp.0.weight"]


def test_flow_has_no_table_of_its_own():
    """Its index is 999 t."""
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    found = DDPM(Flow()).index(Flow().log_snr(t) / -8)
    torch.testing.assert_close(found.double(), 999 * t, rtol=0, atol=1e-3)
