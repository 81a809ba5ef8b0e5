"""What the kernels of fused attention read, padded to whole blocks and laid out as they want it.

Shapes: B batch, S positions, U blocks of W queries, W window, Y window keys (W, then S), N heads, H
head dim, M width of all heads N * H, C entries, K chosen entries of a query, R rope dims, T lanes
of the rotation's tables.
Next file to read: v4jax/kernels/fused_attention/steps.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.fused_attention.blocks import ENTRIES, entry_block
from v4jax.kernels.fused_attention.steps import Operands, Scalars
from v4jax.kernels.rotate import Rotation
from v4jax.kernels.tpu import LANES, padded


class RawQueries(NamedTuple):
    """Queries as the projection makes them, and what is done to them.

    Attributes:
      q_BSNH: neither normalised nor rotated.
      rope: rotation of each query, [B or 1,S,R/2].
      eps: of the RMS norm.
    """

    q_BSNH: jax.Array
    rope: Rotation
    eps: float


class LayerKeys(NamedTuple):
    """What the queries of a layer attend to.

    Attributes:
      kv_BYH: window keys/values: those of the W positions before the queries, then their own.
      sink_N: float32, a logit per head, in the denominator only.
      start_B: int32 [B or 1], index in the row of the first query.
      segment_BS, segment_BY: documents of queries and window keys, 0 for padding; None where each
        row is one document.
      entry_BCH: entries; None without.
      last_BC: int32 [B or 1,C], index in the row of the last token of each entry; a query sees
        those that it has reached.
      segment_BC: document of each entry; None likewise.
      chosen_BSC: bool, which entries a query attends to; None: those of its document that it sees.
      slot_BSK: int32, the same as a list, where most are not chosen: each slot once, -1 for none.
    """

    kv_BYH: jax.Array
    sink_N: jax.Array
    start_B: jax.Array
    segment_BS: jax.Array | None = None
    segment_BY: jax.Array | None = None
    entry_BCH: jax.Array | None = None
    last_BC: jax.Array | None = None
    segment_BC: jax.Array | None = None
    chosen_BSC: jax.Array | None = None
    slot_BSK: jax.Array | None = None


def operands(
    queries: RawQueries, keys: LayerKeys, window: int, small: bool
) -> tuple[Operands, Scalars]:
    """The kernels' operands and scalars.

    Args:
      small: entries are not padded to whole vectors; interpreted kernels do not need that.
    """
    batch, seq, _, dim = queries.q_BSNH.shape
    more = -seq % window
    cos_BST, sin_BST = _tables(queries.rope, dim)
    x = Operands(
        q_BSM=padded(queries.q_BSNH.reshape(batch, seq, -1), more),
        kv_BYH=padded(keys.kv_BYH, more),
        cos_BST=padded(cos_BST, more),
        sin_BST=padded(sin_BST, more),
        sink_N=keys.sink_N,
    )
    if keys.segment_BS is not None and keys.segment_BY is not None:
        x = x._replace(
            segment_BS1=padded(keys.segment_BS, more)[:, :, None],
            segment_B1Y=padded(keys.segment_BY, more)[:, None],
        )
    units = (seq + more) // window
    if keys.entry_BCH is None or keys.last_BC is None:
        return x, Scalars(keys.start_B, jnp.zeros((1, units), jnp.int32))
    empty = _empty_entries(keys.entry_BCH.shape[1], small)
    last_BC = padded(keys.last_BC, empty, fill=jnp.iinfo(jnp.int32).max)
    x = x._replace(entry_BCH=padded(keys.entry_BCH, empty), last_B1C=last_BC[:, None])
    if x.segment_BS1 is not None and keys.segment_BC is not None:
        x = x._replace(segment_B1C=padded(keys.segment_BC, empty)[:, None])
    if keys.chosen_BSC is not None:
        chosen_BSC = jnp.pad(keys.chosen_BSC, ((0, 0), (0, more), (0, empty)))
        x = x._replace(chosen_BSC=chosen_BSC.astype(jnp.int8))
    return x, Scalars(keys.start_B, _blocks_seen(last_BC, keys.start_B, units, window))


def _empty_entries(entries: int, small: bool) -> int:
    """How many entries are missing to whole vectors and whole products."""
    vectors = -entries % (1 if small else LANES)
    return -entries % ENTRIES if entries + vectors > ENTRIES else vectors


def _tables(rope: Rotation, dim: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of each of a head's last lanes; those before the rope dims are not rotated.

    Example: R = 4, T = 6: cos is [1 1 c0 c0 c1 c1] and sin [0 0 s0 s0 s1 s1].
    """
    lanes = min(dim, LANES)
    passed = ((0, 0), (0, 0), (lanes - 2 * rope.cos.shape[2], 0))
    cos_BST = jnp.pad(jnp.repeat(rope.cos, 2, axis=2), passed, constant_values=1)
    return cos_BST, jnp.pad(jnp.repeat(rope.sin, 2, axis=2), passed)


def _blocks_seen(last_BC: jax.Array, start_B: jax.Array, units: int, window: int) -> jax.Array:
    """How many blocks of entries hold all that a block of queries sees, int32 [B or 1,U]."""
    end_U = window * jnp.arange(1, units + 1, dtype=jnp.int32)
    end_BU = start_B[:, None] + end_U[None]
    count_C = jnp.arange(1, last_BC.shape[1] + 1, dtype=jnp.int32)
    seen_BUC = last_BC[:, None] < end_BU[..., None]
    seen_BU = jnp.max(jnp.where(seen_BUC, count_C[None, None], 0), axis=2)
    return -(-seen_BU // entry_block(last_BC.shape[1]))
