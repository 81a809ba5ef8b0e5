"""What a layer keeps of the tokens it has seen, so that a row can be continued: explicit arrays, stacked over scanned layers.

Slots may be cut over the devices that cut sequences (logical axis "cache_slots"), each holding a contiguous part of them; rings are not.

Everything is addressed by absolute position, so that taking tokens back is nothing but a smaller length:
- rings hold the newest rows (the window; what a coming entry will pool): position p lies at p mod R;
- slots hold one compressed entry, or its index key, each: window w lies at w. A slot is seen only by queries at or behind the
  last token of its window, and the chunk that brings that token writes it: whatever stood there before is never read.

Example, CSA (ratio 4), 10 tokens kept: slots 0 and 1 are in use; the ring holds the rows of window 1 (the overlap) and rows 8, 9.
Two tokens later window 2 is pooled from both and written to slot 2.

Shapes: L layers, B batch, S positions of a chunk, R rows of a ring, C slots, H width, K chosen entries.
Next file to read: v4jax/generate/decode.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.manual import first_row
from sharding.rules import AxisRules
from v4jax.cache.quantized import Rows, empty_index_keys, empty_keys, pack, unpack
from v4jax.config import CSA, WINDOW_ONLY, ModelConfig

SPARE_ROWS = 8
"""How many tokens may be taken back, or come at once without covering what the first of them sees: rings are longer by so many rows."""


class ChunkSpan(NamedTuple):
    """Which rows of a chunk [B,S] are real: `count_B` of them, from the left; the first one continues at position `start_B`."""

    start_B: jax.Array
    count_B: jax.Array


class Compressed(NamedTuple):
    """What a compressor keeps: rings of its projections and gate logits, float32 [L,B,R,H], and its entries [L,B,C,H]."""

    c: jax.Array
    z: jax.Array
    slots: Rows


class LayerCache(NamedTuple):
    """One kind of layer, all its repeats: the ring of window rows [L,B,R,H], entries and index keys where the kind has them."""

    window: Rows
    entry: Compressed | None = None
    index: Compressed | None = None


class CacheView(NamedTuple):
    """The cache as a layer sees it: (a part of) the arrays, which of the stacked layers this is, and what the chunk brings."""

    cache: Any
    layer: jax.Array
    span: ChunkSpan

    def with_arrays(self, cache) -> "CacheView":
        """The same layer and chunk, other arrays."""
        return self._replace(cache=cache)


class CompressedKV(NamedTuple):
    """Entries or index keys of one layer: stack [L,B,C,H], and how many are in use in the longest row."""

    stack: Rows
    layer: jax.Array
    used: jax.Array

    @property
    def count(self) -> int:
        """C."""
        return slot_count(self.stack)


def slot_count(slots: Rows) -> int:
    """C of [L,B,C,H]."""
    return jax.tree.leaves(slots)[0].shape[2]


def tail_rows(ratio: int) -> int:
    """How many rows before a token its window may pool: the window itself and, for CSA, the one before."""
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
    """Nothing kept yet, room for `capacity` tokens (a multiple of the ratio); storage: see v4jax/cache/quantized.py."""

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


def _rows_before(
    ring: Rows, layer: jax.Array, start_B: jax.Array, rows: int, dtype: jnp.dtype
) -> jax.Array:
    """[B,rows,H], the rows before position `start_B`, oldest first; anything where positions are negative."""

    def take(ring_LBRH):
        ring_BRH = jax.lax.dynamic_index_in_dim(ring_LBRH, layer, keepdims=False)
        place_BS = (start_B[:, None] - rows + jnp.arange(rows)[None]) % ring_BRH.shape[1]
        return jnp.take_along_axis(ring_BRH, place_BS[..., None], axis=1)

    return unpack(jax.tree.map(take, ring), dtype)


def keep_rows(
    ring: Rows, layer: jax.Array, x_BSH: jax.Array, span: ChunkSpan
) -> tuple[Rows, Callable[[int], jax.Array]]:
    """(the ring with the real rows of a chunk in it, a function: n -> [B,n+S,H], the n rows before the chunk and its own).

    Every place of the ring takes the newest row that belongs there. A few rows fall on the spare ones, so that the rows before stay
    where they are: all are read from the new ring, which costs neither a copy of the old one nor one to put them together.
    """

    def put(ring_LBRH, x_BSH):
        """A few rows, in place: what is written is a few rows and not the ring."""
        size = ring_LBRH.shape[2]
        row_1S = jnp.arange(x_BSH.shape[1], dtype=jnp.int32)[None]
        place_BS = jnp.where(
            row_1S < span.count_B[:, None], (span.start_B[:, None] + row_1S) % size, size + row_1S
        )
        return _write(ring_LBRH, layer, place_BS, x_BSH)

    def keep(ring_LBRH, x_BSH):
        ring_BRH = jax.lax.dynamic_index_in_dim(ring_LBRH, layer, keepdims=False)
        size = ring_BRH.shape[1]
        row_BR = _positions(span, size) - span.start_B[:, None]
        new_BRH = jnp.take_along_axis(x_BSH, jnp.maximum(row_BR, 0)[..., None], axis=1)
        ring_BRH = jnp.where((row_BR >= 0)[..., None], new_BRH, ring_BRH)
        return jax.lax.dynamic_update_index_in_dim(ring_LBRH, ring_BRH, layer, 0)

    size, few = x_BSH.shape[1], x_BSH.shape[1] <= SPARE_ROWS
    new = jax.tree.map(put if few else keep, ring, pack(ring, x_BSH))

    def longer(rows: int) -> jax.Array:
        if few:
            return _rows_before(new, layer, span.start_B + size, rows + size, x_BSH.dtype)
        return jnp.concatenate(
            (_rows_before(ring, layer, span.start_B, rows, x_BSH.dtype), x_BSH), axis=1
        )

    return new, longer


def _positions(span: ChunkSpan, size: int) -> jax.Array:
    """int32 [B,R], which position each place of a ring holds once it has the rows of a chunk; negative: none yet."""
    last_B1 = (span.start_B + span.count_B - 1)[:, None]
    return last_B1 - (last_B1 - jnp.arange(size, dtype=jnp.int32)[None]) % size


def window_rows(
    ring: Rows, layer: jax.Array, x_BSH: jax.Array, span: ChunkSpan, window: int
) -> tuple[Rows, jax.Array, jax.Array]:
    """(the ring with the real rows of a chunk in it, the `window` rows before the chunk and its own [B,V,H], their positions [B,V]).

    A few rows are given with the whole ring, as it lies: to put it in order takes longer than to attend to it. Places that hold no row of
    the window have positions before it.
    """
    new, longer = keep_rows(ring, layer, x_BSH, span)
    if x_BSH.shape[1] > SPARE_ROWS:
        row_1V = jnp.arange(-window, x_BSH.shape[1], dtype=jnp.int32)[None]
        return new, longer(window), span.start_B[:, None] + row_1V
    rows_BRH = _layer_rows(new, layer, x_BSH.dtype)
    return new, rows_BRH, _positions(span, rows_BRH.shape[1])


def _write(
    stack_LBRH: jax.Array, layer: jax.Array, place_BS: jax.Array, x_BSH: jax.Array
) -> jax.Array:
    """stack[layer, b, place[b, s]] = x[b, s], in place; places past the end are dropped. No two of a row are the same.

    Sequences are a batch of the scatter, so XLA sees that a device that holds some needs nothing of the others. vmap would say so too,
    but turn the whole stack around to put them first, and back. A single row goes with one that is dropped: XLA:CPU would repeat the
    writing of one alone wherever the stack is read, each time on a copy of all of it.
    """
    if place_BS.size == 1:
        place_BS, x_BSH = (
            jnp.append(place_BS, stack_LBRH.shape[2]).reshape(1, 2),
            jnp.pad(x_BSH, ((0, 0), (0, 1), (0, 0))),
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
    return jax.lax.scatter(stack_LBRH, index_BS2, x_BSH, numbers, unique_indices=True, mode="drop")


def fill_slots(
    rules: AxisRules, slots: Rows, layer: jax.Array, x_BSH: jax.Array, first_B: jax.Array
) -> Rows:
    """Slots from `first_B` on hold x; rows that would fall off an end are dropped."""

    def fill(slots, layer, x, first_B, axis=None):
        count = slot_count(slots)
        place_BS = (first_B - first_row(axis, count))[:, None] + jnp.arange(x_BSH.shape[1])[None]
        place_BS = jnp.where(
            place_BS >= 0, place_BS, place_BS + 2**30
        )  # past the end, not counted from it
        return jax.tree.map(
            lambda slots_LBCH, x_BSH: _write(slots_LBCH, layer, place_BS, x_BSH), slots, x
        )

    x = pack(slots, x_BSH)
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
    """Where slots are: cut with the batch and, over devices that cut sequences, into contiguous parts."""
    return jax.tree.map(lambda _: rules.spec((None, "act_batch", "cache_slots", None)), slots)


def all_rows(rows: jax.Array | CompressedKV, dtype: jnp.dtype) -> jax.Array:
    """[B,C,H] of a layer; an array passes."""
    return _layer_rows(rows.stack, rows.layer, dtype) if isinstance(rows, CompressedKV) else rows


def _layer_rows(stack: Rows, layer: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return unpack(
        jax.tree.map(
            lambda stack_LBRH: jax.lax.dynamic_index_in_dim(stack_LBRH, layer, keepdims=False),
            stack,
        ),
        dtype,
    )


def some_rows(rows: CompressedKV, first: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """[B,size,H], the slots from `first` on."""

    def take(stack_LBCH):
        _, batch, _, width = stack_LBCH.shape
        return jax.lax.dynamic_slice(
            stack_LBCH, (rows.layer, 0, first, 0), (1, batch, size, width)
        )[0]

    return unpack(jax.tree.map(take, rows.stack), dtype)


def chosen_rows(
    rows: jax.Array | CompressedKV, index_BTK: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """[B,T,K,H], rows[index]; of a stack nothing else is read."""
    if not isinstance(rows, CompressedKV):
        return jax.vmap(lambda rows_CH, index_TK: rows_CH[index_TK])(rows, index_BTK)
    one = jax.vmap(lambda rows_LCH, index_TK: rows_LCH[rows.layer, index_TK], in_axes=(1, 0))
    return unpack(jax.tree.map(lambda stack: one(stack, index_BTK), rows.stack), dtype)
