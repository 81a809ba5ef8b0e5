"""Writes small files whole or not at all, and JSON that every reader accepts.

Next file to read: v4jax/checkpoint/checksums.py.
"""

import json
import math
from typing import Any

from v4jax import storage
from v4jax.storage import Place


def write_text(path: Place, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Place, content: bytes) -> None:
    """Writes a file whole or not at all."""
    storage.write(path, content)


def write_json(path: Place, value: Any) -> None:
    """Writes indented JSON that ends with a newline, in a directory that nobody reads yet."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def json_text(value: Any, **options) -> str:
    """JSON text in which numbers that are not finite are null, since JSON has none."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
