"""The cache of a layer: what decoding keeps of the tokens seen, as arrays stacked over layers.

Everything is addressed by absolute position, so taking tokens back only makes the length smaller:
- Rings hold the newest tokens (keys/values of the window; what a coming entry will pool). Position
  p lies at p mod R.
- Slots hold one entry or one index key each. Window w lies at w. A query sees a slot only from the
  last token of its window on, and the chunk that brings that token writes the slot, so older
  contents are never read.

Example, CSA (ratio 4), 10 tokens: slots 0 and 1 are in use; the ring holds the tokens of window 1
(the overlap) and tokens 8 and 9. Two tokens later window 2 is pooled from both and written to slot
2.

On a mesh, slots may be cut over the devices that cut sequences (logical axis "cache_slots"), a
contiguous part on each; rings are not cut.

Shapes: L layers, B batch, R places of a ring, C entries (their slots), W width.
Next file to read: v4jax/cache/rows.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.cache.quantized import Rows, empty_index_keys, empty_keys
from v4jax.config import CSA, WINDOW_ONLY, ModelConfig

SPARE_ROWS = 8
"""Places that a ring has beyond what queries see.

This many tokens can be taken back, or come at once without overwriting what the first of them sees.
"""


class ChunkSpan(NamedTuple):
    """Which tokens of a chunk [B,S] are real: the first `count_B`, from position `start_B` on."""

    start_B: jax.Array
    count_B: jax.Array


class Compressed(NamedTuple):
    """What a compressor keeps.

    Attributes:
      c, z: rings of its projections and gate logits, float32 [L,B,R,W].
      slots: its entries or index keys, [L,B,C,W].
    """

    c: jax.Array
    z: jax.Array
    slots: Rows


class LayerCache(NamedTuple):
    """The cache of one kind of layer, with all its repeats.

    Attributes:
      window: ring of the window's keys/values, [L,B,R,W].
      entry, index: what the compressors of entries and of index keys keep; None in kinds without
        them.
    """

    window: Rows
    entry: Compressed | None = None
    index: Compressed | None = None


class CacheView(NamedTuple):
    """The cache as one layer sees it.

    Attributes:
      cache: a LayerCache, or a part of one.
      layer: int32 scalar, number of the layer in the stack.
      span: which tokens of the chunk are real.
    """

    cache: Any
    layer: jax.Array
    span: ChunkSpan

    def with_arrays(self, cache) -> "CacheView":
        """The same layer and chunk with other arrays."""
        return self._replace(cache=cache)


class CompressedKV(NamedTuple):
    """Entries or index keys of one layer of the cache.

    Attributes:
      stack: those of all layers, [L,B,C,W].
      layer: int32 scalar, number of the layer in the stack.
      used: int32 scalar, number of slots in use in the longest row.
    """

    stack: Rows
    layer: jax.Array
    used: jax.Array

    @property
    def count(self) -> int:
        """C, the number of slots."""
        return slot_count(self.stack)


def slot_count(slots: Rows) -> int:
    """C of slots [L,B,C,W]."""
    return jax.tree.leaves(slots)[0].shape[2]


def tail_rows(ratio: int) -> int:
    """How many tokens before a chunk its entries may pool: one window, in CSA two."""
    return 2 * ratio if ratio == CSA else ratio


def empty_layer(
    rules: AxisRules,
    cfg: ModelConfig,
    ratio: int,
    layers: int,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    storage: str,
) -> LayerCache:
    """An empty cache with a capacity of `capacity` tokens, which is a multiple of the ratio.

    storage: see v4jax/cache/quantized.py.
    """

    def placed(rows, slots: str | None = None):
        return jax.tree.map(lambda x: rules.constrain(x, None, "act_batch", slots, None), rows)

    def compressed(dim, slots):
        ring = (layers, batch, tail_rows(ratio) + SPARE_ROWS, 2 * dim if ratio == CSA else dim)
        c, z = (placed(jnp.zeros(ring, jnp.float32)) for _ in "cz")
        return Compressed(c, z, placed(slots, "cache_slots"))

    window = placed(
        empty_keys(cfg, (layers, batch, cfg.sliding_window + SPARE_ROWS), dtype, storage)
    )
    if ratio == WINDOW_ONLY:
        return LayerCache(window)
    lead = (layers, batch, capacity // ratio)
    entry = compressed(cfg.head_dim, empty_keys(cfg, lead, dtype, storage))
    if ratio != CSA:
        return LayerCache(window, entry)
    return LayerCache(
        window, entry, compressed(cfg.index_head_dim, empty_index_keys(cfg, lead, dtype, storage))
    )
