"""Attention on a mesh: each device attends for its own positions and heads.

Shapes: B batch, S positions, V window keys, W window, N heads, H head dim, C entries.
Next file to read: v4jax/model/attend.py.
"""

import functools
from typing import NamedTuple

import jax

from sharding.rules import AxisRules
from v4jax.cache.layer import CompressedKV
from v4jax.cache.rows import slots_spec
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.model.attend import attend_locally
from v4jax.model.entries import Entries, ShardAxes
from v4jax.model.indexer import IndexInputs, IndexLoss
from v4jax.model.segments import Segments
from v4jax.model.windows import CompressionWindows


class WindowKV(NamedTuple):
    """Window keys/values of rows that are continued: those before the chunk, and the chunk's own.

    A chunk of at most SPARE_ROWS tokens gets the whole ring, whose keys may be in any order and may
    be older than the window; their positions tell.

    Attributes:
      rows_BVH: keys/values, V = W + S or the length of the ring.
      position_BV: int32, position of each; negative where there is none.
      start_B: int32, position of the chunk's first token.
    """

    rows_BVH: jax.Array
    position_BV: jax.Array
    start_B: jax.Array


def attend(
    ctx: Context,
    cfg: ModelConfig,
    q_BSNH: jax.Array,
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    segments: Segments,
    windows: CompressionWindows | None = None,
    entry_BCH: jax.Array | None = None,
    index: IndexInputs | None = None,
    past: WindowKV | None = None,
) -> tuple[jax.Array, IndexLoss | None]:
    """Attends to window keys and entries: (output [B,S,N,H], the indexer's loss or None).

    The output is the softmax over (window keys, visible or chosen entries, sink) of q . k * H^-0.5,
    times the same keys (docs/equations.md#attention). The loss is returned where the context says
    that the indexer trains (docs/equations.md#indexer-loss).

    Args:
      q_BSNH, kv_BSH: queries and window keys/values, normalised and rotated.
      sink_N: float32, one logit per head, in the denominator only.
      windows: the windows of `entry_BCH`; None in layers of ratio 0, and in rows shorter than a
        window.
      entry_BCH: entries, normalised and rotated; all entries of the cache, as CompressedKV, where
        `past` is given.
      index: inputs of the indexer, if it chooses entries or is trained; None: all visible entries.
      past: window keys/values of rows that continue others; they replace kv_BSH.
    """
    entries = None if windows is None else Entries(entry_BCH, windows.last_BC, windows.segment_BC)
    arguments = (q_BSNH, kv_BSH, sink_N, segments.segment_BS, entries, index, past)
    rules = ctx.rules
    if not rules:
        return attend_locally(ctx, cfg, ShardAxes(), *arguments)
    (axis,) = rules.mesh_axes("act_seq") or (None,)
    batch, seq, heads = "act_batch", "act_seq", "act_heads"
    (slots,) = rules.mesh_axes("cache_slots") or (None,)
    split = ShardAxes(
        axis,
        *(rules.mesh_axes(name) for name in ("index_heads", heads)),
        rules.mesh_axes(batch) + rules.mesh_axes(seq),
        slots,
    )

    def spec(x, *names):
        """Partition spec of x, None if x is None. A batch of 1 (rows of one document) is whole."""
        return (
            None if x is None else rules.spec((None if x.shape[0] == 1 else names[0], *names[1:]))
        )

    specs = (
        rules.spec((batch, seq, heads, None)),
        rules.spec((batch, seq, None)),
        rules.spec((heads,)),
        spec(segments.segment_BS, batch, seq),
        None
        if entries is None
        else Entries(
            _rows_spec(rules, entries.entry_BCH),
            *(spec(x, batch, "cache_slots") for x in entries[1:]),
        ),
        None
        if index is None
        else IndexInputs(
            rules.spec((batch, seq, "index_heads", None)),
            rules.spec((batch, seq, "index_heads")),
            _rows_spec(rules, index.key_BCJ),
        ),
        None
        if past is None
        else WindowKV(
            rules.spec((batch, None, None)), rules.spec((batch, None)), rules.spec((batch,))
        ),
    )
    trains = ctx.sparse.train_indexer and index is not None
    loss = IndexLoss(*[rules.spec(())] * 3) if trains else None
    local = functools.partial(attend_locally, ctx, cfg, split)
    return jax.shard_map(local, in_specs=specs, out_specs=(specs[0], loss))(*arguments)


def _rows_spec(rules: AxisRules, rows: jax.Array | CompressedKV):
    """Partition spec of all entries or index keys; those of a cache stay cut as they are there."""
    if not isinstance(rows, CompressedKV):
        return rules.spec(("act_batch", None, None))
    return CompressedKV(slots_spec(rules, rows.stack), rules.spec(()), rules.spec(()))
