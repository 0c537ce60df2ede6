"""Arguments drawn at random, of the annotated kinds but of any value: a function works, or says what it refuses."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import denoiselab
from denoiselab import arguments
from denoiselab.guidance import DenoiserLike
from denoiselab.lr_schedule import Constant
from denoiselab.sampler import Spacing
from denoiselab.schedule import Schedule
from denoiselab.target import Target
from denoiselab.timesteps import Timesteps
from denoiselab.weighting import Weighting
from exact import parts

pytestmark = pytest.mark.faults

MODULES = (
    *(
        "arguments",
        "compose",
        "conditioning",
        "consistency",
        "curve",
        "ema",
        "errors",
        "gaussian",
        "lr_schedule",
        "rng",
    ),
    *("rows", "study", "target", "weighting"),
    *("data", "diagnostics", "guidance", "launcher", "loss", "metrics", "models", "sampler", "schedule", "sweeper"),
    "timesteps",
)
"""Modules whose public names are called here: all of a file's, and those that a package has at its top."""

ELSEWHERE = {
    "bench": "measures for minutes, and is handed what it measures",
    "announcing callbacks loggers module trainer training": "are handed Lightning's and each other's objects",
    "sharding speed ranks": "are handed networks and processes",
    "cli experiment checks values trust confidential lint": "take lines and configurations: test_wrong_options",
    "dashboard report preference status": "read folders of runs, in tests of what they show of damaged ones",
    "checkpoint archive fitting resuming files content": "read files, in tests of damaged ones",
    "run run_folder outline initial": "read files, in tests of damaged ones",
    "exchange scripted encoding": "read files of others: test_import_refused, test_latents_damaged",
    "measuring progress drawing evaluation inspection summary": "are handed runs and networks that were checked",
    "denoiser likelihood pictures buffers": "are handed networks and pictures by what is called here",
    "__main__ version _torchvision": "take no arguments",
}
"""Modules that are not, and why."""

OBJECTS = "is handed an object of the program that is made elsewhere"
LEFT_OUT: dict[str, str] = dict.fromkeys(
    (
        "arguments.kind_of",
        "arguments.need",
        "arguments.said",
        "arguments.spelled",
        "compose.Composed",
        "compose.write_job",
        "compose.plain",
        "compose.to_yaml",
        "errors.foreseen",
        "errors.disk_fails",
        "errors.one_line",
        "rows.csv_text",
        "study.study_of",
        "study.axes_of",
        "study.written",
        "data.ReadFromDisk",
        "data.OnDisk",
        "diagnostics.Finding",
        "diagnostics.Subject",
        "guidance.KernelClassifier",
        "loss.ConsistencyDistillation",
        "loss.ConsistencyTraining",
        "loss.Mixed",
        "models.ADM",
        "models.DDPM",
        "sampler.Rung",
        "sampler.State",
        "sampler.invert",
        "schedule.Level",
        "timesteps.Place",
    ),
    OBJECTS,
)
"""Public names of MODULES that are not called, and why."""

ALLOWED = (ValueError, TypeError, RuntimeError, IndexError, FileNotFoundError)
"""RuntimeError and IndexError are PyTorch's, of shapes that do not fit; no path that is drawn exists."""


def modules() -> set[str]:
    """The files and packages at the top."""
    return {one.name for one in pkgutil.iter_modules(denoiselab.__path__)}


def public(module: str) -> dict[str, Callable[..., Any]]:
    """The functions and classes of a file, or those that a package has at its top."""
    found = importlib.import_module(f"denoiselab.{module}")
    return {
        f"{module}.{name}": value
        for name, value in vars(found).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (value.__module__ == found.__name__ or value.__module__.startswith(f"{found.__name__}."))
        and not (inspect.isclass(value) and (issubclass(value, BaseException) or typing.is_typeddict(value)))
    }


NAMES = {name: value for module in MODULES for name, value in public(module).items()}


WHOLE = st.one_of(st.integers(-3, 12), st.sampled_from([-(10**6), 16, 32, 64, 100]), st.booleans())
SMALL = st.floats(-2, 2, width=32)
NUMBER = st.one_of(
    SMALL, st.sampled_from([0.0, -0.0, 1.0, 1e-300, 1e308, -1e308, math.nan, math.inf, -math.inf, 1e-8, 50.0]), WHOLE
)
TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["", "eps", "nonsense", "seed=1", "{", "a,b", "../x", "\x00"]))
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(SHAPES)
    dtype = draw(
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
    )
    found = torch.linspace(-1, 2, math.prod(shape)).reshape(shape).to(dtype)
    if dtype.is_floating_point and found.numel() and draw(st.booleans()):
        found.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
    return found


