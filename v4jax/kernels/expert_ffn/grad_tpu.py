"""The weight gradient of a grouped product on TPU, as a kernel: sums of x^T ct over experts' rows.

XLA:TPU makes this gradient of lax.ragged_dot by masking all rows for every expert: E times the
FLOPs, and arrays of E x rows x width, the largest of a training step. Rows lie in whole blocks of
one expert each (sharding/experts.py), so the kernel only adds up blocks. For each tile of the
result, the grid walks through all blocks, which come in the order of their experts.

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
    # Experts without a block keep these zeros.
    zeros = vary_like(jnp.zeros((groups.group_sizes.shape[0], *widths), jnp.float32), x_PA)

    def rows(place):
        return lambda a, z, block, *_: (block, (a, z)[place])

    return pl.pallas_call(
        _add_block,
        out_shape=jax.ShapeDtypeStruct(
            zeros.shape, zeros.dtype, manual_axis_type=jax.typeof(x_PA).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(widths[0] // tiles[0], widths[1] // tiles[1], blocks),
            in_specs=[
                *(pl.BlockSpec((size, tile), rows(i)) for i, tile in enumerate(tiles)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(
                (None, *tiles), lambda a, z, block, expert, in_use: (expert[block], a, z)
            ),
        ),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(groups.block_expert, groups.blocks_in_use[None], x_PA, ct_PZ, zeros)


def _add_block(expert, in_use, x, ct, zeros, out):
    """Adds one block's product to a tile, which stays in fast memory as long as its expert does."""
    # The output is written over them (input_output_aliases).
    del zeros
    block = pl.program_id(2)

    @pl.when((block == 0) | (expert[block] != expert[jnp.maximum(block - 1, 0)]))
    def _start():
        out[...] = jnp.zeros_like(out)

    @pl.when(block < in_use[0])
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
