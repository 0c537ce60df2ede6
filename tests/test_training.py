"""A run: it trains, logs, refuses, saves, starts from another and is held by one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from denoiselab import checkpoint
from denoiselab.compose import compose, conf_dir, options
from denoiselab.data import Stream
from denoiselab.errors import CannotSave, NonFiniteLoss, RunHeld, UserError
from denoiselab.module import Diffusion
from denoiselab.rows import rows
from denoiselab.training import Job
from runs import SMALL, STEPS, differences, last


def on_files(experiment: str) -> bool:
    """Whether its data are files that do not come with denoiselab; test_recipes and test_latents have those."""
    found = re.search(r"override /data: (\w+)", (conf_dir() / "experiment" / f"{experiment}.yaml").read_text())
    return bool(found) and "\nroot:" in (conf_dir() / "data" / f"{found[1]}.yaml").read_text()


@pytest.mark.parametrize("experiment", [name for name in options()["experiment"] if not on_files(name)])
def test_every_experiment_runs_two_steps(experiment: str, train):
    folder = train(f"experiment={experiment}", "trainer.max_steps=2")
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 2)
    found = {key for row in rows(folder / "metrics.jsonl") for key in row}
    assert {"train/loss", "train/lr", "train/grad_norm", "speed/steps_per_second"} <= found
    evaluation = json.loads(next(folder.glob("evaluations/*/evaluation.json")).read_text())
    pictures = {p.name.rpartition("_")[0] for p in (folder / "pictures").iterdir()}
    if "autoencoder" in experiment:  # which makes no samples, and has no losses by level
        assert pictures == {"reconstructions"}
        return
    assert {"val/loss", "val/loss_raw"} <= found
    assert pictures == {"sample_grid"}
    (sweep,) = folder.glob("diagnostics/guidance_sweep/00000002-*")
    assert (sweep / "picture.png").is_file()
    assert evaluation["protocol"]["n"] == 20
    assert evaluation["records"][-1]["name"] == "held_out_loss"


def test_the_first_losses_are_what_they_were(train):
    """Guards refactors: the same seed gives the same numbers (raise NUMERICS_VERSION when that is meant to change)."""
    folder = train(
        "data=8gaussians", "model=mlp", "trainer.max_steps=20", "trainer.log_every=5", "callbacks=none", *SMALL[:1]
    )
    losses = [row["train/loss"] for row in rows(folder / "metrics.jsonl")]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = [0.963676, 0.944974, 0.738515, 0.573234]


def test_a_finished_run_is_skipped_and_a_longer_one_continues(train):
    folder = train(*SMALL, *STEPS, quick=())
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.ckpt")}
    assert train(*SMALL, *STEPS, quick=()) == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.ckpt")}
    train(*SMALL, *STEPS, "trainer.max_steps=14", quick=())
    assert last(folder)["global_step"] == 14


def test_rerun_moves_the_old_run_aside(train):
    folder = train(*SMALL, *STEPS, quick=())
    train(*SMALL, *STEPS, "rerun=true", quick=())
    assert len(list(folder.parent.iterdir())) == 2


def test_accumulation_gives_the_same_batches(train):
    """The loss of a step is the mean over the same global batch; only rounding and the noise's layout differ."""
    streams = [Stream(100, 16, 0, accumulation=a) for a in (1, 4)]
    whole, parts = (iter(s) for s in streams)
    for _ in range(20):
        assert next(whole) == [address for _ in range(4) for address in next(parts)]


