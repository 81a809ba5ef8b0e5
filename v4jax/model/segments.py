"""Documents of packed rows: where they begin and end, and which compression windows they make.

Nothing crosses a document: positions restart, compression windows are aligned to the document's
first token, and its incomplete last window makes no entry (docs/equations.md#packing). A row
without segment ids is one document.

Example, ratio 4, segments [1 1 1 1 1 2 2 2 2 3]: positions are [0 1 2 3 4 0 1 2 3 0]; tokens 3 and
8 of the row close a window, so entries begin at tokens 0 and 5.

Where the sequence is cut over devices, an entry belongs to the device that holds its last token.
Every device has as many slots as windows can end in its shard. So sharding changes which slots are
empty, never the order of entries.

Shapes: B batch, S positions of a row or of a shard, C slots for entries (S // ratio in an uncut
sequence, the most that can be complete), X shards of the sequence.
Next file to read: v4jax/model/rotary.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.cache.layer import ChunkSpan, tail_rows
from v4jax.config import WINDOW_ONLY, ModelConfig
from v4jax.model.rotary import Rotation, rotation


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
      rope: rotation at the position of its first token, [B,C,R/2] for R rope dims; None where
        unused.
    """

    first_BC: jax.Array
    last_BC: jax.Array
    segment_BC: jax.Array | None
    overlaps_BC: jax.Array
    rope: Rotation | None


class Segments(NamedTuple):
    """What layers need to know of a batch's documents.

    Attributes:
      segment_BS: document of each token, 0 for padding; None where each row is one document.
      extent_2BS: indices of the first and last token of each token's document; None likewise.
      counts_BS: which tokens count in router statistics: no padding and, in MTP, no document's last
        token; None: all.
      rope: rotation of tokens in layers of ratio 0, [B,S,R/2] for R rope dims; the batch is 1 where
        each row is one document.
      compressed_rope: the same for CSA and HCA layers.
      windows: compress ratio -> CompressionWindows, for ratios that can make an entry at this
        length.
    """

    segment_BS: jax.Array | None
    extent_2BS: jax.Array | None
    counts_BS: jax.Array | None
    rope: Rotation
    compressed_rope: Rotation | None
    windows: dict[int, CompressionWindows]


def read_segments(
    cfg: ModelConfig, seq: int, segment_BS: jax.Array | None, shards: int = 1
) -> Segments:
    """Segments of rows of `seq` tokens that are cut into `shards` equal parts."""
    extent_2BS = None if segment_BS is None else _extent(segment_BS)
    row_1S = jnp.arange(seq, dtype=jnp.int32)[None]
    position_BS = row_1S if extent_2BS is None else row_1S - extent_2BS[0]
    ratios = sorted({ratio for ratio in cfg.compress_ratios if ratio != WINDOW_ONLY})
    return Segments(
        segment_BS,
        extent_2BS,
        None if segment_BS is None else segment_BS > 0,
        rotation(cfg, False, position_BS),
        rotation(cfg, True, position_BS) if ratios else None,
        {
            ratio: _windows(cfg, ratio, position_BS, segment_BS, shards)
            for ratio in ratios
            if seq >= ratio
        },
    )


