"""Where the samples of a WebDataset tar file lie in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from denoiselab.data.small_images import default_root
from denoiselab.errors import UserError
from denoiselab.files import write_atomic

BLOCK = 512
"""The unit of a tar file."""
VERSION = 1
Index = dict[str, Any]
"""Per sample: offset and length of its image in bytes, which suffix it has, and its class as text."""
COLUMNS = ("offset", "length", "kind", "label", "damage")


def library() -> Any:
    """WebDataset, whose rules for names are followed."""
    try:
        import webdataset
    except ImportError:
        raise UserError("data=shards: needs the package webdataset; pip install 'denoiselab[data]'") from None
    return webdataset


def indexed(path: Path, image: str, label: str | None) -> Index:
    """``scan`` of a shard, kept in the cache for as long as the shard has the same size and time."""
    facts = path.stat()
    key = repr((VERSION, str(path.resolve()), facts.st_size, facts.st_mtime_ns, image, label))
    file = default_root() / "shards" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as kept:
            return {name: kept[name] for name in COLUMNS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        found = scan(path, image.lower().split(";"), label)
    with contextlib.suppress(OSError):  # a full or read-only disk costs another scan next time
        if not str(found["damage"]):
            write_atomic(file, lambda out: np.savez(out, **found))
    return found


def scan(path: Path, suffixes: list[str], label: str | None) -> Index:
    """An index made by going through the headers: length -1 without an image, "" without a class.

    ``damage`` says how the file is damaged, if it is. What follows is left out, and so is the last sample before it,
    which may be incomplete.
    """
    webdataset = library()
    wanted, _, field = (label or "").partition(":")
    rows: list[list[Any]] = []
    last, end, damage = None, 0, ""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    key, suffix = webdataset.tariterators.base_plus_ext(member.name)
                    if not member.isreg() or key is None or suffix is None or re.match(r"__[^/]*__($|/)", member.name):
                        continue
                    if key != last:
                        rows.append([0, -1, len(suffixes), ""])
                        last = key
                    row, suffix = rows[-1], suffix.lower()
                    if suffix in suffixes[: row[2]]:
                        row[:3] = member.offset_data, member.size, suffixes.index(suffix)
                    if suffix == wanted:
                        row[3] = _class_text(os.pread(file.fileno(), member.size, member.offset_data), field)
            if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
                damage = "truncated: it ends without the mark of a tar file's end"
        except tarfile.TarError as error:
            damage = f"truncated or not an uncompressed tar file: {error}"
    if damage:
        rows = rows[:-1]
    columns = zip(*rows, strict=True) if rows else 4 * [[]]
    offset, length, kind, text = columns
    return {
        "offset": np.array(offset, np.int64),
        "length": np.array(length, np.int64),
        "kind": np.array(kind, np.uint8),
        "label": np.array(text, np.str_),
        "damage": np.array(damage),
    }


def _class_text(content: bytes, field: str) -> str:
    """The class in a file of its own, or a field of a .json file; "" where it has none."""
    if not field:
        return content.decode(errors="replace").strip()
    try:
        found = json.loads(content).get(field)
    except (ValueError, AttributeError):
        return ""
    return "" if found is None else str(found)
