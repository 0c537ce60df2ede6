"""Files changed at random: bytes of any file, and values of a configuration or of a JSON file."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "\x1b[2J", "<script>", "../../x", "-1", "1e5", "\ud800", "${oc.env:HOME}", "???", "=1+1"),
    *([], {}, [[]], [None], {"": 0}, ["x", 1], {"_target_": "os.system"}, {"_partial_": True}),
)
"""Values that nobody writes."""


def of_bytes(whole: bytes, rng: random.Random) -> bytes:
    """A file with one to four things that went wrong with it."""
    found = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(found) + 1), rng.choice((1, 1, 2, 8, 64, 512))
        how = rng.randrange(5)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            found[at : at + n] = rng.randbytes(n)
        elif how == 2:
            del found[at : at + n]
        elif how == 3:
            found[at:at] = found[at : at + n]
        else:
            found[at : at + n] = bytes(n)
    return bytes(found)


def of_values(whole: Any, rng: random.Random) -> Any:
    """Plain data of which one to three values, anywhere in it, are strange, gone, or another's."""
    found = copy.deepcopy(whole)
    for _ in range(rng.randint(1, 3)):
        places = [*_places(found)]
        if not places:
            return rng.choice(STRANGE)
        holder, key = rng.choice(places)
        how = rng.randrange(4)
        if how == 0:
            del holder[key]
        elif how == 1:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return found


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in [*(node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ())]:
        yield node, key
        yield from _places(node[key])
