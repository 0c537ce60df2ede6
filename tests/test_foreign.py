"""A pretrained network behind our call, without converting its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.exchange.foreign import Foreign
from denoiselab.schedule import EDM, VE, VP, Flow, Level, Linear, Schedule, ZeroTerminal
from denoiselab.target import X0, Eps, V
from denoiselab.target import Flow as Velocity
from exact import Scaled, make, normals, relative, triangle

diffusers = pytest.importorskip("diffusers")

POINTS = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)


class SiT(nn.Module):
    """As SiT is called, (x_t, t, label) on x_t = (1 - t) x_0 + t eps, for a velocity eps - x_0 (arXiv:2401.08740); with
    the exact E[x_0 | x_t] in the network's place."""

    def __init__(self) -> None:
        super().__init__()
        self.like = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        t = t[:, None]
        x_0 = triangle()(x_t, 1 - t, t, label=label)
        return (x_t - x_0) / t  # eps - x_0, as x_t - x_0 = t (eps - x_0)


def unet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8, "layers_per_block": 1}
        blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "num_class_embeds": 3}
        return diffusers.UNet2DModel(8, 1, 1, **widths, **blocks).eval()


@pytest.mark.parametrize(
    "along", [Flow(), Flow(3.0), VP(), EDM(), VE(), Scaled(VP(), 7.0)], ids=lambda s: type(s).__name__
)
def test_a_network_of_straight_paths_gives_the_closed_form_along_any_schedule(along: Schedule):
    denoiser = Denoiser(Foreign(SiT(), Flow(), "t"), Velocity())
    for t in POINTS[1:-1]:
        level = along(t).like(x_t := normals(6, 2))
        label = torch.tensor([0, 1, 2, -1, 0, 1])
        found = denoiser(x_t, *level, label=label)
        torch.testing.assert_close(found, triangle()(x_t, *level, label=label), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", [Eps(), X0(), V()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("n", [0, 1, 500, 999])
def test_a_unet_of_diffusers_is_asked_for_its_own_index(target, n: int):
    net, label = unet(), torch.tensor([0, 2])
    call = lambda net, x, n, label: net(x, n, class_labels=label).sample  # noqa: E731
    denoiser = Denoiser(Foreign(net, Linear(), "index", call), target)
    level = Linear()(torch.tensor(n / 999, dtype=torch.float64))
    x_t = normals(2, 1, 8, 8).float()
    with torch.no_grad():
        y = net(x_t, n, class_labels=label).sample
        expected = target.to_x_0(y, x_t, *level.like(x_t))
        for k in (1.0, 5.0):  # x_t of another scale is the same question
            found = denoiser(k * x_t, *Level(k * level.alpha, k * level.sigma).like(x_t), label=label)
            assert relative(found, expected) < 1e-5


class Told(SiT):
    """Remembers what it was told."""

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        self.told = time
        return x_t


@pytest.mark.parametrize("schedule", [EDM(), VP()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("time", ["sigma", "log_snr", lambda t, level: level.alpha * t])
def test_what_a_network_is_told_of_a_level(time, schedule: Schedule):
    t, net = POINTS[1:], Told()
    level = schedule(t)
    Foreign(net, schedule, time)(normals(4, 2), schedule.log_snr(t) / -8)
    expected = time(t, level) if callable(time) else getattr(level, time)
    torch.testing.assert_close(net.told, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "cosine", "zero_terminal"])
def test_an_index_is_whole_even_in_float32(name: str):
    schedule, net = make("schedule", name), Told()
    t = torch.linspace(0, 1, 1000, dtype=torch.float64)
    Foreign(net, schedule, "index")(normals(1000, 2).float(), (schedule.log_snr(t) / -8).float())
    assert torch.equal(net.told, torch.arange(1000.0))


def test_it_is_sampled_as_any_denoiser():
    """Along its own path and along another, to the samples of the closed form."""
    noise, label = normals(64, 2), torch.arange(64) % 3
    denoiser = Denoiser(Foreign(SiT(), Flow(), "t"), Velocity())
    for sampler, schedule in (("heun", "flow"), ("dpmpp_2m", "vp"), ("ddim", "cosine")):
        parts = make("sampler", sampler, steps=12), make("schedule", schedule)
        expected = parts[0](triangle(), parts[1], noise, label=label)
        assert relative(parts[0](denoiser, parts[1], noise, label=label), expected) < 1e-6


def test_pure_noise_and_the_clean_end_are_asked_for_at_the_ends_of_the_path():
    net = Told()
    Foreign(net, ZeroTerminal(Linear()), "index")(normals(2, 2), torch.tensor([-10.0, 10.0], dtype=torch.float64))
    assert net.told.tolist() == [0, 999]


def test_it_moves_trains_and_is_copied_as_one_network():
    wrapped = Foreign(unet(), Linear(), "index", lambda net, x, n, label: net(x, n, class_labels=label).sample)
    assert {name.partition(".")[0] for name in wrapped.state_dict()} == {"net"}
    again = copy.deepcopy(wrapped)
    x, c_noise, label = normals(2, 1, 8, 8).float(), torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    again.net.conv_out.weight.data += 1
    assert not torch.allclose(again(x, c_noise, label=label), wrapped(x, c_noise, label=label))
    wrapped(x, c_noise, label=label).square().mean().backward()
    assert all(p.grad is not None for p in wrapped.parameters())


def test_what_cannot_be_said_is_refused():
    with pytest.raises(ValueError, match="time=step: need one of index, t, sigma, log_snr"):
        Foreign(SiT(), Flow(), "step")
    with pytest.raises(ValueError, match="time=index: need another, such as t; Flow has no table"):
        Foreign(SiT(), Flow(), "index")