def read_span(cfg: ModelConfig, seq: int, span: ChunkSpan) -> Segments:
    """Segments of chunks of `seq` tokens that continue rows, each at a position of its own.

    Windows are those that may close in the chunk. last_BC is a position; first_BC counts from the
    first of the `tail_rows` tokens before the chunk. Example: ratio 4, a chunk from position 10 on:
    window 2 begins at position 8 and has first_BC 6, because the tail begins at position 2.
    """
    start_B1 = span.start_B[:, None]
    position_BS = start_B1 + jnp.arange(seq, dtype=jnp.int32)[None]
    ratios = sorted({ratio for ratio in cfg.compress_ratios if ratio != WINDOW_ONLY})
    windows = {}
    for ratio in ratios:
        first_BC = (start_B1 // ratio + jnp.arange(seq // ratio + 1, dtype=jnp.int32)[None]) * ratio
        rope = rotation(cfg, True, first_BC)
        windows[ratio] = CompressionWindows(
            first_BC - start_B1 + tail_rows(ratio), first_BC + ratio - 1, None, first_BC > 0, rope
        )
    compressed = rotation(cfg, True, position_BS) if ratios else None
    return Segments(None, None, None, rotation(cfg, False, position_BS), compressed, windows)


def whole_windows(ratio: int, slots: int) -> CompressionWindows:
    """Windows of a cache: slot c holds the window of tokens c * ratio to c * ratio + ratio - 1."""
    first_1C = jnp.arange(slots, dtype=jnp.int32)[None] * ratio
    return CompressionWindows(first_1C, first_1C + ratio - 1, None, first_1C > 0, None)


def without_last_tokens(segments: Segments, tokens_BS: jax.Array) -> Segments:
    """The same segments, but a document's last token does not count: MTP has none after it."""
    follows_BS = jnp.broadcast_to(
        jnp.arange(tokens_BS.shape[1]) < tokens_BS.shape[1] - 1, tokens_BS.shape
    )
    if segments.segment_BS is not None:
        after_BS = jnp.pad(segments.segment_BS[:, 1:], ((0, 0), (0, 1)))
        follows_BS &= (after_BS == segments.segment_BS) & segments.counts_BS
    return segments._replace(counts_BS=follows_BS)


def _extent(segment_BS: jax.Array) -> jax.Array:
    """Indices of the first and the last token of each token's document, int32 [2,B,S].

    A document is a run of one segment id. Example: [1 1 2] gives [0 0 2] and [1 1 2].
    """
    seq = segment_BS.shape[1]
    row_1S = jnp.arange(seq, dtype=jnp.int32)[None]
    change_BS = segment_BS[:, 1:] != segment_BS[:, :-1]
    begins_BS, ends_BS = (
        jnp.pad(change_BS, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1))
    )
    first_BS = jax.lax.cummax(jnp.where(begins_BS, row_1S, 0), axis=1)
    last_BS = jax.lax.cummin(jnp.where(ends_BS, row_1S, seq), axis=1, reverse=True)
    return jnp.stack((first_BS, last_BS))


def _windows(
    cfg: ModelConfig, ratio: int, position_BS: jax.Array, segment_BS: jax.Array | None, shards: int
) -> CompressionWindows:
    """Windows of one ratio; each shard's windows fill its slots from the left."""
    seq = position_BS.shape[1]
    rows = seq // shards
    slots = rows // ratio if shards == 1 or rows % ratio == 0 else rows // ratio + 1
    if segment_BS is None:
        shard_X1 = jnp.arange(shards, dtype=jnp.int32)[:, None]
        window_XC = shard_X1 * rows // ratio + jnp.arange(slots, dtype=jnp.int32)[None]
        there_BC = (window_XC < (shard_X1 + 1) * rows // ratio).reshape(1, -1)
        first_BC = jnp.where(there_BC, window_XC.reshape(1, -1) * ratio, 0)
        last_BC = jnp.where(there_BC, first_BC + ratio - 1, seq)
        return CompressionWindows(
            first_BC, last_BC, None, first_BC > 0, rotation(cfg, True, first_BC)
        )
    closes_BXS = ((position_BS % ratio == ratio - 1) & (segment_BS > 0)).reshape(-1, shards, rows)
    slot_BXS = jnp.where(closes_BXS, jnp.cumsum(closes_BXS, axis=2) - 1, slots)
    empty_C = jnp.full(slots, seq, jnp.int32)
    place = jax.vmap(
        jax.vmap(lambda slot_S, row_S: empty_C.at[slot_S].set(row_S, mode="drop")),
        in_axes=(0, None),
    )
    last_BC = place(slot_BXS, jnp.arange(seq, dtype=jnp.int32).reshape(shards, rows)).reshape(
        -1, shards * slots
    )
    there_BC = last_BC < seq
    first_BC = jnp.where(there_BC, last_BC - (ratio - 1), 0)
    position_BC = jnp.where(there_BC, jnp.take_along_axis(position_BS, first_BC, axis=1), 0)
    segment_BC = jnp.where(there_BC, jnp.take_along_axis(segment_BS, first_BC, axis=1), 0)
    return CompressionWindows(
        first_BC, last_BC, segment_BC, position_BC > 0, rotation(cfg, True, position_BC)
    )
