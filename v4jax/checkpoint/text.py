"""Small files that are there whole or not at all. Next file to read: v4jax/checkpoint/intact.py."""

import os
import pathlib
import tempfile


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
