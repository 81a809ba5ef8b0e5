"""The forward kernel of fused attention: one softmax over window keys, entries and a sink.

Shapes: B batch, S positions, U blocks of W queries, W window, N heads, H head dim, M width of all
heads, G groups of heads, I width of a group, Y window keys, C entries, K keys of a product, R rows
of a step (queries of each head of a group).
Next file to read: v4jax/kernels/fused_attention/backward.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.fused_attention.blocks import (
    Scratch,
    below,
    block_of_entries,
    dot,
    has_more_entries,
    rotated,
    rows_of_heads,
    scratch_shapes,
    sinks_of_heads,
    write_heads,
)
from v4jax.kernels.fused_attention.steps import (
    Form,
    Operands,
    Scalars,
    operand_specs,
    parts_of,
    spec,
    step,
)
from v4jax.kernels.tpu import NN, NT, VMEM_BYTES


def forward(form: Form, scalars: Scalars, x: Operands) -> tuple[jax.Array, jax.Array]:
    """(output [B,G,S,I], rotated back, in the dtype of the queries; lse float32 [B,S,N])."""
    x = x.with_own()
    batch, rows, width = x.q_BSM.shape
    window, dim = form.window, x.kv_BYH.shape[2]
    units = rows // window
    parts = parts_of(units)
    entries = 0 if x.entry_BCH is None else x.entry_BCH.shape[1]
    vma = jax.typeof(x.q_BSM).manual_axis_type
    outputs = (
        jax.ShapeDtypeStruct(
            (batch, form.heads // form.together, rows, form.together * dim),
            x.q_BSM.dtype,
            manual_axis_type=vma,
        ),
        jax.ShapeDtypeStruct((batch, rows, form.heads), jnp.float32, manual_axis_type=vma),
    )
    keys = 2 * window + entries
    return pl.pallas_call(
        functools.partial(_attend, form, parts),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, parts, units // parts, form.heads // form.group),
            in_specs=[operand_specs(form, x, parts)],
            out_specs=(
                spec(outputs[0], (None, window, form.group * dim), form.in_output, parts),
                spec(outputs[1], (window, form.heads), lambda at: (at.unit, 0), parts),
            ),
            scratch_shapes=scratch_shapes(form, x),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * rows * width * keys,
            bytes_accessed=2 * x.q_BSM.nbytes,
            transcendentals=batch * rows * form.heads * keys,
        ),
        interpret=form.interpret,
        name="fused_attention",
    )(*scalars, x)


def _attend(form: Form, parts: int, start_B, blocks_BU, x: Operands, out, lse, *scratch):
    """One step: a block of W queries, and one group of their heads."""
    at, heads, window = step(parts), form.group, form.window
    first, blocks = Scalars(start_B, blocks_BU).of(at, window)

    shared = Scratch(*scratch)

    @pl.when(at.group == 0)
    def _masks():
        shared.write(x, first)
        lse[...] = jnp.zeros_like(lse)

    dtype = x.q_BSM.dtype
    q_RH = normalised(rows_of_heads(x.q_BSM, heads), form.eps)[0]
    q_RH = rotated(q_RH, x, heads, inverse=False) * q_RH.shape[1] ** -0.5
    q_RH = q_RH.astype(dtype)
    sink_R1 = sinks_of_heads(x.sink_N, at.group * heads, heads, window)
    keys = shared.key_KH.shape[0]
    score = dot(q_RH, shared.key_KH[...], NT) + below(shared.bias_WK[:, :keys], heads)
    # The sink is a key of value 0.
    peak = jnp.maximum(jnp.max(score, axis=1, keepdims=True), sink_R1)
    share = jnp.exp(score - peak)
    total = jnp.sum(share, axis=1, keepdims=True) + jnp.exp(sink_R1 - peak)
    sum_RH = dot(share.astype(dtype), shared.key_KH[...], NN)

    def with_entries(block, carry):
        """Adds a block of entries to (largest score, denominator, weighted sum)."""
        peak, total, sum_RH = carry
        rows, columns = block_of_entries(x, block)
        entry_KH = x.entry_BCH[rows, :]
        score = dot(q_RH, entry_KH, NT) + below(shared.bias_WK[:, columns], heads)
        higher = jnp.maximum(peak, jnp.max(score, axis=1, keepdims=True))
        share, shrink = jnp.exp(score - higher), jnp.exp(peak - higher)
        total = shrink * total + jnp.sum(share, axis=1, keepdims=True)
        return higher, total, shrink * sum_RH + dot(share.astype(dtype), entry_KH, NN)

    if has_more_entries(x):
        carry = lax.fori_loop(1, blocks, with_entries, (peak, total, sum_RH))
        peak, total, sum_RH = carry
    write_heads(out, rotated(sum_RH * (1 / total), x, heads, inverse=True), heads)
    lse_R1 = peak + jnp.log(total)
    place = lax.broadcasted_iota(jnp.int32, lse.shape, 1)
    lse_WN = lse[...]
    for k in range(heads):
        own = lse_R1[k * window : (k + 1) * window]
        lse_WN = jnp.where(place == at.group * heads + k, own, lse_WN)
    lse[...] = lse_WN


def normalised(raw_RH: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(rows over their root mean square, and one over that [R,1] as gradients take it), float32.

    Gradients take the RMS of a row of zeros for 1, as `over_rms` does.
    """
    x_RH = raw_RH.astype(jnp.float32)
    square_R1 = jnp.mean(x_RH * x_RH, axis=1, keepdims=True)
    inverse_R1 = lax.rsqrt(square_R1 + eps)
    return x_RH * inverse_R1, jnp.where(square_R1 == 0, 1.0, inverse_R1)
