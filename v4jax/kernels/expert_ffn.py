"""The experts' feed-forward on rows sorted by expert, with the grouped products of each platform.

TPU: lax.ragged_dot (a grouped GEMM) on all rows at once, with a kernel for its weight gradient
(v4jax/kernels/expert_ffn_grad_tpu.py). NVIDIA GPUs: kernels for both products
(v4jax/kernels/expert_ffn_gpu.py). CPU, other GPUs, and widths that those kernels cannot cut: a loop
over the blocks in use, a few at a time, each with the rows of one expert. There XLA's ragged_dot
does E times the work, and a block's intermediate values stay in cache. All run the same two
formulas, `_ffn` and `_ffn_backward`, which take the products as arguments. v4jax/kernels/README.md
lists the implementations and their tests.

Shapes: P rows (of all blocks, or of some), A and Z widths of a product's factors, D width, F expert
hidden, E experts, N blocks at a time, b rows of a block, T tokens, K active experts.
Next file to read: sharding/experts.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.experts import AT_ONCE, Groups
from sharding.manual import vary_like
from v4jax.kernels import expert_ffn_gpu
from v4jax.kernels.expert_ffn_grad_tpu import grouped_outer
from v4jax.kernels.matmul import precision_of
from v4jax.quant.fake import fp8_input

FEW_ROWS = 32
"""Number of rows up to which all experts on all rows take less time than the loop over blocks.

The loop copies the matrices of each block's expert (figures: v4jax/kernels/README.md).
"""

JOINED_SHARE = 2
"""Blocks have up to this many times an average expert's rows in the CPU's loop without gradients.

