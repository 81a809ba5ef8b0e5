"""Shares memory among tensors at work: several small ones at a time, a large one alone.

Next file to read: v4jax/checkpoint/export.py.
"""

import contextlib
import threading
from collections.abc import Iterator


class MemoryBudget:
    """A number of bytes that threads share.

    A thread that wants more than is free waits. One that wants more than the whole waits to be
    alone.
    """

    def __init__(self, size: int):
        self._size, self._taken, self._changed = size, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        """Context in which `wanted` bytes are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + wanted <= self._size)
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()
