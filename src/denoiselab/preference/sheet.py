"""A sheet for raters: one page with pairs of pictures in random order on random sides, and a key kept apart."""

from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from denoiselab.files import write_text
from denoiselab.rng import mix
from denoiselab.run_folder import digest

SIDE = 320
"""Least side of a picture on the page in pixels: small ones are enlarged by whole factors."""

TEMPLATE = Path(__file__).with_name("sheet.html")


class Pictures(NamedTuple):
    """What a sheet is made of."""

    a: list[Image.Image]
    b: list[Image.Image]
    """As many; pair i is (a[i], b[i])."""
    real: list[Image.Image]
    """One per check."""
    noise: list[Image.Image]
    """As many."""


@dataclass
class Trial:
    """A question of the sheet."""

    kind: str
    """pair; repeat, a pair shown again with its sides swapped; check, a real picture beside noise."""
    item: int
    """Which pair, or which check."""
    left: str
    """a, b, real or noise; what is not at the left is at the right."""
    right: str


def order(n: int, repeats: int, checks: int, seed: int) -> list[Trial]:
    """The questions of a sheet. Half of the pairs have a at the left, and so have half of the checks the real picture,
    so that a rater who likes one side prefers neither.

    Args:
        n: pairs, >= 1.
        repeats: pairs that are shown twice, <= n.
        checks: >= 0.
        seed: decides everything.
    """
    chance = random.Random(mix(seed, "preference"))

    def sides(count: int, names: tuple[str, str]) -> list[tuple[str, str]]:
        first = [names, names[::-1]]
        chance.shuffle(first)
        found = [first[i % 2] for i in range(count)]
        chance.shuffle(found)
        return found

    pairs = [Trial("pair", i, *side) for i, side in enumerate(sides(n, ("a", "b")))]
    again = [Trial("repeat", i, pairs[i].right, pairs[i].left) for i in chance.sample(range(n), repeats)]
    tried = [Trial("check", i, *side) for i, side in enumerate(sides(checks, ("real", "noise")))]
    trials = [*pairs, *again, *tried]
    chance.shuffle(trials)
    return trials


def write_sheet(
    sheet: Path, key: Path, pictures: Pictures, trials: list[Trial], question: str, facts: dict[str, Any]
) -> str:
    """Write the page, which says nothing of what stands where, and the key; the sheet's name is returned.

    Args:
        sheet, key: files.
        pictures: as the trials count them.
        trials: from ``order``.
        question: that raters are asked.
        facts: for the key: what a and b are, and how they were made; plain data.
    """
    from jinja2 import Environment, select_autoescape

    name = digest([facts, [asdict(trial) for trial in trials]])
    shown = [[as_data(picture(pictures, trial, side)) for side in (trial.left, trial.right)] for trial in trials]
    template = Environment(autoescape=select_autoescape()).from_string(TEMPLATE.read_text())
    page = template.render(sheet=name, question=question, trials=shown)
    content = {"sheet": name, "question": question, **facts, "trials": [asdict(trial) for trial in trials]}
    write_text(key, json.dumps(content, indent=1) + "\n")
    write_text(sheet, page)
    return name


def picture(pictures: Pictures, trial: Trial, side: str) -> Image.Image:
    return {"a": pictures.a, "b": pictures.b, "real": pictures.real, "noise": pictures.noise}[side][trial.item]


def as_data(image: Image.Image) -> str:
    """A PNG inside a URL, its pixels squares."""
    factor = max(1, -(-SIDE // max(image.size)))
    buffer = io.BytesIO()
    size = (image.width * factor, image.height * factor)
    image.resize(size, Image.Resampling.NEAREST).save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
