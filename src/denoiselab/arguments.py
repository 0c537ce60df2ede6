"""What kind of value an option or a constructor's argument takes, and whether a value is of it."""

from __future__ import annotations

import builtins
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

Unbounded = Annotated[float, "may be infinite"]
"""A number for which infinity is a choice; any other has to be finite."""

LARGEST = 2**63 - 1
"""The largest whole number that a tensor can hold."""

WORDS = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
    type(None): ("null", "nulls"),
}


@cache
def kinds(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """The annotations of a function's or a constructor's parameters, Any where one cannot be read; and whether it takes
    others too. Those that a constructor passes on to its base are the base's."""
    makers = [one.__init__ for one in inspect.getmro(function)[:-1]] if inspect.isclass(function) else [function]
    found: dict[str, Any] = {}
    for maker in makers:
        names = _Names({**vars(builtins), **getattr(maker, "__globals__", {})})
        try:
            hints = typing.get_type_hints(maker, localns=names, include_extras=True)  # pyright: ignore[reportArgumentType]
            parameters = inspect.signature(maker).parameters.values()
        except (TypeError, ValueError, AttributeError):
            return found, True
        variadic = [one for one in parameters if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        taken = {one.name: hints.get(one.name, Any) for one in parameters if one not in variadic and one.name != "self"}
        found = {**taken, **found}
        if not any(one.kind == one.VAR_KEYWORD for one in variadic):
            return found, False
    return found, True


def kind_of(default: Any) -> Any:
    """The kind of values that may stand for a default.

    >>> kind_of(0.1), kind_of([1, 2])
    (<class 'float'>, list[int])
    """
    if isinstance(default, list) and default:
        return list[kind_of(default[0])] if len({type(value) for value in default}) == 1 else list
    return Any if default is None else type(default)


def need(kind: Any, value: Any) -> str | None:
    """What would have to be given, if a value of a configuration is of another kind.

    Args:
        kind: an annotation. What is none of Python's plain types stands for an object, which a configuration describes
            as a mapping with ``_target_``.

    >>> need(int, True), need(float, 1), need(float | None, float("nan")), need(list[int], [1, "a"])
    ('a whole number', None, 'a finite number or null', 'a list of whole numbers')
    """
    return None if _is(kind, value) else said(kind)


def said(kind: Any, several: bool = False) -> str:
    """A kind in words."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if kind in WORDS:
        return WORDS[kind][several]
    if origin is Literal:
        return " or ".join(of)
    if kind == Unbounded:
        return "numbers or inf" if several else "a number or inf"
    if origin in (typing.Union, types.UnionType):
        plain = [one for one in of if one in WORDS or one == Unbounded or typing.get_origin(one)] or [*of]
        return " or ".join(dict.fromkeys(said(one, several) for one in plain))
    if _listed(origin or kind):
        inner = [one for one in of if one is not Ellipsis]
        length = f"{len(of)} " if origin is tuple and Ellipsis not in of else ""
        listed = "lists" if several else "a list"
        return f"{listed} of {length}{said(inner[0], True)}" if inner else listed
    if _mapped(origin or kind):
        return "mappings" if several else "a mapping"
    return "mappings with _target_" if several else "a mapping with _target_"


def _is(kind: Any, value: Any) -> bool:
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is(one, value) for one in of)
    if kind in (None, type(None)):
        return value is None
    if origin is Literal:
        return value in of
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind is float or kind == Unbounded:
        if isinstance(value, float):
            return math.isfinite(value) or (kind is not float and not math.isnan(value))
        return _is(int, value)
    if kind in (str, Path):
        return isinstance(value, str)
    if _listed(origin or kind):
        if not isinstance(value, list):
            return False
        if origin is tuple and Ellipsis not in of:
            return len(value) == len(of) and all(map(_is, of, value))
        return all(_is(of[0], one) for one in value) if of else True
    if _mapped(origin or kind):
        return isinstance(value, dict)
    return isinstance(value, dict) and "_target_" in value


def _listed(kind: Any) -> bool:
    return inspect.isclass(kind) and kind is not str and issubclass(kind, Sequence)


def _mapped(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Mapping)


class _Names(dict[str, Any]):
    """Names that a module imports for its annotations alone stand for an object of some class."""

    def __missing__(self, name: str) -> Any:
        return object


def spelled(value: Any) -> str:
    """A value as it is written on a command line."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
