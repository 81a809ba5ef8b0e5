"""The shares that all heads of a query give to each entry: what an indexer learns from.

The softmax is that of the forward kernel, by the logarithm of its denominator. There is no
gradient.

Shapes: B batch, S positions, U blocks of W queries, W window, M width of all heads, N heads, H head
dim, C entries, R rows of a step (queries of each head of a group).
Next file to read: v4jax/kernels/queries.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.fused_attention.blocks import (
    below,
    dot,
    entry_bias,
    entry_block,
    of_heads,
    rotated,
    rows_of_heads,
)
from v4jax.kernels.fused_attention.forward import normalised
from v4jax.kernels.fused_attention.steps import (
    Form,
    Operands,
    Scalars,
    operand_specs,
    parts_of,
    spec,
    step,
)
from v4jax.kernels.tpu import NT, VMEM_BYTES


def entry_mass(form: Form, scalars: Scalars, x: Operands, lse_BSN: jax.Array) -> jax.Array:
    """Sum over heads of the softmax, of each entry: float32 [B,S,C]."""
    x = x.with_own()
    batch, rows, width = x.q_BSM.shape
    window, entries = form.window, x.entry_BCH.shape[1]
    units = rows // window
    parts = parts_of(units)
    mass = jax.ShapeDtypeStruct(
        (batch, rows, entries), jnp.float32, manual_axis_type=jax.typeof(x.q_BSM).manual_axis_type
    )
    of = functools.partial(spec, parts=parts)
    return pl.pallas_call(
        functools.partial(_add_heads, form, parts),
        out_shape=mass,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, parts, units // parts, form.heads // form.group),
            in_specs=[
                operand_specs(form, x, parts),
                of(lse_BSN, (window, form.heads), lambda at: (at.unit, 0)),
            ],
            out_specs=of(mass, (window, entries), lambda at: (at.unit, 0)),
            scratch_shapes=[pltpu.VMEM((window, entries), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * rows * width * entries,
            bytes_accessed=x.q_BSM.nbytes + 4 * batch * rows * entries,
            transcendentals=batch * rows * form.heads * entries,
        ),
        interpret=form.interpret,
        name="fused_attention_mass",
    )(*scalars, x, lse_BSN)


def _add_heads(form: Form, parts: int, start_B, blocks_BU, x: Operands, lse_BSN, mass, bias_WC):
    """One step: a block of W queries, and one group of their heads."""
    at, heads, window = step(parts), form.group, form.window
    first, blocks = Scalars(start_B, blocks_BU).of(at, window)

    @pl.when(at.group == 0)
    def _start():
        bias_WC[...] = entry_bias(x, first)
        mass[...] = jnp.zeros_like(mass)

    norm_RH = normalised(rows_of_heads(x.q_BSM, heads), form.eps)[0]
    q_RH = rotated(norm_RH, x, heads, inverse=False) * norm_RH.shape[1] ** -0.5
    q_RH = q_RH.astype(x.q_BSM.dtype)
    lse_R1 = of_heads(lse_BSN[...], at.group * heads, heads)
    size = entry_block(x.entry_BCH.shape[0])

    def add(block, nothing):
        here = pl.ds(pl.multiple_of(block * size, size), size)
        score = dot(q_RH, x.entry_BCH[here, :], NT) + below(bias_WC[:, here], heads)
        share = jnp.exp(score - lse_R1)
        mass[:, here] += sum(share[k * window : (k + 1) * window] for k in range(heads))
        return nothing

    lax.fori_loop(0, blocks, add, 0)
