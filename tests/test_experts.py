"""A network per interval of noise levels: every level has one, each sample goes to its own, and only that learns."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import denoiselab
from denoiselab.denoiser import Denoiser
from denoiselab.ema import EMA
from denoiselab.errors import UserError
from denoiselab.models import ADM, EDM2, MLP, Dead, Experts, UNet
from denoiselab.schedule import Cosine, Linear
from exact import make, normals
from networks import build, perturbed

NAMES = ("noisy", "middle", "clean")
EDGES = [-1.5, 2.0]


def experts(edges: list[float] = EDGES, num_classes: int = 3, **more) -> Experts:
    """Three MLPs of different sizes."""
    made = {name: partial(MLP, width=8 * (i + 1), depth=1) for i, name in enumerate(NAMES)}
    return perturbed(Experts((2,), made, edges, num_classes=num_classes, **more))


def at(*log_snr: float) -> Tensor:
    return torch.tensor(log_snr, dtype=torch.float64) / -8


def asked(n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Levels in all three intervals, out of order, the edges among them."""
    return normals(n, 2), at(9.0, -9.0, 0.0, 2.0, -1.5, -1.6, 1.9)[:n], torch.arange(n) % 4 - 1


class Seen(nn.Module):
    """A network that says its number, and keeps how many rows it was given."""

    def __init__(self, shape: tuple[int, ...], number: float):
        super().__init__()
        self.number, self.rows = nn.Parameter(torch.tensor(number)), []

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.number.expand_as(x)


# Who answers


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32, allow_subnormal=False), max_size=6, unique=True).map(sorted),
    st.lists(st.floats(-60, 60, width=32, allow_subnormal=False), min_size=1, max_size=20),
)
def test_every_level_belongs_to_one_interval(edges: list[float], log_snr: list[float]):
    """Interval k is edge_k <= log_snr < edge_{k+1}, without ends; each sample is answered by its own, in place."""
    net = Experts((1,), {str(k): partial(Seen, number=float(k)) for k in range(len(edges) + 1)}, edges)
    bounds = [-math.inf, *edges, math.inf]
    expected = [[k for k in range(len(edges) + 1) if bounds[k] <= value < bounds[k + 1]] for value in log_snr]
    assert {len(found) for found in expected} == {1}
    with torch.no_grad():
        y = net(torch.zeros(len(log_snr), 1), torch.tensor(log_snr) / -8)
    assert y.flatten().tolist() == [k for (k,) in expected]


def test_the_first_expert_has_the_noise_and_an_edge_is_the_cleaner_ones():
    net = experts()
    assert net.route(at(-1000.0, -1.5001, -1.5, 0, 1.9999, 2.0, 1000.0)).tolist() == [0, 0, 1, 1, 1, 2, 2]
    t = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert net.route(Cosine().log_snr(t) / -8).tolist() == [0, 1, 2]


def test_each_sample_is_answered_as_by_its_expert_alone():
    net, (x, c_noise, label) = experts(), asked()
    with torch.no_grad():
        found = net(x, c_noise, label)
        for i, name in enumerate([NAMES[k] for k in (2, 0, 1, 2, 1, 0, 1)]):
            alone = net.experts[name](x[i : i + 1], c_noise[i : i + 1], label[i : i + 1])
            torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-12, atol=1e-12)


def test_every_condition_goes_with_its_sample():
    """Label, vector and an image to be enlarged, in any order of levels."""
    made = {name: partial(UNet, channels=32, multipliers=[1], blocks=1) for name in NAMES}
    net = perturbed(Experts((1, 8, 8), made, EDGES, num_classes=3, vector=2, low_res=1))
    _, c_noise, label = asked()
    rows = {"label": label, "vector": normals(7, 2, seed=1), "low_res": normals(7, 1, 4, 4, seed=2)}
    x, order = normals(7, 1, 8, 8), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    with torch.no_grad():
        found = net(x, c_noise, **rows)
        for i in range(7):
            own = {key: value[i : i + 1] for key, value in rows.items()}
            alone = net.experts[NAMES[net.route(c_noise)[i]]](x[i : i + 1], c_noise[i : i + 1], **own)
            torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-10, atol=1e-10)
        turned = net(x[order], c_noise[order], **{key: value[order] for key, value in rows.items()})
    torch.testing.assert_close(turned, found[order], rtol=1e-10, atol=1e-10)


