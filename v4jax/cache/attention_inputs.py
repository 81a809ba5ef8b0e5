"""What attention reads: queries, window keys, compressed entries and the indexer's inputs.

Shapes: B batch, S positions, Y window keys, N heads, H head dim, C entries, I index heads, J index
dim, R rope dims.
Next file to read: v4jax/cache/sharded.py.
"""

from typing import NamedTuple

import jax

from v4jax.cache.layer import CompressedKV
from v4jax.kernels.rotate import Rotation


class Entries(NamedTuple):
    """Compressed entries that queries may attend to.

    Attributes:
      entry_BCH: keys/values, normalised and rotated; of rows that continue all entries of the
        cache, as CompressedKV.
      last_BC: int32, index in the row of the last token of each entry's window.
      segment_BC: document of each entry; None where each row is one document.
    """

    entry_BCH: jax.Array | CompressedKV
    last_BC: jax.Array
    segment_BC: jax.Array | None


class IndexInputs(NamedTuple):
    """What scores are made of: queries and head weights of some positions, keys of all entries."""

    q_BSIJ: jax.Array
    w_BSI: jax.Array
    key_BCJ: jax.Array | CompressedKV


class WindowKV(NamedTuple):
    """Window keys/values of rows that are continued: those before the chunk, and the chunk's own.

    A chunk of at most SPARE_ROWS tokens gets the whole ring, whose keys may be in any order and may
    be older than the window; their positions tell.

    Attributes:
      rows_BYH: keys/values, Y = W + S for a window of W, or the length of the ring.
      position_BY: int32, position of each; negative where there is none.
      start_B: int32, position of the chunk's first token.
    """

    rows_BYH: jax.Array
    position_BY: jax.Array
    start_B: jax.Array


class AttentionInputs(NamedTuple):
    """What attention reads of one layer.

    Attributes:
      q_BSNH: queries, neither normalised nor rotated.
      rope: rotation of each query, [B or 1,S,R/2].
      kv_BSH: window keys/values, normalised and rotated.
      sink_N: float32, one logit per head, in the denominator only.
      segment_BS: document of each token; None where each row is one document.
      entries: None in layers of ratio 0, and in rows shorter than a window.
      index: inputs of the indexer, if it chooses entries or is trained; None: all visible entries.
      past: window keys/values of rows that continue others; they replace kv_BSH.
    """

    q_BSNH: jax.Array
    rope: Rotation
    kv_BSH: jax.Array
    sink_N: jax.Array
    segment_BS: jax.Array | None = None
    entries: Entries | None = None
    index: IndexInputs | None = None
    past: WindowKV | None = None
