"""What a layer keeps of the tokens it has seen, so that a row can be continued: explicit arrays, stacked over scanned layers.

Slots may be cut over the devices that cut sequences (logical axis "cache_slots"), each holding a stretch of them; rings are not.

Everything is addressed by absolute position, so that taking tokens back is nothing but a smaller length:
- rings hold the newest rows (the window; what a coming entry will pool): position p lies at p mod R;
- slots hold one compressed entry, or its index key, each: window w lies at w. A slot is seen only by queries at or behind the
  last token of its window, and the chunk that brings that token writes it: whatever stood there before is never read.

Example, CSA (ratio 4), 10 tokens kept: slots 0 and 1 are in use; the ring holds the rows of window 1 (the overlap) and rows 8, 9.
Two tokens later window 2 is pooled from both and written to slot 2.

Shapes: L layers, B batch, S positions of a chunk, R rows of a ring, C slots, H width, K chosen entries.
Next file to read: v4jax/model/compressor.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.manual import first_row
from sharding.rules import AxisRules
from v4jax.config import CSA, WINDOW_ONLY, ModelConfig
from v4jax.model.packed import Rows, empty_index_keys, empty_keys, pack, unpack

SPARE_ROWS = 8
"""How many tokens may be taken back: rings are longer by so many rows."""


class Stretch(NamedTuple):
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


class Kept(NamedTuple):
    """The cache as layers meet it: (a part of) the arrays, which of the stacked layers this is, and what the chunk brings."""

    cache: Any
    layer: jax.Array
    stretch: Stretch

    def part(self, cache) -> "Kept":
        """The same layer and chunk, other arrays."""
        return self._replace(cache=cache)


class Slots(NamedTuple):
    """Slots of one layer: stack [L,B,C,H], and how many are in use in the longest row."""

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
    rules: AxisRules, cfg: ModelConfig, ratio: int, layers: int, batch: int, capacity: int, dtype: jnp.dtype, storage: str
) -> LayerCache:
    """Nothing kept yet, room for `capacity` tokens (a multiple of the ratio); storage: see v4jax/model/packed.py."""

    def placed(rows, slots: str | None = None):
        return jax.tree.map(lambda x: rules.constrain(x, None, "act_batch", slots, None), rows)

    def compressed(dim, slots):
        ring = (layers, batch, tail_rows(ratio) + SPARE_ROWS, 2 * dim if ratio == CSA else dim)
        c, z = (placed(jnp.zeros(ring, jnp.float32)) for _ in "cz")
        return Compressed(c, z, placed(slots, "cache_slots"))

    window = placed(empty_keys(cfg, (layers, batch, cfg.sliding_window + SPARE_ROWS), dtype, storage))
    if ratio == WINDOW_ONLY:
        return LayerCache(window)
    lead = (layers, batch, capacity // ratio)
    entry = compressed(cfg.head_dim, empty_keys(cfg, lead, dtype, storage))
    if ratio != CSA:
        return LayerCache(window, entry)
    return LayerCache(window, entry, compressed(cfg.index_head_dim, empty_index_keys(cfg, lead, dtype, storage)))


def rows_before(ring: Rows, layer: jax.Array, start_B: jax.Array, rows: int, dtype: jnp.dtype) -> jax.Array:
    """[B,rows,H], the rows before position `start_B`, oldest first; anything where positions are negative."""

    def take(ring_LBRH):
        ring_BRH = jax.lax.dynamic_index_in_dim(ring_LBRH, layer, keepdims=False)
        place_BS = (start_B[:, None] - rows + jnp.arange(rows)[None]) % ring_BRH.shape[1]
        return jnp.take_along_axis(ring_BRH, place_BS[..., None], axis=1)

    return unpack(jax.tree.map(take, ring), dtype)


def keep_rows(ring: Rows, layer: jax.Array, x_BSH: jax.Array, stretch: Stretch) -> Rows:
    """The ring with the real rows of a chunk in it: every place takes the newest row that belongs there."""

    def put(ring_LBRH, x_BSH):
        """A few rows, in place: what is written is a few rows and not the ring."""
        size = ring_LBRH.shape[2]
        row_1S = jnp.arange(x_BSH.shape[1], dtype=jnp.int32)[None]
        place_BS = jnp.where(row_1S < stretch.count_B[:, None], (stretch.start_B[:, None] + row_1S) % size, size)
        # One sequence at a time for vmap: so XLA sees that a device that holds some sequences needs nothing of the others.
        one = lambda ring_LRH, place_S, x_SH: ring_LRH.at[layer, place_S].set(x_SH, mode="drop")  # noqa: E731
        return jax.vmap(one, in_axes=(1, 0, 0), out_axes=1)(ring_LBRH, place_BS, x_BSH)

    def keep(ring_LBRH, x_BSH):
        ring_BRH = jax.lax.dynamic_index_in_dim(ring_LBRH, layer, keepdims=False)
        size = ring_BRH.shape[1]
        last_B1 = (stretch.start_B + stretch.count_B - 1)[:, None]
        row_BR = last_B1 - (last_B1 - jnp.arange(size)[None]) % size - stretch.start_B[:, None]
        new_BRH = jnp.take_along_axis(x_BSH, jnp.maximum(row_BR, 0)[..., None], axis=1)
        ring_BRH = jnp.where((row_BR >= 0)[..., None], new_BRH, ring_BRH)
        return jax.lax.dynamic_update_index_in_dim(ring_LBRH, ring_BRH, layer, 0)

    return jax.tree.map(put if x_BSH.shape[1] <= SPARE_ROWS else keep, ring, pack(ring, x_BSH))


def fill_slots(rules: AxisRules, slots: Rows, layer: jax.Array, x_BSH: jax.Array, first_B: jax.Array) -> Rows:
    """Slots from `first_B` on hold x; rows that would fall off an end are dropped."""

    def one(layer, slots_LCH, x_SH, first):
        # A slice that would stick out is moved inside: move the rows in it the other way by as much.
        rows, width = min(x_SH.shape[0], slots_LCH.shape[1]), slots_LCH.shape[2]
        place = jnp.clip(first, 0, slots_LCH.shape[1] - rows)
        old_SH = jax.lax.dynamic_slice(slots_LCH, (layer, place, 0), (1, rows, width))[0]
        source_S = jnp.arange(rows) - (first - place)
        real_S1 = ((source_S >= 0) & (source_S < x_SH.shape[0]))[:, None]
        x_SH = jnp.where(real_S1, x_SH[jnp.clip(source_S, 0, x_SH.shape[0] - 1)], old_SH)
        return jax.lax.dynamic_update_slice(slots_LCH, x_SH[None], (layer, place, 0))

    def fill(slots, layer, x, first_B, axis=None):
        first_B = first_B - first_row(axis, slot_count(slots))
        each = jax.vmap(one, in_axes=(None, 1, 0, 0), out_axes=1)
        return jax.tree.map(lambda slots_LBCH, x_BSH: each(layer, slots_LBCH, x_BSH, first_B), slots, x)

    x = pack(slots, x_BSH)
    if not rules.mesh_axes("cache_slots"):
        return fill(slots, layer, x, first_B)
    (axis,) = rules.mesh_axes("cache_slots")
    kept = slots_spec(rules, slots)
    new = jax.tree.map(lambda _: rules.spec(("act_batch", None, None)), x)
    local = functools.partial(fill, axis=axis)
    return jax.shard_map(local, in_specs=(kept, rules.spec(()), new, rules.spec(("act_batch",))), out_specs=kept)(slots, layer, x, first_B)


def slots_spec(rules: AxisRules, slots: Rows):
    """Where slots are: cut with the batch and, over devices that cut sequences, in stretches."""
    return jax.tree.map(lambda _: rules.spec((None, "act_batch", "cache_slots", None)), slots)


def all_rows(rows: jax.Array | Slots, dtype: jnp.dtype) -> jax.Array:
    """[B,C,H] of a layer; an array passes."""
    if not isinstance(rows, Slots):
        return rows
    take = lambda stack_LBCH: jax.lax.dynamic_index_in_dim(stack_LBCH, rows.layer, keepdims=False)  # noqa: E731
    return unpack(jax.tree.map(take, rows.stack), dtype)


def some_rows(rows: Slots, first: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """[B,size,H], the slots from `first` on."""

    def take(stack_LBCH):
        _, batch, _, width = stack_LBCH.shape
        return jax.lax.dynamic_slice(stack_LBCH, (rows.layer, 0, first, 0), (1, batch, size, width))[0]

    return unpack(jax.tree.map(take, rows.stack), dtype)


def chosen_rows(rows: jax.Array | Slots, index_BTK: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B,T,K,H], rows[index]; of a stack nothing else is read."""
    if not isinstance(rows, Slots):
        return jax.vmap(lambda rows_CH, index_TK: rows_CH[index_TK])(rows, index_BTK)
    one = jax.vmap(lambda rows_LCH, index_TK: rows_LCH[rows.layer, index_TK], in_axes=(1, 0))
    return unpack(jax.tree.map(lambda stack: one(stack, index_BTK), rows.stack), dtype)
