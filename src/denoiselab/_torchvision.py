"""torchvision beside a CPU-only torch.

The wheels on package registries are built for CUDA. Beside a CPU-only torch their ``_C`` library cannot load, and
torchvision (with it lightning and torchmetrics, which import it) then fails at import with ``operator
torchvision::nms does not exist``. Declaring the two operators that it registers shapes for is enough: transforms,
datasets, grids and classifiers work, and the operators themselves refuse by name.

Where ``_C`` loads, or torchvision is not installed, nothing is done: declaring operators that exist aborts the
process. The work waits until torchvision is first imported, so ``import denoiselab`` costs nothing.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[object] = []


class _BeforeTorchvision(MetaPathFinder):
    """Acts once, when torchvision is about to be found, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_missing_operators() -> bool:
    """Declare torchvision's nms and qnms if its own library cannot be loaded; whether that was needed."""
    import torch

    if _kept:
        return True
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    libraries = [path for path in Path(spec.origin).parent.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib")]
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        pass
    else:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + SCHEMA)
    _kept.append(library)  # the declarations live as long as this object
    return True


def install() -> None:
    """Arrange for declare_missing_operators to run before torchvision is imported."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())
