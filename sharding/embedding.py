"""Lookup in an embedding table that is cut over vocabulary and width, without gathering the table.

XLA's own partitioning of this gather makes the whole table on every device, so the collectives are
written out here.

Shapes: B batch, S positions, V vocabulary, D hidden; lower case = this device's share.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.rules import AxisRules


def embed_lookup(rules: AxisRules, table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """table[tokens], [B,S,D]: the table has axes (vocab, embed), tokens have (act_batch, act_seq).

    Raises:
      ValueError: a mesh axis splits embed but not the tokens.
    """
    if not rules:
        return table_VD[tokens_BS]
    vocab, width = rules.mesh_axes("vocab"), rules.mesh_axes("embed")
    tokens = rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq")
    # Devices along `shared` differ in tokens and in columns. Each looks up the tokens of all of
    # them in its own columns; then they swap.
    shared = tuple(axis for axis in width if axis in tokens)

    def local(table_vd, tokens_bs):
        if shared:
            tokens_bs = lax.all_gather(tokens_bs, shared, axis=0, tiled=True)
        rows = tokens_bs - lax.axis_index(vocab) * table_vd.shape[0] if vocab else tokens_bs
        mine = (rows >= 0) & (rows < table_vd.shape[0])
        x_bsd = jnp.where(mine[..., None], table_vd[jnp.clip(rows, 0, table_vd.shape[0] - 1)], 0)
        if vocab:
            x_bsd = lax.psum(x_bsd, vocab)
        if shared:
            x_bsd = lax.all_to_all(x_bsd, shared, split_axis=0, concat_axis=2, tiled=True)
        return x_bsd

    rest = tuple(axis for axis in width if axis not in tokens)
    if rest:
        raise ValueError(
            f"embed is split over {rest}, which do not split the tokens; "
            "embed_lookup does not support that"
        )
    return jax.shard_map(
        local,
        in_specs=(rules.spec(("vocab", "embed")), rules.spec(("act_batch", "act_seq"))),
        out_specs=rules.spec(("act_batch", "act_seq", None)),
    )(table_VD, tokens_BS)
