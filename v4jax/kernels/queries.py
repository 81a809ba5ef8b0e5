"""Queries in chunks of blocks, and the window keys that each block sees.

Blocks of W queries attend to 2W window keys, so no S x S array exists. Queries run in chunks, so
the scores of all queries against all entries never exist at once.

Shapes: B batch, S positions, T query positions of a chunk, U blocks of a chunk, W window (the
queries of a block; the keys that a block sees, window_BUWH and its positions and documents, are
2W), Y window keys, N heads, H head dim, I index heads, J index dim.
Next file to read: v4jax/model/entries.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.attention import WindowKeys


class Queries(NamedTuple):
    """A chunk of queries, in blocks, and the window keys that each block sees.

    A block of W queries sees 2W keys: its own positions and the W before them. A few queries that
    continue a row are one block, which sees all keys that are given.

    Attributes:
      q_BTNH: queries, normalised and rotated.
      window_BUWH: keys/values of each block.
      position_BT: int32 [B or 1,T], index of each query in its row.
      window_position_BUW: int32 [B or 1,U,2W], the same for keys; negative where there is none.
      segment_BT, segment_BUW: documents of queries and keys; None where each row is one document.
      real_T: False for queries that only fill up the last chunk.
      index: the indexer's queries [B,T,I,J] and head weights [B,T,I]; None without it.
    """

    q_BTNH: jax.Array
    window_BUWH: jax.Array
    position_BT: jax.Array
    window_position_BUW: jax.Array
    segment_BT: jax.Array | None
    segment_BUW: jax.Array | None
    real_T: jax.Array
    index: tuple[jax.Array, jax.Array] | None


def cut(
    q_BSNH: jax.Array,
    kv_BYH: jax.Array,
    first_B: jax.Array,
    position_BY: jax.Array,
    segment_BS: jax.Array | None,
    segment_BY: jax.Array | None,
    index: tuple[jax.Array, jax.Array] | None,
    block: int,
    blocks: int,
    chunks: int,
) -> Queries:
    """Pads queries to whole chunks, and stacks the chunks on a new first axis.

    Keys (kv_BYH, position_BY, segment_BY) are those of the W positions before the queries, then
    those of the queries: Y = W + S. A single block takes all Y keys, whatever Y is. The index is
    the indexer's queries [B,S,I,J] and head weights [B,S,I].

    Example, W = 2, S = 4: the keys of positions -2 to 3 become two blocks of 2W keys,
    [-2 -1 0 1] and [0 1 2 3].
    """
    total = chunks * blocks * block

    def chunked(x):
        return in_chunks(x, chunks, total)

    def banded(x, fill=0):
        """[B,Y,...] -> [chunks,B,U,2W,...]: each block of W keys follows the one before it."""
        if block == q_BSNH.shape[1]:
            return x[None, :, None]
        before = x.shape[1] - q_BSNH.shape[1]
        x = jnp.pad(
            x,
            [(0, 0), (0, before + total - x.shape[1])] + [(0, 0)] * (x.ndim - 2),
            constant_values=fill,
        )
        x = x.reshape(x.shape[0], chunks * blocks + 1, block, *x.shape[2:])
        x = jnp.concatenate((x[:, :-1], x[:, 1:]), axis=2)
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, blocks, *x.shape[2:]), 1, 0)

    return Queries(
        chunked(q_BSNH),
        banded(kv_BYH),
        jnp.moveaxis(
            (first_B[:, None] + jnp.arange(total, dtype=jnp.int32)[None]).reshape(
                -1, chunks, blocks * block
            ),
            1,
            0,
        ),
        banded(position_BY, fill=-1),
        None if segment_BS is None else chunked(segment_BS),
        None if segment_BY is None else banded(segment_BY),
        (jnp.arange(total) < q_BSNH.shape[1]).reshape(chunks, -1),
        None if index is None else (chunked(index[0]), chunked(index[1])),
    )


def in_chunks(x: jax.Array, chunks: int, total: int) -> jax.Array:
    """[B,S,...] -> [chunks,B,T,...], with zeros up to `total` positions."""
    x = jnp.pad(x, [(0, 0), (0, total - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, total // chunks, *x.shape[2:]), 1, 0)


def window_keys(chunk: Queries, window: int) -> WindowKeys:
    """The window keys of a chunk's blocks, and which of them each query sees.

    A query sees itself and the `window` - 1 tokens before it, in its document.
    """
    blocks = chunk.window_position_BUW.shape[1]
    position_BUW1 = chunk.position_BT.reshape(chunk.position_BT.shape[0], blocks, -1, 1)
    key_BU1W = chunk.window_position_BUW[:, :, None]
    band = (key_BU1W <= position_BUW1) & (key_BU1W > jnp.maximum(position_BUW1 - window, -1))
    if chunk.segment_BT is None or chunk.segment_BUW is None:
        return WindowKeys(chunk.window_BUWH, band)
    same = (
        chunk.segment_BT.reshape(chunk.segment_BT.shape[0], -1, window, 1)
        == chunk.segment_BUW[:, :, None]
    )
    return WindowKeys(chunk.window_BUWH, band & same)