def test_a_sampler_meets_one_expert_at_a_time():
    """Evaluation calls nobody for nothing; training calls each once, for one row at least."""
    net = Experts((2,), {name: partial(Seen, number=0.0) for name in NAMES}, EDGES)
    x = torch.zeros(5, 2)
    with torch.no_grad():
        net.eval()(x, at(0, 0, 0, 0, 0))
    assert [expert.rows for expert in net.experts.values()] == [[], [5], []]
    net.train()(x, at(0, 9, 0, 9, 0))
    assert [expert.rows for expert in net.experts.values()] == [[1], [5, 3], [2]]


# Who learns


@pytest.mark.parametrize("used", [[0], [2], [0, 2], [0, 1, 2]])
def test_gradients_reach_only_the_experts_that_were_used(used):
    """The others' are zero, exactly, and there, as they are on another rank that used them."""
    net = experts().train()
    c_noise = at(*[(-9.0, 0.0, 9.0)[k] for k in used for _ in range(3)])
    net(normals(len(c_noise), 2), c_noise).square().sum().backward()
    for k, expert in enumerate(net.experts.values()):
        gradients = [p.grad for p in expert.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients) == (k in used)


def test_gradients_are_those_of_the_experts_alone():
    net, (x, c_noise, label) = experts().train(), asked()
    weight = normals(7, 2, seed=5)
    (net(x, c_noise, label) * weight).sum().backward()
    together = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    for i, k in enumerate(net.route(c_noise)):
        own = slice(i, i + 1)
        (net.experts[NAMES[k]](x[own], c_noise[own], label[own]) * weight[own]).sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-10, atol=1e-10)


