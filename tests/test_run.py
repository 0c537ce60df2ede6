"""The Python surface: load, sample, build, a sampler over any callable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import denoiselab
from denoiselab import checkpoint
from denoiselab.compose import compose, plain
from denoiselab.errors import CheckpointError, UserError
from denoiselab.evaluation import evaluate


@pytest.fixture(scope="module")
def run(example_run: Path):
    return denoiselab.load(example_run)


def test_samples_have_the_stated_form(run):
    images = run.sample(n=3, steps=2)
    assert (images.dtype, images.shape) == (torch.float32, (3, 1, 8, 8))
    assert bool((images.abs() <= 1).all())


def test_a_sample_is_addressed_by_its_seed_and_number(run):
    few, many = run.sample(n=2, steps=2, seed=3), run.sample(n=300, steps=2, seed=3)
    assert torch.allclose(few, many[:2], atol=1e-4)
    assert torch.equal(few, run.sample(n=2, steps=2, seed=3))
    assert not torch.allclose(few, run.sample(n=2, steps=2, seed=4), atol=1e-2)


def test_labels_are_checked(run):
    assert run.cond(12)["label"].tolist() == [*range(10), 0, 1]
    assert run.cond(2, 7)["label"].tolist() == [7, 7]
    for wrong in (10, -1, [1, 2, 3]):
        with pytest.raises(UserError, match="label="):
            run.sample(n=2, label=wrong)
    with pytest.raises(UserError, match="did you mean ddim"):
        run.sample(n=1, sampler="ddimm")


def test_ema_is_the_default_and_raw_is_another_model(example_run: Path, run):
    raw = denoiselab.load(example_run, weights="raw")
    state = checkpoint.load(example_run / "checkpoints" / "last.ckpt")["state_dict"]
    for loaded, prefix in ((run, "ema.model."), (raw, "denoiser.")):
        for key, value in loaded.denoiser.state_dict().items():
            assert torch.equal(value, state[prefix + key])
        assert not any(module.training for module in loaded.denoiser.modules())
    assert any(not torch.equal(a, b) for a, b in zip(run.denoiser.parameters(), raw.denoiser.parameters(), strict=True))


def test_a_checkpoint_file_alone_is_enough(example_run: Path, run, tmp_path: Path):
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((example_run / "checkpoints" / "last.ckpt").read_bytes())
    assert torch.equal(denoiselab.load(alone).sample(n=2, steps=2), run.sample(n=2, steps=2))


def test_what_watched_a_training_need_not_be_there(example_run: Path, run, tmp_path: Path):
    """A run whose callbacks, diagnostics and loggers are gone, or somebody else's: loading makes none of them."""
    content = checkpoint.load(example_run / "checkpoints" / "last.ckpt")
    text = content["denoiselab"]["config"]
    assert "denoiselab.callbacks.SampleGrid" in text
    content["denoiselab"]["config"] = text.replace("denoiselab.callbacks.SampleGrid", "elsewhere.Gone")
    checkpoint.save(content, tmp_path / "alone.ckpt")
    assert torch.equal(denoiselab.load(tmp_path / "alone.ckpt").sample(n=2, steps=2), run.sample(n=2, steps=2))
    content["denoiselab"]["config"] = text.replace("denoiselab.sampler.DDIM", "elsewhere.Gone")
    checkpoint.save(content, tmp_path / "alone.ckpt")
    with pytest.raises(UserError, match=r"sampler\._target_='elsewhere\.Gone' is not among the allowed"):
        denoiselab.load(tmp_path / "alone.ckpt")


