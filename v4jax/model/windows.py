"""Compression windows: which tokens each entry pools, and where entries lie.

Where the sequence is cut over devices, an entry belongs to the device that holds its last token.
Every device has as many slots as windows can end in its shard. So sharding changes which slots are
empty, never the order of entries.

Shapes: B batch, S positions of a row or of a shard, C slots for entries (S // ratio in an uncut
sequence, the most that can be complete), H head dim, Z shards of the sequence.
Next file to read: v4jax/model/rotary.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.cache.attention_inputs import Entries
from v4jax.cache.layer import CompressedKV
from v4jax.config import ModelConfig
from v4jax.kernels.rotate import Rotation
from v4jax.model.rotary import rotation


class CompressionWindows(NamedTuple):
    """Compression windows of one ratio, one per slot.

    An empty slot has last_BC = S, which no query can see. The batch is 1 where each row is one
    document.

    Attributes:
      first_BC: int32, index in the row of the window's first token (see read_span for continued
        rows).
      last_BC: int32, index in the row of its last token.
      segment_BC: its document; None where each row is one document.
      overlaps_BC: whether its document has a window before it, which CSA pools too.
      rope: rotation at the position of its first token, [B,C,R/2] for R rope dims.
    """

    first_BC: jax.Array
    last_BC: jax.Array
    segment_BC: jax.Array | None
    overlaps_BC: jax.Array
    rope: Rotation


def entries_of(
    ratio: int, entry_BCH: jax.Array | CompressedKV | None, windows: CompressionWindows | None
) -> Entries | None:
    """Entries, with the last token of each one's window; None where there are none.

    In a cache, slot c holds the window of tokens c * ratio to c * ratio + ratio - 1.
    """
    if isinstance(entry_BCH, CompressedKV):
        first_1C = jnp.arange(entry_BCH.count, dtype=jnp.int32)[None] * ratio
        return Entries(entry_BCH, first_1C + ratio - 1, None)
    if entry_BCH is None or windows is None:
        return None
    return Entries(entry_BCH, windows.last_BC, windows.segment_BC)


def windows_of(
    cfg: ModelConfig, ratio: int, position_BS: jax.Array, segment_BS: jax.Array | None, shards: int
) -> CompressionWindows:
    """Windows of one ratio; each shard's windows fill its slots from the left."""
    seq = position_BS.shape[1]
    rows = seq // shards
    slots = rows // ratio if shards == 1 or rows % ratio == 0 else rows // ratio + 1
    if segment_BS is None:
        shard_Z1 = jnp.arange(shards, dtype=jnp.int32)[:, None]
        window_ZC = shard_Z1 * rows // ratio + jnp.arange(slots, dtype=jnp.int32)[None]
        there_BC = (window_ZC < (shard_Z1 + 1) * rows // ratio).reshape(1, -1)
        first_BC = jnp.where(there_BC, window_ZC.reshape(1, -1) * ratio, 0)
        last_BC = jnp.where(there_BC, first_BC + ratio - 1, seq)
        return CompressionWindows(
            first_BC, last_BC, None, first_BC > 0, rotation(cfg, first_BC, compressed=True)
        )
    closes_BZS = ((position_BS % ratio == ratio - 1) & (segment_BS > 0)).reshape(-1, shards, rows)
    slot_BZS = jnp.where(closes_BZS, jnp.cumsum(closes_BZS, axis=2) - 1, slots)
    empty_C = jnp.full(slots, seq, jnp.int32)
    place = jax.vmap(
        jax.vmap(lambda slot_S, row_S: empty_C.at[slot_S].set(row_S, mode="drop")),
        in_axes=(0, None),
    )
    last_BC = place(slot_BZS, jnp.arange(seq, dtype=jnp.int32).reshape(shards, rows)).reshape(
        -1, shards * slots
    )
    there_BC = last_BC < seq
    first_BC = jnp.where(there_BC, last_BC - (ratio - 1), 0)
    position_BC = jnp.where(there_BC, jnp.take_along_axis(position_BS, first_BC, axis=1), 0)
    segment_BC = jnp.where(there_BC, jnp.take_along_axis(segment_BS, first_BC, axis=1), 0)
    return CompressionWindows(
        first_BC, last_BC, segment_BC, position_BC > 0, rotation(cfg, position_BC, compressed=True)
    )
