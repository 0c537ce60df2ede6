"""What the README shows works as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from denoiselab.compose import compose
from denoiselab.errors import UserError
from denoiselab.training import Job

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_its_schedule_trains_along_a_path_that_reaches_the_clean_level(tmp_path: Path, train):
    """alpha = 1 and sigma = 0 at t = 0, alpha = 0 at t = 1: no weight, loss or sample may become infinite."""
    folder = tmp_path / "mylab"
    (folder / "schedule").mkdir(parents=True)
    (folder / "power.py").write_text(re.findall(r"```python\n(.*?)```", README, re.S)[0])
    (folder / "schedule" / "power.yaml").write_text(re.findall(r"```yaml\n(.*?)```", README, re.S)[0])
    points = ["experiment=points", "schedule=power", "evaluation.n=200", "sampler.steps=10", "trainer.max_steps=40"]
    for recipe in (
        ["loss=v"],
        ["loss=v", "weighting=min_snr"],
        ["loss=v", "sampler=heun"],
        ["loss=v", "spacing=linspace"],
    ):
        train(*points, *recipe, config_dir=folder)
    with pytest.raises(UserError, match="target: Eps says nothing of x_0 at t = 1 of Power"):
        Job(compose("train", [*points, "loss=simple"], folder))


def test_a_taken_name_is_refused(tmp_path: Path):
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "cosine.yaml").write_text("_target_: denoiselab.schedule.Linear\n")
    with pytest.raises(UserError, match=r"cosine\.yaml: there is a shipped option of this name"):
        compose("train", [], tmp_path)
