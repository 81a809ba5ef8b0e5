"""Where documents begin and end in packed rows, and which compression windows they make.

Nothing crosses a document: positions restart, windows are aligned to the document's first token, and its incomplete last
window makes no entry. A row without segment ids is one document.

Example, ratio 4, segments [1 1 1 1 1 2 2 2 2 3]: positions [0 1 2 3 4 0 1 2 3 0]; tokens 3 and 8 close a window, so
entries start at rows 0 and 5.

Shapes: B batch, S positions, C compressed entries (S // ratio: never more can be complete).
Next file to read: v4jax/model/rotary.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.config import WINDOW_ONLY, ModelConfig
from v4jax.model.rotary import Rotation, rotation


class Entries(NamedTuple):
    """The compression windows of one ratio. Slots without a window have last_BC = S, which no query can see.

    Attributes:
      first_BC: row of the window's first token. last_BC: row of its last one. Batch is 1 for rows of one document.
      segment_BC: its document, or None for rows of one document.
      overlaps_BC: whether its document has a window before it (CSA pools that one's rows too).
      turn: rotation at the position of the window's first token [B,C,R/2].
    """

    first_BC: jax.Array
    last_BC: jax.Array
    segment_BC: jax.Array | None
    overlaps_BC: jax.Array
    turn: Rotation


class Documents(NamedTuple):
    """What attention must know about rows.

    Attributes:
      segment_BS: document id of each token, 0 for padding; None where each row is one document.
      counts_BS: tokens that count in router statistics: not padding and, in MTP, not a document's last. None: all.
      turn: rotation of tokens in layers of ratio 0 [B,S,R/2] (batch 1 for rows of one document).
      compressed_turn: the same for CSA and HCA layers.
      entries: compress ratio -> Entries, for the ratios that give any entry at this length.
    """

    segment_BS: jax.Array | None
    counts_BS: jax.Array | None
    turn: Rotation
    compressed_turn: Rotation | None
    entries: dict[int, Entries]


def read_documents(cfg: ModelConfig, seq: int, segment_BS: jax.Array | None) -> Documents:
    """Positions, rotations and windows of rows of `seq` tokens."""
    row_1S = jnp.arange(seq, dtype=jnp.int32)[None]
    position_BS = row_1S if segment_BS is None else row_1S - document_start(segment_BS)
    ratios = sorted({ratio for ratio in cfg.compress_ratios if ratio != WINDOW_ONLY})
    return Documents(
        segment_BS,
        None if segment_BS is None else segment_BS > 0,
        rotation(cfg, False, position_BS),
        rotation(cfg, True, position_BS) if ratios else None,
        {ratio: _entries(cfg, ratio, position_BS, segment_BS) for ratio in ratios if seq >= ratio},
    )


def without_last_tokens(documents: Documents, tokens_BS: jax.Array) -> Documents:
    """The same, but the last token of each document does not count: in MTP it has no next token."""
    follows_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]) < tokens_BS.shape[1] - 1, tokens_BS.shape)
    if documents.segment_BS is not None:
        after_BS = jnp.pad(documents.segment_BS[:, 1:], ((0, 0), (0, 1)))
        follows_BS &= (after_BS == documents.segment_BS) & documents.counts_BS
    return documents._replace(counts_BS=follows_BS)


def document_start(segment_BS: jax.Array) -> jax.Array:
    """Row of the first token of each token's document, int32 [B,S]. A document is a run of one segment id."""
    row_1S = jnp.arange(segment_BS.shape[1], dtype=jnp.int32)[None]
    begins_BS = jnp.concatenate((jnp.ones_like(segment_BS[:, :1], bool), segment_BS[:, 1:] != segment_BS[:, :-1]), axis=1)
    return jax.lax.cummax(jnp.where(begins_BS, row_1S, 0), axis=1)


def _entries(cfg: ModelConfig, ratio: int, position_BS: jax.Array, segment_BS: jax.Array | None) -> Entries:
    seq = position_BS.shape[1]
    slots = seq // ratio
    if segment_BS is None:
        first_BC = jnp.arange(slots, dtype=jnp.int32)[None] * ratio
        return Entries(first_BC, first_BC + ratio - 1, None, first_BC > 0, rotation(cfg, True, first_BC))
    closes_BS = (position_BS % ratio == ratio - 1) & (segment_BS > 0)
    slot_BS = jnp.where(closes_BS, jnp.cumsum(closes_BS, axis=1) - 1, slots)
    row_S = jnp.arange(seq, dtype=jnp.int32)
    last_BC = jax.vmap(lambda slot_S: jnp.full(slots, seq, jnp.int32).at[slot_S].set(row_S, mode="drop"))(slot_BS)
    there_BC = last_BC < seq
    first_BC = jnp.where(there_BC, last_BC - (ratio - 1), 0)
    position_BC = jnp.where(there_BC, jnp.take_along_axis(position_BS, first_BC, axis=1), 0)
    segment_BC = jnp.where(there_BC, jnp.take_along_axis(segment_BS, first_BC, axis=1), 0)
    return Entries(first_BC, last_BC, segment_BC, position_BC > 0, rotation(cfg, True, position_BC))
