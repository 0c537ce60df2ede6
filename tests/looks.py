"""Every diagnostic in a small version, for the tests that hold for all of them."""

from __future__ import annotations

SMALL: dict[str, tuple[str, list[str]]] = {
    "forward": ("points", []),
}
"""By option: the kind of run ("points": one of ``healthy``; "digits": ``example_run``), and overrides that make it
quick."""
