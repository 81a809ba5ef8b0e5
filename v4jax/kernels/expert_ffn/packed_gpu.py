"""The same for NVIDIA GPUs (v4jax/kernels/expert_ffn/packed_tpu.py says why): Pallas, Triton.

Shapes: P rows in blocks, E experts, A what is summed over, Y half of it, Z width of the result.
Next file to read: sharding/experts.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sharding.experts import Groups
from v4jax.kernels.expert_ffn import gpu
from v4jax.quant.packed import HALF, Packed, halves_of_inputs, mxfp4_exponent, mxfp4_value

DEPTH = 32
"""Rows of bytes that become numbers at a time: two blocks, 64 inputs."""

WIDE = 128
"""Widest tile of the result."""


def suits(x_PA: jax.Array, w: Packed, groups: Groups) -> bool:
    """Whether whole tiles cover the blocks and widths, and few enough blocks share an expert."""
    experts, deep, wide = w.shape
    blocks = groups.block_expert.shape[0]
    return (
        w.format == "mxfp4"
        and gpu.suits(x_PA.shape[0] // blocks, wide)
        and deep % (2 * DEPTH) == 0
        and blocks <= 2 * experts
    )


def grouped_dot(x_PA: jax.Array, w: Packed, groups: Groups, interpret: bool = False) -> jax.Array:
    """out[p] = x[p] w[expert of p], [P,Z] in the dtype of x; 0 for rows of blocks not in use.

    Sums are float32. The numbers of w are rounded to the dtype of x, which changes none.

    Args:
      w: MXFP4 [E,A,Z].
      interpret: run the kernel step by step on any platform (tests).
    """
    blocks, (_, deep, wide) = groups.block_expert.shape[0], w.shape
    size, tile = x_PA.shape[0] // blocks, gpu.tile_of(wide, WIDE)

    def one_tile(expert, in_use, low, high, codes, scale, out):
        block, columns = pl.program_id(0), pl.ds(pl.program_id(1) * tile, tile)

        def add(k, total):
            part = pl.ds(k * DEPTH, DEPTH)
            byte = codes[expert[block], part, columns].astype(jnp.int32)
            blocks_of_32 = pl.ds(k * (DEPTH // HALF), DEPTH // HALF)
            exponent = mxfp4_exponent(scale[expert[block], blocks_of_32, columns])
            of_byte = jnp.broadcast_to(exponent[:, None], (DEPTH // HALF, HALF, tile))
            of_byte = of_byte.reshape(DEPTH, tile)
            total += gpu.dot(low[:, part], mxfp4_value(byte, of_byte).astype(low.dtype))
            return total + gpu.dot(high[:, part], mxfp4_value(byte >> 4, of_byte).astype(low.dtype))

        steps = (block < in_use[0]).astype(jnp.int32) * (deep // 2 // DEPTH)
        total = lax.fori_loop(0, steps, add, jnp.zeros((size, tile), jnp.float32))
        out[...] = total.astype(out.dtype)

    rows = pl.BlockSpec((size, deep // 2), lambda block, z: (block, 0))
    low_PY, high_PY = halves_of_inputs(x_PA)
    return pl.pallas_call(
        one_tile,
        out_shape=gpu.like(x_PA, (x_PA.shape[0], wide), x_PA.dtype),
        grid=(blocks, wide // tile),
        in_specs=[*gpu.anywhere(2), rows, rows, *gpu.anywhere(2)],
        out_specs=pl.BlockSpec((size, tile), lambda block, z: (block, z)),
        compiler_params=gpu.options(x_PA),
        interpret=interpret,
        name="packed_grouped_dot",
    )(groups.block_expert, groups.blocks_in_use[None], low_PY, high_PY, w.codes, w.scale)
