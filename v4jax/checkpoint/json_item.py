"""Lets Orbax save a small JSON value as one item of a checkpoint.

Next file to read: v4jax/checkpoint/store.py.
"""

import json
from collections.abc import Awaitable
from typing import Any

from sharding.processes import is_first

NOTE_FILE = "note.json"


class JsonItem:
    """Holds `value`, which Orbax saves and which loading replaces.

    The first process writes it; all processes read it.
    """

    def __init__(self, value: Any):
        self.value = value

    async def save(self, directory) -> Awaitable[None]:
        """Writes the present value in the background."""
        text = json.dumps(self.value)

        async def write():
            folder = await directory.await_creation()
            if is_first():
                (folder / NOTE_FILE).write_text(text)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        async def read():
            self.value = json.loads((directory / NOTE_FILE).read_text())

        return read()
