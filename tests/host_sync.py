"""What makes the host wait for a GPU, refused on a CPU, where nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "_assert_async"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave"),
}
"""Operations whose result, or the shape of whose result, is read by the host."""

READING = ("tolist", "numpy", "cpu", "__array__")
"""Methods that copy to the host without being dispatched as an operation on a CPU."""


class HostWaits(AssertionError):
    """The host asked for a value."""


class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
        if name in WAITING and not sized:
            raise HostWaits(name)
        indices = args[1] if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 else ()
        if isinstance(indices, list | tuple) and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices
        ):
            raise HostWaits(f"{name} with a mask")
        return func(*args, **kwargs)


@contextmanager
def refused() -> Iterator[None]:
    """Raise HostWaits where a GPU would be waited for."""

    def reading(name: str) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise HostWaits(name)

        return refuse

    def one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
        """On a CPU it looks whether the classes are in range; on a GPU only where their number is not given."""
        if num_classes < 0:
            raise HostWaits("one_hot without a number of classes")
        found = torch.zeros(*index.shape, num_classes, dtype=index.dtype, device=index.device)
        return found.scatter_(-1, index[..., None], 1)

    with pytest.MonkeyPatch.context() as patch, Refuse():
        for name in READING:
            patch.setattr(Tensor, name, reading(name))
        patch.setattr(torch.nn.functional, "one_hot", one_hot)
        yield
