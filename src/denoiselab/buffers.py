"""Modules whose numbers keep their precision."""

from __future__ import annotations

from torch import nn, zeros


class ExactBuffers(nn.Module):
    """Buffers follow the module's device, never its dtype: tables and histories stay float64 under bf16-true."""

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda buffer: buffer.to(fn(zeros((), device=buffer.device)).device), recurse)
