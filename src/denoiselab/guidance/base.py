"""Guidance: denoisers made of denoisers, with the same call, so that they nest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from denoiselab.denoiser import Outputs

DenoiserLike = Callable[..., Tensor]
"""Any callable denoiser(x_t, alpha_t, sigma_t, **cond) -> x_0_hat."""


def outputs_of(denoiser: DenoiserLike, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
    """Everything a denoiser says about x_t; of a plain callable, its x_0_hat."""
    outputs = getattr(denoiser, "outputs", None)
    return (
        Outputs(denoiser(x_t, alpha_t, sigma_t, **cond)) if outputs is None else outputs(x_t, alpha_t, sigma_t, **cond)
    )


def unguided(denoiser: DenoiserLike) -> DenoiserLike:
    """The denoiser as it is."""
    return denoiser


class Guidance:
    """A denoiser that changes another's x_0_hat and passes the conditional branch's other outputs through.

    Args:
        denoiser: the denoiser to guide.
        guidance: what guides it first, ``guidance(denoiser) -> denoiser``, so that files nest as objects do.
    """

    def __init__(self, denoiser: DenoiserLike, guidance: Callable[[DenoiserLike], DenoiserLike] = unguided):
        self.denoiser = guidance(denoiser)

    @property
    def needs_null(self) -> bool:
        """Whether it, or what it guides, asks for the unconditional estimate, which only label dropping trains."""
        return getattr(self.denoiser, "needs_null", False)

    def outputs(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Outputs:
        """Everything it says about x_t; shapes as for a Denoiser."""
        raise NotImplementedError

    def __call__(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, **cond: Any) -> Tensor:
        """x_0_hat, shaped like x_t."""
        return self.outputs(x_t, alpha_t, sigma_t, **cond).x_0
