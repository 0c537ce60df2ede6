"""Pictures of runs as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass
class Picture:
    """A PNG inside the page, at its natural size."""

    source: str
    width: int
    height: int
    label: str
    caption: str


def embed(path: Path, label: str, caption: str, widest: int | None = None) -> Picture | None:
    """A PNG file for the page, scaled down to ``widest`` pixels if given; None if it is not a good PNG."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            width, height = image.size
            if widest is not None and width > widest:
                small = image.convert("RGB").resize((widest, max(1, round(height * widest / width))))
                (width, height), buffer = small.size, io.BytesIO()
                small.save(buffer, format="PNG", optimize=True)
                content = buffer.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(source, width, height, label, caption)
