"""The arithmetic that the kernels of fused attention share: rows of heads, rotation, masks.

In a step the W queries of every head of its group lie below each other, head after head: R rows.

What a query may see is the same for all heads. It is written once for each block of queries, as a
bias of 0 or HIDDEN that is added to scores.

Shapes: B batch, S positions (padded to whole blocks), W window (and queries of a block), Y window
keys, N heads, H head dim, M width of all heads N * H, C entries (padded), T lanes of the rotation's
tables, R rows of a step, K keys.
Next file to read: v4jax/kernels/fused_attention/forward.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.fused_attention.steps import Form, Operands
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.tpu import LANES

ENTRIES = 512
"""Most entries of a product; later ones that no query of a block sees are skipped."""

HIDDEN = -1e30
"""Added to the score of a key that a query does not see. It is finite, so no sum is NaN."""


def dot(a: jax.Array, b: jax.Array, contraction) -> jax.Array:
    """A product with sums in float32."""
    return lax.dot_general(
        a, b, contraction, precision=precision_of(a), preferred_element_type=jnp.float32
    )


def below(x_WT: jax.Array, heads: int) -> jax.Array:
    """What all heads share, once for each: [heads * W, T]."""
    return jnp.concatenate([x_WT] * heads, axis=0) if heads > 1 else x_WT


def rows_of_heads(ref, heads: int) -> jax.Array:
    """A block [W, heads * H], its heads below each other: [heads * W, H]."""
    dim = ref.shape[1] // heads
    return jnp.concatenate([ref[:, k * dim : (k + 1) * dim] for k in range(heads)], axis=0)


def write_heads(ref, x_RH: jax.Array, heads: int):
    """The inverse of rows_of_heads."""
    rows, dim = x_RH.shape[0] // heads, x_RH.shape[1]
    for k in range(heads):
        ref[:, k * dim : (k + 1) * dim] = x_RH[k * rows : (k + 1) * rows].astype(ref.dtype)


def of_heads(x_WN: jax.Array, first, heads: int) -> jax.Array:
    """Columns `first` to `first + heads` of [W, N], below each other: [heads * W, 1]."""
    place = lax.broadcasted_iota(jnp.int32, x_WN.shape, 1)
    columns = [
        jnp.sum(jnp.where(place == first + k, x_WN, 0.0), axis=1, keepdims=True)
        for k in range(heads)
    ]
    return jnp.concatenate(columns, axis=0)


def sinks_of_heads(sink_N, first, heads: int, rows: int) -> jax.Array:
    """The sinks of a group of heads, [heads * rows, 1]."""
    return jnp.concatenate(
        [jnp.full((rows, 1), sink_N[first + k], jnp.float32) for k in range(heads)], axis=0
    )


def rotated(x_RH: jax.Array, x: Any, heads: int, inverse: bool) -> jax.Array:
    """float32 rows with the pairs of their last lanes rotated (docs/equations.md#rotary).

    Args:
      x: what holds the tables cos_BST and sin_BST.
    """
    width, lanes = x_RH.shape[1], x.cos_BST.shape[1]
    tail = x_RH[:, width - lanes :]
    even = lax.broadcasted_iota(jnp.int32, tail.shape, 1) % 2 == 0
    # (a, b) -> (-b, a) of each pair; what wraps around is never used.
    swapped = jnp.where(even, -pltpu.roll(tail, lanes - 1, 1), pltpu.roll(tail, 1, 1))
    sin = below(x.sin_BST[...], heads)
    tail = tail * below(x.cos_BST[...], heads) + (-sin if inverse else sin) * swapped
    return tail if lanes == width else jnp.concatenate((x_RH[:, :-lanes], tail), axis=1)


def first_entries(x: Operands) -> int:
    """Entries that are taken in one product with the window keys: a whole block, or none."""
    return 0 if x.entry_BCH is None else entry_block(x.entry_BCH.shape[-2])


def entry_block(entries: int) -> int:
    """Entries of a product."""
    return min(entries, ENTRIES)


def has_more_entries(x: Operands) -> bool:
    """Whether there are blocks of entries after the first."""
    return x.entry_BCH is not None and x.entry_BCH.shape[-2] > ENTRIES


class Scratch(NamedTuple):
    """What a kernel keeps while it goes through the heads of a block of queries.

    Attributes:
      key_KH: the 2W window keys, then the first block of entries.
      bias_WK: float32, 0 or HIDDEN, of the 2W window keys and all entries.
    """

    key_KH: Any
    bias_WK: Any

    def write(self, x: Operands, first):
        """Keys and bias of a block whose first query has index `first` in the row."""
        window = x.kv_BYH.shape[0]
        self.key_KH[:window, :] = x.kv_BYH[...]
        self.key_KH[window : 2 * window, :] = x.own_BYH[...]
        self.bias_WK[:, : 2 * window] = _window_bias(x, first)
        if x.entry_BCH is not None:
            self.key_KH[2 * window :, :] = x.entry_BCH[: first_entries(x), :]
            self.bias_WK[:, 2 * window :] = entry_bias(x, first)


def scratch_shapes(form: Form, x: Operands) -> list[Any]:
    """The memory of a Scratch."""
    entries = 0 if x.entry_BCH is None else x.entry_BCH.shape[1]
    near, dim = 2 * form.window, x.kv_BYH.shape[2]
    return [
        pltpu.VMEM((near + first_entries(x), dim), x.kv_BYH.dtype),
        pltpu.VMEM((form.window, near + entries), jnp.float32),
    ]


def block_of_entries(x: Operands, block) -> tuple[Any, Any]:
    """(rows of a block of entries, columns of their bias)."""
    size, near = first_entries(x), 2 * x.kv_BYH.shape[0]
    rows = pl.ds(pl.multiple_of(block * size, size), size)
    # ENTRIES are whole vectors, and so are the window's columns on TPU.
    column = near + block * size
    column = column if near % LANES else pl.multiple_of(column, LANES)
    return rows, pl.ds(column, size)


def _window_bias(x: Operands, first) -> jax.Array:
    """Bias of a block's window keys, float32 [W, 2W]: the W before the block, then its own.

    A query sees itself and the W - 1 tokens before it, in its document.

    Args:
      first: index in the row of the block's first query.
    """
    window = x.kv_BYH.shape[0]
    query = lax.broadcasted_iota(jnp.int32, (window, 2 * window), 0)
    key = lax.broadcasted_iota(jnp.int32, (window, 2 * window), 1)
    seen = (key > query) & (key <= query + window) & (key >= window - first)
    if x.segment_BS1 is not None:
        segment = jnp.concatenate((x.segment_B1Y[...], x.own_segment_B1Y[...]), axis=1)
        seen &= x.segment_BS1[...] == segment
    return jnp.where(seen, 0.0, HIDDEN)


def entry_bias(x: Operands, first) -> jax.Array:
    """Bias of the entries, float32 [W, C]: those that are chosen, or all that a query sees."""
    if x.chosen_BSC is not None:
        return jnp.where(x.chosen_BSC[...].astype(jnp.int32) != 0, 0.0, HIDDEN)
    window, entries = x.kv_BYH.shape[0], x.last_B1C.shape[1]
    position = first + lax.broadcasted_iota(jnp.int32, (window, entries), 0)
    seen = x.last_B1C[...] <= position
    if x.segment_B1C is not None:
        seen &= x.segment_BS1[...] == x.segment_B1C[...]
    return jnp.where(seen, 0.0, HIDDEN)
