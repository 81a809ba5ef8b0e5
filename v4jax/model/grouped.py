"""One operation for experts' matrices: rows sorted by expert, times that expert's matrix. A backend per platform.

TPU: lax.ragged_dot (a grouped GEMM). CPU and GPU: a loop over blocks of rows that belong to one expert, as long as there are
blocks in use; XLA's own ragged_dot does E times the work on those platforms (30-50 times slower on CPU).

Shapes: P rows, A in, Z out, E experts, N blocks.
Next file to read: v4jax/model/moe.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.experts import Groups, vary_like


@jax.custom_vjp
def grouped_matmul(x_PA: jax.Array, w_EAZ: jax.Array, groups: Groups) -> jax.Array:
    """y[p] = x[p] @ w[expert of row p], in the dtype of x; rows of blocks not in use are unspecified on TPU, 0 elsewhere.

    Args:
      x_PA: rows in whole blocks of one expert (sharding/experts.py). w_EAZ: one matrix per expert, cast to the dtype of x.
    """
    return lax.platform_dependent(x_PA, w_EAZ, groups, cpu=_blocked, cuda=_blocked, rocm=_blocked, default=_ragged)


def _fwd(x_PA, w_EAZ, groups):
    return grouped_matmul(x_PA, w_EAZ, groups), (x_PA, w_EAZ, groups)


def _bwd(saved, ct_PZ):
    x_PA, w_EAZ, groups = saved
    ct_x = grouped_matmul(ct_PZ, jnp.swapaxes(w_EAZ, 1, 2), groups)
    ct_w = lax.platform_dependent(
        x_PA, ct_PZ, w_EAZ, groups, cpu=_blocked_outer, cuda=_blocked_outer, rocm=_blocked_outer, default=_ragged_outer
    )
    return ct_x, ct_w, None


grouped_matmul.defvjp(_fwd, _bwd)


def _blocked(x_PA, w_EAZ, groups: Groups):
    size = x_PA.shape[0] // groups.block_expert.shape[0]

    def one_block(n, y_PZ):
        x = lax.dynamic_slice_in_dim(x_PA, n * size, size)
        w = lax.dynamic_index_in_dim(w_EAZ, groups.block_expert[n], keepdims=False).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(y_PZ, x @ w, n * size, axis=0)

    empty = vary_like(jnp.zeros((x_PA.shape[0], w_EAZ.shape[2]), x_PA.dtype), x_PA)
    return lax.fori_loop(0, groups.blocks_in_use, one_block, empty)


def _blocked_outer(x_PA, ct_PZ, w_EAZ, groups: Groups):
    """Gradient of the matrices: for each expert, the sum over its blocks of x^T ct."""
    size = x_PA.shape[0] // groups.block_expert.shape[0]

    def one_block(n, ct_EAZ):
        x = lax.dynamic_slice_in_dim(x_PA, n * size, size)
        ct = lax.dynamic_slice_in_dim(ct_PZ, n * size, size)
        expert = groups.block_expert[n]
        total = lax.dynamic_index_in_dim(ct_EAZ, expert, keepdims=False) + (x.T @ ct).astype(w_EAZ.dtype)
        return lax.dynamic_update_index_in_dim(ct_EAZ, total, expert, axis=0)

    return lax.fori_loop(0, groups.blocks_in_use, one_block, vary_like(jnp.zeros(w_EAZ.shape, w_EAZ.dtype), x_PA))


def _ragged(x_PA, w_EAZ, groups: Groups):
    return lax.ragged_dot(x_PA, w_EAZ.astype(x_PA.dtype), groups.group_sizes)


def _ragged_outer(x_PA, ct_PZ, w_EAZ, groups: Groups):
    _, pull = jax.vjp(lambda w: _ragged(x_PA, w, groups), w_EAZ)
    return pull(ct_PZ)[0]
