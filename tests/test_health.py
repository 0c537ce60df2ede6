"""Whether a model is told its level, is at its level, and learns: faults are seen, healthy seeds not accused."""

from __future__ import annotations

import json
import math

import pytest
import torch

import denoiselab
from denoiselab.conditioning import NULL, Drop
from denoiselab.denoiser import Denoiser
from denoiselab.diagnostics import BestTarget, EmbeddingHealth, LossCurve, ScheduleMismatch
from denoiselab.diagnostics.loss_curve import risen, smoothed, swings
from denoiselab.diagnostics.optimal import Optimum
from denoiselab.errors import UserError
from denoiselab.run import load
from denoiselab.schedule import Linear, Schedule
from exact import make
from healthy import subject, trained

FOUND = ((2, 1.19, 0.0), (3, 1.25, 0.02))
"""Steps, slopes and their standard errors."""


def told(run, change):
    """The run, its network told another level than that of x_t: ``change(alpha_t, sigma_t)``."""
    whole = run.denoiser.outputs
    run.denoiser.outputs = lambda x_t, alpha_t, sigma_t, **cond: whole(x_t, *change(alpha_t, sigma_t), **cond)
    return run


def along(schedule: Schedule, other: Schedule):
    """Levels read as those of another schedule at the same time."""

    def change(alpha_t, sigma_t):
        level = other(schedule.inverse(2 * (alpha_t.double() / sigma_t.double()).log()))
        return level.alpha.to(alpha_t.dtype), level.sigma.to(sigma_t.dtype)

    return change


class TestEmbedding:
    def test_healthy_seeds_listen(self, healthy):
        for run in healthy:
            found = EmbeddingHealth().look(subject(run))
            values = {record.name: record.value for record in found.records}
            assert found.alarms == []
            assert values["embedding_sensitivity"] > 1e-2
            assert values["embedding_rank"] > 2
            assert values["embedding_gradient_share"] > 0
            assert all(variance > 0 for variance in found.facts["layers"].values())

    @pytest.mark.parametrize("model", ["mlp", "unet_digits", "dit_digits", "edm2_digits", "experts_digits"])
    @pytest.mark.parametrize("dead", [False, True])
    def test_a_network_that_is_not_told_is_seen(self, model, dead, healthy, example_run):
        """Of every kind, with random weights everywhere, since new ones answer 0."""
        run = healthy[0] if model == "mlp" else example_run
        small = {"mlp": ["width=16"], "unet_digits": ["channels=32"]}.get(model, [])
        parts = denoiselab.build(
            *(["experiment=points"] if model == "mlp" else []),
            f"model={model}",
            *(f"model.{option}" for option in small),
            "embedding=dead" if dead and model != "edm2_digits" else "embedding=log_snr",
        )
        seen = load(run)
        torch.manual_seed(0)
        net = parts.model
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter)
        if dead and model == "edm2_digits":  # which has features of its own
            net.embedding.noise.weight = torch.nn.Parameter(torch.zeros_like(net.embedding.noise.weight))
        seen.denoiser = Denoiser(net, parts.target, parts.sigma_data).eval()
        found = EmbeddingHealth(n=8, levels=4).look(subject(seen))
        values = {record.name: record.value for record in found.records}
        assert found.facts["layers"]
        assert (values["embedding_sensitivity"] < 1e-8) == dead
        assert any("does not arrive" in alarm for alarm in found.alarms) == dead
        assert (values["embedding_rank"] < 1) == dead
        if model != "edm2_digits":
            assert (values["embedding_gradient_share"] == 0) == dead

    def test_a_new_network_is_said_to_answer_0(self, healthy):
        run = load(healthy[0])
        torch.nn.init.zeros_(run.denoiser.net.last[2].weight)
        torch.nn.init.zeros_(run.denoiser.net.last[2].bias)
        (alarm,) = EmbeddingHealth().look(subject(run)).alarms
        assert "answers 0 to everything" in alarm


