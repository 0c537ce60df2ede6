"""Diagnostics during training: on their cadence, within their budget, told to every dashboard, and harmless."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from denoiselab.diagnostics import Diagnostic, Finding, Subject
from denoiselab.errors import UserError
from denoiselab.metrics.base import Measurement
from denoiselab.module import Clock
from healthy import POINTS
from runs import differences, last

HERE = "test_inspection.Looks"
QUICK = (*POINTS, "trainer.max_steps=12", "trainer.checkpoint_every=4", "data.n=64", "data.batch_size=16")


class Looks(Diagnostic):
    """Takes so many seconds in ten parts; keeps what it was shown."""

    shown: list[tuple[int, bool, bool]]

    def __init__(self, seconds: float = 0.0, every: int = 4, budget: str | None = "5%"):
        super().__init__(every, budget)
        self.seconds = seconds

    def look(self, subject: Subject) -> Finding:
        tell = subject.progress("looking", 10)
        for _ in range(10):
            time.sleep(self.seconds / 10)
            tell(1)
        assert subject.raw is not None
        samples, _ = subject.draw(4)
        Looks.shown.append((subject.run.step, subject.denoiser.training, subject.raw.training))
        return Finding(
            table={"k": [1, 2], "word": ["a", None]},
            protocol=subject.protocol(4),
            records=[Measurement("seen", float(samples.std()), "none", protocol={"of": "samples"})],
            alarms=["it looks odd"],
        )

    def draw(self, finding: Finding) -> Image.Image:
        return Image.new("RGB", (40, 30), "white")


@pytest.fixture(autouse=True)
def _shown():
    Looks.shown = []


@pytest.fixture
def look(train, tmp_path: Path) -> Callable[..., Path]:
    """Train with this diagnostic, an option of one's own; the run directory."""
    option = tmp_path / "mylab" / "diagnostics" / "odd.yaml"
    option.parent.mkdir(parents=True)
    option.write_text(f"odd:\n  _target_: {HERE}\n  seconds: 0.0\n  every: 4\n  budget: 5%\n")

    def run(seconds: float = 0.0, *overrides: str, **own: Any) -> Path:
        values = {"seconds": seconds, **own}.items()
        lines = [f"diagnostics.odd.{k}={'null' if v is None else v}" for k, v in values]
        return train("diagnostics=odd", *lines, *overrides, quick=QUICK, config_dir=tmp_path / "mylab")

    return run


def kept(run: Path) -> list[int]:
    return [int(path.name.partition("-")[0]) for path in sorted((run / "diagnostics").glob("odd/*"))]


def rows(run: Path, key: str) -> list[Any]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in found if key in row]


def test_it_looks_on_its_cadence_and_at_the_end_and_says_what_is_wrong(look, capsys):
    run = look(every=5, budget=None)
    assert kept(run) == [5, 10, 12]
    assert Looks.shown == [(step, False, False) for step in (5, 10, 12)]
    assert capsys.readouterr().err.count("it looks odd") == 3
    assert rows(run, "diagnostics/odd/alarms") == [1, 1, 1]
    assert len(rows(run, "diagnostics/odd/seen")) == 3


def test_looking_changes_nothing(train, look, tmp_path: Path):
    """The checkpoint is that of a run without it but for what the look itself remembers; training goes on in its own
    mode."""
    plain = last(train(quick=QUICK))
    looked = last(look(0.0, f"output_dir={tmp_path / 'looked'}", every=3, budget=None))
    assert not differences(plain["state_dict"], looked["state_dict"])
    assert not differences(plain["optimizer_states"], looked["optimizer_states"])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Training that has taken a second per step."""
    seen: list[float] = []

    def seconds(self: Clock) -> float:
        return float(seen[0])

    monkeypatch.setattr(Clock, "seconds", seconds)
    return seen


@pytest.mark.parametrize(
    ("seconds", "budget", "looks", "says"),
    [
        (0.05, "90%", [4, 8, 12], []),
        # 0.04, 0.08 and 0.12 s in all: cut at 4 after at least that, too little left for it at 8 and 12
        (5.0, "1%", [], ["was cut after", "would take about", "would take about"]),
        (0.3, "100%", [4, 8, 12], []),
    ],
)
def test_it_keeps_to_its_budget_and_says_when_it_was_cut(seconds, budget, looks, says, look, clock, capsys):
    from denoiselab.callbacks import Inspection

    clock.append(0.0)
    run_one = Inspection.run

    def timed(self, trainer, module):
        clock[0] = float(trainer.global_step)
        run_one(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inspection, "run", timed)
        began = time.perf_counter()
        run = look(seconds, budget=budget)
    assert kept(run) == looks
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == len(says)
    assert all(word in line and "diagnostics.odd.budget=null" in line for word, line in zip(says, lines, strict=True))
    assert rows(run, "diagnostics/odd/left_out") == [k + 1 for k in range(len(says))]
    if says:
        assert time.perf_counter() - began < 5  # it was cut, not waited for


def test_what_it_may_not_spend_at_first_is_kept_for_later(look, clock):
    """A look of 0.5 s, and 0.18 s more for it with every step: the first are cut or left out, a later one is not."""
    from denoiselab.callbacks import Inspection

    clock.append(0.0)
    run_one = Inspection.run

    def timed(self, trainer, module):
        clock[0] = 6.0 * trainer.global_step
        run_one(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inspection, "run", timed)
        run = look(0.5, "trainer.max_steps=20", budget="3%", every=1)
    assert kept(run)
    assert kept(run)[0] > 2
    assert rows(run, "diagnostics/odd/left_out")


def test_a_training_does_not_end_because_it_cannot_be_looked_at(look, monkeypatch, capsys):
    def look_at(self: Looks, subject: Subject) -> Finding:
        raise UserError("n=8: too few")

    monkeypatch.setattr(Looks, "look", look_at)
    run = look(budget=None)
    assert kept(run) == []
    assert rows(run, "diagnostics/odd/left_out") == [1, 2, 3]
    assert "odd: left out at step 12: n=8: too few" in capsys.readouterr().err
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("budget", ["0%", "101%", "five", "5"])
def test_a_budget_is_a_share(budget: str, look):
    with pytest.raises(UserError, match=rf"diagnostics.odd.budget={budget}: need a share"):
        look(budget=f"'{budget}'")


def test_diagnostics_of_samples_are_refused_for_autoencoders(train):
    with pytest.raises(UserError, match=r"diagnostics.forward: is about samples, and this loss trains an autoencoder"):
        train("experiment=autoencoder_digits", "diagnostics=forward", quick=())


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_dashboards_get_the_picture_and_the_numbers(logger: str, look, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = look(0.0, f"logger=[csv,{logger}]", every=12, budget=None)
    if logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = {path.parent for path in run.rglob("events.out.*")}
        found = EventAccumulator(str(folder)).Reload()
        assert found.Tags()["images"] == ["pictures/odd"]
        (scalar,) = found.Scalars("diagnostics/odd/seen")
        assert scalar.value == pytest.approx(rows(run, "diagnostics/odd/seen")[0])
    else:
        (media,) = run.rglob("media/images/pictures/*.png")
        with Image.open(media) as shown:
            assert shown.width >= 900
        (table,) = run.rglob("media/table/tables/*.json")
        assert json.loads(table.read_text())["data"] == [[1, "a"], [2, None]]
