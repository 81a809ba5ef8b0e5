"""The backward kernel of fused attention.

It computes the normalised queries and each softmax again, from the saved logarithm of its
denominator. Gradients of keys are sums over heads and queries: those over the heads of a block are
made here, in float32; the blocks' (of window keys) and the parts' (of entries) are added outside.

Shapes: B batch, S positions, U blocks of W queries, W window, Y window keys, N heads, H head dim, M
width of all heads, G groups of heads, I width of a group, C entries, P parts of the grid, R rows of
a step (queries of each head of a group), K keys.
Next file to read: v4jax/kernels/fused_attention/mass.py.
"""

import functools
from typing import Any, NamedTuple

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
    of_heads,
    rotated,
    rows_of_heads,
    scratch_shapes,
    sinks_of_heads,
    write_heads,
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
from v4jax.kernels.tpu import NN, NT, TN, VMEM_BYTES


class Gradients(NamedTuple):
    """Outputs of the kernel, in a kernel their blocks.

    Attributes:
      q_BSM: in the dtype of the queries.
      kv_BUYH: float32, of the 2W window keys of each block of queries.
      sink_BU1N: float32, of each block of queries.
      entry_BPCH: float32, of each part of the grid; None without entries.
    """

    q_BSM: Any
    kv_BUYH: Any
    sink_BU1N: Any
    entry_BPCH: Any


class Saved(NamedTuple):
    """What the backward pass reads beside the operands: gradient and results of the forward.

    Attributes:
      far_BSM: the gradient of normalised, rotated and scaled queries from keys that this kernel
        does not see; None without.
    """

    ct_BGSI: jax.Array
    out_BGSI: jax.Array
    lse_BSN: jax.Array
    far_BSM: jax.Array | None = None


def backward(form: Form, scalars: Scalars, x: Operands, saved: Saved) -> Gradients:
    """Gradients of the queries, and of keys, sinks and entries in parts."""
    x = x.with_own()
    batch, rows, width = x.q_BSM.shape
    window, dim = form.window, x.kv_BYH.shape[2]
    units = rows // window
    parts = parts_of(units)
    entries = 0 if x.entry_BCH is None else x.entry_BCH.shape[1]
    struct = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x.q_BSM).manual_axis_type
    )
    of = functools.partial(spec, parts=parts)
    outputs = Gradients(
        struct(x.q_BSM.shape, x.q_BSM.dtype),
        struct((batch, units, 2 * window, dim), jnp.float32),
        struct((batch, units, 1, form.heads), jnp.float32),
        struct((batch, parts, entries, dim), jnp.float32) if entries else None,
    )
    heads_block = (window, form.group * dim)
    specs = Gradients(
        of(outputs.q_BSM, heads_block, lambda at: (at.unit, at.group)),
        of(outputs.kv_BUYH, (None, 2 * window, dim), lambda at: (at.unit, 0, 0)),
        of(outputs.sink_BU1N, (None, 1, form.heads), lambda at: (at.unit, 0, 0)),
        # A part's block stays in fast memory until the part has ended.
        of(outputs.entry_BPCH, (None, entries, dim), lambda at: (at.unit % parts, 0, 0)),
    )
    saved_specs = Saved(
        of(saved.ct_BGSI, (None, *heads_block), form.in_output),
        of(saved.out_BGSI, (None, *heads_block), form.in_output),
        of(saved.lse_BSN, (window, form.heads), lambda at: (at.unit, 0)),
        of(saved.far_BSM, heads_block, lambda at: (at.unit, at.group)),
    )
    keys = 2 * window + entries
    return pl.pallas_call(
        functools.partial(_gradients, form, parts),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, parts, units // parts, form.heads // form.group),
            in_specs=[operand_specs(form, x, parts), saved_specs],
            out_specs=specs,
            scratch_shapes=scratch_shapes(form, x),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * batch * rows * width * keys,
            bytes_accessed=4 * x.q_BSM.nbytes,
            transcendentals=batch * rows * form.heads * keys,
        ),
        interpret=form.interpret,
        name="fused_attention_gradients",
    )(*scalars, x, saved)


