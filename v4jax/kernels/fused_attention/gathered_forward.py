"""The forward kernel of gathered entries: it goes on with the softmax of the window keys.

Shapes: B batch, S positions, Q queries of a block, N heads, H head dim, M width of all heads, G
groups of heads, I width of a group, C entries, K chosen entries of a query, P vectors of a row, J
lanes of one, A vectors of a row in float32.
Next file to read: v4jax/kernels/fused_attention/gathered_backward.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.fused_attention.blocks import dot, rotated
from v4jax.kernels.fused_attention.forward import normalised
from v4jax.kernels.fused_attention.gathered import (
    Gathered,
    Rows,
    bias_of,
    block_of,
    column,
    fetch,
    from_words,
    gathered_specs,
    row,
    rows_memory,
    spec,
)
from v4jax.kernels.fused_attention.steps import Form, parts_of
from v4jax.kernels.tpu import NN, NT, VMEM_BYTES


def forward(
    form: Form, x: Gathered, near_BGSI: jax.Array, lse_BSN: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention to window keys, the sink and the chosen entries.

    Args:
      near_BGSI: what `forward` makes of the window keys and the sink, rotated back.
      lse_BSN: the logarithm of its denominator.

    Returns:
      (output like near_BGSI; lse float32 [B,S,N]; mass: shares that all heads give to each chosen
      entry, float32 [B,S,K]).
    """
    batch, rows, width = x.q_BSM.shape
    block, chosen, dim = block_of(form, x), x.slot_BSK.shape[2], width // form.heads
    units = rows // block
    parts = parts_of(units)
    struct = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x.q_BSM).manual_axis_type
    )
    groups, _, group = near_BGSI.shape[1:]
    of = functools.partial(spec, parts=parts)
    heads = of((groups, block, group), where=lambda at: (0, at.unit, 0))
    each = of((block, form.heads), where=lambda at: (at.unit, 0))
    return pl.pallas_call(
        functools.partial(_attend, form),
        out_shape=(
            struct(near_BGSI.shape, near_BGSI.dtype),
            struct(lse_BSN.shape, jnp.float32),
            struct(x.slot_BSK.shape, jnp.float32),
        ),
        grid=(batch, parts, units // parts),
        in_specs=[gathered_specs(x, block, parts), heads, each],
        out_specs=(heads, each, of((block, chosen), where=lambda at: (at.unit, 0))),
        scratch_shapes=[
            rows_memory(form, block, dim),
            pltpu.VMEM((2, chosen, *x.entry_BCPJ.shape[2:]), x.entry_BCPJ.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * rows * width * chosen,
            bytes_accessed=3 * x.q_BSM.nbytes + x.entry_BCPJ.nbytes,
            transcendentals=batch * rows * form.heads * chosen,
        ),
        interpret=form.interpret,
        name="gathered_attention",
    )(x, near_BGSI, lse_BSN)


def _attend(form: Form, x: Gathered, near_GQI, near_QN, out_GQI, lse_QN, mass_QK, wide, row_2KPJ):
    """One step: a block of queries, one after another."""
    wide, block, dtype = Rows(wide, form.heads), x.q_BSM.shape[0], x.q_BSM.dtype
    write_queries(form, x, wide)

    def one(query, row_KPJ):
        key_KH = from_words(row_KPJ, dtype)
        score_NK = dot(wide.query(query).astype(dtype), key_KH, NT) + bias_of(x, query)
        near_N1 = column(near_QN[pl.ds(query, 1), :])
        peak_N1 = jnp.maximum(near_N1, jnp.max(score_NK, axis=1, keepdims=True))
        share_NK = jnp.exp(score_NK - peak_N1)
        total_N1 = jnp.exp(near_N1 - peak_N1) + jnp.sum(share_NK, axis=1, keepdims=True)
        once_N1 = 1 / total_N1
        wide.write_query(query, dot(share_NK.astype(dtype), key_KH, NN) * once_N1)
        lse_QN[pl.ds(query, 1), :] = row(peak_N1 + jnp.log(total_N1))
        mass_QK[pl.ds(query, 1), :] = jnp.sum(share_NK * once_N1, axis=0, keepdims=True)

    even, odd = row_2KPJ.at[0], row_2KPJ.at[1]

    def two(pair, nothing):
        # Nothing between the copies of one query's entries and the products of another is a loop,
        # so that the compiler can mix them.
        fetch(x, 2 * pair + 1, odd)
        one(2 * pair, even)
        fetch(x, jnp.minimum(2 * pair + 2, block - 1), even)
        one(2 * pair + 1, odd)
        return nothing

    fetch(x, 0, even)
    lax.fori_loop(0, block // 2, two, 0)
    if block % 2:
        one(block - 1, even)
    # The share of the window keys and the sink.
    share_QN = jnp.exp(near_QN[...] - lse_QN[...])
    dim = x.q_BSM.shape[1] // form.heads
    for head in range(form.heads):
        group, place = divmod(head, form.together)
        here = slice(place * dim, (place + 1) * dim)
        far_QH = rotated(wide.head(head, block), x, 1, inverse=True)
        near_QH = near_GQI[group, :, here].astype(jnp.float32)
        out_GQI[group, :, here] = (far_QH + near_QH * share_QN[:, head : head + 1]).astype(dtype)


def write_queries(form: Form, x: Gathered, wide: Rows):
    """Puts normalised, rotated and scaled queries into fast memory, query by query."""
    dim = x.q_BSM.shape[1] // form.heads
    for head in range(form.heads):
        norm_QH = normalised(x.q_BSM[:, head * dim : (head + 1) * dim], form.eps)[0]
        wide.write_head(head, rotated(norm_QH, x, 1, inverse=False) * dim**-0.5)
