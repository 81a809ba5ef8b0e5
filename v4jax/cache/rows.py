"""Reads and writes rows of the cache: tokens of a ring by position, slots by window.

Shapes: L layers, B batch, S positions of a chunk, R places of a ring, Y window keys, C entries
(their slots), W width, T query positions, K chosen entries.
Next file to read: v4jax/generate/steps.py.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sharding.manual import first_row
from sharding.rules import AxisRules
from v4jax.cache.attention_inputs import WindowKV
from v4jax.cache.layer import SPARE_ROWS, ChunkSpan, CompressedKV, slot_count
from v4jax.cache.quantized import Rows, pack, unpack
from v4jax.kernels.index_scores import KeyReader


def rows_before(
    ring: Rows, layer: jax.Array, start_B: jax.Array, rows: int, dtype: jnp.dtype
) -> jax.Array:
    """[B,rows,W]: what a ring holds of the `rows` positions before `start_B`, oldest first.

    At negative positions the values mean nothing.
    """

    def take(ring_LBRW):
        ring_BRW = jax.lax.dynamic_index_in_dim(ring_LBRW, layer, keepdims=False)
        place_BS = (start_B[:, None] - rows + jnp.arange(rows)[None]) % ring_BRW.shape[1]
        return jnp.take_along_axis(ring_BRW, place_BS[..., None], axis=1)

    return unpack(jax.tree.map(take, ring), dtype)


def keep_rows(
    ring: Rows, layer: jax.Array, x_BSW: jax.Array, span: ChunkSpan
) -> tuple[Rows, Callable[[int], jax.Array]]:
    """Writes a chunk's real tokens to a ring: (the new ring, a function n -> [B,n+S,W]).

    The function returns the values of the n positions before the chunk, then the chunk's own. Each
    place of the ring takes the newest token that belongs there. A few tokens (at most SPARE_ROWS)
    fall on spare places, so the tokens before the chunk stay. All values can then be read from the
    new ring, without copying the old one and without joining two arrays.
    """

    def put(ring_LBRW, x_BSW):
        """Writes a few tokens in place, not the whole ring."""
        size = ring_LBRW.shape[2]
        row_1S = jnp.arange(x_BSW.shape[1], dtype=jnp.int32)[None]
        place_BS = jnp.where(
            row_1S < span.count_B[:, None], (span.start_B[:, None] + row_1S) % size, size + row_1S
        )
        return _write(ring_LBRW, layer, place_BS, x_BSW)

    def keep(ring_LBRW, x_BSW):
        ring_BRW = jax.lax.dynamic_index_in_dim(ring_LBRW, layer, keepdims=False)
        size = ring_BRW.shape[1]
        row_BR = _positions(span, size) - span.start_B[:, None]
        new_BRW = jnp.take_along_axis(x_BSW, jnp.maximum(row_BR, 0)[..., None], axis=1)
        ring_BRW = jnp.where((row_BR >= 0)[..., None], new_BRW, ring_BRW)
        return jax.lax.dynamic_update_index_in_dim(ring_LBRW, ring_BRW, layer, 0)

    size, few = x_BSW.shape[1], x_BSW.shape[1] <= SPARE_ROWS
    new = jax.tree.map(put if few else keep, ring, pack(ring, x_BSW))

    def longer(rows: int) -> jax.Array:
        if few:
            return rows_before(new, layer, span.start_B + size, rows + size, x_BSW.dtype)
        return jnp.concatenate(
            (rows_before(ring, layer, span.start_B, rows, x_BSW.dtype), x_BSW), axis=1
        )

    return new, longer


def _positions(span: ChunkSpan, size: int) -> jax.Array:
    """Position of the token at each place of a ring after a chunk, int32 [B,R]; negative: none.

    Example, R = 4, 6 tokens: [4 5 2 3].
    """
    last_B1 = (span.start_B + span.count_B - 1)[:, None]
    return last_B1 - (last_B1 - jnp.arange(size, dtype=jnp.int32)[None]) % size


def window_rows(
    ring: Rows, layer: jax.Array, x_BSW: jax.Array, span: ChunkSpan, window: int
) -> tuple[Rows, WindowKV]:
    """(the ring with a chunk's real tokens, the window's keys/values).

    These are the keys/values of the `window` positions before the chunk, then the chunk's own. For
    a few tokens (at most SPARE_ROWS) they are the whole ring in its own order: sorting it takes
    longer than attending to it. Places without a token of the window have positions before it.
    """
    new, longer = keep_rows(ring, layer, x_BSW, span)
    if x_BSW.shape[1] > SPARE_ROWS:
        row_1Y = jnp.arange(-window, x_BSW.shape[1], dtype=jnp.int32)[None]
        rows_BYW = longer(window)
        return new, WindowKV(rows_BYW, span.start_B[:, None] + row_1Y, span.start_B)
    rows_BRW = _layer_rows(new, layer, x_BSW.dtype)
    return new, WindowKV(rows_BRW, _positions(span, rows_BRW.shape[1]), span.start_B)


def _write(
    stack_LBRW: jax.Array, layer: jax.Array, place_BS: jax.Array, x_BSW: jax.Array
) -> jax.Array:
    """stack[layer, b, place[b,s]] = x[b,s], in place; places past the end are dropped.

    The places of a sequence must differ. Sequences are a batch axis of the scatter, so XLA sees
    that a device needs nothing of other devices' sequences. vmap would show that too, but it would
    transpose the whole stack and back. A single token is written together with a dropped one:
    XLA:CPU would otherwise repeat the write wherever the stack is read, each time on a copy of it.
    """
    if place_BS.size == 1:
        place_BS, x_BSW = (
            jnp.append(place_BS, stack_LBRW.shape[2]).reshape(1, 2),
            jnp.pad(x_BSW, ((0, 0), (0, 1), (0, 0))),
        )
    index_BS2 = jnp.stack(
        (jnp.broadcast_to(layer, place_BS.shape).astype(place_BS.dtype), place_BS), axis=-1
    )
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(stack_LBRW, index_BS2, x_BSW, numbers, unique_indices=True, mode="drop")


def fill_slots(
    rules: AxisRules, slots: Rows, layer: jax.Array, x_BSW: jax.Array, first_B: jax.Array
) -> Rows:
    """Writes x to the slots from `first_B` on; what falls off either end is dropped."""

    def fill(slots, layer, x, first_B, axis=None):
        count = slot_count(slots)
        place_BS = (first_B - first_row(axis, count))[:, None] + jnp.arange(x_BSW.shape[1])[None]
        # A negative place would count from the end; moved past the end, it is dropped.
        place_BS = jnp.where(place_BS >= 0, place_BS, place_BS + 2**30)
        return jax.tree.map(
            lambda slots_LBCW, x_BSW: _write(slots_LBCW, layer, place_BS, x_BSW), slots, x
        )

    x = pack(slots, x_BSW)
    if not rules.mesh_axes("cache_slots"):
        return fill(slots, layer, x, first_B)
    (axis,) = rules.mesh_axes("cache_slots")
    kept = slots_spec(rules, slots)
    new = jax.tree.map(lambda _: rules.spec(("act_batch", None, None)), x)
    local = functools.partial(fill, axis=axis)
    return jax.shard_map(
        local, in_specs=(kept, rules.spec(()), new, rules.spec(("act_batch",))), out_specs=kept
    )(slots, layer, x, first_B)


def slots_spec(rules: AxisRules, slots: Rows):
    """Partition spec of slots: cut with the batch and, contiguously, along "cache_slots"."""
    return jax.tree.map(lambda _: rules.spec((None, "act_batch", "cache_slots", None)), slots)


def all_rows(rows: jax.Array | CompressedKV, dtype: jnp.dtype) -> jax.Array:
    """All entries or keys of a layer, [B,C,W]; a plain array is returned as is."""
    return _layer_rows(rows.stack, rows.layer, dtype) if isinstance(rows, CompressedKV) else rows


def _layer_rows(stack: Rows, layer: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One layer of a stack, unpacked."""
    return unpack(
        jax.tree.map(
            lambda stack_LBRW: jax.lax.dynamic_index_in_dim(stack_LBRW, layer, keepdims=False),
            stack,
        ),
        dtype,
    )


