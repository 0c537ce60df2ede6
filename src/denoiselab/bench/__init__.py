"""How fast training, networks and samplers are, against what one would use instead.

A contender is something that takes turns (``timing.Contender``); a part makes its contenders, lets ``timing`` alternate
them in one run, checks that they compute the same, and returns ``record.Record``s.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from denoiselab.bench.record import Record
from denoiselab.bench.refusal import Unavailable

PARTS = {"training": None, "networks": None, "sampling": 1, "importance": 1, "launch": None, "gpu": None}
"""Each a module of this package; and its CPU threads, None for torch's choice. Small operations go on one: more are
noisier than the operations are long."""


def run(parts: Sequence[str], config: dict[str, Any]) -> Iterator[Record | str]:
    """The records of these parts, each as soon as it is there, or a line that says why a part is not made.

    Args:
        parts: of PARTS.
        config: as in conf/bench.yaml.
    """
    device = torch.device("cuda" if config["device"] == "auto" and torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    for part in parts:
        torch.set_num_threads(config["threads"] or PARTS[part] or before)
        try:
            for record in importlib.import_module(f"denoiselab.bench.{part}").measure(config[part], device):
                record.facts["threads"] = torch.get_num_threads()
                yield record
        except Unavailable as reason:
            yield f"{part}: {reason}"
        finally:
            torch.set_num_threads(before)
