"""Classes by number and by name, and files of labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.data.picture import is_image
from denoiselab.errors import UserError

Class = int | str


def numbered(given: list[Class | None], classes: list[Class] | None, source: str) -> tuple[list[Class], Tensor]:
    """Classes, and each sample's number among them; -1 where there is none.

    Whole numbers are class indices themselves; names are numbered in alphabetical order.

    Args:
        given: per sample, a number, a name, or None.
        classes: those of the training set, that a held-out set must keep to; None finds them.
        source: the option that names the labels, for errors.
    """
    known = {value for value in given if value is not None}
    if classes is None:
        if known and all(isinstance(value, int) for value in known):
            numbers = [value for value in known if isinstance(value, int)]
            if min(numbers) < 0:
                raise UserError(f"{source}: class {min(numbers)}; need numbers from 0 on, or names")
            classes = [*range(max(numbers) + 1)]
        else:
            classes = sorted(known, key=str)
    strange = sorted(known - set(classes), key=str)
    if strange:
        raise UserError(f"{source}: class {strange[0]} of the held-out images is not one of the training's")
    number = {value: i for i, value in enumerate(classes)} | {None: -1}
    return classes, torch.tensor([number[value] for value in given])


def read_labels(file: Path) -> dict[str, Class]:
    """The class of each path below the data's root, a number or a name.

    ``.csv``: path and class in the first two columns, a first row of column names if its path is no image's.
    ``.json``: {path: class}, or {"labels": [[path, class], ...]} as StyleGAN's and EDM's tools write it.
    """
    try:
        if file.suffix.lower() == ".json":
            content = json.loads(file.read_text())
            content = content.get("labels", content)
            rows = content.items() if isinstance(content, dict) else content
        else:
            with file.open(newline="") as text:
                rows = [row for row in csv.reader(text) if row]
            if rows and not is_image(rows[0][0]):
                rows = rows[1:]
        pairs = [(str(row[0]), row[1]) for row in rows]
    except (OSError, ValueError, AttributeError, TypeError, LookupError, csv.Error) as error:
        raise UserError(
            f"data.labels={file}: cannot be read as rows of path, class ({' '.join(str(error).split())})"
        ) from None
    found: dict[str, Class] = {}
    for path, value in pairs:
        label = class_of(value)
        if label is None:
            continue
        if found.setdefault(path, label) != label:
            raise UserError(f"data.labels={file}: {path} has two classes, {found[path]} and {label}")
    if len({type(value) for value in found.values()}) > 1:
        found = {path: str(value) for path, value in found.items()}
    return found


def class_of(value: Any) -> Class | None:
    """A number where the value is one, else its text; None for nothing."""
    text = str(value).strip()
    if value is None or not text:
        return None
    try:
        return int(text)
    except ValueError:
        return text
