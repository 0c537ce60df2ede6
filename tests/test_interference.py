"""Training on one slot of times: losses whose conflict is known, and a model that has not learned yet."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoiselab.diagnostics import Finding, Interference
from denoiselab.diagnostics.interference import cosines, verdict
from exact import normals
from fakes import knowing
from healthy import subject, trained

SMALL = {"slots": 2, "steps": 10, "seeds": 2, "batch_size": 16, "n": 64, "gradient_n": 64}


def matrix(found: Finding, column: str = "change") -> Tensor:
    count = max(found.table["measured"]) + 1
    return torch.tensor([math.nan if v is None else v for v in found.table[column]]).view(-1, count)


def late(t: Tensor) -> Tensor:
    return (t >= 0.5).float()


def test_slots_that_want_opposite_weights_interfere(healthy: list[Path]):
    """l = (theta - s(t))^2 with s = 1 at early, -1 at late times: at theta = 0 the gradients are opposite."""
    seen = knowing(
        healthy[0], lambda theta, eps, t: (theta - 1 + 2 * late(t)) ** 2 + 0.01 * eps[:, 0] ** 2, torch.zeros(1)
    )
    found = Interference(**SMALL, lr=0.01).look(seen)
    change = matrix(found)
    assert (change[:2].diagonal() < 0).all()
    assert change[1, 0] > 0 < change[0, 1]
    assert found.facts["interval"][0] > 0
    assert found.facts["late_on_early"] == pytest.approx(change[1, 0].item())
    assert matrix(found, "cosine")[0, 1] == pytest.approx(-1, abs=1e-4)
    assert change[2].abs().max() < change[1, 0] / 2  # training on all times leaves both as they are


def test_slots_with_weights_of_their_own_do_not(healthy: list[Path]):
    """theta_0 at early times, theta_1 at late ones: what the one learns is nothing to the other."""
    seen = knowing(
        healthy[0], lambda theta, eps, t: (theta[late(t).long()] - 1) ** 2 + 0.01 * eps[:, 0] ** 2, torch.zeros(2)
    )
    seen.run.parts.config["optimizer"] = {**seen.run.parts.config["optimizer"], "weight_decay": 0.0}
    found = Interference(**SMALL, lr=0.01).look(seen)
    change = matrix(found)
    assert (change[:2].diagonal() < -0.05).all()
    assert change[0, 1] == change[1, 0] == 0
    assert found.facts["interval"] == [0, 0]
    torch.testing.assert_close(matrix(found, "cosine")[:2], torch.eye(2), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy run that is far from done."""
    return trained(tmp_path_factory.mktemp("early"), "trainer.max_steps=60", "ema.decay=0.9")


def test_a_model_that_is_not_done_learns_each_slot(early: Path):
    found = Interference(slots=3, steps=30, seeds=1, n=256, gradient_n=512).look(subject(early))
    change, high = matrix(found), matrix(found, "change_high")
    assert (change[:3].diagonal() < 0).all()
    assert (high[:3].diagonal() < 0).all()
    assert (change[3] < 0).all()  # the control: training on all times helps all of them
    own = next(record for record in found.records if record.name == "interference_own_slot")
    assert own.value < 0
    assert own.controls.keys() == {"trained on all t"}
    low, middle, top = (matrix(found, name) for name in ("change_low", "change", "change_high"))
    assert (low <= middle).all()
    assert (middle <= top).all()


def test_slots_of_equal_loss_are_cut_as_for_training(early: Path):
    found = Interference(**{**SMALL, "steps": 1}, curve='{"t": [0, 1], "value": [2, 0]}').look(subject(early))
    assert found.protocol["edges"][1] == pytest.approx(1 - math.sqrt(0.5))
    assert found.protocol["slots"] == "2, of equal eps loss"
    given = Interference(boundaries=[0.2, 0.7])
    assert given.edges == [0, 0.2, 0.7, 1]


def test_weights_stay_and_a_second_look_is_the_same(early: Path):
    seen = subject(early)
    before, weights = torch.get_rng_state(), [p.clone() for p in seen.denoiser.parameters()]
    first, second = (Interference(**{**SMALL, "steps": 2}).look(seen) for _ in range(2))
    assert first.table == second.table
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, seen.denoiser.parameters(), strict=True))


def test_cosines_are_not_shrunk_by_noise():
    """Two means at 60 degrees under noise ten times as long as they are; that of sample means is off."""
    mean = torch.zeros(2, 400, dtype=torch.float64)
    mean[0, 0], mean[1, :2] = 1, torch.tensor([0.5, math.sqrt(0.75)])
    gradients = mean[:, None] + 0.25 * normals(2, 64, 400)
    found, low, high = cosines(gradients, 0)
    assert found[0, 1] == pytest.approx(0.5, abs=0.1)
    assert low[0, 1] < 0.5 < high[0, 1]
    assert torch.equal(found.diagonal(), torch.ones(2).double())
    naive = torch.nn.functional.cosine_similarity(*gradients.mean(1), dim=0)
    assert naive < 0.4
    lost, _, _ = cosines(normals(2, 8, 400), 0)
    assert lost.isnan().all()


def test_the_verdict_adds_what_late_slots_do_to_early_ones():
    """Row: trained on; column: measured on. Slots count from the data on, so late ones are below the diagonal."""
    m = torch.tensor([[-9.0, 1, 2], [10, -9, 4], [20, 30, -9]]).double()
    found = verdict(m, torch.stack([m - 1, m, m + 1]))
    assert found["late_on_early"] == 60
    assert found["early_on_late"] == 7
    assert 57 <= found["interval"][0] < 60 < found["interval"][1] <= 63


@pytest.mark.parametrize(
    "wrong",
    [{"slots": 1}, {"boundaries": [0.5, 0.2]}, {"steps": 0}, {"seeds": 0}, {"n": 2}, {"lr": 0}, {"gradient_n": 9}],
)
def test_wrong_options_are_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        Interference(**wrong)
