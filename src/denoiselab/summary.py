"""What a network costs: parameters, multiply-adds and memory, worked out on tensors that have a shape and no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What autocast computes products in, by ``trainer.precision``."""

TRUE = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
"""What the weights themselves are, where that is not float32."""

# What autocast does on GPUs, by the name of the operation in Python (aten/src/ATen/autocast_mode.h, AT_FORALL_*).
NARROW = {
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu"),
    *("matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addmv", "addr", "addbmm", "baddbmm", "einsum"),
    *("chain_matmul", "multi_dot", "vecdot", "scaled_dot_product_attention"),
}
"""In the narrow type."""

WIDE = {
    *("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "softplus", "interpolate", "logsumexp"),
    *("exp", "expm1", "log", "log2", "log10", "log1p", "pow", "rpow", "reciprocal", "rsqrt", "sum", "prod"),
    *("cumsum", "cumprod", "norm", "vector_norm", "matrix_norm", "dist", "cdist", "cosine_similarity", "renorm"),
    *("acos", "asin", "sinh", "cosh", "tan", "erfinv", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
}
"""In float32."""

WIDEST = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sample", "tensordot", "scatter_add"}
"""In float32 if any argument is."""


@dataclass
class Part:
    """A module of the network, or several equal ones in a row.

    Attributes:
        name: where it is in the network.
        output: shape of what it returns for one sample.
        parameters: their number, shared ones where they are first met.
        multiply_adds: of one forward pass of one sample.
        activations: bytes that are kept for the backward pass, of one sample.
        times: how many such parts; the other numbers are of all of them together.
        unit: whether it is one of the network's repeated blocks, which ``trainer.recompute`` acts on.
    """

    name: str
    output: list[int] = field(default_factory=list)
    parameters: int = 0
    multiply_adds: int = 0
    activations: float = 0
    times: int = 1
    unit: bool = False


@dataclass
class Summary:
    """A network's cost. Bytes are for ``batch`` samples at a time, the parts' for one.

    Attributes:
        parameters: their number.
        multiply_adds: of one forward pass of one sample; convolutions, matrix products and attention.
        activations: bytes that the forward pass keeps for the backward pass, of one sample.
        recomputed: the same where each unit keeps its input only and is computed again in the backward pass: inputs of
            units, what lies outside them, and the largest unit; None for a network without units.
        memory: bytes of weights, gradients, optimizer state (None if unknown), EMA, autocast's copies of weights.
    """

    batch: int
    precision: str
    parameters: int
    multiply_adds: int
    activations: float
    recomputed: float | None
    memory: dict[str, int | None]
    parts: list[Part]

    def total(self, recompute: bool = False) -> float:
        """Bytes of a training step between its forward and its backward pass, without what single operations need
        for themselves."""
        kept = self.recomputed if recompute and self.recomputed is not None else self.activations
        return sum(size or 0 for size in self.memory.values()) + kept * self.batch


def summarise(
    net: nn.Module,
    shape: Sequence[int],
    num_classes: int = 0,
    vector: int = 0,
    low_res: int = 0,
    batch: int = 1,
    precision: str = "32-true",
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    ema: Callable[..., nn.Module] | None = None,
) -> Summary:
    """Parameters, multiply-adds and memory of ``net(x, c_noise, **cond)``, counted in one forward pass.

    On ``torch.device("meta")`` nothing is computed and no memory is used, whatever the size. Attention counts as a
    fused kernel, which keeps no matrix of weights.

    Args:
        net: on any device; on meta for large ones.
        shape: one sample's.
        num_classes, vector, low_res: its conditions, as in the network's constructor.
        batch: samples at a time.
        precision: as in ``trainer.precision``; "-mixed" counts the casts that autocast makes on a GPU.
        optimizer: ``optimizer(parameters)``, for its state.
        ema: ``ema(model=net)``, for its size.

    >>> from denoiselab.models import MLP
    >>> with torch.device("meta"):
    ...     net = MLP((2,), width=128, depth=4)
    >>> summarise(net, (2,)).multiply_adds        # the weights of all matrices: each meets a sample once
    287232
    """
    dtype = TRUE.get(precision, torch.float32)
    levels = torch.promote_types(dtype, torch.float32)
    with next(net.parameters()).device:
        net.to(dtype)
        cond = {"label": torch.zeros(batch, dtype=torch.int64)} if num_classes else {}
        cond |= {"vector": torch.zeros(batch, vector, dtype=levels)} if vector else {}
        cond |= {"low_res": torch.zeros(batch, low_res, *shape[1:], dtype=levels)} if low_res else {}
        x, c_noise = torch.zeros(batch, *shape, dtype=dtype), torch.zeros(batch, dtype=levels)
        averaged = ema(model=net) if ema else nn.Module()

    watch, autocast = _Watch(net), _Autocast(MIXED.get(precision))
    with watch.watching(), autocast.everywhere():
        y = net(x, c_noise, **cond)
    del y
    watch.forget(autocast.copies.values())

    trained = [p for p in net.parameters() if p.requires_grad]
    memory = {
        "weights": _bytes([*net.parameters(), *net.buffers()]),
        "gradients": _bytes(trained),
        "optimizer": _optimizer_state(optimizer, trained) if optimizer else 0,
        "ema": _bytes(averaged.state_dict().values()),
        "autocast": _bytes(autocast.copies.values()),
    }
    recomputed = watch.recomputed() / batch if watch.units else None
    return Summary(
        batch,
        precision,
        parameters=sum(p.numel() for p in net.parameters()),
        multiply_adds=watch.flops.get_total_flops() // 2 // batch,
        activations=sum(watch.sizes.values()) / batch,
        recomputed=recomputed,
        memory=memory,
        parts=_merged(watch.parts(batch)),
    )


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer_state(make: Callable[..., torch.optim.Optimizer], parameters: list[nn.Parameter]) -> int | None:
    """Bytes of its state after a first step; None of one that must look at values."""
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        for parameter in parameters:
            parameter.grad = None
    return _bytes(leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))


def _parts(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's children, those that only hold others and those that hold units taken apart."""
    units = {id(unit) for unit in getattr(net, "units", [])}

    def apart(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            holds = any(id(inner) in units for inner in child.modules())
            if id(child) not in units and (holds or isinstance(child, nn.ModuleList | nn.ModuleDict)):
                yield from apart(f"{prefix}{name}.", child)
            else:
                yield f"{prefix}{name}", child

    yield from apart("", net)


def _merged(parts: list[Part]) -> list[Part]:
    """Equal neighbours in one row."""
    rows: list[list[Part]] = []
    for part in parts:
        like = rows and all(
            getattr(part, key) == getattr(rows[-1][0], key)
            for key in ("output", "parameters", "multiply_adds", "activations", "unit")
        )
        rows[-1].append(part) if like else rows.append([part])
    return [
        Part(
            row[0].name if len(row) == 1 else f"{row[0].name} to {row[-1].name}",
            row[0].output,
            *(sum(getattr(part, key) for part in row) for key in ("parameters", "multiply_adds", "activations")),
            times=len(row),
            unit=row[0].unit,
        )
        for row in rows
    ]


class _Watch:
    """What each part of a network computes and keeps in one forward pass.

    A tensor is known by its storage, so that views of it, and several operations that keep it, count once. Weights do
    not count.
    """

    def __init__(self, net: nn.Module):
        self.net, self.modules = net, dict(_parts(net))
        self.units = {id(unit) for unit in getattr(net, "units", [])}
        self.flops = FlopCounterMode(display=False)
        self.now, self.begun = "", 0
        self.computed = dict.fromkeys([*self.modules, ""], 0)
        self.output: dict[str, list[int]] = {}
        self.storages: dict[int, Any] = {}  # held, so that no address is used twice
        self.sizes: dict[int, int] = {}
        self.kept: dict[str, set[int]] = {name: set() for name in [*self.modules, ""]}
        self.first: dict[int, str] = {}  # the part that kept a storage first
        self.inputs: set[int] = set()  # storages that units are given
        self.weights = {self._key(tensor) for tensor in [*net.parameters(), *net.buffers()]}

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return storage._cdata

    def _enter(self, name: str, unit: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.now, self.begun = name, self.flops.get_total_flops()
        if unit:
            given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            self.inputs |= given - self.weights

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.computed[name] += self.flops.get_total_flops() - self.begun
        self.output[name] = list(output.shape[1:]) if isinstance(output, Tensor) else []
        self.now = ""

    def _keep(self, tensor: Tensor) -> Tensor:
        key = self._key(tensor)
        if key not in self.weights:
            self.sizes[key] = self.storages[key].nbytes()
            self.kept[self.now].add(key)
            self.first.setdefault(key, self.now)
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in self.modules.items():
            enter = partial(self._enter, name, id(module) in self.units)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._leave, name)))
        try:
            with self.flops, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def forget(self, tensors: Any) -> None:
        """Do not count these tensors."""
        for key in {self._key(tensor) for tensor in tensors}:
            self.sizes.pop(key, None)
            self.inputs.discard(key)
            for kept in self.kept.values():
                kept.discard(key)

    def recomputed(self) -> int:
        """Bytes kept where units keep their inputs only, while the largest of them is computed again."""
        units = {name for name, module in self.modules.items() if id(module) in self.units}
        stay = self.inputs.union(*(kept for name, kept in self.kept.items() if name not in units))
        size = {key: self.storages[key].nbytes() for key in stay} | self.sizes
        return sum(size[key] for key in stay) + max(sum(size[key] for key in self.kept[name] - stay) for name in units)

    def parts(self, batch: int) -> list[Part]:
        """One per module, in the network's order, and last what the network does itself."""
        found, seen = [], set()
        for name, module in [*self.modules.items(), ("", self.net)]:
            own = {id(p): p for p in module.parameters() if id(p) not in seen}
            seen |= own.keys()
            kept = sum(size for key, size in self.sizes.items() if self.first[key] == name)
            part = Part(
                name or "the rest",
                self.output.get(name, []),
                sum(p.numel() for p in own.values()),
                self.computed[name] // 2 // batch,
                kept / batch,
                unit=id(module) in self.units,
            )
            if name or part.parameters or kept:
                found.append(part)
        return found


class _Autocast(TorchFunctionMode):
    """What ``torch.autocast`` does on a GPU, for tensors on any device, meta included, where torch has none.

    Args:
        dtype: of products; None for no autocast.
    """

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype
        self.copies: dict[int, Tensor] = {}  # of weights, made once

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """In force, also for a network that itself switches ``torch.autocast`` off or on."""
        theirs, torch.autocast = torch.autocast, self._region  # type: ignore[misc, assignment]
        try:
            with self:
                yield
        finally:
            torch.autocast = theirs  # type: ignore[misc]

    @contextmanager
    def _region(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any):
        before, self.dtype = self.dtype, (dtype or self.dtype or torch.bfloat16) if enabled else None
        try:
            yield
        finally:
            self.dtype = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", "").strip("_"), kwargs or {}
        if self.dtype is not None and name in NARROW | WIDE | WIDEST:
            floating = [t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
            wide = name in WIDE or (name in WIDEST and torch.float32 in floating)
            to = torch.float32 if wide else self.dtype
            args, kwargs = tree_map(partial(self._cast, to), (args, kwargs))
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, to: torch.dtype, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == to or value.dtype not in _AUTOCAST_DTYPES:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(to)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(to)
        return self.copies[id(value)]


_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **more) -> Tensor:
    """On meta, attention as a fused kernel: it keeps its inputs, its output and one number per row."""
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, True, dropout_p, is_causal, scale=more.get("scale"))[0]