class TestMismatch:
    @pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_sde", "edm_stochastic"])
    def test_healthy_seeds_are_silent(self, sampler, healthy):
        for run in healthy if sampler == "ddim" else healthy[:1]:
            seen = subject(run, f"sampler={sampler}", "sampler.steps=20")
            assert ScheduleMismatch(n=256).look(seen).alarms == []

    def test_levels_of_another_schedule_are_seen_and_make_samples_worse(self, healthy):
        """A network of the cosine schedule that is told the linear one's levels."""
        right = subject(healthy[0], "sampler.steps=20")
        wrong = subject(told(load(healthy[0]), along(right.schedule, Linear())), "sampler.steps=20")
        alarms = ScheduleMismatch(n=256).look(wrong).alarms
        assert any("another amount of noise" in alarm for alarm in alarms)
        label = torch.arange(800) % 8
        off = []
        for seen in (right, wrong):
            away = (seen.draw(800)[0] - seen.data.centres[label]).square().mean() / seen.data.std**2
            off.append(abs(away.item() - 1))  # the error of the variance about the modes
        assert off[1] > 2 * off[0]

    def test_any_slope_that_is_off_is_seen(self):
        """One within the limit is no excuse for another, however sure it is."""
        within, beyond = ({"of": "eps", "tells": True, "state": k, "slope": s, "se": e} for k, s, e in FOUND)
        (alarm,) = ScheduleMismatch.alarms([within, beyond])
        assert "1.25 at step 3" in alarm
        assert ScheduleMismatch.alarms([within]) == []

    def test_fewer_held_out_conditions_than_samples_are_enough(self, healthy):
        seen = subject(healthy[0], "sampler.steps=5")
        seen.cond = lambda n: {"label": torch.arange(40) % 8}
        found = ScheduleMismatch(n=64).look(seen)
        assert found.protocol["n"] == 40
        assert found.alarms == []

    @pytest.mark.parametrize("by", [-1, 1])
    def test_an_index_that_is_off_by_one_is_seen_on_the_exact_model(self, by, healthy):
        """The denoiser is told the level of the walk's next, or previous, state."""
        seen = subject(healthy[0], "sampler.steps=20")
        levels = seen.parts.sampler.levels(seen.schedule)[:-1]
        exact = Optimum(seen.data)
        assert ScheduleMismatch(n=256).look(_with(seen, exact)).alarms == []

        def off(x_t, alpha_t, sigma_t, **cond):
            ratio = (sigma_t.flatten()[0] / alpha_t.flatten()[0]).item()
            k = min(range(len(levels)), key=lambda i: abs(math.log(levels[i].ratio / ratio)))
            rung = levels[min(max(k + by, 0), len(levels) - 1)]
            return exact(x_t, *rung.like(x_t), **cond)

        found = ScheduleMismatch(n=256).look(_with(subject(healthy[0], "sampler.steps=20"), off))
        assert any("over its estimate" in alarm for alarm in found.alarms)

    def test_data_of_another_scale_are_seen(self, healthy):
        """As latents that were divided by another number than in training."""
        seen = subject(healthy[0], "sampler.steps=20")
        data = make("data", "8gaussians", n=4000)
        for samples in (data.train, data.held_out):
            samples.x_0 = 2 * samples.x_0
        seen.parts.data = data
        alarms = ScheduleMismatch(n=256).look(seen).alarms
        assert any("over its estimate" in alarm for alarm in alarms)


def _with(seen, exact):
    """A subject whose denoiser is a function."""
    seen.run.denoiser.forward = exact
    return seen