def test_ranks_share_weights_and_never_noise_or_times(command, tmp_path: Path):
    """Two processes: one directory, one log, world size 2, and the two ranks' draws differ."""
    program = Path(__file__).parent / "two_ranks.py"
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    runs = [path for path in (tmp_path / "outputs" / "runs").iterdir() if path.name != ".jobs"]
    assert len(runs) == 1
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert first["world"] == second["world"] == 2
    assert not torch.equal(first["t"], second["t"])
    assert not torch.equal(first["eps"], second["eps"])
    assert not set(first["id"].tolist()) & set(second["id"].tolist())
    assert torch.equal(first["weight"], second["weight"])
    both = torch.cat([first["t"], second["t"]]).flatten()
    assert sorted((both * len(both)).long().tolist()) == list(range(len(both)))  # one t per stratum of the global batch
    assert [row["step"] for row in rows(runs[0] / "metrics.jsonl") if "train/loss" in row] == [1, 2, 3, 4]

    told = [torch.load(tmp_path / f"told{r}.pt", weights_only=True) for r in (0, 1)]
    for k in (0, 1):  # times, losses: in rank order, the same for both
        both = torch.cat([told[0]["own"][k], told[1]["own"][k]])
        assert torch.equal(told[0]["told"][k], both)
        assert torch.equal(told[1]["told"][k], both)
    learned = [torch.load(tmp_path / f"learned{r}.pt", weights_only=True) for r in (0, 1)]
    assert differences(*learned) == []
    assert learned[0]["timesteps.p"].max() > learned[0]["timesteps.p"].min()
    assert (learned[0]["schedule.knots"].diff().diff().abs() > 1e-6).any()


def test_a_run_is_held_by_one_process(train, tmp_path: Path):
    job = Job(compose("train", [*SMALL, *STEPS, f"output_dir={tmp_path}"]))
    with job.folder.locked(), pytest.raises(RunHeld, match=str(os.getpid())) as held:
        Job(compose("train", [*SMALL, *STEPS, f"output_dir={tmp_path}"])).run()
    assert held.value.status == 75
    lock = job.folder.path / "run.lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock.write_text(json.dumps({"host": os.uname().nodename, "pid": gone.pid}))
    with job.folder.locked():
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


@pytest.mark.faults
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(train, tmp_path: Path, monkeypatch, faults):
    from denoiselab.loss import WeightedLoss

    forward = WeightedLoss.forward
    calls = []

    def poisoned(self, *args, **kwargs):
        loss, parts = forward(self, *args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 6 else loss), parts

    monkeypatch.setattr(WeightedLoss, "forward", poisoned)
    with pytest.raises(NonFiniteLoss, match="at step 6") as error:
        train(*SMALL, *STEPS, quick=())
    assert error.value.status == 3
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert last(folder)["global_step"] == 4
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    faults.injected("call")


@pytest.mark.faults
def test_a_full_disk_is_survived_until_it_is_not(train, tmp_path: Path, monkeypatch, capsys, faults):
    save, failing = checkpoint.save, []

    def full(content, path):
        if failing:
            failing.pop()
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr("denoiselab.trainer._save", full)
    failing[:] = [1, 1]
    folder = train(*SMALL, *STEPS, quick=())
    assert last(folder)["global_step"] == 12
    assert "No space left on device" in capsys.readouterr().err
    failing[:] = [1] * 9
    with pytest.raises(CannotSave) as error:
        train(*SMALL, *STEPS, "seed=1", quick=())
    assert error.value.status == 74
    faults.injected("call", 5)


def test_starting_from_another_run(train, tmp_path: Path, capsys):
    source = train(*SMALL, *STEPS, quick=())
    ema = {k.removeprefix("ema.model."): v for k, v in last(source)["state_dict"].items() if k.startswith("ema.model.")}
    start = {}
    fit = Diffusion.on_train_batch_start

    def spy(self, *args):
        if not start:
            start.update({k: v.clone() for k, v in self.denoiser.state_dict().items()}, step=self.global_step)
        return fit(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diffusion, "on_train_batch_start", spy)
        folder = train(*SMALL, *STEPS, "seed=5", f"init_from={source}", quick=())
    assert start.pop("step") == 0
    assert start.keys() == ema.keys()
    assert all(torch.equal(start[k], ema[k]) for k in ema)
    assert folder != train(*SMALL, *STEPS, "seed=5", quick=())
    for wrong, what in {"schedule=linear": "schedule Cosine", "target=eps": "target denoiselab.target.V"}.items():
        with pytest.raises(UserError, match=what):
            train(*SMALL, *STEPS, wrong, f"init_from={source}", quick=())
    with pytest.raises(UserError, match="do not match"):
        train(*SMALL, *STEPS, "model.blocks=2", f"init_from={source}", quick=())
    capsys.readouterr()
    train(*SMALL, *STEPS, "schedule=linear", "model.blocks=2", f"init_from={source}", "init_mismatch=allow", quick=())
    assert "not matched" in capsys.readouterr().err


