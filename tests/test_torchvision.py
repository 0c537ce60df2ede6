"""torchvision beside any torch, and what must be installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_torchvision_and_what_imports_it_work_after_denoiselab():
    result = python(
        "import denoiselab, torch, torchvision, torchmetrics, lightning\n"
        "from torchvision.utils import make_grid\nfrom torchvision.transforms import v2\n"
        "assert make_grid(torch.zeros(4, 1, 8, 8)).shape == (3, 12, 42)\n"
        "assert v2.Resize(4)(torch.zeros(1, 8, 8)).shape == (1, 4, 4)"
    )
    assert result.returncode == 0, result.stderr


def test_operators_are_declared_only_where_they_are_missing():
    result = python(
        "import denoiselab._torchvision as shim, torch\n"
        "needed = shim.declare_missing_operators()\n"
        "import torchvision\n"
        "from torchvision.extension import _has_ops\n"
        "assert needed != _has_ops(), (needed, _has_ops())"
    )
    assert result.returncode == 0, result.stderr


def test_nothing_is_declared_where_the_library_loads(monkeypatch):
    import torch

    from denoiselab import _torchvision

    monkeypatch.setattr(_torchvision, "_kept", [])
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.library, "Library", lambda *a: pytest.fail("declared"))
    assert not _torchvision.declare_missing_operators()


def test_importing_denoiselab_imports_nothing_heavy():
    result = python("import sys, denoiselab; assert not {'torch', 'torchvision'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_installed_versions_are_past_the_known_holes():
    def at_least(name: str, *floor: int) -> bool:
        return tuple(int(p) for p in version(name).split("+")[0].split(".")[: len(floor)]) >= floor

    assert at_least("torch", 2, 10)
    assert at_least("hydra-core", 1, 3, 8)
    assert at_least("lightning", 2, 6, 6)


def test_the_compromised_releases_are_excluded():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (line,) = (d for d in project["dependencies"] if d.startswith("lightning"))
    assert "!=2.6.2" in line
    assert "!=2.6.3" in line
