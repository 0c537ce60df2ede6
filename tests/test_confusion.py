"""Asked against recognised class: the classifier on unseen samples, label noise, leaks."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from denoiselab.data import Digits, EightGaussians
from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Identity
from denoiselab.diagnostics import Confusion
from denoiselab.diagnostics.confusion import alarms, beyond, shares_of
from denoiselab.metrics.accuracy import Recogniser, accuracy, recogniser
from denoiselab.rng import generator
from healthy import subject, trained


class Photographs(Data):
    """Labelled images of any shape whose classes cannot be told apart."""

    shape = (3, 12, 12)
    num_classes = 3

    def __init__(self):
        super().__init__(16)
        g = generator(0, "photographs")
        self.codec = Identity(1.0)
        images, label = torch.rand(400, *self.shape, generator=g) * 2 - 1, torch.arange(400) % 3
        self.train, self.held_out = Samples(images[:300], label[:300]), Samples(images[300:], label[300:])


class Colours(Photographs):
    """The same, each class in a colour of its own."""

    def __init__(self):
        super().__init__()
        for part in (self.train, self.held_out):
            assert part.label is not None
            part.x_0[torch.arange(len(part)), part.label] += 0.5
            part.x_0.clamp_(-1, 1)


def test_the_classifier_is_tried_on_what_it_has_not_seen():
    data = Digits()
    told = recogniser(data)
    assert told.unseen.sum() == 1797
    assert 0.985 < accuracy(told.unseen) < 1  # every real digit, each unseen
    assert recogniser(data) is told
    assert accuracy(Recogniser(EightGaussians(n=1000)).unseen) > 0.99
    assert accuracy(Recogniser(Colours()).unseen) > 0.99
    chance = accuracy(Recogniser(Photographs()).unseen)
    assert 0.2 < chance < 0.45
    with pytest.raises(ValueError, match="has no classes"):
        Recogniser(SimpleNamespace(num_classes=0))  # pyright: ignore[reportArgumentType]


def asked_wrongly(seen, rate: float, to: int | None = None):
    """A subject whose model mistakes a share of what it is asked for, for another class or for one."""
    n, classes = 2000, seen.run.parts.num_classes
    g = generator(1, "noise")
    cond = seen.cond(n)
    other = (cond["label"] + torch.randint(1, classes, (n,), generator=g)) % classes
    if to is not None:
        other = torch.where(cond["label"] == 0, to, cond["label"])
    swapped = torch.where(torch.rand(n, generator=g) < rate, other, cond["label"])
    samples, _ = seen.draw(n, cond={"label": swapped})
    broken = copy.copy(seen)
    broken.draw = lambda n, **options: (samples, 15.0)
    return broken, float((swapped != cond["label"]).double().mean())


def test_label_noise_appears_at_its_rate_and_healthy_models_are_silent(healthy: list[Path]):
    for run in healthy:
        seen = subject(run, "sampler.steps=15")
        found = Confusion().look(seen)
        assert found.alarms == [], run
        assert found.records[0].value < 0.03
    clean = found.records[0].value
    broken, rate = asked_wrongly(seen, 0.1)
    found = Confusion(n=2000).look(broken)
    assert found.records[0].value == pytest.approx(rate, abs=0.015 + clean)
    assert any("not recognised as what was asked for" in said for said in found.alarms)
    off = torch.tensor(found.table["share"]).view(8, 8)[~torch.eye(8, dtype=torch.bool)]
    assert off.mean() == pytest.approx(rate / 7, abs=0.005)
    broken, _ = asked_wrongly(seen, 0.3, to=4)
    (leak, *_) = Confusion(n=2000).look(broken).alarms
    assert "0 drawn as 4" in leak
    assert leak.count("drawn as") == 1


def test_a_cell_is_a_two_sample_test():
    found, control = torch.tensor([[80, 20], [0, 100]]), torch.tensor([[190, 10], [0, 200]])
    z, excess = beyond(found, control)
    assert excess[0, 1] == pytest.approx(0.15)
    assert z[0, 1] == pytest.approx(0.15 / (0.1 * 0.9 * (1 / 100 + 1 / 200)) ** 0.5)
    assert z[1].abs().sum() == 0
    assert shares_of(torch.tensor([[0, 0], [1, 3]])).tolist() == [[0, 0], [0.25, 0.75]]
    never = torch.tensor([[0, 0], [0, 100]])  # a class that was not asked for says nothing
    assert alarms(never, control, *beyond(never, control)) == []
    few = torch.tensor([[3, 1], [0, 4]])
    assert alarms(few, control, *beyond(few, control)) == []


@pytest.mark.parametrize(
    ("data", "classes", "said"),
    [
        (
            Photographs(),
            3,
            r"^the classifier \(SVC, .* on pixels .*16x16\) recognises \d\d\.\d% of real samples .*; need 90%$",
        ),
        (None, 0, "knows no classes"),
        (None, 1000, "there are 1000 classes; the classifier is for at most 100"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(data: Any, classes: int, said: str):
    parts: Any = SimpleNamespace(num_classes=classes, images=data)
    with pytest.raises(ValueError, match=said):
        Confusion().check(parts)
    Confusion().check(SimpleNamespace(num_classes=3, images=Colours()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^n=0: need at least 1"):
        Confusion(n=0)


def test_a_model_of_wrong_labels_draws_them_at_their_rate(tmp_path: Path, monkeypatch):
    """A fifth of the training labels are of another mode; the classifier knows the right ones."""
    right = EightGaussians.draw

    def wrong(self, n: int, seed: int = 0):
        points, label = right(self, n, seed)
        g = generator(seed, "wrong labels")
        other = (label + torch.randint(1, 8, (n,), generator=g)) % 8
        return points, torch.where(torch.rand(n, generator=g) < 0.2, other, label)

    with monkeypatch.context() as patched:
        patched.setattr(EightGaussians, "draw", wrong)
        run = trained(tmp_path)
    found = Confusion().look(subject(run, "sampler.steps=15"))
    assert found.records[0].value == pytest.approx(0.2, abs=0.05)
    assert any("not recognised as what was asked for" in said for said in found.alarms)
