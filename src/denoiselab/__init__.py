"""denoiselab: a laboratory for diffusion-model ablations.

>>> import denoiselab, torch
>>> parts = denoiselab.build("schedule=cosine", "target=v", "model=unet_digits")
>>> alpha_t, sigma_t = parts.schedule(torch.tensor([0.0, 0.5, 1.0]))
>>> bool(((alpha_t**2 + sigma_t**2 - 1).abs() < 1e-6).all())
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from denoiselab import _torchvision
from denoiselab.version import __version__

if TYPE_CHECKING:
    from denoiselab.experiment import Parts, build
    from denoiselab.report.ranking import rank
    from denoiselab.run import Run, load

_torchvision.install()

__all__ = ["Parts", "Run", "__version__", "build", "load", "rank"]


def __getattr__(name: str):
    """Heavy parts are imported when first asked for, so that the command line answers at once."""
    if name in ("build", "Parts"):
        from denoiselab import experiment as module
    elif name in ("load", "Run"):
        from denoiselab import run as module
    elif name == "rank":
        from denoiselab.report import ranking as module
    else:
        raise AttributeError(f"module 'denoiselab' has no attribute {name!r}")
    return getattr(module, name)