def objects(kind: Any) -> st.SearchStrategy[Any] | None:
    """Objects of one of the types; None for one that is not known here."""
    base = parts("data=8gaussians", "data.n=64", "data.batch_size=16", "model=mlp", "model.width=8", "model.depth=1")
    from denoiselab.curve import Curve
    from denoiselab.data import Data
    from denoiselab.denoiser import Denoiser
    from denoiselab.models import NoiseEmbedding
    from denoiselab.sampler import Rung, Sampler, Spacing
    from denoiselab.timesteps import Place

    known: dict[Any, Callable[[], Any]] = {
        Schedule: lambda: base.schedule,
        Target: lambda: base.target,
        Weighting: lambda: base.weighting,
        Timesteps: lambda: base.timesteps,
        Spacing: lambda: base.spacing,
        Sampler: lambda: base.sampler,
        Denoiser: lambda: base.denoiser,
        Data: lambda: base.data,
        NoiseEmbedding: lambda: base.embedding,
        Curve: lambda: Curve([0, 0.5, 1], [3, 2, 1]),
        Place: lambda: Place(0, 0),
        Rung: lambda: Rung(0.6, 0.8),
        torch.nn.Module: lambda: torch.nn.Linear(2, 2),
        torch.Generator: lambda: torch.Generator().manual_seed(0),
    }
    return st.builds(known[kind]) if kind in known else None


def strategy(kind: Any) -> st.SearchStrategy[Any] | None:
    """Values of an annotation; None if there is no way to make one."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    plain = {int: WHOLE, float: NUMBER, bool: st.booleans(), str: TEXT, Tensor: tensors(), type(None): st.none()}
    plain |= {
        Path: TEXT.map(lambda name: Path("nowhere") / "".join(filter(str.isalnum, name))),
        torch.device: st.just(torch.device("cpu")),
    }
    if kind in plain:
        return plain[kind]
    if kind == arguments.Unbounded:
        return NUMBER
    if origin in (typing.Union, types.UnionType):
        found = [made for one in of if (made := strategy(one)) is not None]
        return st.one_of(found) if found else None
    if origin is tuple:
        inner = [strategy(one) for one in of if one is not Ellipsis]
        if not inner or None in inner:
            return None
        return st.lists(inner[0], max_size=4).map(tuple) if Ellipsis in of else st.tuples(*inner)
    if origin in (list, Sequence, Iterable) or (inspect.isclass(origin) and issubclass(origin, Sequence)):
        inner = strategy(of[0])
        return None if inner is None else st.lists(inner, max_size=4)
    if origin in (dict, Mapping):
        inner = strategy(of[1])
        return None if inner is None or of[0] is not str else st.dictionaries(TEXT, inner, max_size=3)
    if (origin or kind) in (Callable, DenoiserLike):
        return st.just(lambda x_t, alpha_t, sigma_t, **cond: alpha_t * x_t / (alpha_t**2 + sigma_t**2))
    return objects(kind) if inspect.isclass(kind) else None


def drawn(function: Callable[..., Any]) -> dict[str, tuple[st.SearchStrategy[Any], bool]] | None:
    """A strategy for each parameter, and whether it must be given; None if one that must be cannot be made."""
    found = {}
    kinds, _ = arguments.kinds(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        made = strategy(kinds.get(name, Any))
        needed = parameter.default is parameter.empty
        if made is None and needed:
            return None
        if made is not None:
            found[name] = (made, needed)
    return found


def arguments_of(data: st.DataObject, function: Callable[..., Any]) -> dict[str, Any]:
    wanted = drawn(function)
    assert wanted is not None
    always = {"n"}  # whose default takes long
    return {
        name: data.draw(values, label=name)
        for name, (values, needed) in wanted.items()
        if needed or name in always or data.draw(st.integers(0, 2)) == 0
    }


def called(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What it gives; None if it refused in one of the ways that it may."""
    positional = [
        given[name]
        for name, one in inspect.signature(function).parameters.items()
        if one.kind == one.POSITIONAL_ONLY and name in given
    ]
    only = {n for n, one in inspect.signature(function).parameters.items() if one.kind == one.POSITIONAL_ONLY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = function(*positional, **{key: value for key, value in given.items() if key not in only})
            return list(zip(found, range(5))) if inspect.isgenerator(found) else found  # noqa: B905
        except ALLOWED as error:
            if not str(error) and not isinstance(error, NotImplementedError):
                raise AssertionError(f"{type(error).__name__} says nothing") from error
            return None


LIMITS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[*HealthCheck],
)


