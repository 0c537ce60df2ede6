"""What a network may be told beside x_t, and what "unconditional" means.

A condition is a dict of tensors with one row per sample: ``label`` holds class indices, ``vector`` any other vector,
``low_res`` an image to be enlarged. There is one definition of "no condition", used by training's drop and by guidance
alike: the null label and the vector of NaN, for which networks keep learned tokens. An image is never dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NULL = -1
"""The label that means "none"; a vector that means it is NaN."""


def null(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same condition with nothing said: every label becomes NULL and every vector NaN.

    >>> null({"label": torch.tensor([3, 7])})
    {'label': tensor([-1, -1])}
    """
    nothing = {"label": NULL, "vector": math.nan}
    return {key: torch.full_like(value, nothing[key]) if key in nothing else value for key, value in cond.items()}


class Drop:
    """Each sample's condition becomes null with probability p_null, independently (Ho and Salimans 2022,
    arXiv:2207.12598, algorithm 1).

    Args:
        p_null: in [0, 1); 0.1 is usual. 0 trains no unconditional model, so guidance scales other than 1 have
            nothing to stand on.
    """

    def __init__(self, p_null: float = 0.1):
        if not 0 <= p_null < 1:
            raise ValueError(f"p_null={p_null}: need a probability in [0, 1), such as 0.1")
        self.p_null = p_null

    def __call__(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.draw(cond)[0]

    def draw(self, cond: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The condition, and which samples' was dropped, (B,) on its device; None where none can be."""
        if self.p_null == 0 or not cond:
            return cond, None
        first = next(iter(cond.values()))
        dropped = torch.rand(len(first), device=first.device) < self.p_null
        nothing = null(cond)
        found = {
            key: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), nothing[key], value)
            for key, value in cond.items()
        }
        return found, dropped
