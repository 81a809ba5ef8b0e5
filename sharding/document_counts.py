"""Counts over the documents of packed rows, which may cross devices: who chooses which expert.

Shapes: B batch, S positions, E experts, K active experts; lower case = this device's share.
Next file to read: sharding/counting.py.
"""

import functools

import jax
import jax.numpy as jnp

from sharding.counting import running_sum
from sharding.rules import AxisRules


def times_chosen(index_BSK: jax.Array, experts: int) -> jax.Array:
    """How often each token chose each expert, float32 [B,S,E]."""
    return jnp.sum(jax.nn.one_hot(index_BSK, experts), axis=2)


def document_share(
    rules: AxisRules,
    index_BSK: jax.Array,
    counts_BS: jax.Array,
    extent_2BS: jax.Array,
    experts: int,
    scale: float,
) -> jax.Array:
    """scale / T * number of tokens that choose each expert, in the document of each token.

    T is the number of the document's tokens that count, or 1 if there are none.

    Args:
      index_BSK: int32, the experts of each token.
      counts_BS: bool, which tokens count.
      extent_2BS: int32, indices of the first and last token of each token's document.

    Returns:
      float32 [B,S,E].
    """
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
        return local(index_BSK, counts_BS, extent_2BS)
    specs = tuple(
        rules.spec(names)
        for names in (
            ("act_batch", "act_seq", None),
            ("act_batch", "act_seq"),
            (None, "act_batch", "act_seq"),
        )
    )
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0])(
        index_BSK, counts_BS, extent_2BS
    )


def _at(x_BSE: jax.Array, row_BS: jax.Array) -> jax.Array:
    """x[b, row[b,s]], [B,S,E]."""
    return jax.vmap(lambda x_SE, row_S: x_SE[row_S])(x_BSE, row_BS)
