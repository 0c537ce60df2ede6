"""What was measured of a run after training, as numbers and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Evaluations(NamedTuple):
    """Every evaluation of a run."""

    step: int
    """Of the weights that were measured last."""
    values: dict[str, float]
    """evaluation/NAME: of the measurements of the last one."""
    table: dict[str, list[Any]]
    """A row per measurement of each: its value, controls and the protocol that it depends on."""


def evaluations(last: Path) -> Evaluations:
    """All that lie beside one, that one last.

    Args:
        last: RUN/evaluations/HASH.
    """
    folders = sorted(file.parent for file in last.parent.glob("*/evaluation.json") if file.parent != last)
    made = [(folder, json.loads((folder / "evaluation.json").read_text())) for folder in [*folders, last]]
    rows = [_row(folder.name, content["protocol"], record) for folder, content in made for record in content["records"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    _, newest = made[-1]
    return Evaluations(
        step=newest["protocol"]["step"],
        values={f"evaluation/{record['name']}": record["value"] for record in newest["records"]},
        table={column: [row.get(column) for row in rows] for column in columns},
    )


def _row(address: str, protocol: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    sampler, guidance = protocol.get("sampler") or {}, protocol.get("guidance") or {}
    return {
        "evaluation": address,
        "measurement": record["name"],
        "value": record["value"],
        "better": record["better"],
        "controls": json.dumps(record["controls"]),
        "step": protocol["step"],
        "weights": protocol["weights"],
        "n": protocol["n"],
        "seed": protocol.get("seed"),
        "sampler": str(sampler.get("_target_", "")).rpartition(".")[2],
        "steps": sampler.get("steps"),
        "guidance": guidance.get("scale"),
        "nfe": protocol.get("nfe"),
        "protocol": json.dumps({**protocol, "measurement": record["protocol"]}, sort_keys=True),
    }
