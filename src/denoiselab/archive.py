"""A file of PyTorch's, looked at before and after it is opened, so that a small one cannot claim a large memory.

``weights_only`` keeps a file from running code. It still builds what the file asks for: ``bytearray(10**12)``, a
tensor of 10**12 values that all lie in one place, records that unpack to a thousand times their size. A file that we
read holds what `torch.save` writes of tensors and primitives, and nothing else.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoiselab.errors import CheckpointError, disk_fails

DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
STORAGES = (
    *("Float", "Double", "Half", "BFloat16", "ComplexFloat", "ComplexDouble"),
    *("Long", "Int", "Short", "Char", "Byte", "Bool"),
)
NAMES = frozenset(
    {
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size"),
        *("collections.OrderedDict", "collections.Counter", "collections.defaultdict", "builtins.set"),
        *(f"torch.{kind}Storage" for kind in STORAGES),
        *DTYPES,
    }
)
"""What the pickle inside may name."""

MAGIC = b"PK\x03\x04"

MOST = 4
"""Bytes of tensors that a byte of the file may stand for: tensors may share their values, as tied weights do."""


def examine(path: Path, more: frozenset[str] = frozenset()) -> None:
    """Look at a file without opening anything in it.

    Args:
        path: of the file.
        more: what it may name beside ``NAMES``, as "module.name".

    Raises:
        CheckpointError: it is not a plain file of what `torch.save` writes.
    """
    refuse_what_is_no_file(path)
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path}: not a file of PyTorch 1.6 or later; nothing was executed")
            with zipfile.ZipFile(file) as archive:
                names = [_entry(info, path) for info in archive.infolist()]
                if len({*names}) < len(names) or sum(info.file_size for info in archive.infolist()) > _size(path):
                    raise CheckpointError(f"{path}: its parts overlap or have one name; nothing was executed")
                (inside,) = [name for name in names if name.endswith("/data.pkl")]
                said = archive.read(inside)
        for name in _named(said):
            if name not in NAMES | more:
                raise CheckpointError(
                    f"{path}: not tensors and primitives only (it names {name[:80]!r}); nothing was executed"
                )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes zipfile and pickletools raise nearly any type
        if disk_fails(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason[:120]})") from None


def refuse_what_is_no_file(path: Path) -> None:
    """Raise CheckpointError unless a path is a file with something in it; a pipe would be waited for without end."""
    try:
        size, plain = _size(path), path.is_file()
    except OSError as error:
        no = error.errno is not None and not os.path.lexists(path)
        why = "no such checkpoint file" if no else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path}: {why}") from None
    if not plain:
        raise CheckpointError(f"{path}: no such checkpoint file, but a {'folder' if path.is_dir() else 'device'}")
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")


def check_tensors(content: Any, path: Path) -> None:
    """Raise CheckpointError where tensors take much more memory than the file has bytes, or lie outside of it."""
    total, most = 0, MOST * _size(path)
    for tensor in _tensors(content):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: holds a tensor of an unusual kind ({tensor.layout})")
        total += tensor.numel() * tensor.element_size()
        if tensor.is_meta or total > most:
            raise CheckpointError(f"{path}: claims tensors of more than {MOST} times the file's {most // MOST:,} bytes")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Each once, however often and deep it is in dicts, lists and tuples."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Tensor):
            yield node
        elif isinstance(node, dict | list | tuple | set) and id(node) not in seen:
            seen.add(id(node))
            waiting += node.values() if isinstance(node, dict) else node


def _size(path: Path) -> int:
    return path.stat().st_size


def _entry(info: zipfile.ZipInfo, path: Path) -> str:
    """The name of a part, which must lie in the file as it is."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise CheckpointError(f"{path}: a part of it is packed, which PyTorch never does; nothing was executed")
    return info.filename


def _named(said: bytes) -> Iterator[str]:
    """What a pickle names, told from its instructions."""
    for instruction, argument, _ in pickletools.genops(said):
        if instruction.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif instruction.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID"):
            yield instruction.name
