"""What makes training faster or smaller and leaves alone what is learned: compiled and recomputed blocks.

Both act on a network from outside and in place: no parameter changes its name, so a checkpoint of one kind loads into
any other, and networks know nothing of it. What they act on are a network's ``units``, its repeated blocks in order.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from denoiselab.errors import UserError

BACKEND = "inductor"


def units(net: nn.Module) -> list[nn.Module]:
    """A network's repeated blocks, in order; none where it names none."""
    return list(getattr(net, "units", ()))


def recompute(net: nn.Module) -> None:
    """Keep of each unit only its input for the backward pass, which computes the rest again: activation checkpointing
    (Chen et al. 2016, arXiv:1604.06174), about a third more time for memory that hardly grows with depth.

    Gradients are the same: dropout draws again what it drew, under the same autocast.
    """
    for unit in units(net):
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)


def compile(net: nn.Module) -> None:
    """Compile each unit, or the whole network where it names none; for the shapes that training has.

    ``nn.Module.compile`` works in place and is left out of copies, unlike the wrapper that ``torch.compile`` returns,
    whose ``_orig_mod`` would enter the names. Unit by unit, equal blocks are compiled once, and on several devices
    the gradients of one travel while those of the next are computed.
    """
    import torch._dynamo

    parts = units(net) or [net]
    limit = torch._dynamo.config.recompile_limit  # per function; units of one class share theirs
    torch._dynamo.config.recompile_limit = max(limit, 8 + 2 * len(parts))
    options: Any = (
        {"fallback_random": True} if BACKEND == "inductor" else None
    )  # dropout draws what it draws uncompiled
    for part in parts:
        if isinstance(part.forward, partial):  # recomputed: what is compiled is what is computed twice
            again = torch.compile(part.forward.args[0], backend=BACKEND, dynamic=False, options=options)
            part.forward = partial(checkpoint, again, use_reentrant=False)
        else:
            part.compile(backend=BACKEND, dynamic=False, options=options)


def check(net: nn.Module, trainer: dict[str, Any]) -> None:
    """Raise UserError where a network or this machine cannot do what is asked.

    Args:
        net: may be on the meta device.
        trainer: its options.
    """
    if trainer["recompute"] and not units(net):
        raise UserError(
            f"trainer.recompute=true: {type(net).__name__} names no units to recompute; need a network that does, or "
            "trainer.recompute=false"
        )
    if trainer["compile"] and BACKEND == "inductor" and (missing := _missing_compiler()):
        raise UserError(f"trainer.compile=true: need {missing} on this machine, or trainer.compile=false")
    scalars = [name for name, p in net.named_parameters() if p.ndim == 0 and p.requires_grad]
    if trainer["strategy"] == "fsdp" and scalars:
        raise UserError(
            f"trainer.strategy=fsdp: {scalars[0]} of {type(net).__name__} has no axis to divide; need shape (1,), or "
            "trainer.strategy=ddp"
        )


def _missing_compiler() -> str | None:
    """What torch.compile lacks here."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton and a GPU that it knows"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler}, or another that CXX names)"
