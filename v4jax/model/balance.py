"""The balance loss of one layer: the experts of a document should be used alike.

Equation: docs/equations.md#losses.
Shapes: B batch, S positions, E experts, K active experts; lower case = this device's share.
Next file to read: v4jax/model/hyper.py.
"""

import functools

import jax
import jax.numpy as jnp

from sharding.counting import running_sum
from sharding.rules import AxisRules
from v4jax.model.router import shares, times_chosen
from v4jax.model.segments import Segments


def expert_share(
    rules: AxisRules, index_BSK: jax.Array, segments: Segments, experts: int
) -> jax.Array:
    """f_i = E / (K T) * number of tokens that choose expert i, in the document of each token.

    T is the number of the document's tokens that count (docs/equations.md#losses).

    Returns:
      float32 [B,S,E]; [B,1,E] where each row is one document.
    """
    scale = experts / index_BSK.shape[-1]
    if segments.extent_2BS is None:
        count_BS1 = (
            jnp.ones((1, 1, 1)) if segments.counts_BS is None else segments.counts_BS[..., None]
        )
        chosen_B1E = jnp.sum(times_chosen(index_BSK, experts) * count_BS1, axis=1, keepdims=True)
        tokens = jnp.sum(
            jnp.broadcast_to(count_BS1, (*index_BSK.shape[:2], 1)), axis=1, keepdims=True
        )
        return chosen_B1E * scale / jnp.maximum(tokens, 1)
    seq = rules.mesh_axes("act_seq")

    def local(index_BsK, counts_Bs, extent_2Bs):
        # Documents cross devices. Indices are gathered, being a few bytes per token; running sums
        # of all experts are far larger.
        if seq:
            gather = functools.partial(jax.lax.all_gather, axis_name=seq, axis=1, tiled=True)
            index_BsK, counts_Bs = gather(index_BsK), gather(counts_Bs)
        one_BS1 = counts_Bs[..., None].astype(jnp.float32)
        chosen_BSE = jnp.concatenate((times_chosen(index_BsK, experts) * one_BS1, one_BS1), axis=-1)
        through_BSE = running_sum(chosen_BSE)
        first_Bs, last_Bs = extent_2Bs
        total = _at(through_BSE, last_Bs) - _at(through_BSE - chosen_BSE, first_Bs)
        return total[..., :-1] * scale / jnp.maximum(total[..., -1:], 1)

    if not rules:
        return local(index_BSK, segments.counts_BS, segments.extent_2BS)
    specs = tuple(
        rules.spec(names)
        for names in (
            ("act_batch", "act_seq", None),
            ("act_batch", "act_seq"),
            (None, "act_batch", "act_seq"),
        )
    )
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0])(
        index_BSK, segments.counts_BS, segments.extent_2BS
    )


def balance_loss(score_BSE: jax.Array, share_BSE: jax.Array, segments: Segments) -> jax.Array:
    """Mean over documents, weighted by their tokens, of sum_i f_i P_i; float32 scalar.

    P_i is the mean of s_i / sum_j s_j over the document's tokens that count; share_BSE is f (see
    expert_share). Equation: docs/equations.md#losses.
    """
    each_BS = jnp.sum(share_BSE * shares(score_BSE), axis=-1)
    if segments.counts_BS is None:
        return jnp.mean(each_BS)
    return jnp.sum(each_BS * segments.counts_BS) / jnp.maximum(segments.counts_BS.sum(), 1)


def _at(x_BSE: jax.Array, row_BS: jax.Array) -> jax.Array:
    """x[b, row[b,s]], [B,S,E]."""
    return jax.vmap(lambda x_SE, row_S: x_SE[row_S])(x_BSE, row_BS)
