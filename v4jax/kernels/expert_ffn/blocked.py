"""The experts in a loop over the blocks in use, a few at a time: CPU, and GPUs without a kernel.

There XLA's ragged_dot does E times the work, and a block's intermediate values stay in cache.

Shapes: P rows in blocks, A and Z widths of a product's factors, D hidden, F expert hidden, E
experts, G blocks at a time, M rows of a block.
Next file to read: v4jax/kernels/expert_ffn/whole.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.experts import AT_ONCE
from sharding.manual import vary_like
from v4jax.kernels.expert_ffn.formulas import ExpertWeights, ffn, ffn_backward, matmul, turned
from v4jax.quant.packed import as_numbers

JOINED_SHARE = 2
"""Blocks have up to this many times an average expert's rows in the CPU's loop without gradients.

The loop copies an expert's matrices for every block, so large blocks are cheaper.
"""


def _rows(x, n, size):
    return lax.dynamic_slice_in_dim(x, n * size, size)


def _store(total, part, n, size):
    return lax.dynamic_update_slice_in_dim(total, part, n * size, axis=0)


def _joined_one(w: ExpertWeights, expert, dtype) -> ExpertWeights:
    def take(m):
        own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), m)
        return as_numbers(own, dtype)

    return ExpertWeights(take(w.w1), None, take(w.w2))


def _several(w, expert_G, dtype):
    """The matrices of G blocks' experts, stacked; `w` is one array or a tree of them."""

    def take(m, n):
        return lax.dynamic_index_in_dim(m, expert_G[n], keepdims=False)

    return jax.tree.map(lambda m: jnp.stack([take(m, n) for n in range(AT_ONCE)]).astype(dtype), w)


def _in_blocks(x_PA):
    return x_PA.reshape(AT_ONCE, -1, x_PA.shape[-1])


def _batched(x_PA, w_GAZ):
    y_GMZ = matmul(_in_blocks(x_PA), w_GAZ)
    return y_GMZ.reshape(-1, y_GMZ.shape[-1])


def forward(form, w, x_PD, gate_P, groups):
    """`ffn` in a loop over the blocks in use, AT_ONCE at a time.

    Joined weights (decoding) go block by block, because few rows use few blocks.
    """
    w = w.read(x_PD.dtype) if w.w3 is not None else w
    count = 1 if w.w3 is None else AT_ONCE
    size = x_PD.shape[0] // groups.block_expert.shape[0] * count

    def some_blocks(n, totals):
        if w.w3 is None:
            dot, own = matmul, _joined_one(w, groups.block_expert[n], x_PD.dtype)
        else:
            dot, own = _batched, _several(w, _rows(groups.block_expert, n, count), x_PD.dtype)
        parts = ffn(form, dot, own, _rows(x_PD, n, size), _rows(gate_P, n, size))
        return tuple(
            _store(total, part, n, size) for total, part in zip(totals, parts, strict=True)
        )

    widths = (x_PD.shape[1], w.w2.shape[-2], w.w2.shape[-2])
    zeros = tuple(
        vary_like(jnp.zeros((x_PD.shape[0], width), x_PD.dtype), x_PD) for width in widths
    )
    return lax.fori_loop(0, -(-groups.blocks_in_use // count), some_blocks, zeros)


def backward(form, w, x_PD, gate_P, groups, h1_PF, h3_PF, ct_PD):
    """`ffn_backward` in a loop over the blocks in use, AT_ONCE at a time."""
    size = x_PD.shape[0] // groups.block_expert.shape[0] * AT_ONCE

    def some_blocks(n, totals):
        ct_w, ct_x, ct_gate = totals
        expert_G = _rows(groups.block_expert, n, AT_ONCE)
        rows = [_rows(a, n, size) for a in (x_PD, gate_P, h1_PF, h3_PF, ct_PD)]

        def outer(x, ct):
            return matmul(jnp.swapaxes(_in_blocks(x), 1, 2), _in_blocks(ct))

        part_w, part_x, part_gate = ffn_backward(
            form, turned(_batched), outer, _several(w, expert_G, x_PD.dtype), *rows
        )
        ct_w = ExpertWeights(
            *(_add_each(total, part, expert_G) for total, part in zip(ct_w, part_w, strict=True))
        )
        return ct_w, _store(ct_x, part_x, n, size), _store(ct_gate, part_gate, n, size)

    zeros = jax.tree.map(lambda a: vary_like(jnp.zeros(a.shape, a.dtype), x_PD), (w, x_PD, gate_P))
    return lax.fori_loop(0, -(-groups.blocks_in_use // AT_ONCE), some_blocks, zeros)


def dot(x_PA, w_EAZ, groups):
    """Each row times its expert's matrix, [P,Z]; 0 in blocks not in use."""
    return _product(_batched, x_PA, w_EAZ, w_EAZ.shape[2], groups)


def back(ct_PZ, w_EAZ, groups):
    """The gradient of `dot` for its rows, [P,A]."""

    def transposed(ct_PZ, w_GAZ):
        return _batched(ct_PZ, jnp.swapaxes(w_GAZ, 1, 2))

    return _product(transposed, ct_PZ, w_EAZ, w_EAZ.shape[1], groups)


def _product(multiply, x_PA, w_EAZ, width: int, groups):
    size = x_PA.shape[0] // groups.block_expert.shape[0] * AT_ONCE

    def some_blocks(n, total):
        w_GAZ = _several(w_EAZ, _rows(groups.block_expert, n, AT_ONCE), x_PA.dtype)
        return _store(total, multiply(_rows(x_PA, n, size), w_GAZ), n, size)

    zeros = vary_like(jnp.zeros((x_PA.shape[0], width), x_PA.dtype), x_PA)
    return lax.fori_loop(0, -(-groups.blocks_in_use // AT_ONCE), some_blocks, zeros)


def _add_each(total, part_GAZ, expert_G):
    """Adds each part to its expert's total, one by one, as several may belong to one expert."""
    for n in range(AT_ONCE):
        now = lax.dynamic_index_in_dim(total, expert_G[n], keepdims=False) + part_GAZ[n].astype(
            total.dtype
        )
        total = lax.dynamic_update_index_in_dim(total, now, expert_G[n], axis=0)
    return total