def test_nothing_optional_runs_without_callbacks(train):
    folder = train(*SMALL, *STEPS, quick=())
    assert not (folder / "pictures").exists()
    assert {key.partition("/")[0] for row in rows(folder / "metrics.jsonl") for key in row} == {"step", "train"}


def test_no_evaluation_runs_before_the_first_step_and_cadences_are_kept(train, monkeypatch):
    from denoiselab.callbacks import Inspection, LossBuckets, SampleGrid

    seen: list[tuple[str, int]] = []
    for kind in (LossBuckets, SampleGrid, Inspection):
        monkeypatch.setattr(
            kind, "run", lambda self, trainer, module: seen.append((type(self).__name__, trainer.global_step))
        )
    cadence = ("callbacks.buckets.every=2", "callbacks.sample_grid.every=3", "callbacks.guidance_sweep.every=4")
    train(*SMALL[2:], *STEPS[1:], "metrics=none", "trainer.max_steps=5", *cadence, quick=())
    assert sorted(seen) == [
        *[("Inspection", s) for s in (4, 5)],
        *[("LossBuckets", s) for s in (2, 4, 5)],
        *[("SampleGrid", s) for s in (3, 5)],
    ]


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_dashboards_get_the_same_numbers(logger: str, train, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train(f"logger={logger}", "model.channels=8", "model.head_channels=8")
    expected = {row["step"]: row["train/loss"] for row in rows(folder / "metrics.jsonl") if "train/loss" in row}
    if logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(expected)
        assert "pictures/sample_grid" in events.Tags()["images"]
    else:
        (offline,) = folder.glob("wandb/offline-run-*")
        assert offline.name.endswith(folder.name.rpartition("-")[2])  # one run, one id for life: its identity's hash
        assert list(offline.glob("*.wandb"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_loss_targets_levels_and_ema_stay_float32_or_better(precision: str, train, monkeypatch):
    from denoiselab.denoiser import Denoiser

    seen = set()
    outputs = Denoiser.outputs

    def spy(self, x_t, alpha_t, sigma_t, **cond):
        found = outputs(self, x_t, alpha_t, sigma_t, **cond)
        seen.update({x_t.dtype, alpha_t.dtype, sigma_t.dtype, found.x_0.dtype})
        return found

    monkeypatch.setattr(Denoiser, "outputs", spy)
    folder = train(*SMALL, *STEPS[2:], "trainer.max_steps=2", f"trainer.precision={precision}", quick=())
    if precision != "bf16-true":
        assert seen <= {torch.float32, torch.float64}
    state = last(folder)["state_dict"]
    assert {v.dtype for k, v in state.items() if k.startswith("ema.model")} == {torch.float32}


def test_weight_decay_spares_norms_biases_and_embeddings():
    from denoiselab.experiment import build
    from denoiselab.module import parameter_groups

    model = build("model=unet_digits").model
    decayed, spared = (group["params"] for group in parameter_groups(model))
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(spared) == len(names)
    assert all("norm" not in names[id(p)] and "label" not in names[id(p)] and p.ndim > 1 for p in decayed)
    assert any("label" in names[id(p)] for p in spared)


def test_the_realised_share_of_dropped_labels():
    from denoiselab.conditioning import NULL, Drop

    torch.manual_seed(0)
    dropped = Drop(0.1)({"label": torch.zeros(100_000, dtype=torch.int64)})["label"] == NULL
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.003)


def test_a_sweep_with_an_idle_axis_is_refused(tmp_path: Path):
    from denoiselab.sweeper.base import refuse_idle_axes

    jobs = [Job(compose("train", [f"logger={name}", f"output_dir={tmp_path}"])) for name in ("csv", "wandb")]
    with pytest.raises(UserError, match=r"logger=csv and logger=wandb: this axis has no effect"):
        refuse_idle_axes(jobs, [])
    jobs = [Job(compose("train", [f"sampler={name}", f"output_dir={tmp_path}"])) for name in ("ddim", "heun")]
    refuse_idle_axes(jobs, [])
    assert jobs[0].folder.path == jobs[1].folder.path
    assert not list(tmp_path.iterdir())
