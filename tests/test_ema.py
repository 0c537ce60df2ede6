import copy
import math

import pytest
import torch
from torch import Tensor, nn

from denoiselab.ema import EMA
from denoiselab.errors import UserError
from exact import OPTIONS, make, normals, parts_with

EVERY = pytest.mark.parametrize("name", OPTIONS["ema"])


class Live(nn.Module):
    """Weights that are set by hand, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def set(self, step: int) -> None:
        """A walk that has both noise and drift."""
        with torch.no_grad():
            self.w.copy_(normals(3, seed=step) + 0.001 * step)
            self.b.copy_(normals(2, 2, seed=10_000 + step))
            self.steps.fill_(step)


def reference(start: Tensor, weights: list[Tensor], decay: float, warmup: bool) -> Tensor:
    """The recursion in float64, as it is written."""
    average = start.double()
    for n, w in enumerate(weights, start=1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = d * average + (1 - d) * w.double()
    return average


def followed(ema: EMA, live: Live, steps: int) -> list[Tensor]:
    """The live w at each update."""
    seen = []
    for step in range(1, steps + 1):
        live.set(step)
        ema.update(live)
        seen.append(live.w.detach().clone())
    return seen


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_recursion(decay, warmup):
    for steps in (1, 2, 30):
        live = Live()
        ema = EMA(live, decay, warmup)
        expected = reference(torch.zeros(3), followed(ema, live, steps), decay, warmup)
        torch.testing.assert_close(ema.model.w.double(), expected, rtol=1e-5, atol=1e-6)
        assert ema.updates.item() == steps


def test_warm_up_forgets_the_initial_weights():
    """What five updates leave of the start: 2/11 3/12 4/13 5/14 6/15 of it, where the decay alone leaves 0.9995."""
    live = Live()
    ema = EMA(live, 0.9999, warmup=True)
    with torch.no_grad():
        live.w.fill_(1.0)
    for _ in range(5):
        ema.update(live)
    torch.testing.assert_close(1 - ema.model.w, torch.full((3,), 720 / 360_360), rtol=1e-4, atol=0)


@EVERY
def test_what_is_constant_stays(name):
    live = Live()
    live.set(7)
    ema = make("ema", name, model=live)
    for _ in range(200):
        ema.update(live)
    assert torch.equal(ema.model.w, live.w.float())
    assert torch.equal(ema.model.b, live.b.float())


def test_decay_0_follows():
    live = Live()
    ema = EMA(live, 0.0)
    followed(ema, live, 5)
    torch.testing.assert_close(ema.model.w, live.w.float(), rtol=1e-6, atol=1e-6)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_average_is_float32_and_moves_whatever_the_model_is(name, dtype):
    """1,000 steps; in bfloat16 a decay of 0.999 would move nothing."""
    live = Live(dtype)
    ema = make("ema", name, model=live).to(dtype)
    seen = followed(ema, live, 1000)
    found = parts_with("ema", name).config["ema"]
    expected = reference(torch.zeros(3), seen, found["decay"], found["warmup"])
    assert ema.model.w.dtype == torch.float32
    assert (ema.model.w.double() - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_precision_leaves_the_average_alone(name, dtype):
    live = Live(torch.float32)
    ema = make("ema", name, model=live)
    followed(ema, live, 10)
    before = ema.model.w.clone()
    outer = nn.ModuleList([live, ema]).to(dtype)
    assert live.w.dtype == dtype
    assert {p.dtype for p in outer[1].parameters()} == {torch.float32}
    assert torch.equal(ema.model.w, before)
    assert ema.updates.dtype == torch.int64


@EVERY
def test_the_count_is_saved_and_an_average_resumes_bit_for_bit(name):
    live, other = Live(torch.float32), Live(torch.float32)
    whole = make("ema", name, model=live)
    followed(whole, live, 5)
    resumed = make("ema", name, model=other)
    assert "updates" in whole.state_dict()
    resumed.load_state_dict(whole.state_dict())
    assert resumed.updates.item() == 5
    for step in range(6, 20):
        for model, ema in ((live, whole), (other, resumed)):
            model.set(step)
            ema.update(model)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert whole.updates.item() == 19


@EVERY
def test_the_average_is_a_model_of_its_own(name):
    live = Live()
    live.set(3)
    ema = make("ema", name, model=live)
    with torch.no_grad():
        live.w += 1
        live.steps += 5
    assert torch.equal(ema.model.w, (live.w - 1).float())
    assert ema.model.steps == 3
    before = live.w.clone()
    ema.update(live)
    with torch.no_grad():
        ema.model.w += 100
    assert torch.equal(live.w, before)
    another = copy.deepcopy(ema)
    another.update(live)
    assert ema.updates == 1
    assert another.updates == 2
    assert not torch.equal(another.model.w, ema.model.w)


@EVERY
def test_buffers_are_copied(name):
    live = Live()
    ema = make("ema", name, model=live)
    followed(ema, live, 4)
    assert ema.model.steps == 4


@EVERY
def test_it_is_always_in_evaluation_mode_without_gradients(name):
    live = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    ema = make("ema", name, model=live)
    for mode in (ema.train(), ema.train(True), nn.ModuleList([live, ema]).train()[1]):
        assert not any(module.training for module in mode.modules())
    ema.update(live)
    assert live.training
    assert all(p.requires_grad for p in live.parameters())
    assert not any(p.requires_grad for p in ema.parameters())
    assert not ema.model(torch.ones(1, 3)).requires_grad
    assert torch.equal(ema.model(torch.ones(1, 3)), ema.model(torch.ones(1, 3)))


@EVERY
def test_an_update_has_no_graph_and_spares_the_gradients(name):
    live = Live()
    ema = make("ema", name, model=live)
    loss = (live.w * 2).sum()
    ema.update(live)
    loss.backward()
    assert torch.equal(live.w.grad, torch.full((3,), 2.0).double())
    assert all(p.grad is None for p in ema.parameters())


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_a_bad_decay_is_refused_in_a_line(decay):
    with pytest.raises(UserError, match=rf"^ema\.decay={decay}: need [^\n]*$"):
        make("ema", "default", decay=decay, model=Live())
