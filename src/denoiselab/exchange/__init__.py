"""Weights of other libraries, and ours for them."""

from denoiselab.exchange.foreign import Foreign

__all__ = ["Foreign"]
