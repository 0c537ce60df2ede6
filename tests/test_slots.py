"""Times divided into slots of equal shares: one, a mixture, and a curriculum."""

import itertools
import math

import pytest
import torch

from denoiselab.curve import Curve
from denoiselab.schedule import Linear
from denoiselab.timesteps import Curriculum, Place, Slot, Slots
from exact import middles


class TestSlots:
    HYPERBOLA = Curve(torch.logspace(-3, 0, 3000).tolist(), (1 / torch.logspace(-3, 0, 3000)).tolist())
    """1/t from 0.001 on and 1000 before it: 1 + log(1000 t) is its integral up to t."""

    def test_a_constant_loss_gives_equal_slots(self):
        found = Slots(curve=Curve([0.5], [3]), slots=10)
        torch.testing.assert_close(found.edges, torch.linspace(0, 1, 11, dtype=torch.float64))

    def test_a_loss_like_one_over_t_gives_the_closed_form(self):
        found = Slots(curve=self.HYPERBOLA, slots=10)
        whole = 1 + math.log(1000)
        expected = [0, 1e-3 * whole / 10, *(math.exp(k / 10 * whole - 1) / 1000 for k in range(2, 10)), 1]
        torch.testing.assert_close(found.edges, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("slots", [2, 7, 10])
    def test_slots_carry_equal_shares_and_cover_the_range(self, slots):
        curve = Curve([0, 0.1, 0.5, 1], [9, 2, 0, 1])
        found = Slots(curve=curve, slots=slots)
        assert found.count == slots
        assert found.edges[0] == 0
        assert found.edges[-1] == 1
        assert (found.edges.diff() > 0).all()
        shares = curve.cumulative(found.edges).diff() / curve.total
        torch.testing.assert_close(shares, torch.full_like(shares, 1 / slots))

    def test_one_slot_draws_from_itself_alone_and_from_all_of_it(self):
        edges, levels = [0.0, 0.2, 0.5, 1.0], Linear()
        for k, (low, high) in enumerate(itertools.pairwise(edges)):
            for correct, weight in ((False, 1.0), (True, high - low)):
                found = Slot(k, edges[1:-1], correct=correct)
                t, w = found(2000, levels, Place(0, 0))
                assert low <= t.min() < low + 1e-3
                assert high - 1e-3 < t.max() <= high
                torch.testing.assert_close(w, torch.full_like(w, weight))

    def test_a_mixture_draws_each_slot_with_its_probability(self):
        found = Slots([0.2, 0.5, 0.6], probabilities=[3, 1, 0, 4], correct=False)
        t, w = found(80_000, Linear(), Place(0, 0))
        counts = torch.histogram(t.double(), found.edges).hist
        torch.testing.assert_close(counts / len(t), torch.tensor([3, 1, 0, 4]).double() / 8, rtol=0, atol=1e-4)
        assert torch.equal(w, torch.ones_like(w))

    @pytest.mark.parametrize("steps", [None, 7, 1000])
    def test_a_corrected_mixture_is_unbiased(self, steps):
        """Also where times move to the points of a table that knows nothing of the slots."""
        found = Slots(curve=self.HYPERBOLA, slots=5, probabilities=[1, 2, 3, 4, 5], steps=steps)
        t, w = found(1_000_000, Linear(), Place(0, 0))
        free = middles(1_000_000) if steps is None else torch.arange(steps).double() / (steps - 1)
        expected = (-3 * free).exp().mean().item()
        assert (w.double() * (-3 * t.double()).exp()).mean().item() == pytest.approx(expected, rel=2e-5)
        assert (-3 * t.double()).exp().mean().item() != pytest.approx(expected, rel=0.1)

    def test_a_curriculum_visits_its_order_with_its_budget(self):
        found = Curriculum([2, 0, 1, 0], 100, [0.2, 0.5])
        visited = []
        for samples_seen in range(0, 1000, 50):
            found.advance(samples_seen)
            t = found(50, Linear(), Place(0, samples_seen))[0]
            slots = torch.bucketize(t.double(), found.edges[1:-1], right=True).unique()
            assert len(slots) == 1
            visited.append(slots.item())
        assert visited == [2, 2, 0, 0, 1, 1, 0, 0] * 2 + [2, 2, 0, 0]

    def test_a_round_of_a_corrected_curriculum_is_unbiased(self):
        found = Curriculum([2, 0, 1, 0], 1000, [0.2, 0.5], correct=True)
        total = 0.0
        for samples_seen in range(0, 4000, 500):
            found.advance(samples_seen)
            t, w = found(500, Linear(), Place(0, samples_seen))
            total += (w.double() * (-3 * t.double()).exp()).sum().item()
        assert total / 4000 == pytest.approx((1 - math.exp(-3)) / 3, rel=1e-4)

    def test_boundaries_are_in_the_checkpoint(self):
        state = Slots(curve=self.HYPERBOLA, slots=5).state_dict()
        found = Slots([0.2, 0.4, 0.6, 0.8])
        found.load_state_dict(state)
        assert torch.equal(found.edges, state["edges"])
        assert found.edges[1] < 0.01
