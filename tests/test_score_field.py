"""The score field against the exact score: of the exact denoiser, of healthy models, and of one that is not."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics import Finding, ScoreField, Subject
from denoiselab.diagnostics.optimal import Optimum
from denoiselab.diagnostics.score_field import angle, relative
from denoiselab.errors import UserError
from exact import ExactNet, Mixture, eight_gaussians
from healthy import subject, trained

LEVELS = (0.3, 0.6, 1.0)
"""Where runs of three seconds know the score; towards the data they have seen too little without a class."""


def knowing(run: Path, exact: Mixture | Optimum) -> Subject:
    seen = subject(run)
    net = ExactNet(exact, seen.run.denoiser.target)
    seen.run.denoiser = Denoiser(net, seen.run.denoiser.target)
    return seen


def test_the_exact_denoiser_is_nowhere_off(healthy: list[Path]):
    seen = knowing(healthy[0], Optimum(subject(healthy[0]).data))
    found = ScoreField(times=(0.05, 0.3, 0.6, 1.0)).look(seen)
    assert max(found.table["angle_deg"]) < 0.01
    assert max(found.table["relative_error"]) < 1e-4
    assert found.table["error_to_white"][-1] < 0.05  # at t = 1 the field is about -x
    assert found.table["error_to_white"][0] > 1
    assert not found.alarms


def test_the_exact_score_is_the_gradient_of_the_log_density(healthy: list[Path]):
    """A second implementation of it, of one mode and of all; data's mean and width are off by a draw."""
    other, exact = eight_gaussians(), Optimum(subject(healthy[0]).data)
    x_t = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = torch.full_like(x_t[:, :1], 0.8), torch.full_like(x_t[:, :1], 0.6)
    for label in (None, 3):
        told = {} if label is None else {"label": torch.full((50,), label)}
        expected = (alpha * other(x_t, alpha, sigma, **told) - x_t) / sigma**2
        assert relative(exact.score(x_t, alpha, sigma, **told), expected) < 0.05
    assert relative(exact(x_t, alpha, sigma), other(x_t, alpha, sigma)) < 0.05


def test_angles_are_those_of_the_longer_half():
    exact = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 0.1], [0.1, 0]]).double()
    turned = torch.stack([exact[:, 0] - exact[:, 1], exact[:, 0] + exact[:, 1]], dim=1)  # by 45 degrees
    turned[3:] *= -1
    assert angle(turned, exact) == pytest.approx(45)
    assert angle(-exact, exact) == pytest.approx(180)
    assert relative(1.1 * exact, exact) == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(5))
def test_healthy_models_are_right_where_they_know_and_silent(healthy: list[Path], seed: int):
    found = ScoreField(times=(0.1, *LEVELS)).look(subject(healthy[seed]))
    assert not found.alarms
    assert all(off < 10 for off in found.table["angle_deg"][1:])
    assert found.table["error_to_white"][-1] < 0.05
    (record,) = [record for record in found.records if record.name == "score_angle"]
    assert record.controls == {"exact_denoiser": 0.0}


def test_a_field_that_is_mirrored_is_reported(healthy: list[Path]):
    seen = subject(healthy[0])
    with torch.no_grad():
        seen.run.denoiser.net.first.weight[:, 1] *= -1
    found = ScoreField(times=LEVELS).look(seen)
    assert len(found.alarms) == 1
    assert "degrees off the exact one at t =" in found.alarms[0]
    assert "20 is the most" in found.alarms[0]


def test_a_guided_field_is_said_to_be_a_heuristic_and_not_compared(healthy: list[Path]):
    one = ScoreField(times=LEVELS, label=3, n=50)
    plain = one.look(subject(healthy[0]))
    guided = one.look(subject(healthy[0], "guidance.scale=4"))
    assert plain.table["angle_deg"][-1] < 10
    assert not plain.facts["heuristic"]
    assert guided.facts["heuristic"]
    assert guided.table["angle_deg"] == [None] * 3
    assert not guided.alarms
    far = [relative(a, b) for a, b in zip(guided.tensors["found"], plain.tensors["found"], strict=True)]
    assert max(far) > 0.1


def test_data_without_a_density_are_compared_with_white_data_alone(healthy: list[Path]):
    seen = subject(healthy[0])
    seen.parts.data = type("Drawn", (), dict(vars(seen.data).items(), shape=(2,), num_classes=8))()
    found = ScoreField(times=(1.0,), n=50).look(seen)
    assert found.table["angle_deg"] == [None]
    assert found.table["error_to_white"][0] < 0.05
    assert "exact" not in found.tensors
    assert [record.name for record in found.records] == ["score_error_to_white"]


def test_during_training_the_error_falls(tmp_path: Path):
    """The looks of one training, from its first steps on: the field morphs into the exact one."""
    run = trained(
        tmp_path,
        *("diagnostics=score_field", "diagnostics.score_field.every=50", "diagnostics.score_field.budget=null"),
        *("diagnostics.score_field.n=200", "diagnostics.score_field.times=[0.4]", "trainer.max_steps=300"),
    )
    folders = sorted((run / "diagnostics" / "score_field").iterdir())
    assert len(folders) == 6
    steps = [json.loads((folder / "finding.json").read_text())["protocol"]["step"] for folder in folders]
    assert steps == [*range(50, 301, 50)]
    errors = [sum(Finding.load(folder).table["relative_error"]) for folder in folders]
    falls = [b < a for a, b in pairwise(errors)]
    assert sum(falls) >= 0.8 * len(falls)
    assert errors[-1] < 0.6 * errors[0]


def test_images_are_refused(example_run: Path):
    with pytest.raises(UserError, match=r"score_field: draws points in the plane; these data have the shape \(1, 8"):
        _ = subject(example_run, "diagnostics=score_field").parts.diagnostics


@pytest.mark.parametrize("wrong", [{"times": [0.0]}, {"times": []}, {"grid": 1}, {"n": 1}, {"most": 0}])
def test_wrong_options_are_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        ScoreField(**wrong)


def test_a_second_look_is_the_same(healthy: list[Path]):
    small = ScoreField(times=(0.5,), grid=4, n=10)
    first, second = (small.look(subject(healthy[1])) for _ in range(2))
    assert first.table == second.table
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
