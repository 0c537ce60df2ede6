"""Composition: every option works, recipes override what they should, and mistakes are one line."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import pytest
import torch
import yaml

from denoiselab.checks import check
from denoiselab.compose import compose, conf_dir, options, plain, read_yaml, sweep, to_yaml
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, identity, resolve
from denoiselab.run_folder import digest
from exact import ON_FILES, OPEN, needing, own
from networks import NETWORKS, natural_shape
from test_data_options import FILES
from test_points import MIXTURES, POINTS

GROUPS = options()
DATA = {name: ["model=mlp", "metrics=points", *([] if name in MIXTURES else ["~metrics.modes"])] for name in POINTS}
DATA["mlp"] = ["data=8gaussians", "metrics=points"]
DATA["points"] = ["data=8gaussians", "model=mlp", "metrics=points"]
ALONE = {group: names for group, names in GROUPS.items() if group not in ("trainer", "logger", "model")}
DATA["score_field"] = ["data=8gaussians", "model=mlp", "metrics=points"]
DATA["super_resolution"] = ["data=super_resolution"]
DATA["reconstruction"] = DATA["reconstruction_digits"] = DATA["autoencoder"] = ["loss=autoencoder"]
ALONE["data"] = [name for name in GROUPS["data"] if name not in FILES]  # those are made in test_data_options
ELSEWHERE = {"latents", "latent_digits", "ddpm_cifar10", "adm_imagenet64", "dit_imagenet256", *ON_FILES}
ELSEWHERE |= {"inception", "inception_infinity"}
"""Options on files that test_latents, test_recipes and tests of metrics write, and compose there."""
ALONE = {group: [name for name in names if name not in ELSEWHERE] for group, names in ALONE.items()}


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, names in ALONE.items() for o in names])
def test_every_option_composes_and_its_objects_are_made(group: str, option: str, example_run):
    fitting = [line for line in DATA.get(option, []) if group != "experiment" and not line.startswith(f"{group}=")]
    fitting += needing(option, example_run)
    fitting += ["loss=learned_hybrid"] if option == "ddpm_learned" else []
    parts = Parts(resolve(compose("train", [f"{group}={option}", *fitting])))
    check(parts)
    assert own(group, option) in (None, parts.config.get(group))


@cache
def composed(*overrides: str) -> dict[str, Any]:
    return plain(compose("train", overrides))


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_composes_and_is_made_at_its_own_size(model: str):
    """On the meta device, where it costs nothing, with all that is made of it."""
    data = ["data=unknown", f"data.shape={[*natural_shape(model)]}", "metrics=none"]
    parts = Parts(resolve(compose("train", [f"model={model}", *data])))
    assert parts.data.shape
    assert parts.schedule.points == 1000
    with torch.device("meta"):
        assert next(parts.denoiser.parameters()).is_meta
    check(parts)


@pytest.mark.parametrize("option", OPEN)
def test_an_option_that_needs_more_asks_for_it(option: str):
    (group,) = [group for group, names in GROUPS.items() if option in names]
    with pytest.raises(UserError, match=rf"^{re.escape(OPEN[option])}=\?\?\?: this option must be given$"):
        resolve(compose("train", [f"{group}={option}"]))


@pytest.mark.parametrize("file", sorted(conf_dir().glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_an_experiment_names_a_recipe_and_never_its_parts(file):
    text = file.read_text()
    if file.parent.name in ("experiment", "study"):
        assert not re.search(r"/(target|weighting|timesteps):", text), "override /loss instead"
    assert "${eval" not in text
    assert yaml.safe_load(text) is not None


@pytest.mark.parametrize("loss", GROUPS["loss"])
@pytest.mark.parametrize("axis", ["target=x0", "weighting=min_snr", "timesteps=uniform"])
def test_a_part_given_beside_a_recipe_replaces_only_that_part(loss: str, axis: str):
    group, _, option = axis.partition("=")
    recipe = composed(f"loss={loss}", *needing(loss, "a"))
    mixed = composed(axis, f"loss={loss}", *needing(loss, "a"))
    own = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text())
    assert mixed[group] == own
    assert {k: v for k, v in mixed.items() if k != group} == {k: v for k, v in recipe.items() if k != group}


def test_a_recipe_replaces_that_of_an_experiment():
    mixed = plain(compose("train", ["experiment=digits", "loss=simple"]))
    assert mixed["target"]["_target_"].endswith("Eps")
    assert mixed["name"] == "digits"


def test_heun_brings_its_spacing_and_another_may_be_given():
    assert plain(compose("sample", ["sampler=heun", "ckpt=x"]))["spacing"]["_target_"].endswith("Karras")
    chosen = plain(compose("sample", ["sampler=heun", "spacing=log_snr", "ckpt=x"]))
    assert chosen["spacing"]["_target_"].endswith("LogSNR")


MISTAKES = {
    "schedul=cosine": "schedule",
    "schedule=cosin": "cosine",
    "sampler=ddimm": "ddim",
    "trainer.max_step=3": "max_steps",
    "sampler.step=3": "steps",
    "optimzer.lr=1": "optimizer",
    "trainer.max_steps=abc": "whole number",
    "trainer.max_steps=1e4": "whole number",
    "trainer.max_steps=1.5": "whole number",
    "optimizer.lr=fast": "a finite number",
    "rerun=maybe": "true or false",
    "optimizer.betas=0.9": "a list",
    "+new.key=1": "no option 'new'",
    "+trainer.new=1": "no option 'new'",
    "seed=0,1": "-m",
    "seed": "option=value",
    "data=": "data is one of",
    "schedule=[cosine,linear]x": "cannot be read",
}


@pytest.mark.faults
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistyped_override_is_named_with_what_would_work(line: str, faults):
    faults.injected("option")
    with pytest.raises(UserError) as error:
        compose("train", [line])
    message = str(error.value)
    assert message.startswith(line)
    assert MISTAKES[line] in message
    assert "\n" not in message


VALUES = {
    "p_null=1.5": "p_null=1.5",
    "p_null=-0.1": "p_null=-0.1",
    "sampler.steps=0": "sampler.steps=0",
    "sampler.steps=2000": "sampler.steps=2000",
    "sampler.eta=2": "sampler.eta=2",
    "sampler.clip=-1": "sampler.clip=-1",
    "spacing=karras spacing.sigma_max=-1": "spacing.sigma_max=-1",
    "spacing=karras spacing.rho=0": "spacing.rho=0",
    "schedule.points=1": "schedule.points=1",
    "schedule.shift=-1": "schedule.shift=-1",
    "schedule=linear schedule.beta_max=2": "schedule.beta_min",
    "weighting=min_snr weighting.gamma=0": "weighting.gamma=0",
    "guidance.scale=inf": "guidance.scale=inf",
    "guidance.scale=2 p_null=0": "guidance=CFG: with p_null=0",
    "ema.decay=1": "ema.decay=1",
    "optimizer.lr=-1": "optimizer.lr=-1: need a number >= 0",
    "data.batch_size=0": "data.batch_size=0",
    "data.size=9": "data.size=9",
    "data.workers=-1": "data.workers=-1",
    "model.channels=20": "model.channels=20",
    "model.dropout=1": "model.dropout=1",
    "model.multipliers=[1,1,1,1,1]": "model.multipliers=[1, 1, 1, 1, 1]",
    "model=mlp": "model.shape=(1, 8, 8)",
    "data=8gaussians": "model.shape=(2,)",
    "data=8gaussians model=mlp": "metrics=digits",
    "trainer.max_steps=0": "trainer.max_steps=0",
    "trainer.precision=12": "trainer.precision=12",
    "trainer.gradient_clip=0": "trainer.gradient_clip=0",
    "trainer.epochs=0": "trainer.epochs=0",
    "evaluation.n=0": "evaluation.n=0",
    "evaluation.n=3": "evaluation.n=3: metrics.precision_recall needs at least 4",
    "evaluation.weights=best": "evaluation.weights=best",
    "callbacks.buckets.buckets=0": "callbacks.buckets.buckets=0",
    "callbacks.sample_grid.every=0": "callbacks.sample_grid.every=0",
    "lr_schedule=warmup lr_schedule.warmup=-1": "lr_schedule.warmup=-1",
    "+optimizer.nonsense=1": "optimizer.nonsense=1: no option 'nonsense' here",
}


@pytest.mark.faults
@pytest.mark.parametrize("line", VALUES)
def test_a_value_out_of_range_is_refused_before_anything_is_written(line: str, tmp_path, monkeypatch, faults):
    faults.injected("option")
    from denoiselab.training import Job

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        Job(compose("train", line.split()))
    assert str(error.value).startswith(VALUES[line])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


CONTRADICTIONS = {
    "target=eps schedule=zero_terminal": ("target: Eps says nothing of x_0 at t = 1 of ZeroTerminal", "target=v"),
    "target=eps schedule=flow": ("target: Eps says nothing of x_0 at t = 1 of Flow", "target=v"),
    "loss=simple schedule=gvp": ("target: Eps says nothing of x_0 at t = 1 of GVP", "target=v"),
    "sampler=ddpm_learned": ("sampler: LearnedDDPM needs a variance", "loss=learned_hybrid"),
    "timesteps=slots timesteps.curve=null": ("timesteps.boundaries=null: slots have no boundaries", "curve=PATH"),
    "timesteps=slot timesteps.curve=null": ("timesteps.boundaries=null: slots have no boundaries", "curve=PATH"),
    "timesteps=from_curve timesteps.curve=nowhere.csv": ("timesteps.curve=nowhere.csv: no such file", "CSV"),
    "timesteps=importance timesteps.floor=0": ("timesteps.floor=0: need a number in (0, 1]", "0.001"),
    "timesteps=importance timesteps.floor=-1": ("timesteps.floor=-1: need a number in (0, 1]", "0.001"),
    "timesteps=discrete schedule=vp": ("timesteps=discrete: VP has no points", "timesteps.steps=1000"),
    "weighting=vlb_beta schedule=edm": ("weighting.schedule=EDM: need a table of points", "vlb"),
    "loss=consistency target=v": ("loss.target=V: need target=consistency", "sigma_min"),
    "loss=hybrid weighting=min_snr": ("weighting=min_snr: the loss Hybrid does not use a weighting", "loss=simple"),
    "loss=mixed target=eps": ("target=eps: the loss Mixed does not use a target", "loss=simple"),
    "guidance=interval p_null=0": ("guidance=Interval: with p_null=0", "p_null=0.1"),
    "guidance=dynamic_threshold p_null=0": ("guidance=DynamicThreshold: with p_null=0", "guidance=none"),
}


@pytest.mark.faults
@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_parts_that_contradict_each_other_are_refused_before_anything_is_written(
    line: str, tmp_path, monkeypatch, faults
):
    faults.injected("option")
    from denoiselab.training import Job

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        Job(compose("train", line.split()))
    begins, works = CONTRADICTIONS[line]
    assert str(error.value).startswith(begins)
    assert works in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("guidance", ["cfg", "interval", "rescale", "dynamic_threshold"])
def test_guidance_without_classes_is_refused(guidance: str):
    interface = {**Parts(resolve(compose("train", []))).interface, "num_classes": 0}
    config = resolve(compose("train", [f"guidance={guidance}", *(["guidance.scale=2"] if guidance == "cfg" else [])]))
    with pytest.raises(UserError, match=r"^guidance=\w+: the model is unconditional[^\n]*guidance=none$"):
        _ = Parts(config, interface).guidance


def test_a_network_of_ones_own_without_the_outputs_that_a_loss_needs_is_refused(monkeypatch):
    monkeypatch.setattr("denoiselab.models.MLP.__init__", lambda self, shape, num_classes=0, width=8, depth=1: None)
    config = resolve(compose("train", ["data=8gaussians", "model=mlp", "metrics=points", "loss=learned_hybrid"]))
    with pytest.raises(UserError, match=r"^model: denoiselab.models.MLP has no argument outputs, [^\n]* 2 tensors"):
        _ = Parts(config).model


def test_the_global_batch_must_divide():
    from denoiselab.training import Job

    with pytest.raises(UserError, match=r"data.batch_size=128: .* 1 x 3"):
        Job(compose("train", ["trainer.accumulate=3"]))


def test_epochs_become_steps():
    config = resolve(compose("train", ["trainer.epochs=2", "lr_schedule=cosine"]))
    assert config["trainer"]["max_steps"] == config["lr_schedule"]["steps"] == 23  # ceil(2 * 1437 / 128)


def test_a_sweep_is_the_product_of_its_axes():
    jobs = sweep(["schedule=linear,cosine", "p_null=0.1", "seed=range(3)"])
    assert len(jobs) == 6
    assert jobs[0] == ["schedule=linear", "p_null=0.1", "seed=0"]
    assert len({tuple(job) for job in jobs}) == 6


def test_a_configuration_survives_being_written_and_read():
    composed = compose("train", ["experiment=digits"])
    assert read_yaml(to_yaml(composed), "x") == plain(composed)


def test_environment_lookups_are_not_resolved_into_files(monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    composed = compose("train", ["name=${oc.env:SECRET}"])
    assert plain(composed)["name"] == "canary"
    assert "canary" not in to_yaml(composed)
    refers = compose("train", ["name=${oc.env:SECRET}", "output_dir='a/${name}'", "trainer.max_steps='${seed}'"])
    assert plain(refers)["output_dir"] == "a/canary"
    assert "canary" not in to_yaml(refers)
    assert read_yaml(to_yaml(refers), "x")["trainer"]["max_steps"] == 0


def test_what_only_looks_like_a_look_up_is_resolved(monkeypatch):
    """A value of the environment may be in any text; a run whose file refers to nothing could not be loaded."""
    monkeypatch.setenv("THREADS", "1")
    composed = compose("train", ["data=super_resolution", "trainer.threads='${oc.decode:${oc.env:THREADS}}'"])
    written, config = read_yaml(to_yaml(composed), "x"), plain(composed)
    assert written.pop("trainer") == {**config.pop("trainer"), "threads": "${oc.decode:${oc.env:THREADS}}"}
    assert written == config
    composed.config.name = "${trainer.threads.deeper}"
    composed.config.trainer.threads = "${oc.create:{deeper:${oc.env:THREADS}}}"
    assert plain(composed)["name"] == "1"
    assert read_yaml(to_yaml(composed), "x")["name"] == "${trainer.threads.deeper}"


class TestIdentity:
    IRRELEVANT = (
        *("sampler=heun", "guidance.scale=3", "callbacks=none", "logger=wandb", "output_dir=elsewhere"),
        *("trainer.checkpoint_every=7", "trainer.devices=2", "data.workers=2", "trainer.max_steps=9", "name=x"),
        *("evaluation.n=5", "trainer.accumulate=2", "trainer.log_every=3"),
    )
    RELEVANT = (
        *("seed=1", "schedule=linear", "target=eps", "weighting=min_snr", "timesteps=uniform", "p_null=0.2"),
        *("data.batch_size=64", "optimizer.lr=1", "ema.decay=0.5", "model.dropout=0", "trainer.precision=bf16-mixed"),
        *("lr_schedule=cosine", "trainer.gradient_clip=2"),
    )

    @staticmethod
    @cache
    def of(*overrides: str):
        return identity(resolve(compose("train", overrides)), None)

    def test_it_ignores_what_does_not_change_the_result(self):
        for line in self.IRRELEVANT:
            assert self.of(line) == self.of(), line

    def test_it_tells_apart_what_does(self):
        found = [self.of(), *(self.of(line) for line in self.RELEVANT)]
        assert all(a != b for a, b in itertools.combinations(found, 2))

    def test_the_number_of_steps_counts_only_where_the_learning_rate_depends_on_it(self):
        assert self.of("lr_schedule=cosine") != self.of("lr_schedule=cosine", "trainer.max_steps=9000")

    def test_one_and_one_point_zero_are_the_same_address(self):
        assert digest(self.of("trainer.gradient_clip=1")) == digest(self.of("trainer.gradient_clip=1.0"))
        assert digest([1, 2.5]) != digest([1, 2])

    def test_two_names_of_one_thing_are_one_run(self):
        assert self.of("loss=min_snr") == self.of("loss=simple", "weighting=min_snr")
