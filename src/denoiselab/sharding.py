"""A training module whose weights, gradients, averages and optimizer state are divided over the devices: FSDP2.

Every parameter is cut along its first axis, one piece per device (Zhao et al. 2023, arXiv:2304.11277, in its second,
per-parameter form). A network's units are gathered one after the other where they are needed, and let go again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from denoiselab.denoiser import Denoiser
from denoiselab.speed import units


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every denoiser's network in a module, the averaged ones by the same plan, and what else is trained.

    A network is the root of its shards, because it is the one part of a denoiser that is always called as a module.
    """
    for denoiser in [m for m in module.modules() if isinstance(m, Denoiser)]:
        for parameter in denoiser.net.parameters():
            parameter.data = parameter.data.contiguous()  # channels-last kernels cannot be cut
        for part in [*units(denoiser.net), denoiser.net]:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for child in module.children():
        if not isinstance(child, Denoiser) and any(p.requires_grad for p in child.parameters()):
            fully_shard(child, mesh=mesh, reshard_after_forward=True)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """With all weights on every device, so that one of them may call a network alone. All must enter."""
    shards = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in shards:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in shards:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def own(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor; all of it where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A tensor with all its pieces, on every device; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any, keep: bool) -> Any:
    """A state with its sharded tensors whole and on the CPU; ``keep`` says whether this rank wants them. All ranks
    must call it."""

    def collect(tensor: Tensor) -> Tensor | None:
        found = full(tensor)
        return found.cpu() if keep else None

    return _mapped(state, collect)


def _mapped(state: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, Mapping):
        return {key: _mapped(value, function) for key, value in state.items()}
    return [_mapped(value, function) for value in state] if isinstance(state, list) else state


def like(tensor: Tensor, own: Any) -> Tensor:
    """A whole tensor cut as one's own is, if that is sharded and of its shape."""
    if not isinstance(own, DTensor) or tensor.shape != own.shape:
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


class Sharded(ModelParallelStrategy):
    """FSDP2 whose checkpoint is the ordinary file of an unsharded run, written by rank 0.

    Lightning's own single file numbers the optimizer's state in the order of the module's parameters, not of the
    optimizer's groups, and is written and read past the checkpoint plugin.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return gathered(self.lightning_module.state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return gathered(optimizer.state_dict(), self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: like(tensor, own.get(name)) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            entries = {
                number: {key: like(v, parameters[number]) if isinstance(v, Tensor) else v for key, v in entry.items()}
                for number, entry in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": entries})
