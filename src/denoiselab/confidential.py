"""What must not be written down: keys and passwords in a configuration, which every run keeps as text."""

from __future__ import annotations

import re
from typing import Any

from denoiselab.errors import UserError

SECRET = re.compile(r"api_?key|token(?!i[sz])|secret|passw|credential", re.IGNORECASE)
"""In an option's name: its value is kept back."""

ACCOUNT = re.compile(r"(?<=://)[^/\s@]+@")
"""user:password of an address."""

PASSWORD = re.compile(r"://[^/\s:@]*:(?!\$\{)[^/\s@]+@")


def refuse_secrets(node: Any, where: str = "") -> None:
    """Refuse a configuration with a secret in plain text: it would be in config.yaml, in every checkpoint, in the files
    that jobs start from, and on the dashboard.

    Args:
        node: plain dicts and lists, look-ups unresolved.
        where: it stands.

    Raises:
        UserError: naming the option, and not its value.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            refuse_secrets(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            refuse_secrets(value, where)
    elif isinstance(node, str) and node:
        named = SECRET.search(where.rpartition(".")[2]) and "${" not in node
        if named or PASSWORD.search(node):
            raise UserError(
                f"{where}: a key or a password would be written into every file of the run; keep it in a variable of "
                f"the environment and give {where}='${{oc.env:NAME}}'"
            )
