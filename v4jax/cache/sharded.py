"""Attention on a mesh: each device attends for its own positions and heads.

Where the sequence is cut, a device receives the W positions before its shard from its neighbour and
the entries of all devices. Where the cache is cut along the sequence, each device attends to its
own slots, and the results are merged.

Shapes: B batch, S positions, T query positions of a chunk, Y window keys, N heads, H head dim, C
entries, K chosen entries, I index heads, J index dim.
Next file to read: v4jax/cache/rows.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.manual import first_row, vary_like, with_rows_before
from sharding.rules import AxisRules
from v4jax.cache.attention_inputs import AttentionInputs, Entries, IndexInputs, WindowKV
from v4jax.cache.layer import CompressedKV
from v4jax.cache.rows import slots_spec
from v4jax.kernels.rotate import Rotation
from v4jax.kernels.top_k import top_k_mask


class ShardAxes(NamedTuple):
    """Mesh axes that cut the arrays of attention; None or () where an array is whole.

    Attributes:
      seq: cuts the sequence.
      index_heads: cut the indexer's heads.
      heads: cut the attention heads.
      queries: cut the queries (batch and sequence).
      slots: cuts the slots of the cache.
    """

    seq: str | None = None
    index_heads: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    slots: str | None = None


def on_mesh(
    rules: AxisRules,
    attend: Callable[[ShardAxes, AttentionInputs], Any],
    inputs: AttentionInputs,
    check_vma: bool = True,
):
    """attend(axes, inputs) of every device's share: (output [B,S,N,H], sums over all queries).

    Args:
      check_vma: JAX tracks which values vary over the mesh. It cannot in a kernel that is
        interpreted; gradients are then summed over all devices that an array is copied to.
    """
    if not rules:
        return attend(ShardAxes(), inputs)
    (axis,) = rules.mesh_axes("act_seq") or (None,)
    (slots,) = rules.mesh_axes("cache_slots") or (None,)
    axes = ShardAxes(
        axis,
        rules.mesh_axes("index_heads"),
        rules.mesh_axes("act_heads"),
        rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq"),
        slots,
    )
    specs = _specs(rules, inputs)
    local = functools.partial(attend, axes)
    outputs = (specs.q_BSNH, rules.spec(()))
    return jax.shard_map(local, in_specs=(specs,), out_specs=outputs, check_vma=check_vma)(inputs)


def _specs(rules: AxisRules, inputs: AttentionInputs) -> AttentionInputs:
    """Partition spec of each array; None where there is none."""
    batch, seq = "act_batch", "act_seq"

    def spec(*names: str | None) -> Any:  # it takes the place of an array
        return rules.spec(names)

    def one(x: jax.Array | None, *names: str | None) -> Any:
        """None if x is None. A batch of 1 (rows of one document) is whole."""
        return None if x is None else spec(None if x.shape[0] == 1 else names[0], *names[1:])

    def rows(rows: jax.Array | CompressedKV) -> Any:
        """Those of all entries or index keys; those of a cache stay cut as they are there."""
        if not isinstance(rows, CompressedKV):
            return spec(batch, None, None)
        return CompressedKV(slots_spec(rules, rows.stack), spec(), spec())

    entries = index = past = None
    if inputs.entries is not None:
        entry_BCH, last_BC, segment_BC = inputs.entries
        slots = "cache_slots"
        entries = Entries(
            rows(entry_BCH), one(last_BC, batch, slots), one(segment_BC, batch, slots)
        )
    if inputs.index is not None:
        index = IndexInputs(
            spec(batch, seq, "index_heads", None),
            spec(batch, seq, "index_heads"),
            rows(inputs.index.key_BCJ),
        )
    if inputs.past is not None:
        past = WindowKV(spec(batch, None, None), spec(batch, None), spec(batch))
    cos, sin = (one(x, batch, seq, None) for x in inputs.rope)
    return AttentionInputs(
        spec(batch, seq, "act_heads", None),
        Rotation(cos, sin),
        spec(batch, seq, None),
        spec("act_heads"),
        one(inputs.segment_BS, batch, seq),
        entries,
        index,
        past,
    )


def varying(inputs: AttentionInputs) -> AttentionInputs:
    """The same arrays; those that gradients flow to are marked as varying with the heads.

    Positions are not: masks must be known to be equal on devices that have other heads.
    """
    q_BSNH, entries = inputs.q_BSNH, inputs.entries
    entry_BCH = None if entries is None else entries.entry_BCH
    sink_N, kv_BSH, entry_BCH = jax.tree.map(
        lambda x: vary_like(x, q_BSNH), (inputs.sink_N, inputs.kv_BSH, entry_BCH)
    )
    if entries is not None:
        entries = entries._replace(entry_BCH=entry_BCH)
    return inputs._replace(sink_N=sink_N, kv_BSH=kv_BSH, entries=entries)


def window_before(inputs: AttentionInputs, window: int, axis: str | None) -> WindowKV:
    """Keys/values of a device's positions and of the `window` positions before them."""
    if inputs.past is not None:
        return inputs.past._replace(rows_BYH=vary_like(inputs.past.rows_BYH, inputs.q_BSNH))
    seq = inputs.q_BSNH.shape[1]
    first_B = jnp.reshape(first_row(axis, seq), 1)
    rows_BYH = with_rows_before(inputs.kv_BSH, window, axis)
    position_BY = first_B[:, None] + jnp.arange(-window, seq, dtype=jnp.int32)[None]
    return WindowKV(rows_BYH, position_BY, first_B)


def among_all(score_BTK: jax.Array, topk: int, axis: str) -> jax.Array:
    """Which of this device's best scores are among the `topk` best of all devices.

    Each device holds a contiguous part of the entries, in the order of the devices, so the smaller
    index wins ties here too. K scores per query travel.
    """
    best = top_k_mask(jax.lax.all_gather(score_BTK, axis, axis=2, tiled=True), topk)
    count = score_BTK.shape[-1]
    return jax.lax.dynamic_slice_in_dim(best, jax.lax.axis_index(axis) * count, count, axis=2)


def merged(axis: str, near_BTNH, near_lse_BTN, far_BTNH, far_lse_BTN) -> jax.Array:
    """Attention to window and sink, which all devices have, and to entries of all devices."""
    peak_BTN = jnp.maximum(near_lse_BTN, jax.lax.pmax(far_lse_BTN, axis))
    near_share_BTN = jnp.exp(near_lse_BTN - peak_BTN)
    far_share_BTN = jnp.exp(far_lse_BTN - peak_BTN)
    total_BTN = near_share_BTN + jax.lax.psum(far_share_BTN, axis)
    far_BTNH = jax.lax.psum(far_BTNH * far_share_BTN[..., None], axis)
    return (near_BTNH * near_share_BTN[..., None] + far_BTNH) / total_BTN[..., None]