class TestLossCurve:
    def test_healthy_seeds_are_silent(self, healthy):
        for run in healthy:
            found = LossCurve().look(subject(run))
            assert found.alarms == []
            values = {record.name: record for record in found.records}
            assert 20 < values["train_loss_flat_since"].value < 500
            share = values["null_share"]
            assert share.value == pytest.approx(0.1, abs=4 * share.controls["sd"])
            assert share.protocol["n"] == 600 * 256
            assert share.value == pytest.approx(0.1, abs=0.005)

    def test_a_learning_rate_30_times_too_large_is_seen(self, tmp_path):
        """30 times 0.01, which is well; at 30 times the default 0.001 this model still learns."""
        alarms = LossCurve().look(subject(trained(tmp_path, "optimizer.lr=0.3", "trainer.max_steps=200"))).alarms
        assert any("blew up" in alarm for alarm in alarms)

    def test_swings_and_rises_within_a_run(self):
        g = torch.Generator().manual_seed(0)
        values = (0.3 + 0.7 * torch.exp(-torch.arange(200) / 20) + 0.01 * torch.randn(200, generator=g)).tolist()
        worst, limits = swings(values)
        assert worst is not None
        assert worst[1] < 6
        assert limits[:10] == [None] * 10
        assert risen(smoothed(values), 0.01)[0] == 0
        assert swings([*values[:150], 0.5, *values[150:]])[0][0] == 150
        assert swings([*values[:150], 0.5, *values[150:]])[0][1] > 6
        diverging = [*values, *(0.3 + 0.005 * k for k in range(40))]
        assert risen(smoothed(diverging), 0.01)[0] > 0.2

    def test_rows_tell_of_drops_that_are_not_p_null(self, healthy, tmp_path):
        run = load(healthy[0])
        rows = [json.loads(line) for line in (healthy[0] / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row["train/null_share"] += 0.01
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run.folder = tmp_path
        (alarm,) = LossCurve().look(subject(run)).alarms
        assert "conditions were dropped" in alarm
        (tmp_path / "metrics.jsonl").unlink()
        with pytest.raises(UserError, match="no train/loss"):
            LossCurve().look(subject(run))


def test_drops_are_counted_as_they_are_drawn():
    torch.manual_seed(0)
    label = torch.zeros(200_000, dtype=torch.int64)
    cond, dropped = Drop(0.1).draw({"label": label})
    assert dropped is not None
    assert torch.equal(cond["label"] == NULL, dropped)
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.005)
    assert Drop(0.0).draw({"label": label})[1] is None
    assert Drop(0.1).draw({})[1] is None


class TestBestTarget:
    def test_a_better_run_is_the_best_where_it_is(self, healthy, tmp_path):
        """The same network is told the wrong level in half of the times: there, and only there, the other is better."""
        seen = subject(healthy[0])
        other = load(healthy[1])
        found = BestTarget([str(healthy[1])], n=400).look(seen)
        (one, two) = found.facts["names"]
        assert found.table["best"].count("undetermined") >= 3  # two seeds of one recipe
        assert set(found.table["best"]) <= {one, two, "undetermined"}
        assert found.table[f"{two} - {one}"][3] == pytest.approx(found.table[two][3] - found.table[one][3], rel=1e-6)
        assert other.step == 600

        def change(alpha_t, sigma_t):
            return alpha_t, torch.where(sigma_t > 0.7, 0.5 * sigma_t, sigma_t)

        found = BestTarget([str(healthy[1])], n=400).look(subject(told(load(healthy[0]), change)))
        assert found.table["best"][6:9] == [two] * 3

    def test_pairs_are_what_makes_differences_small(self, healthy):
        table = BestTarget([str(healthy[1])], n=400).look(subject(healthy[0])).table
        two = next(name for name in table if name.endswith("_95")).removesuffix("_95").partition(" - ")[0]
        assert table[f"{two} - V_95"][4] < table["V_se"][4]

    def test_other_data_are_refused(self, healthy, example_run):
        with pytest.raises(UserError, match="its held-out samples are not those of"):
            BestTarget([str(example_run)], n=20).look(subject(healthy[0]))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (EmbeddingHealth, {"levels": 1}),
        (EmbeddingHealth, {"n": 0}),
        (ScheduleMismatch, {"n": 1}),
        (BestTarget, {"n": 1}),
    ],
)
def test_bad_options_are_named(kind, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}: need"):
        kind(**wrong)
