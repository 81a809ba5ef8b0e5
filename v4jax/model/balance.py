"""The balance loss of one layer: the experts of a document should be used alike.

Equation: docs/equations.md#losses.
Shapes: B batch, S positions, E experts, K active experts.
Next file to read: v4jax/model/hyper.py.
"""

import jax
import jax.numpy as jnp

from sharding.document_counts import document_share, times_chosen
from sharding.rules import AxisRules
from v4jax.model.router import shares
from v4jax.model.segments import Segments


def expert_share(
    rules: AxisRules, index_BSK: jax.Array, segments: Segments, experts: int
) -> jax.Array:
    """f_i = E / (K T) * number of tokens that choose expert i, in the document of each token.

    T is the number of the document's tokens that count (docs/equations.md#losses).

    Returns:
      float32 [B,S,E]; [B,1,E] where each row is one document.
    """
    scale, counts_BS = experts / index_BSK.shape[-1], segments.counts_BS
    if segments.extent_2BS is not None and counts_BS is not None:
        return document_share(rules, index_BSK, counts_BS, segments.extent_2BS, experts, scale)
    count_BS1 = jnp.ones((1, 1, 1)) if counts_BS is None else counts_BS[..., None]
    chosen_B1E = jnp.sum(times_chosen(index_BSK, experts) * count_BS1, axis=1, keepdims=True)
    tokens_B11 = jnp.sum(
        jnp.broadcast_to(count_BS1, (*index_BSK.shape[:2], 1)), axis=1, keepdims=True
    )
    return chosen_B1E * scale / jnp.maximum(tokens_B11, 1)


def balance_loss(score_BSE: jax.Array, share_BSE: jax.Array, segments: Segments) -> jax.Array:
    """Mean over documents, weighted by their tokens, of sum_i f_i P_i; float32 scalar.

    P_i is the mean of s_i / sum_j s_j over the document's tokens that count; share_BSE is f (see
    expert_share). Equation: docs/equations.md#losses.
    """
    each_BS = jnp.sum(share_BSE * shares(score_BSE), axis=-1)
    if segments.counts_BS is None:
        return jnp.mean(each_BS)
    return jnp.sum(each_BS * segments.counts_BS) / jnp.maximum(segments.counts_BS.sum(), 1)