def test_another_schedule_is_sampled_along_only_where_it_is_named(run, example_run: Path, called):
    own, other = run.parts_for(sampling()), run.parts_for(sampling("schedule=linear"))
    assert own.schedule is run.schedule
    assert run.elsewhere(own) == []
    assert run.elsewhere(other) == [other.schedule.fingerprint]
    for option, says in ((), 0), (("schedule=linear",), 1):
        said = called("sample", f"ckpt={example_run}", *option, "sampler.steps=2", "n=2", "device=cpu", "output=drawn")
        line = f"along {other.schedule.fingerprint}; the run was trained along {run.schedule.fingerprint}"
        assert said.returncode == 0
        assert said.stderr.count(line) == says
    assert torch.equal(run.sample(n=2, steps=2, schedule="cosine"), run.sample(n=2, steps=2))
    assert not torch.allclose(run.sample(n=2, steps=2, schedule="linear"), run.sample(n=2, steps=2), atol=1e-2)


def sampling(*overrides: str) -> dict[str, Any]:
    return plain(compose("sample", ["ckpt=none", *overrides]))


def test_an_evaluation_along_another_schedule_says_both_and_has_its_own_address(run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run, "folder", tmp_path)
    asked = ["ckpt=none", "metrics=none", "evaluation.n=2", "sampler.steps=2"]
    folders = [
        evaluate(run, run.parts_for(plain(compose("evaluate", [*asked, *more])))) for more in ([], ["schedule=linear"])
    ]
    assert folders[0] != folders[1]
    own, other = (json.loads((folder / "evaluation.json").read_text())["protocol"] for folder in folders)
    assert own["schedule"] == own["trained_along"] == other["trained_along"] == run.schedule.fingerprint
    assert other["schedule"].startswith("Linear:")
    assert own["nfe"] == 2


def test_what_a_schedule_and_a_loss_have_learned_is_loaded(train):
    """And without it the run is not the one that was trained."""
    folder = train(
        *("data=8gaussians", "data.n=200", "data.batch_size=32", "model=mlp", "model.width=16", "callbacks=none"),
        *("schedule=adaptive", "weighting=uncertainty", "trainer.max_steps=12"),
    )
    run = denoiselab.load(folder)
    state = checkpoint.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    learned = {key: value for key, value in state.items() if key.startswith(("schedule.", "loss."))}
    assert any(key.startswith("schedule.") for key in learned)
    assert any(key.startswith("loss.weighting.") for key in learned)
    for key, value in learned.items():
        group, _, name = key.partition(".")
        assert torch.equal(getattr(run, group).state_dict()[name], value)


def changed(example_run: Path, path: Path, change) -> Path:
    content = checkpoint.load(example_run / "checkpoints" / "last.ckpt")
    change(content)
    checkpoint.save(content, path)
    return path


CHANGES = {
    "names a foreign class": (
        lambda c: c["denoiselab"].update(
            config=c["denoiselab"]["config"].replace("denoiselab.schedule.Cosine", "torch.hub.load")
        ),
        "nothing was run",
    ),
    "another schedule than it was trained with": (
        lambda c: c["denoiselab"].update(
            config=c["denoiselab"]["config"].replace("schedule.Cosine", "schedule.Linear")
        ),
        "schedule",
    ),
    "a foreign codec": (
        lambda c: c["denoiselab"]["interface"].update(codec={"_target_": "os.system"}),
        "nothing was run",
    ),
    "no EMA": (
        lambda c: c.update(state_dict={k: v for k, v in c["state_dict"].items() if not k.startswith("ema")}),
        "holds no ema weights",
    ),
    "a wrong shape": (lambda c: c["state_dict"].update({"ema.model.net.first.weight": torch.zeros(3)}), "do not fit"),
    "a configuration that is no mapping": (lambda c: c["denoiselab"].update(config="- 1"), "not a configuration"),
    "a configuration that is no YAML": (lambda c: c["denoiselab"].update(config="a: ["), "not YAML"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_wrong_inside_is_refused_in_one_line(name: str, example_run: Path, tmp_path: Path):
    change, reason = CHANGES[name]
    file = changed(example_run, tmp_path / "changed.ckpt", change)
    with pytest.raises(UserError, match=reason) as error:
        denoiselab.load(file)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        denoiselab.load(tmp_path)
