"""An offline run of wandb's, read back from its .wandb file."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 32_768, struct.Struct("<IHB")


@dataclass
class Logged:
    """What a file holds."""

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def rows(self, *names: str) -> list[dict[str, Any]]:
        """The rows that have these names, with their step."""
        return [{name: row[name] for name in (*names, "trainer/global_step")} for row in self.history
                if set(names) <= row.keys()]  # fmt: skip

    def steps(self, name: str) -> list[int]:
        return [row["trainer/global_step"] for row in self.rows(name)]

    def files(self, name: str) -> list[Path]:
        """The media of a key, in order."""
        found = []
        for row in self.history:
            if name in row:
                value = row[name]
                paths = value.get("filenames") or [value["path"]]
                found += [self.folder / "files" / path for path in paths]
        return found


def logged(folder: Path) -> Logged:
    """A run's folder, wandb/offline-run-TIME-ID, once wandb's service has written its end."""
    until = time.monotonic() + 60
    while not any(one.WhichOneof("record_type") == "exit" for path in folder.glob("*.wandb") for one in records(path)):
        assert time.monotonic() < until, f"{folder} has no end"
        time.sleep(0.05)
    (file,) = folder.glob("*.wandb")
    found = Logged(folder)
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def runs(folder: Path) -> list[Logged]:
    """Every wandb folder of a run directory, in the order in which they were made."""
    return [logged(path) for path in sorted(folder.glob("wandb/*run-*-*"))]


def newest(folder: Path) -> Logged:
    """The wandb folder of a run directory that was made last."""
    return logged((folder / "wandb" / "latest-run").resolve())


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        node = found
        for part in path:
            node = node.setdefault(part, {})
        node[last] = json.loads(item.value_json)
    return found


def records(file: Path) -> Iterator[Record]:
    """LevelDB's log format behind a header of seven bytes: blocks of 32 KiB; a record is whole (1) or in parts, first
    (2), middle (3) and last (4)."""
    data, place, parts = file.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")  # it is begun in the background
    while place + HEAD.size <= len(data):
        if (left := BLOCK - place % BLOCK) < HEAD.size:
            place += left
            continue
        _, size, kind = HEAD.unpack_from(data, place)
        place += HEAD.size
        if place + size > len(data):  # it is being written
            return
        parts = (parts if kind in (3, 4) else b"") + data[place : place + size]
        place += size
        if kind in (1, 4):
            yield Record.FromString(parts)
