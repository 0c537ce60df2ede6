"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import denoiselab

MODULES = ["denoiselab", *(m.name for m in pkgutil.walk_packages(denoiselab.__path__, "denoiselab."))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples(name: str, example_run: Path):
    """``example_run`` in an example is a small trained run."""
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.testmod(importlib.import_module(name), extraglobs={"example_run": example_run}, optionflags=flags)
    assert found.failed == 0
