"""Scores a long cache and finds the best slots of each query, in one pass over the scores.

The peak of every few neighbours is noted as they are scored. The k groups of highest peak contain
the k best slots.

Shapes: B batch, T queries, C slots of entries, K chosen slots, P groups of neighbouring slots,
I index heads, J index dim.
Next file to read: v4jax/kernels/streams.py.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels import index_scores as scores
from v4jax.kernels.choice import Kernels
from v4jax.kernels.index_scores import KeyReader, fold_scores
from v4jax.kernels.top_k import top_k

GROUP = 32
"""Neighbouring slots of which a search reads the highest score first.

It divides SCORE_BLOCK and the number of slots of every cache that is searched.
"""


def may_search(keys: jax.Array | KeyReader, k: int, kernels: Kernels = Kernels()) -> bool:
    """Whether `best_slots` pays: in a long cache, lax.top_k takes as long as the scores do.

    It is no choice where `kernels` names another way than "groups" of top_k, or the reference of
    index_scores.
    """
    asked = kernels.top_k in (None, "groups") and kernels.index_scores != "reference"
    return (
        asked
        and isinstance(keys, KeyReader)
        and keys.count >= max(scores.SCORE_BLOCK, 4 * k * GROUP)
    )


def best_slots(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    keys: KeyReader,
    position_BT: jax.Array,
    ratio: int,
    k: int,
    kernels: Kernels = Kernels(),
    block: int | None = None,
    group: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k best slots that each query sees: those of lax.top_k over all scores, in any order.

    Args:
      q_BTIJ: queries.
      w_BTI: float32, weights of the heads.
      keys: at least k * `group` slots.
      position_BT: int32, position of each query, counted from the first token of slot 0.
      ratio: tokens of a slot.
      kernels: those of index_scores and top_k.
      block: see fold_scores; a multiple of `group`, or all slots are.
      group: neighbours with one peak, which divide the slots; None: GROUP.

    Returns:
      (scores, slots), float32 and int32 [B,T,K]; scores are -inf where a query sees fewer than k.
    """
    size = GROUP if group is None else group
    (batch, rows), slots = q_BTIJ.shape[:2], keys.count

    def note(first, part_BTC, totals):
        score_BTC, peak_BTP = totals
        last_C = (first + jnp.arange(part_BTC.shape[2], dtype=jnp.int32)) * ratio + ratio - 1
        part_BTC = jnp.where(last_C[None, None] <= position_BT[..., None], part_BTC, -jnp.inf)
        part_BTP = part_BTC.reshape(batch, rows, -1, size).max(axis=-1)
        return (
            jax.lax.dynamic_update_slice_in_dim(score_BTC, part_BTC, first, axis=2),
            jax.lax.dynamic_update_slice_in_dim(peak_BTP, part_BTP, first // size, axis=2),
        )

    nothing = tuple(jnp.full((batch, rows, n), -jnp.inf) for n in (slots, slots // size))
    score_BTC, peak_BTP = fold_scores(
        q_BTIJ, w_BTI, keys, note, nothing, kernels.index_scores, block
    )
    _, group_BTK = top_k(peak_BTP, k, kernels.top_k)
    group_BTK = jnp.sort(group_BTK, axis=-1)
    near = jnp.take_along_axis(
        score_BTC.reshape(batch, rows, -1, size), group_BTK[..., None], axis=2
    )
    score_BTK, place_BTK = top_k(near.reshape(batch, rows, -1), k, kernels.top_k)
    first_BTK = jnp.take_along_axis(group_BTK, place_BTK // size, axis=-1) * size
    return score_BTK, first_BTK + place_BTK % size