def _gradients(
    form: Form, parts: int, start_B, blocks_BU, x: Operands, saved: Saved, *outputs_and_scratch
):
    """One step: a block of W queries, and one group of their heads."""
    # A kernel gets outputs one by one, and then its scratch memory.
    ct, shared = Gradients(*outputs_and_scratch[:4]), Scratch(*outputs_and_scratch[4:])
    at, heads, window = step(parts), form.group, form.window
    first, blocks = Scalars(start_B, blocks_BU).of(at, window)

    @pl.when(at.group == 0)
    def _start():
        shared.write(x, first)
        ct.kv_BUYH[...] = jnp.zeros_like(ct.kv_BUYH)
        ct.sink_BU1N[...] = jnp.zeros_like(ct.sink_BU1N)

    if x.entry_BCH is not None:

        @pl.when((at.group == 0) & (at.unit < parts))
        def _start_part():
            ct.entry_BPCH[...] = jnp.zeros_like(ct.entry_BPCH)

    dtype = x.q_BSM.dtype
    scale = x.kv_BYH.shape[1] ** -0.5
    norm_RH, inverse_R1 = normalised(rows_of_heads(x.q_BSM, heads), form.eps)
    q_RH = (rotated(norm_RH, x, heads, inverse=False) * scale).astype(dtype)
    do_RH = rows_of_heads(saved.ct_BGSI, heads).astype(jnp.float32)
    out_RH = rows_of_heads(saved.out_BGSI, heads).astype(jnp.float32)
    # Rotation keeps inner products.
    delta_R1 = jnp.sum(do_RH * out_RH, axis=1, keepdims=True)
    do_RH = rotated(do_RH, x, heads, inverse=False).astype(dtype)
    lse_R1 = of_heads(saved.lse_BSN[...], at.group * heads, heads)

    def with_keys(key_KH, bias_WK):
        """(what the keys add to the gradient of q, the gradient of the keys)."""
        score = dot(q_RH, key_KH, NT) + below(bias_WK, heads)
        share = jnp.exp(score - lse_R1)
        slope = (share * (dot(do_RH, key_KH, NT) - delta_R1)).astype(dtype)
        ct_KH = dot(slope, q_RH, TN) + dot(share.astype(dtype), do_RH, TN)
        return dot(slope, key_KH, NN), ct_KH

    def with_entries(block, ct_RH):
        rows, columns = block_of_entries(x, block)
        more_RH, ct_KH = with_keys(x.entry_BCH[rows, :], shared.bias_WK[:, columns])
        ct.entry_BPCH[rows, :] += ct_KH
        return ct_RH + more_RH

    keys, near = shared.key_KH.shape[0], 2 * window
    ct_RH, ct_KH = with_keys(shared.key_KH[...], shared.bias_WK[:, :keys])
    ct.kv_BUYH[...] += ct_KH[:near]
    if x.entry_BCH is not None:
        ct.entry_BPCH[: keys - near, :] += ct_KH[near:]
    if has_more_entries(x):
        ct_RH = lax.fori_loop(1, blocks, with_entries, ct_RH)
    if saved.far_BSM is not None:
        ct_RH = ct_RH + rows_of_heads(saved.far_BSM, heads).astype(jnp.float32)
    ct_RH = rotated(ct_RH * scale, x, heads, inverse=True)
    mean_R1 = jnp.mean(ct_RH * norm_RH, axis=1, keepdims=True)
    write_heads(ct.q_BSM, inverse_R1 * (ct_RH - norm_RH * mean_R1), heads)
    _add_sinks(form, at, x, ct, lse_R1, delta_R1)


def _add_sinks(form: Form, at, x: Operands, ct: Gradients, lse_R1, delta_R1):
    """A sink has value 0: its gradient is minus its share of the softmax times delta."""
    heads, window = form.group, form.window
    sink_R1 = sinks_of_heads(x.sink_N, at.group * heads, heads, window)
    slope_R1 = -jnp.exp(sink_R1 - lse_R1) * delta_R1
    place = lax.broadcasted_iota(jnp.int32, ct.sink_BU1N.shape, 1)
    sum_1N = ct.sink_BU1N[...]
    for k in range(heads):
        own = jnp.sum(slope_R1[k * window : (k + 1) * window], axis=0, keepdims=True)
        sum_1N = jnp.where(place == at.group * heads + k, own, sum_1N)
    ct.sink_BU1N[...] = sum_1N
