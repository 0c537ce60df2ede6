"""Mistakes in options, generated from every option file: each is answered in one line that names it, before anything
is written."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from denoiselab import compose as composing
from denoiselab.checks import check, check_arguments
from denoiselab.compose import compose, conf_dir, options
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.values import check_value
from exact import own, parts
from mutations import Mutation, choices, files, leaves, mutations, out_of_range, written

pytestmark = pytest.mark.faults

FILES = [path for path in files() if leaves(path)]
PARSER = OverridesParser.create()


def name_of(path: Path) -> str:
    return path.relative_to(conf_dir()).with_suffix("").as_posix()


def start(path: Path) -> tuple[str, list[str]]:
    """A command, and the choice of the option that a file is of."""
    grouped = path.parent != conf_dir()
    return ("train", [f"{path.parent.name}={path.stem}"]) if grouped else (path.stem, [])


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hydra makes of the same options is made once."""
    monkeypatch.setattr(composing, "_composed", cache(composing._composed))


def sampled(found: list[Mutation], n: int, draw: random.Random) -> Iterator[Mutation]:
    """So many, of different kinds as far as there are."""
    draw.shuffle(found)
    kinds = list(dict.fromkeys(one.kind for one in found))
    draw.shuffle(kinds)
    turns = itertools.zip_longest(*([one for one in found if one.kind == kind] for kind in kinds))
    return itertools.islice((one for turn in turns for one in turn if one), n)


def refused(line: str, look: Callable[[str], object]) -> str:
    """What was said of a mistake: one line that begins with it."""
    try:
        look(line)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert said.startswith(line), said
        return said
    raise AssertionError(f"{line} was accepted")


def hints(mutation: Mutation, said: str) -> None:
    """A mistyped name of some length is known again, or is nearer to another."""
    last = mutation.leaf.key.rpartition(".")[2]
    if mutation.kind == "typo" and len(last) > 4:
        assert "did you mean " in said
        meant = said.partition("did you mean ")[2].partition("?")[0]
        typed = mutation.line.partition("=")[0].rpartition(".")[2]
        assert meant == last or abs(len(meant) - len(typed)) <= 2


