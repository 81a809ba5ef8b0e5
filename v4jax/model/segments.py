"""Documents of packed rows: where they begin and end, and which compression windows they make.

Nothing crosses a document: positions restart, compression windows are aligned to the document's
first token, and its incomplete last window makes no entry (docs/equations.md#packing). A row
without segment ids is one document.

Example, ratio 4, segments [1 1 1 1 1 2 2 2 2 3]: positions are [0 1 2 3 4 0 1 2 3 0]; tokens 3 and
8 of the row close a window, so entries begin at tokens 0 and 5.

Shapes: B batch, S positions of a row, C slots for entries.
Next file to read: v4jax/model/windows.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.cache.layer import ChunkSpan, tail_rows
from v4jax.config import WINDOW_ONLY, ModelConfig
from v4jax.kernels.rotate import Rotation
from v4jax.model.rotary import rotation
from v4jax.model.windows import CompressionWindows, windows_of


class Segments(NamedTuple):
    """What layers need to know of a batch's documents.

    Attributes:
      segment_BS: document of each token, 0 for padding; None where each row is one document.
      extent_2BS: indices of the first and last token of each token's document; None likewise.
      counts_BS: which tokens count in router statistics: no padding and, in MTP, no document's last
        token; None: all.
      rope: rotation of tokens in layers of ratio 0, [B,S,R/2] for R rope dims; the batch is 1 where
        each row is one document.
      compressed_rope: the same for CSA and HCA layers; `rope` in models without them.
      windows: compress ratio -> CompressionWindows, for ratios that can make an entry at this
        length.
    """

    segment_BS: jax.Array | None
    extent_2BS: jax.Array | None
    counts_BS: jax.Array | None
    rope: Rotation
    compressed_rope: Rotation
    windows: dict[int, CompressionWindows]


def read_segments(
    cfg: ModelConfig, seq: int, segment_BS: jax.Array | None, shards: int = 1
) -> Segments:
    """Segments of rows of `seq` tokens that are cut into `shards` equal parts."""
    extent_2BS = None if segment_BS is None else _extent(segment_BS)
    row_1S = jnp.arange(seq, dtype=jnp.int32)[None]
    position_BS = row_1S if extent_2BS is None else row_1S - extent_2BS[0]
    ratios = sorted({ratio for ratio in cfg.compress_ratios if ratio != WINDOW_ONLY})
    counts_BS = None if segment_BS is None else segment_BS > 0
    rope = rotation(cfg, position_BS, compressed=False)
    return Segments(
        segment_BS,
        extent_2BS,
        counts_BS,
        rope,
        rotation(cfg, position_BS, compressed=True) if ratios else rope,
        {
            ratio: windows_of(cfg, ratio, position_BS, segment_BS, shards)
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
        rope = rotation(cfg, first_BC, compressed=True)
        windows[ratio] = CompressionWindows(
            first_BC - start_B1 + tail_rows(ratio), first_BC + ratio - 1, None, first_BC > 0, rope
        )
    compressed = rotation(cfg, position_BS, compressed=True) if ratios else None
    rope = rotation(cfg, position_BS, compressed=False)
    return Segments(None, None, None, rope, rope if compressed is None else compressed, windows)


def without_last_tokens(segments: Segments, tokens_BS: jax.Array) -> Segments:
    """The same segments, but a document's last token does not count: MTP has none after it."""
    follows_BS = jnp.broadcast_to(
        jnp.arange(tokens_BS.shape[1]) < tokens_BS.shape[1] - 1, tokens_BS.shape
    )
    if segments.segment_BS is not None and segments.counts_BS is not None:
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
