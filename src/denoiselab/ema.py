"""An exponential moving average of the weights, kept beside them as a second model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA(nn.Module):
    """w_ema <- d w_ema + (1 - d) w, d = min(decay, (1 + n)/(10 + n)) at the n-th update.

    ``ema.model`` is a complete float32 copy that is used as it is and never swapped into the training module, so at
    no moment can the wrong weights be saved. It stays float32 under every precision (in bfloat16 a decay of 0.999
    moves nothing), and its update count is part of its state.

    Args:
        model: the live model; copied.
        decay: in [0, 1); 0 follows the weights.
        warmup: whether the decay starts small, so that short runs forget their initial weights.
    """

    updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = True):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: need a number in [0, 1), such as 0.999")
        self.decay, self.warmup = decay, warmup
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._count = 0  # of updates, on the host, where asking the buffer would wait for the device
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_count", int(module.updates)))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards the model's weights; buffers are copied. Call it once per optimizer step."""
        self._count += 1
        self.updates.fill_(self._count)
        pull = max(1 - self.decay, 9 / (10 + self._count)) if self.warmup else 1 - self.decay
        averages = [local(p) for p in self.model.parameters()]
        live = [local(p) if p.dtype == torch.float32 else local(p).float() for p in model.parameters()]
        torch._foreach_lerp_(averages, live, pull)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> EMA:
        """Always in evaluation mode."""
        return super().train(False)

    def _apply(self, fn, recurse=True):
        """Follow the device, never the dtype."""
        return super()._apply(lambda tensor: tensor.to(fn(torch.zeros((), device=tensor.device)).device), recurse)


def local(tensor: Tensor) -> Tensor:
    """The piece of a sharded tensor that lies here; an average is cut like what it follows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