def some_rows(rows: CompressedKV, first: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """`size` slots from `first` on, [B,size,W]."""

    def take(stack_LBCW):
        _, batch, _, width = stack_LBCW.shape
        return jax.lax.dynamic_slice(
            stack_LBCW, (rows.layer, 0, first, 0), (1, batch, size, width)
        )[0]

    return unpack(jax.tree.map(take, rows.stack), dtype)


def chosen_rows(
    rows: jax.Array | CompressedKV, index_BTK: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """rows[index], [B,T,K,W]; of a stack nothing else is read."""
    if not isinstance(rows, CompressedKV):
        return jax.vmap(lambda rows_CW, index_TK: rows_CW[index_TK])(rows, index_BTK)
    index_BTK2 = jnp.stack(
        (jnp.broadcast_to(rows.layer, index_BTK.shape).astype(index_BTK.dtype), index_BTK), axis=-1
    )
    # As in `_write`: vmap would turn the whole stack around to put the sequences first.
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(3,),
        collapsed_slice_dims=(0, 2),
        start_index_map=(0, 2),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(0,),
    )

    def take(stack_LBCW):
        size = (1, 1, 1, stack_LBCW.shape[3])
        return jax.lax.gather(stack_LBCW, index_BTK2, numbers, size, mode="clip")

    return unpack(jax.tree.map(take, rows.stack), dtype)


def key_reader(keys: jax.Array | CompressedKV, dtype: jnp.dtype) -> jax.Array | KeyReader:
    """Index keys as their op reads them: those of a cache in parts, a plain array as it is."""
    if not isinstance(keys, CompressedKV):
        return keys
    return KeyReader(
        whole=lambda: all_rows(keys, dtype),
        part=lambda first, size: some_rows(keys, first, size, dtype),
        count=keys.count,
        used=keys.used,
    )
