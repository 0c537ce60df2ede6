"""From option names to a configuration: Hydra's composition, with errors of one line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.confidential import refuse_secrets
from denoiselab.errors import UserError, nearest
from denoiselab.files import write_text
from denoiselab.values import NAMED, check_nodes, check_value

JOBS = ".jobs"
"""The folder of composed configurations that processes are started from: beside the runs, or in the run measured."""


@dataclass
class Composed:
    """A configuration before its interpolations are resolved, and how it was asked for."""

    config: Any
    """An OmegaConf DictConfig."""
    choices: dict[str, str]
    overrides: list[str]
    config_dir: Path | None

    @property
    def command(self) -> str:
        """That makes the run that this describes, alone, for a shell."""
        words = [*(["--config-dir", str(self.config_dir)] if self.config_dir else []), *self.overrides]
        return shlex.join(["denoiselab", "train", *words])


def conf_dir() -> Path:
    """The shipped option files: inside the wheel, or at the top of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def options(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Every group and its options, of the shipped folder and the user's."""
    found: dict[str, set[str]] = {}
    for root in filter(None, (conf_dir(), config_dir)):
        for path in root.rglob("*.yaml"):
            group = path.parent.relative_to(root).as_posix()
            if group != ".":
                found.setdefault(group, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def compose(app: str, overrides: Sequence[str], config_dir: Path | None = None) -> Composed:
    """Compose conf/APP.yaml with overrides such as ``schedule=linear`` and ``sampler.steps=20``.

    Args:
        app: train, sample or evaluate.
        overrides: of Hydra's grammar, without sweeps.
        config_dir: the user's own folder of options, which also becomes importable.

    Raises:
        UserError: an unknown group, option or key, or a value of another type than the default's; in one line, with
            the nearest valid names.
    """
    from omegaconf import OmegaConf

    search = []
    if config_dir is not None:
        if not config_dir.is_dir():
            raise UserError(f"--config-dir={config_dir}: no such folder")
        search = [f"hydra.searchpath=[{json.dumps('file://' + str(config_dir.resolve()))}]"]
        if str(config_dir.resolve()) not in sys.path:
            sys.path.insert(0, str(config_dir.resolve()))
        _refuse_shadows(config_dir)
    known = options(config_dir)
    parsed = _parse(overrides)
    groups = [line for line, override in parsed if override.key_or_group in known]
    for line, override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{line}: several values need -m (a sweep)")
        if override.key_or_group in known:
            _check_choice(line, override, known)

    chosen = _composed(app, *search, *groups)
    choices = {k: v for k, v in OmegaConf.to_container(chosen.hydra.runtime.choices).items() if k in known}  # type: ignore[union-attr]
    chosen = _without_hydra(chosen)
    plain = OmegaConf.to_container(chosen, resolve=False)
    for line, override in parsed:
        if override.key_or_group not in known:
            check_value(line, override, plain, [*known])
    values = len(groups) < len(overrides)
    config = _without_hydra(_composed(app, *search, *overrides)) if values else chosen  # composing takes long
    if config_dir is not None or any("@" in line for line in groups):
        base = OmegaConf.to_container(_without_hydra(_composed(app, *search)), resolve=False)
        check_nodes(OmegaConf.to_container(config, resolve=False), base)
    refuse_secrets(OmegaConf.to_container(config, resolve=False))
    _list_axes(config)
    return Composed(config, choices, list(overrides), config_dir)


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep: every combination of comma-separated values, the last one varying fastest.

    >>> sweep(["schedule=linear,cosine", "seed=0,1"])[1]
    ['schedule=linear', 'seed=1']
    """
    from hydra.errors import HydraException

    axes = []
    for line, override in _parse(overrides):
        try:
            swept = override.sweep_string_iterator() if override.is_sweep_override() else None
            axes.append([line] if swept is None else [f"{override.get_key_element()}={value}" for value in swept])
        except HydraException:
            raise UserError(
                f"{line}: cannot be expanded; list the values (a,b,c), use range(n), or search with sweeper=optuna"
            ) from None
    return [list(job) for job in itertools.product(*axes)]


def option(override: str) -> str:
    """The option that an override is of.

    >>> option("+model.width=4,8"), option("~metrics.modes"), option("schedule@other=linear")
    ('model.width', 'metrics.modes', 'schedule')
    """
    return re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]


def sweeps(override: str) -> bool:
    """Whether it has several values.

    >>> sweeps("seed=0,1"), sweeps("seed=0")
    (True, False)
    """
    return _parse([override])[0][1].is_sweep_override()


def value_of(override: str) -> Any:
    """The value that it gives its option.

    >>> value_of("ckpt='a, b'"), value_of("sampler.steps=10")
    ('a, b', 10)
    """
    return _parse([override])[0][1].value()


def interval(override: str) -> tuple[float, float, set[str]] | None:
    """Ends and tags of an option that may have any value between two; whole ends are for whole values.

    >>> interval("ema.beta=tag(log,interval(0.5,1))"), interval("seed=0,1")
    ((0.5, 1.0, {'log'}), None)
    """
    value = _parse([override])[0][1].value()
    low, high = getattr(value, "start", None), getattr(value, "end", None)
    return None if low is None or high is None else (low, high, set(value.tags))


def write_job(composed: Composed, file: Path) -> None:
    """Keep a composed configuration for the processes that will work on it, so that neither a later change of an option
    file nor the quoting of a value can make them work on another one. Look-ups of the environment stay look-ups."""
    from omegaconf import OmegaConf

    content = {
        "config": OmegaConf.to_yaml(composed.config, resolve=False),
        "choices": composed.choices,
        "overrides": composed.overrides,
        "config_dir": composed.config_dir and str(composed.config_dir.resolve()),
    }
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(file, json.dumps(content, indent=2) + "\n")


def read_job(file: Path) -> Composed:
    """What write_job kept. It may name anything importable, so it is read only where nobody else can write.

    Raises:
        UserError: there is no such file, it is none of these, or others may write to its folder.
    """
    from omegaconf import OmegaConf

    try:
        path = file.resolve(strict=True)  # where it lies, whatever links lead there
        for place in (path, path.parent):
            if place.stat().st_uid != os.getuid() or place.stat().st_mode & 0o022:
                raise UserError(f"--job {file}: others can write to {place}; need one that is yours alone (chmod 700)")
        if not path.is_file():
            raise UserError(f"--job {file}: no file")
        content = json.loads(path.read_text())
        config = OmegaConf.create(content["config"])
        if not (
            isinstance(content["config"], str) and OmegaConf.is_dict(config) and isinstance(content["choices"], dict)
        ):
            raise TypeError("no configuration is in it")
        config_dir = content["config_dir"] and Path(content["config_dir"])
        found = Composed(config, content["choices"], [*map(str, content["overrides"])], config_dir)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes json and yaml raise nearly any type
        raise UserError(f"--job {file}: no job that can be read ({_first_line(error)})") from None
    if config_dir and str(config_dir) not in sys.path:
        sys.path.insert(0, str(config_dir))
    return found


def plain(composed: Composed) -> dict[str, Any]:
    """The configuration as plain containers, interpolations resolved.

    Raises:
        UserError: a value that was left open (``???``) or refers to nothing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(composed.config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}=???: this option must be given") from None
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from None


def to_yaml(composed: Composed) -> str:
    """The configuration as text, resolved except look-ups of the environment, which may be secrets, and except what
    refers to one of these."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def marked(raw: Any, what: str) -> Any:
        if isinstance(raw, dict):
            return {key: marked(value, what) for key, value in raw.items()}
        if isinstance(raw, list):
            return [marked(value, what) for value in raw]
        return LOOK_UP if isinstance(raw, str) and what in raw else raw

    def merge(raw: Any, resolved: Any, traced: Any) -> Any:
        if isinstance(raw, dict) and isinstance(resolved, dict):
            return {key: merge(value, resolved[key], traced[key]) for key, value in raw.items()}
        if isinstance(raw, list) and isinstance(resolved, list):
            return [merge(*each) for each in zip(raw, resolved, traced, strict=True)]
        return raw if isinstance(raw, str) and "${" in raw and LOOK_UP in str(traced) else resolved

    raw, resolved = OmegaConf.to_container(composed.config, resolve=False), plain(composed)
    # Not by the values of look-ups: that of a number of threads is in many a text that has nothing to do with it.
    try:
        traced = OmegaConf.to_container(OmegaConf.create(marked(raw, "${oc.env")), resolve=True)
    except OmegaConfBaseException:  # something refers into what is looked up, or computes with it
        traced = marked(raw, "${")
    return OmegaConf.to_yaml(OmegaConf.create(merge(raw, resolved, traced)))


LOOK_UP = "<look-up of the environment>"
"""Stands for one where it is traced what refers to it."""


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """A configuration written by to_yaml, as plain containers; interpolations stay unresolved text.

    Raises:
        UserError: it is not YAML, not a mapping, larger than 1 MB, or repeats parts of itself by reference, by which a
            few lines can stand for any amount of memory.
    """
    import yaml

    if len(text) > 1_000_000:
        raise UserError(f"{source}: a configuration of {len(text)} bytes; 1 MB is the most")
    try:
        if "&" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{source}: refers to parts of itself (*name), which no configuration of a run does")
        found = yaml.safe_load(text)
    except UserError:
        raise
    except Exception as error:  # a damaged text makes yaml raise nearly any type
        raise UserError(f"{source}: not YAML ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{source}: not a configuration")
    return found


def _parse(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = []
    for line in overrides:
        if "=" not in line and not line.startswith("~"):
            raise UserError(f"{line}: not of the form option=value; `denoiselab train --help` lists the options")
        try:
            found.append((line, OverridesParser.create().parse_override(line)))
        except HydraException:
            raise UserError(f"{line}: cannot be read as option=value; quote values that hold , = [ or spaces") from None
    return found


def _refuse_shadows(config_dir: Path) -> None:
    """An option of the user's with a shipped one's name would never be read."""
    for path in config_dir.rglob("*.yaml"):
        if (conf_dir() / path.relative_to(config_dir)).is_file():
            raise UserError(f"{path}: there is a shipped option of this name; give yours another")


def _check_choice(line: str, override: Any, known: dict[str, list[str]]) -> None:
    group, value = override.key_or_group, override.value()
    if isinstance(value, list) and group not in NAMED:
        raise UserError(
            f"{line}: need one; {nearest(str(value[0]) if value else '', known[group], f'{group} is one of')}"
        )
    if (override.is_add() or override.is_force_add()) and "@" not in line:
        raise UserError(f"{line}: a command's groups are there already; leave out the +, as in {line.lstrip('+')}")
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, str | int) or str(choice) not in known[group]:
            which = f"no option {choice!r} here; " if isinstance(value, list) else ""
            raise UserError(f"{line}: {which}{nearest(str(choice), known[group], f'{group} is one of')}")


def _composed(app: str, *lines: str) -> Any:
    """What Hydra makes of conf/APP.yaml and overrides, its own settings among it."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra_compose(app, [*lines], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        other = f" `denoiselab {app} --help` lists this command's groups" if "Could not override" in str(error) else ""
        raise UserError(_first_line(error) + other) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else "an option file"
        raise UserError(f"{where}: not YAML ({error.problem})") from None
    except (yaml.YAMLError, RecursionError) as error:
        where = f"{error.name}: " if isinstance(error, yaml.reader.ReaderError) else "an option file: "
        raise UserError(f"{where}not YAML ({_first_line(error)})") from None


def _list_axes(config: Any) -> None:
    """Write a study's axes that are a text, such as range(5), as the values that it means: those who read a run's
    configuration have to know what was planned. An interval has no values, and stays."""
    from omegaconf import OmegaConf

    axes = OmegaConf.select(config, "study.axes")
    plan = OmegaConf.to_container(axes, resolve=False) if OmegaConf.is_dict(axes) else {}
    for name, text in plan.items():  # type: ignore[union-attr]
        if isinstance(text, str):
            with contextlib.suppress(UserError):
                config.study.axes[name] = [value_of(line) for (line,) in sweep([f"{name}={text}"])]


def _without_hydra(config: Any) -> Any:
    from omegaconf import OmegaConf, open_dict

    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    with open_dict(config):
        del config["hydra"]
    return config


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", str(error)) if line.strip()]
    return "; ".join(lines[:2]) or type(error).__name__
