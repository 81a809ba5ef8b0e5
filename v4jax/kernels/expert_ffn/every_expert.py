"""All experts on all rows: the reference, and what a few rows of decoding take.

Shapes: T tokens, P rows in blocks, K active experts, D hidden, E experts, F expert hidden.
Next file to read: v4jax/kernels/expert_ffn/formulas.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.experts import Groups
from sharding.manual import vary_like
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights, ffn, gated, matmul
from v4jax.quant.packed import as_numbers

FEW_ROWS = 32
"""Number of rows up to which all experts on all rows take less time than the loop over blocks.

The loop copies the matrices of each block's expert (figures: v4jax/kernels/README.md).
"""


def reference(
    form: Activation, w: ExpertWeights, x_PD: jax.Array, gate_P: jax.Array, groups: Groups
) -> jax.Array:
    """Adds up what each expert makes of its rows, one expert after another."""
    w = w.read(x_PD.dtype)
    x_PD, expert_P = jnp.where(gate_P[:, None] == 0, 0, x_PD), expert_of_rows(x_PD, groups)

    def add(y_PD, one):
        expert, own = one
        own = jax.tree.map(lambda matrix: matrix.astype(x_PD.dtype), own)
        return y_PD + ffn(form, matmul, own, x_PD, jnp.where(expert_P == expert, gate_P, 0))[
            0
        ], None

    experts_E = jnp.arange(groups.group_sizes.shape[0], dtype=expert_P.dtype)
    return lax.scan(add, vary_like(jnp.zeros_like(x_PD), x_PD), (experts_E, w))[0]


def every_expert_on_rows(
    form: Activation, w: ExpertWeights, x_PD: jax.Array, gate_P: jax.Array, groups: Groups
) -> jax.Array:
    """`every_expert` for rows sorted by expert."""
    x_PD = jnp.where(gate_P[:, None] == 0, 0, x_PD)
    return every_expert(form, w, x_PD, expert_of_rows(x_PD, groups)[:, None], gate_P[:, None])


def expert_of_rows(x_PD: jax.Array, groups: Groups) -> jax.Array:
    """The expert of each row, int32 [P]."""
    return jnp.repeat(groups.block_expert, x_PD.shape[0] // groups.block_expert.shape[0])


def pays_every_expert(
    w: ExpertWeights, rows: int, active: int, implementation: str | None = None
) -> bool:
    """Whether `every_expert` beats the loop over blocks, or is asked for.

    It does for a few rows that choose at least as many experts as there are, so that the loop could
    leave few out. Weights must be joined, and all on one device.
    """
    if implementation is not None:
        return implementation == "every_expert"
    return w.w3 is None and rows * active >= w.w1.shape[0] and rows <= FEW_ROWS


def every_expert(
    form: Activation, w: ExpertWeights, x_TD: jax.Array, index_TK: jax.Array, gate_TK: jax.Array
) -> jax.Array:
    """y[t] = sum_k expert_{index[t,k]}(x[t], gate[t,k]) by all experts on all tokens, [T,D].

    The gate is 0 where an expert was not chosen. The loop over blocks would copy almost every
    expert's matrices before it multiplies. Experts are a batch of the first product. The second
    takes two experts at a time if their number is even: XLA:CPU then reads the matrices faster.
    """
    experts, hidden, width = w.w2.shape
    pair, rows = 2 - experts % 2, x_TD.shape[0]
    gate_ET = jnp.sum(jax.nn.one_hot(index_TK, experts) * gate_TK[..., None], axis=1).T
    x_ETD = jnp.broadcast_to(x_TD, (experts, *x_TD.shape))
    if w.w3 is None:
        h1, h3 = jnp.split(matmul(x_ETD, as_numbers(w.w1, x_TD.dtype)), 2, axis=-1)
    else:
        h1, h3 = (matmul(x_ETD, as_numbers(matrix, x_TD.dtype)) for matrix in (w.w1, w.w3))
    h_ETF = gated(form, h1, h3, gate_ET)
    paired = jnp.moveaxis(h_ETF.reshape(-1, pair, rows, hidden), 1, 2).reshape(
        -1, rows, pair * hidden
    )
    w2 = as_numbers(w.w2, x_TD.dtype)
    return matmul(paired, w2.reshape(-1, pair * hidden, width)).sum(0)
