"""The Python surface: load, sample, build, a sampler over any callable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import denoiselab
from denoiselab import checkpoint
from denoiselab.errors import CheckpointError, UserError


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
    assert run.labels(12).tolist() == [*range(10), 0, 1]
    assert run.labels(2, 7).tolist() == [7, 7]
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
