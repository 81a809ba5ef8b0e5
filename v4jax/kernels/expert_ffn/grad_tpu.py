"""The weight gradient of a grouped product on TPU, as a kernel: sums of x^T ct over experts' rows.

XLA:TPU makes this gradient of lax.ragged_dot by masking all rows for every expert: E times the
FLOPs, and arrays of E x rows x width, the largest of a training step. Rows lie in whole blocks of
one expert each (sharding/experts.py), so the kernel only adds up blocks. For each tile of the
result, the grid walks through all blocks, which come in the order of their experts, and then
through the experts, whose zeros it writes where they have no block.

Shapes: P rows in blocks, E experts, A and Z widths of the two factors.
Next file to read: v4jax/kernels/expert_ffn/gpu.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sharding.experts import Groups
from sharding.manual import vary_like
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.tpu import LANES

TILE = 1024
"""Widest tile, a multiple of LANES like all. In float32 it is 4 MB; two fit the 16 MB that a kernel
has by default."""


def grouped_outer(
    x_PA: jax.Array, ct_PZ: jax.Array, groups: Groups, interpret: bool = False
) -> jax.Array:
    """out[e] = sum over rows p of expert e of x[p]^T ct[p], float32 [E,A,Z]; 0 without rows.

    interpret: run the kernel step by step on any platform (tests).
    """
    blocks, widths = groups.block_expert.shape[0], (x_PA.shape[1], ct_PZ.shape[1])
    size, tiles = x_PA.shape[0] // blocks, tuple(_tile(width) for width in widths)
    experts = groups.group_sizes.shape[0]

    def rows(place):
        return lambda a, z, step, *_: (jnp.minimum(step, blocks - 1), (a, z)[place])

    return pl.pallas_call(
        _add_block,
        out_shape=jax.ShapeDtypeStruct(
            (experts, *widths), jnp.float32, manual_axis_type=jax.typeof(x_PA).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(widths[0] // tiles[0], widths[1] // tiles[1], blocks + experts),
            in_specs=[pl.BlockSpec((size, tile), rows(i)) for i, tile in enumerate(tiles)],
            out_specs=pl.BlockSpec(
                (None, *tiles), lambda a, z, step, expert, in_use: (expert[step], a, z)
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(_expert_of_steps(groups), groups.blocks_in_use[None], x_PA, ct_PZ)


def _expert_of_steps(groups: Groups) -> jax.Array:
    """Whose tile each step works on: those of blocks, then experts without one; others stay."""
    last = groups.block_expert[-1]
    number = jnp.arange(groups.group_sizes.shape[0], dtype=last.dtype)
    # A tile that is left must not be visited again, so a step of another expert changes nothing.
    empty = jnp.where(groups.group_sizes == 0, number, -1)
    stays = lax.cummax(vary_like(empty, last))
    return jnp.concatenate([groups.block_expert, jnp.where(stays < 0, last, stays)])


def _add_block(expert, in_use, x, ct, out):
    """Adds one block's product to a tile, which stays in fast memory as long as its expert does."""
    step = pl.program_id(2)

    @pl.when((step == 0) | (expert[step] != expert[jnp.maximum(step - 1, 0)]))
    def _start():
        out[...] = jnp.zeros_like(out)

    @pl.when(step < in_use[0])
    def _add():
        out[...] += lax.dot_general(
            x[...],
            ct[...],
            (((0,), (0,)), ((), ())),
            precision=precision_of(x),
            preferred_element_type=jnp.float32,
        )


def _tile(width: int) -> int:
    """The widest tile of whole vectors that cuts `width` evenly, or all of it."""
    return max((tile for tile in range(LANES, TILE + 1, LANES) if width % tile == 0), default=width)