def composed(app: str, lines: list[str]) -> None:
    """As a command does before it makes anything: options, then what the class declares that takes the last one."""
    node = OmegaConf.to_container(compose(app, lines).config, resolve=False)
    *within, last = lines[-1].partition("=")[0].split(".")
    for part in within:
        assert isinstance(node, dict)
        node = node[part]
    if isinstance(node, dict) and "_target_" in node:
        check_arguments(".".join(within), {"_target_": node["_target_"], last: node[last]})


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("start_with", range(4))
def test_a_mistake_of_any_kind_in_any_option_file_is_named(start_with: int, faults, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in FILES[start_with::4]:
        draw = random.Random(name_of(path))
        app, lines = start(path)
        for mutation in sampled([*mutations(path, draw)], 4, draw):
            hints(mutation, refused(mutation.line, lambda line: composed(app, [*lines, line])))  # noqa: B023
            faults.injected("option")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("once")
def test_what_a_file_says_itself_can_be_said_again():
    """The tests here could fail: an option with its own value is no mistake."""
    accepted = 0
    for path in FILES[::16]:
        app, lines = start(path)
        base = OmegaConf.to_container(compose(app, lines).config, resolve=False)
        for leaf in leaves(path):
            line = f"{leaf.key}={written(leaf.default)}"
            if leaf.key.startswith("study.axes") or leaf.default == "???":
                continue
            check_value(line, PARSER.parse_override(line), base, [])
            accepted += 1
    assert accepted > 40


@pytest.mark.slow
@pytest.mark.parametrize("start_with", range(4))
def test_every_mistake_in_every_option_file_is_named(start_with: int, faults):
    known = [*options()]
    for path in FILES[start_with::4]:
        draw = random.Random(name_of(path))
        app, lines = start(path)
        base = OmegaConf.to_container(compose(app, lines).config, resolve=False)
        for mutation in mutations(path, draw):

            def look(line: str) -> None:
                check_value(line, PARSER.parse_override(line), base, known)  # noqa: B023
                composed(app, [*lines, line])  # noqa: B023

            said = refused(mutation.line, look)
            hints(mutation, said)
            faults.injected("option")


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("part", ["quick", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_mistaken_choice_is_named_with_what_there_is(part: str, faults):
    for line in itertools.islice(choices(random.Random(0)), 0, None, 8 if part == "quick" else 1):
        said = refused(line, lambda line: compose("train", [line]))
        group = line.lstrip("+~").partition("=")[0]
        if line == f"{group}=null":
            assert f"{group} is one of" in said
        faults.injected("option")


SMALL = ("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "metrics=none", "callbacks=none")
GROUPS = ("schedule", "weighting", "timesteps", "spacing", "sampler", "guidance", "ema", "optimizer", "lr_schedule")


@pytest.mark.parametrize("group", GROUPS)
def test_a_number_out_of_its_range_is_refused_when_its_object_is_made(group: str, faults):
    """Of every option of the group, each argument at values that its docstring excludes."""
    base, seen = parts(*SMALL), set()
    for path in (path for path in FILES if path.parent.name == group):
        node = own(group, path.stem)
        if node is None or path.stem in ("ddpm_learned", "vlb_beta", "vlb_beta_tilde"):
            continue
        for leaf in leaves(path):
            name = leaf.key.removeprefix(f"{group}.")
            for wrong in [] if "." in name or (leaf.target, name) in seen else out_of_range(leaf):
                changed = Parts({**base.config, group: {**node, name: wrong}})
                changed.__dict__ |= {"data": base.data, "model": base.model}
                with pytest.raises(UserError, match=rf"^{group}\.") as error:
                    check(changed)
                assert name in str(error.value)
                assert "\n" not in str(error.value)
                faults.injected("option")
            seen.add((leaf.target, name))


WITHOUT_OBJECTS = {
    "trainer.devices=fast": "trainer.devices=fast: need a whole number or auto or a list of whole numbers",
    "trainer.devices=0": "trainer.devices=0: need a number >= 1",
    "trainer.nodes=0": "trainer.nodes=0: need at least 1",
    "trainer.threads=0": "trainer.threads=0: need at least 1",
    "trainer.accelerator=nonsense": "trainer: ",
    "trainer.epochs=1e300": "trainer.epochs=1e+300: more steps",
    "trainer.epochs=abc": "trainer.epochs=abc: need a finite number or null",
    "trainer.gradient_clip=inf": "trainer.gradient_clip=inf: need a finite number or null",
    "trainer.max_steps=null": "trainer.max_steps=null: need a whole number",
    "trainer.max_steps=1e9": "trainer.max_steps=1e9: need a whole number",
    "sigma_data=inf": "sigma_data=inf: need a finite number or null",
    "seed=null": "seed=null: need a whole number",
    "init_from=5": "init_from=5: need a text or null",
    "evaluation={x:5}": "evaluation={x:5}: no option 'x' here",
    "evaluation={n:abc}": "evaluation={n:abc}: evaluation.n: need a whole number",
    "lint.level=loud": "lint.level=loud: need one of",
    "lint.allow=[1]": "lint.allow=[1]: need a list of texts",
    "~seed": "~seed: cannot be left out",
    "~sampler._target_": "~sampler._target_: cannot be left out",
    "+seed=3": "+seed=3: there is one already",
    "+sampler.stepz=3": "sampler.stepz=3: no option 'stepz' here; did you mean steps?",
    "+metrics.mine=5": "metrics.mine=5: need a mapping with _target_",
    "model._target_=nonsense": "model._target_=nonsense: ",
    "loss._target_=denoiselab.loss.Nonsense": "loss._target_=denoiselab.loss.Nonsense: ",
    "data.batch_size=true": "data.batch_size=true: need a finite number",
    "data.batch_size=null": "data.batch_size=null: need a whole number",
    "optimizer.lr=nan": "optimizer.lr=nan: need a finite number",
    "optimizer.weight_decay=-1": "optimizer.weight_decay=-1: need a number >= 0",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9]: need a list of 2 finite numbers",
    "optimizer.betas=[0.9,1.0]": "optimizer.betas=[0.9, 1.0]: need numbers in [0, 1)",
    "ema.decay=2": "ema.decay=2: need a number in [0, 1)",
    "sampler.clip=true": "sampler.clip=true: need a finite number or null",
    "sampler.steps=null": "sampler.steps=null: need a whole number",
    "schedule=edm timesteps=slots timesteps.panel=u": "timesteps.panel=u: need one of",
    "timesteps=importance timesteps.points=0": "timesteps.points=0: need at least 2",
}


@pytest.mark.parametrize("words", WITHOUT_OBJECTS)
def test_a_command_ends_with_status_2_and_one_line_and_leaves_nothing(words: str, called, faults, tmp_path):
    result = called("train", *SMALL, *words.split())
    assert result.returncode == 2
    assert result.stderr.startswith(f"denoiselab train: {WITHOUT_OBJECTS[words]}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())
    faults.injected("option")


def test_a_sweep_of_which_one_job_cannot_work_starts_none(called, faults, tmp_path):
    for axis in ("sampler.steps=2,0", "optimizer.lr=1e-3,nan", "seed=0,x"):
        result = called("train", "-m", *SMALL, axis)
        assert result.returncode == 2
        assert axis.partition("=")[0] in result.stderr
        assert result.stderr.count("\n") == 1
        assert not list(tmp_path.iterdir())
        faults.injected("option")


ACCEPTED = {
    "optimizer.lr=1": ("optimizer.lr", 1),
    "trainer.gradient_clip=null": ("trainer.gradient_clip", None),
    "sampler.clip=2": ("sampler.clip", 2),
    "sampler=dpmpp_2m sampler.reach=inf": ("sampler.reach", float("inf")),
    "diagnostics=forward diagnostics.forward.budget=null": ("diagnostics.forward.budget", None),
    "trainer.devices=auto": ("trainer.devices", "auto"),
    "trainer.threads=1": ("trainer.threads", 1),
    "+optimizer.amsgrad=true": ("optimizer.amsgrad", True),
    "++seed=3": ("seed", 3),
    "evaluation={n:5}": ("evaluation.n", 5),
}


@pytest.mark.parametrize("words", ACCEPTED)
def test_a_value_that_can_be_meant_is_taken_and_acts(words: str):
    key, value = ACCEPTED[words]
    config: Any = resolve(compose("train", [*SMALL, *words.split()]))
    check(Parts(config))
    for part in key.split("."):
        config = config[part]
    assert config == value


def test_an_option_file_of_ones_own_is_read_as_strictly(tmp_path, faults):
    mistakes = {
        "trainer: {max_step: 3}": "trainer.max_step: an option file sets it, and there is no such option; did you mean",
        "trainer: {max_steps: many}": "trainer.max_steps=many: need a whole number",
        "sed: 1": "sed: an option file sets it, and there is no such option; did you mean seed?",
        "evaluation: 5": "evaluation=5: need a mapping",
    }
    (tmp_path / "experiment").mkdir()
    for i, (text, said) in enumerate(mistakes.items()):
        (tmp_path / "experiment" / f"mine{i}.yaml").write_text(f"# @package _global_\n{text}\n")
        with pytest.raises(UserError) as error:
            compose("train", [f"experiment=mine{i}"], tmp_path)
        assert str(error.value).startswith(said)
        faults.injected("option")
    (tmp_path / "experiment" / "right.yaml").write_text("# @package _global_\ntrainer: {max_steps: 3}\n")
    assert compose("train", ["experiment=right"], tmp_path).config.trainer.max_steps == 3