def test_every_public_name_is_called_or_left_out_for_a_reason():
    listed = {name for names in ELSEWHERE for name in names.split()}
    assert modules() == listed | {*MODULES}
    assert not listed & {*MODULES}
    unmade = {name for name, value in NAMES.items() if name not in LEFT_OUT and drawn(value) is None}
    assert unmade == set()
    assert LEFT_OUT.keys() <= NAMES.keys()
    stale = {name for name, why in LEFT_OUT.items() if why == OBJECTS and drawn(NAMES[name]) is not None}
    assert stale == set()


@pytest.mark.parametrize("draws", [8, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", MODULES)
def test_what_is_called_with_anything_works_or_says_what_it_refuses(
    module: str, draws: int, faults, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    failed = [
        said
        for name, function in public(module).items()
        if name not in LEFT_OUT and (said := failure(name, function, draws, faults))
    ]
    assert failed == []


def failure(name: str, function: Callable[..., Any], draws: int, faults: Any) -> str | None:
    """How a function fails with arguments that are drawn, in another way than it may; None if it never does."""

    @settings(LIMITS, max_examples=draws)
    @given(data=st.data())
    def anything(data: st.DataObject):
        chosen = arguments_of(data, function)
        faults.injected("argument")
        try:
            made = called(function, chosen)
            if made is not None:
                ask(made, data)
        except Exception as error:
            raise AssertionError(f"{name}({chosen}): {type(error).__name__}: {error}") from error

    try:
        anything()
    except AssertionError as error:
        return str(error)
    except ExceptionGroup as several:
        return "; ".join(map(str, several.exceptions))
    return None


METHODS: dict[type, tuple[str, ...]] = {
    Schedule: ("__call__", "log_snr", "inverse", "at", "rate"),
    Target: ("coefficients", "to_x_0", "to_eps", "to_score", "precision"),
    Weighting: ("weight", "apply"),
    Spacing: ("__call__",),
    Constant: ("__call__",),
}
"""What is asked of an object that was made."""


def ask(made: Any, data: st.DataObject) -> None:
    for kind, names in METHODS.items():
        for name in names if isinstance(made, kind) else ():
            method = getattr(made, name)
            if drawn(method) is not None:
                called(method, arguments_of(data, method))


def test_a_function_that_fails_in_its_own_way_is_found():
    """The tests here could fail."""

    def broken(steps: int) -> float:
        return {1: 1 / steps}[steps]

    @settings(LIMITS, max_examples=50)
    @given(data=st.data())
    def anything(data: st.DataObject):
        called(broken, arguments_of(data, broken))

    with pytest.raises((KeyError, ZeroDivisionError, ExceptionGroup)):
        anything()


MODERATE = st.floats(0.01, 100)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in NAMES.items()
        if inspect.isclass(value)
        and issubclass(value, Schedule)
        and name not in ("schedule.Schedule", "schedule.Discrete")
    ],
)
def test_a_schedule_that_was_made_is_finite_at_every_time(name: str, faults):
    made_any = []

    @settings(LIMITS, max_examples=25)
    @given(data=st.data())
    def anything(data: st.DataObject):
        kinds, _ = arguments.kinds(NAMES[name])
        numbers = [key for key, kind in kinds.items() if kind is float]
        given = {key: data.draw(MODERATE) for key in numbers if data.draw(st.booleans())}
        needed = {key: data.draw(values) for key, (values, must) in drawn(NAMES[name]).items() if must}
        made = called(NAMES[name], {**needed, **given})
        faults.injected("argument")
        if made is None or type(made) is Schedule:
            return
        t = torch.linspace(0, 1, 33, dtype=torch.float64)
        for value in (*made(t), made.log_snr(t), made.inverse(made.log_snr(t))):
            assert bool(value.isfinite().all()), given
        made_any.append(made)

    anything()
    assert made_any
