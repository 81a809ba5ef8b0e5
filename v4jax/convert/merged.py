"""A checkpoint with an adapter merged into it, read tensor by tensor.

Next file to read: v4jax/convert/targets.py.
"""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from v4jax.adapters.read import load_adapter
from v4jax.checkpoint.formats import format_of
from v4jax.checkpoint.load import Source
from v4jax.checkpoint.names import official_names
from v4jax.convert.sources import StoreSource
from v4jax.storage import Place


class Merged:
    """What a StoreSource or load.Source is, with a b added to each matrix that has a pair."""

    def __init__(self, source: Source | StoreSource, adapter, given: Place):
        """Reads the adapter whole; of the checkpoint, nothing yet.

        Args:
          given: where the checkpoint is read.

        Raises:
          ValueError: see load_adapter.
        """
        self.source = source
        self.directory, self.cfg, self.raw = source.directory, source.cfg, source.raw
        self.kinds, self.carried = source.kinds, source.carried
        self._pairs: Any = flatten_dict(load_adapter(source.cfg, adapter, given))
        self._slots = official_names(source.cfg)
        self.scales = {name: one for name, one in source.scales.items() if not self.adapts(name)}

    @property
    def format(self) -> str:
        return format_of(self.kinds)

    def adapts(self, name: str) -> bool:
        """Whether an official tensor has a pair."""
        return (*self._slots[name].path, "a") in self._pairs

    def numbers(self, name: str) -> np.ndarray:
        """The tensor's numbers; float32 where it has a pair."""
        numbers = self.source.numbers(name)
        if not self.adapts(name):
            return numbers
        slot = self._slots[name]
        a, b = (self._pairs[(*slot.path, part)][slot.index] for part in ("a", "b"))
        return numbers.astype(np.float32) + (a @ b).T

    def scale(self, name: str) -> np.ndarray | None:
        """The scales of a tensor that is as it was; None for one that has a pair."""
        return None if self.adapts(name) else self.source.scale(name)


AnySource = Source | StoreSource | Merged


def as_it_was(source: AnySource, name: str) -> Source | None:
    """The safetensors whose stored form of a tensor may be copied; None if there are none."""
    if isinstance(source, Merged):
        return None if source.adapts(name) else as_it_was(source.source, name)
    return source if isinstance(source, Source) else None