The loop copies an expert's matrices for every block, so large blocks are cheaper.
"""


class ExpertWeights(NamedTuple):
    """The experts' matrices w1, w3 [E,D,F] and w2 [E,F,D]; those of one expert have no axis E.

    Joined (w3 None, forward only), w1 is both side by side, [E,D,2F].
    """

    w1: jax.Array
    w3: jax.Array | None
    w2: jax.Array


class Activation(NamedTuple):
    """How the hidden activation is made.

    Attributes:
      limit: swiglu_limit.
      quant: "official" rounds it to fp8 before w2.
    """

    limit: float
    quant: str = "none"


def clamped_swiglu(h1: jax.Array, h3: jax.Array, limit: float) -> jax.Array:
    """silu(min(h1, limit)) * clip(h3, -limit, limit), float32.

    The clamp comes before silu (docs/equations.md#trap-29).
    """
    h1, h3 = h1.astype(jnp.float32), h3.astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(h1, limit)) * jnp.clip(h3, -limit, limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn(
    form: Activation, w: ExpertWeights, x_PD: jax.Array, gate_P: jax.Array, groups: Groups
) -> jax.Array:
    """y = w2(gate * clamped_swiglu(w1 x, w3 x)) with each row's own expert, in the dtype of x.

    The routed weight multiplies the hidden activation before w2 (docs/equations.md#trap-30). Rows
    of gate 0 give 0.

    Args:
      form: see Activation.
      w: matrices, cast to the dtype of x when used.
      x_PD: rows, in whole blocks of one expert.
      gate_P: float32, routed weight of each row.
      groups: which rows belong to which expert (sharding/experts.py).
    """
    return _forward(form, w, x_PD, gate_P, groups)[0]


def _fwd(form, w, x_PD, gate_P, groups):
    y_PD, h1_PF, h3_PF = _forward(form, w, x_PD, gate_P, groups)
    return y_PD, (w, x_PD, gate_P, groups, h1_PF, h3_PF)


def _bwd(form, saved, ct_PD):
    w, x_PD, gate_P, groups, h1_PF, h3_PF = saved
    args = (w, x_PD, gate_P, groups, h1_PF, h3_PF, ct_PD)
    ct_w, ct_x, ct_gate = _by_platform(form, w, groups, x_PD, _blocked_backward, _whole_backward)(
        *args
    )
    return ct_w, ct_x, ct_gate, None


expert_ffn.defvjp(_fwd, _bwd)


def _forward(form, w, x_PD, gate_P, groups):
    """(y, h1, h3); the backward pass needs h1 and h3."""
    return _by_platform(form, w, groups, x_PD, _blocked_forward, _whole_forward)(
        w, x_PD, gate_P, groups
    )


def _by_platform(
    form: Activation, w: ExpertWeights, groups: Groups, x_PD: jax.Array, blocked, whole
):
    """`blocked`, or `whole` with the platform's products, chosen when it is compiled."""
    blocked, ragged = (
        functools.partial(blocked, form),
        functools.partial(whole, form, _ragged_dot, grouped_outer),
    )
    cuda = blocked
    if expert_ffn_gpu.suits(
        x_PD.shape[0] // groups.block_expert.shape[0], x_PD.shape[1], w.w2.shape[-2]
    ):
        cuda = functools.partial(
            whole, form, expert_ffn_gpu.grouped_dot, expert_ffn_gpu.grouped_outer
        )
    return functools.partial(
        lax.platform_dependent, cpu=blocked, cuda=cuda, rocm=blocked, default=ragged
    )


# ---- A few rows, all experts ----


def pays_every_expert(w: ExpertWeights, rows: int, active: int) -> bool:
    """Whether `every_expert` beats the loop over blocks.

    It does for a few rows that choose at least as many experts as there are, so that the loop could
    leave few out. Weights must be joined, and all on one device.
    """
    return w.w3 is None and rows * active >= w.w1.shape[0] and rows <= FEW_ROWS


def every_expert(
    form: Activation, w: ExpertWeights, x_TD: jax.Array, index_TK: jax.Array, gate_TK: jax.Array
) -> jax.Array:
    """y[t] = sum_k expert_{index[t,k]}(x[t], gate[t,k]) by all experts on all tokens, [T,D].

    The gate is 0 where an expert was not chosen. Forward only. The loop over blocks would copy
    almost every expert's matrices before it multiplies. Experts are a batch of the first product.
    The second takes two experts at a time if their number is even: XLA:CPU then reads the matrices
    faster.
    """
    experts, hidden, width = w.w2.shape
    pair, rows = 2 - experts % 2, x_TD.shape[0]
    gate_ET = jnp.sum(jax.nn.one_hot(index_TK, experts) * gate_TK[..., None], axis=1).T
    x_ETD = jnp.broadcast_to(x_TD, (experts, *x_TD.shape))
    h_ETF = _gated(form, *jnp.split(_matmul(x_ETD, w.w1.astype(x_TD.dtype)), 2, axis=-1), gate_ET)
    paired = jnp.moveaxis(h_ETF.reshape(-1, pair, rows, hidden), 1, 2).reshape(
        -1, rows, pair * hidden
    )
    return _matmul(paired, w.w2.reshape(-1, pair * hidden, width).astype(x_TD.dtype)).sum(0)


# ---- The formulas. dot(x, w): rows times experts' matrices; outer(x, ct): its gradient for w ----


def _matmul(x, w):
    return jnp.matmul(x, w, precision=precision_of(x))


def _gated(form: Activation, h1, h3, gate, axis: int = -1):
    """The hidden activation; `axis` is the axis of its width, which `gate` lacks."""
    gate = jnp.expand_dims(gate, axis)
    # Rows that fill up a block have gate 0 and may hold anything on TPU: they are replaced, not
    # multiplied by 0.
    h = jnp.where(gate == 0, 0, clamped_swiglu(h1, h3, form.limit) * gate).astype(h1.dtype)
    return (
        jnp.moveaxis(fp8_input(jnp.moveaxis(h, axis, -1)), -1, axis)
        if form.quant == "official"
        else h
    )


def _ffn(form, dot, w: ExpertWeights, x, gate_P):
    """(y, h1, h3): the formula of the forward pass."""
    if w.w3 is None:
        h1, h3 = jnp.split(dot(x, w.w1), 2, axis=-1)
        return dot(_gated(form, h1, h3, gate_P), w.w2), h1, h3
    h1, h3 = dot(x, w.w1), dot(x, w.w3)
    return dot(_gated(form, h1, h3, gate_P), w.w2), h1, h3


def _ffn_backward(form, dot, outer, w: ExpertWeights, x, gate_P, h1, h3, ct):
    """(gradients of w, of x, of the gate): the formula of the backward pass."""
    hidden, pull = jax.vjp(functools.partial(_gated, form), h1, h3, gate_P)
    ct_h1, ct_h3, ct_gate = pull(dot(ct, jnp.swapaxes(w.w2, -1, -2)))
    ct_x = dot(ct_h1, jnp.swapaxes(w.w1, -1, -2)) + dot(ct_h3, jnp.swapaxes(w.w3, -1, -2))
    ct_w = ExpertWeights(outer(x, ct_h1), outer(x, ct_h3), outer(hidden, ct))
    return ct_w, ct_x, ct_gate


# ---- TPU and NVIDIA: all rows at once ----


def _ragged_dot(x_PA, w_EAZ, groups: Groups):
    return lax.ragged_dot(x_PA, w_EAZ, groups.group_sizes, precision=precision_of(x_PA))


def _whole_forward(form, dot, outer, w, x_PD, gate_P, groups):
    """`_ffn` on all rows; dot(x, w, groups) and outer(x, ct, groups) are the platform's."""
    del outer
    return _ffn(form, _grouped(dot, groups), w, x_PD, gate_P)


def _whole_backward(form, dot, outer, w, x_PD, gate_P, groups, h1_PF, h3_PF, ct_PD):
    """`_ffn_backward` on all rows; dot and outer as in `_whole_forward`."""

    def sums(x_PA, ct_PZ):
        return outer(x_PA, ct_PZ, groups).astype(w.w1.dtype)

    return _ffn_backward(form, _grouped(dot, groups), sums, w, x_PD, gate_P, h1_PF, h3_PF, ct_PD)


def _grouped(dot, groups: Groups):
    return lambda x_PA, w_EAZ: dot(x_PA, w_EAZ.astype(x_PA.dtype), groups)


# ---- CPU and other GPUs: some blocks at a time ----


def _rows(x, n, size):
    return lax.dynamic_slice_in_dim(x, n * size, size)


def _store(total, part, n, size):
    return lax.dynamic_update_slice_in_dim(total, part, n * size, axis=0)


def _joined_one(w: ExpertWeights, expert, dtype) -> ExpertWeights:
    def take(m):
        return lax.dynamic_index_in_dim(m, expert, keepdims=False).astype(dtype)

    return ExpertWeights(take(w.w1), None, take(w.w2))


def _several(w: ExpertWeights, expert_N, dtype) -> ExpertWeights:
    """The matrices of N blocks' experts, stacked."""

    def take(m, n):
        return lax.dynamic_index_in_dim(m, expert_N[n], keepdims=False)

    return jax.tree.map(lambda m: jnp.stack([take(m, n) for n in range(AT_ONCE)]).astype(dtype), w)


def _in_blocks(x_PA):
    return x_PA.reshape(AT_ONCE, -1, x_PA.shape[-1])


def _batched(x_PA, w_NAZ):
    y_NbZ = _matmul(_in_blocks(x_PA), w_NAZ)
    return y_NbZ.reshape(-1, y_NbZ.shape[-1])


def _blocked_forward(form, w, x_PD, gate_P, groups):
    """`_ffn` in a loop over the blocks in use, AT_ONCE at a time.

    Joined weights (decoding) go block by block, because few rows use few blocks.
    """
    count = 1 if w.w3 is None else AT_ONCE
    size = x_PD.shape[0] // groups.block_expert.shape[0] * count

    def some_blocks(n, totals):
        if w.w3 is None:
            dot, own = _matmul, _joined_one(w, groups.block_expert[n], x_PD.dtype)
        else:
            dot, own = _batched, _several(w, _rows(groups.block_expert, n, count), x_PD.dtype)
        parts = _ffn(form, dot, own, _rows(x_PD, n, size), _rows(gate_P, n, size))
        return tuple(
            _store(total, part, n, size) for total, part in zip(totals, parts, strict=True)
        )

    widths = (x_PD.shape[1], w.w2.shape[-2], w.w2.shape[-2])
    zeros = tuple(
        vary_like(jnp.zeros((x_PD.shape[0], width), x_PD.dtype), x_PD) for width in widths
    )
    return lax.fori_loop(0, -(-groups.blocks_in_use // count), some_blocks, zeros)


def _blocked_backward(form, w, x_PD, gate_P, groups, h1_PF, h3_PF, ct_PD):
    """`_ffn_backward` in a loop over the blocks in use, AT_ONCE at a time."""
    size = x_PD.shape[0] // groups.block_expert.shape[0] * AT_ONCE

    def some_blocks(n, totals):
        ct_w, ct_x, ct_gate = totals
        expert_N = _rows(groups.block_expert, n, AT_ONCE)
        rows = [_rows(a, n, size) for a in (x_PD, gate_P, h1_PF, h3_PF, ct_PD)]

        def outer(x, ct):
            return _matmul(jnp.swapaxes(_in_blocks(x), 1, 2), _in_blocks(ct))

        part_w, part_x, part_gate = _ffn_backward(
            form, _batched, outer, _several(w, expert_N, x_PD.dtype), *rows
        )
        ct_w = ExpertWeights(
            *(_add_each(total, part, expert_N) for total, part in zip(ct_w, part_w, strict=True))
        )
        return ct_w, _store(ct_x, part_x, n, size), _store(ct_gate, part_gate, n, size)

    zeros = jax.tree.map(lambda a: vary_like(jnp.zeros(a.shape, a.dtype), x_PD), (w, x_PD, gate_P))
    return lax.fori_loop(0, -(-groups.blocks_in_use // AT_ONCE), some_blocks, zeros)


def _add_each(total, part_NAZ, expert_N):
    """Adds each part to its expert's total, one by one, as several may belong to one expert."""
    for n in range(AT_ONCE):
        now = lax.dynamic_index_in_dim(total, expert_N[n], keepdims=False) + part_NAZ[n].astype(
            total.dtype
        )
        total = lax.dynamic_update_index_in_dim(total, now, expert_N[n], axis=0)
    return total