def test_experts_with_the_same_weights_are_one_network():
    """repeated() starts all of them from one trained network; their EMA too."""
    one = perturbed(build("unet_digits", (1, 8, 8)))
    net = perturbed(build("experts_digits", (1, 8, 8), edges=EDGES))
    net.load_state_dict(net.repeated(one.state_dict()))
    x, (_, c_noise, label) = normals(7, 1, 8, 8), asked()
    with torch.no_grad():
        expected = one(x, c_noise, label)
        torch.testing.assert_close(net(x, c_noise, label), expected, rtol=1e-10, atol=1e-10)
        averaged = EMA(net).model.double()
        torch.testing.assert_close(averaged(x, c_noise, label), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        experts().load_state_dict(experts().repeated(MLP((2,), 3, width=16, depth=1).state_dict()))


# How they are made


def test_experts_may_differ_in_kind_and_share_what_all_networks_share():
    made = {
        "coarse": partial(EDM2, channels=16, multipliers=[1], blocks=1, attention=[]),
        "fine": partial(UNet, channels=32, multipliers=[1, 2], blocks=1),
    }
    embedding = ADM(Linear())
    net = Experts((1, 8, 8), made, [0], num_classes=3, vector=2, embedding=embedding, outputs=2)
    assert [type(expert) for expert in net.experts.values()] == [EDM2, UNet]
    assert net.experts["fine"].condition.embedding is embedding
    assert net.units == [*net.experts["coarse"].units, *net.experts["fine"].units]
    x, c_noise = torch.randn(4, 1, 8, 8), torch.tensor([-1.0, 1.0, -2.0, 2.0])
    assert net(x, c_noise, torch.tensor([0, 1, 2, -1]), vector=torch.ones(4, 2)).shape == (4, 2, 8, 8)
    assert experts().units == []


def test_a_configuration_may_change_one_expert_or_its_kind():
    from denoiselab.experiment import build as composed

    sizes = composed("model=experts_digits", "model.experts.clean.channels=64", "model.edges=[-3,0.5]").model
    assert sizes.edges == [-3.0, 0.5]
    assert [expert.first.out_channels for expert in sizes.experts.values()] == [32, 32, 64]
    kinds = composed("model=experts_digits", "model@model.experts.noisy=edm2_digits", "loss=learned_hybrid").model
    assert [type(expert) for expert in kinds.experts.values()] == [EDM2, UNet, UNet]
    assert kinds(torch.randn(2, 1, 8, 8), torch.tensor([-1.0, 1.0])).shape == (2, 2, 8, 8)


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"edges": [1, 0]}, r"model.edges=\[1, 0\]: need rising log-SNRs, one fewer than the 3 experts"),
        ({"edges": [0, 0]}, r"model.edges=\[0, 0\]: need rising"),
        ({"edges": [0]}, r"model.edges=\[0\]: need rising"),
        ({"edges": [0, math.nan]}, r"model.edges=\[0, nan\]: need a list of finite numbers"),
        ({"edges": [-math.inf, 0]}, r"model.edges=\[-inf, 0\]: need a list of finite numbers"),
        ({"experts": {}, "edges": []}, r"model.edges=\[\]: need rising log-SNRs, one fewer than the 0 experts"),
        ({"experts": {"a": partial(UNet, channels=2)}, "edges": []}, r"model.experts.a.channels=2: need an even"),
        ({"experts": {"a": partial(MLP)}, "edges": []}, r"model.experts.a.shape=\(1, 8, 8\): need points"),
        ({"experts": {"a": partial(Seen, number=0.0)}, "edges": []}, r"model.experts.a: need a network .* num_classes"),
        (
            {"experts": {"a": partial(EDM2)}, "edges": [], "embedding": Dead()},
            r"model.embedding=Dead: need an expert that takes an embedding",
        ),
        (
            {"experts": {"a": partial(Seen, number=0.0)}, "edges": [], "num_classes": 0, "outputs": 2},
            r"model.experts.a: need a network with an argument outputs, here 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(bad, line):
    with pytest.raises(UserError) as refused:
        make("model", "experts_digits", **{"shape": (1, 8, 8), "num_classes": 10, **bad})
    assert re.match(line, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


def test_a_run_trains_and_samples(train):
    """From the command line to a loaded run, whose samples meet all experts on their way."""
    points = ["data=8gaussians", "data.n=200", "data.batch_size=8", "callbacks=none", "trainer.max_steps=1"]
    folder = train("model=experts_digits", *[f"model@model.experts.{name}=mlp" for name in NAMES], *points)
    run = denoiselab.load(folder)
    assert [*run.denoiser.net.experts] == [*NAMES]
    called = []
    for name, expert in run.denoiser.net.experts.items():
        expert.register_forward_hook(lambda *_, name=name: called.append(name))
    run.sample(n=2, label=1, steps=10)
    assert called == sorted(called, key=NAMES.index)
    assert set(called) == set(NAMES)


def test_a_denoiser_of_experts_is_a_denoiser():
    """Its dtype, its level and its copies are those of any network."""
    net = experts(num_classes=0)
    alpha_t, sigma_t = Cosine()(torch.tensor([[0.05], [0.5], [0.95]], dtype=torch.float64))
    denoiser = Denoiser(net, make("target", "v"))
    with torch.no_grad():
        found = denoiser(normals(3, 2), alpha_t, sigma_t)
        for k, name in enumerate(reversed(NAMES)):
            own = Denoiser(copy.deepcopy(net).experts[name], make("target", "v"))
            alone = own(normals(3, 2)[k : k + 1], alpha_t[k : k + 1], sigma_t[k : k + 1])
            torch.testing.assert_close(found[k : k + 1], alone, rtol=1e-12, atol=1e-12)
