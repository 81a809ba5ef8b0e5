"""The backward kernel of gathered entries: queries' gradients, and the sum of the entries'.

It computes each softmax again, from the saved logarithm of its denominator. A query's gradient of
its chosen entries is added row by row to that of all entries, which stays in fast memory.

Shapes: B batch, S positions, Q queries of a block, N heads, H head dim, M width of all heads, G
groups of heads, I width of a group, C entries, K chosen entries of a query, P vectors of a row, J
lanes of one, A vectors of a row in float32, U parts of the grid, Z all chosen
entries B * S * K.
Next file to read: v4jax/kernels/queries.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sharding.manual import vary_like
from v4jax.kernels.fused_attention.blocks import dot, rotated
from v4jax.kernels.fused_attention.gathered import (
    NOTHING,
    Gathered,
    Rows,
    bias_of,
    block_of,
    column,
    fetch,
    from_words,
    gathered_specs,
    rows_memory,
    spec,
    unrolled_of,
)
from v4jax.kernels.fused_attention.gathered_forward import write_queries
from v4jax.kernels.fused_attention.steps import Form, parts_of
from v4jax.kernels.tpu import LANES, NN, NT, TN, VMEM_BYTES


def backward(
    form: Form, x: Gathered, ct_BGSI: jax.Array, delta_BSN: jax.Array, lse_BSN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the normalised, rotated and scaled queries, and of the entries.

    The first is [B,S,M] in the dtype of the queries, the other float32 [B,C,H].

    Args:
      ct_BGSI: the gradient of the output.
      delta_BSN: float32, its inner products with the output, of each head.
      lse_BSN: the logarithm of the denominator.
    """
    batch, rows, width = x.q_BSM.shape
    block, chosen, dim = block_of(form, x), x.slot_BSK.shape[2], width // form.heads
    units = rows // block
    parts = parts_of(units)
    lanes = min(LANES, dim)
    entries = x.entry_BCPJ.shape[1]
    struct = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x.q_BSM).manual_axis_type
    )
    sums = struct((batch, parts, entries, dim // lanes, lanes), jnp.float32)
    of = functools.partial(spec, parts=parts)
    each = of((block, form.heads), where=lambda at: (at.unit, 0))
    groups, _, group = ct_BGSI.shape[1:]
    ct_BSM, sum_BUCAJ = pl.pallas_call(
        functools.partial(_gradients, form),
        out_shape=(struct(x.q_BSM.shape, x.q_BSM.dtype), sums),
        grid=(batch, parts, units // parts),
        in_specs=[
            gathered_specs(x, block, parts),
            of((groups, block, group), where=lambda at: (0, at.unit, 0)),
            each,
            each,
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=(
            of((block, width), where=lambda at: (at.unit, 0)),
            # Written once, when a part has ended: twice its size would not fit.
            pl.BlockSpec(memory_space=pl.ANY),
        ),
        scratch_shapes=[
            rows_memory(form, block, dim),
            rows_memory(form, block, dim),
            pltpu.VMEM((chosen, *x.entry_BCPJ.shape[2:]), x.entry_BCPJ.dtype),
            pltpu.VMEM((chosen * sums.shape[3], lanes), jnp.float32),
            pltpu.VMEM(sums.shape[2:], jnp.float32),
            pltpu.SemaphoreType.DMA,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * batch * rows * width * chosen,
            bytes_accessed=3 * x.q_BSM.nbytes + x.entry_BCPJ.nbytes + 4 * sums.size,
            transcendentals=batch * rows * form.heads * chosen,
        ),
        interpret=form.interpret,
        name="gathered_attention_gradients",
    )(x, ct_BGSI, delta_BSN, lse_BSN, vary_like(jnp.zeros(sums.shape[2:]), x.q_BSM))
    sum_BCH = sum_BUCAJ.sum(1).reshape(batch, entries, dim)
    return ct_BSM, sum_BCH[:, : entries - NOTHING]


def _gradients(
    form: Form,
    x: Gathered,
    ct_GQI,
    delta_QN,
    lse_QN,
    zero_CAJ,
    ct_QM,
    sum_BUCAJ,
    wide,
    wide_ct,
    row_KPJ,
    ct,
    sum_CAJ,
    arrived,
):
    """One step: a block of queries, one after another."""
    wide, wide_ct = Rows(wide, form.heads), Rows(wide_ct, form.heads)
    block, dtype = x.q_BSM.shape[0], x.q_BSM.dtype
    dim = x.q_BSM.shape[1] // form.heads
    # Not inside of pl.when: interpreted kernels do not know them there.
    batch, part, turn = (pl.program_id(n) for n in range(3))
    last = pl.num_programs(2) - 1

    @pl.when(turn == 0)
    def _start():
        _copy(zero_CAJ, sum_CAJ, arrived)

    write_queries(form, x, wide)
    for head in range(form.heads):
        group, place = divmod(head, form.together)
        ct_QH = ct_GQI[group, :, place * dim : (place + 1) * dim].astype(jnp.float32)
        wide_ct.write_head(head, rotated(ct_QH, x, 1, inverse=False))

    def one(query, nothing):
        key_KH = from_words(row_KPJ, dtype)
        q_NH, do_NH = wide.query(query).astype(dtype), wide_ct.query(query).astype(dtype)
        score_NK = dot(q_NH, key_KH, NT) + bias_of(x, query)
        share_NK = jnp.exp(score_NK - column(lse_QN[pl.ds(query, 1), :]))
        slope_NK = dot(do_NH, key_KH, NT) - column(delta_QN[pl.ds(query, 1), :])
        slope_NK = (share_NK * slope_NK).astype(dtype)
        wide.write_query(query, dot(slope_NK, key_KH, NN))
        # One product of twice the depth.
        ct_KH = dot(
            jnp.concatenate((slope_NK, share_NK.astype(dtype))), jnp.concatenate((q_NH, do_NH)), TN
        )
        _add_and_fetch(x, query, ct_KH, ct, sum_CAJ, row_KPJ)
        return nothing

    fetch(x, 0, row_KPJ)
    lax.fori_loop(0, block, one, 0)
    for head in range(form.heads):
        ct_QM[:, head * dim : (head + 1) * dim] = wide.head(head, block).astype(dtype)

    @pl.when(turn == last)
    def _end():
        _copy(sum_CAJ, sum_BUCAJ.at[batch, part], arrived)


def _copy(source, target, arrived):
    """Copies between kinds of memory, and waits."""
    copy = pltpu.make_async_copy(source, target, arrived)
    copy.start()
    copy.wait()


def _add_and_fetch(x: Gathered, query, ct_KH: jax.Array, ct, sum_CAJ, row_KPJ):
    """Adds the gradient of a query's entries to that of all; copies the next query's entries.

    Args:
      ct: memory for the rows of ct_KH, as sum_CAJ has them, below each other.
    """
    chosen, (_, vectors, lanes) = ct_KH.shape[0], sum_CAJ.shape
    for n in range(vectors):
        ct[pl.ds(n, chosen, stride=vectors), :] = ct_KH[:, n * lanes : (n + 1) * lanes]
    unrolled = unrolled_of(chosen)
    following = jnp.minimum(query + 1, x.slot_BSK.shape[0] - 1)

    def some(n, nothing):
        first = n * unrolled
        fetch(x, following, row_KPJ, first, unrolled)
        slots = [x.slot_Z[query * chosen + first + k] for k in range(unrolled)]
        rows = pl.ds(pl.multiple_of(first * vectors, unrolled * vectors), unrolled * vectors)
        more = ct[rows, :].reshape(unrolled, vectors, lanes)
        # A query chooses an entry once, and nothing reads the rows of zeros: all may be read before
        # one is written.
        sums = [sum_CAJ[slot] + more[k] for k, slot in enumerate(slots)]
        for slot, total in zip(slots, sums, strict=True):
            sum_CAJ[slot] = total
        return nothing

    lax.fori_loop(0, chosen // unrolled, some, 0)
