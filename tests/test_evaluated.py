"""Rules of what is measured: no network in training mode, exactly n samples, n seeds whatever the number of ranks."""

import itertools
import json

import pytest
import torch
from torch import nn

from denoiselab import evaluation
from denoiselab.checks import check_evaluates
from denoiselab.compose import compose, plain
from denoiselab.rng import Noise, mix
from denoiselab.run import load


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_fifty_thousand_samples_have_as_many_seeds_on_any_number_of_ranks(world):
    """Rank r takes samples r, r + world, ...: together the same 50,000 generators, none of them twice."""
    n, seed = 50_000, 7
    whole = [mix(seed, "noise", i) for i in range(n)]
    assert len(set(whole)) == n
    parts = [[mix(seed, "noise", i) for i in range(rank, n, world)] for rank in range(world)]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    rank = world - 1
    ids = range(rank, n, world)[-3:]
    noise = Noise(seed, ids, (4,))
    assert [g.initial_seed() for g in noise.generators] == [mix(seed, "noise", i) for i in ids]
    assert torch.equal(noise()[1], Noise(seed, range(n - 2 * world, n), (4,))()[ids[1] - (n - 2 * world)])
    assert len(noise().unique()) == 12


def test_exactly_n_samples_are_made_in_batches_of_any_size(example_run, monkeypatch):
    n = 13
    run, made = load(example_run), []
    config = plain(compose("evaluate", ["ckpt=none", f"evaluation.n={n}", "metrics=none", "sampler.steps=2"]))
    sample = evaluation.sample
    monkeypatch.setattr(evaluation, "sample", lambda *a: made.append(sample(*a)) or made[-1])
    monkeypatch.setattr("denoiselab.run.BATCH", 5)
    folder = evaluation.evaluate(run, run.parts_for(config), rerun=True)
    monkeypatch.setattr("denoiselab.run.BATCH", 256)
    evaluation.sample(run, run.parts_for(config), n, 0)
    protocol = json.loads((folder / "evaluation.json").read_text())["protocol"]
    assert [len(one.generated) for one in made] == [n, n]
    assert protocol["n"] == n
    torch.testing.assert_close(made[0].generated, made[1].generated, atol=1e-5, rtol=0)
    assert len(made[0].generated.flatten(1).unique(dim=0)) == n


def test_nothing_is_measured_of_a_network_in_training_mode(example_run):
    run = load(example_run)
    parts = run.parts_for(plain(compose("evaluate", ["ckpt=none", "evaluation.n=2", "metrics=none"])))
    check_evaluates(run.denoiser)
    layers = (layer for layer in run.denoiser.named_modules() if isinstance(layer[1], nn.Dropout | nn.Conv2d))
    name, part = next(layers)
    part.train()
    with pytest.raises(RuntimeError, match=rf"^{name} is in training mode; nothing was made or measured"):
        run.draw(parts, run.cond(2), range(2))
    with pytest.raises(RuntimeError, match="is in training mode"):
        evaluation.evaluate(run, parts, rerun=True)
    part.eval()
    run.draw(parts, run.cond(2), range(2))
