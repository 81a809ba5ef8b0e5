"""Grouped products with MXFP4 matrices on TPU, as a kernel that reads them where it multiplies.

Decoding is bound by bytes: a token reads every matrix that it needs once. Numbers written out in
bfloat16 would be four times the packed bytes, written and read again. Here an expert's codes travel
to fast memory, a tile at a time, and become numbers there; experts without rows are not read.

A byte holds numbers k and 16+k of a block of 32 inputs (v4jax/quant/packed.py). So the low and the
high halves of the bytes are two matrices, which belong to different inputs: x is parted likewise.

Shapes: P rows in blocks, E experts, A what is summed over, Y half of it, Z width of the result.
Next file to read: v4jax/kernels/expert_ffn/grad_tpu.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sharding.experts import Groups
from v4jax.kernels.expert_ffn.rows_tpu import TILES
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.tpu import LANES, NN
from v4jax.quant.packed import HALF, Packed, halves_of_inputs, mxfp4_exponent, mxfp4_value

DEPTHS = (256, 128, 64)
"""Rows of bytes that become numbers at a time, the best first: their numbers fill registers."""


def suits(x_PA: jax.Array, w: Packed, groups: Groups) -> bool:
    """Whether whole vectors cover the blocks and widths, and few enough blocks share an expert."""
    experts, deep, wide = w.shape
    blocks = groups.block_expert.shape[0]
    return (
        w.format == "mxfp4"
        and x_PA.shape[0] // blocks % 16 == 0
        and deep % (2 * DEPTHS[-1]) == 0
        and wide % LANES == 0
        and blocks <= 2 * experts
    )


def grouped_dot(x_PA: jax.Array, w: Packed, groups: Groups, interpret: bool = False) -> jax.Array:
    """out[p] = x[p] w[expert of p], [P,Z] in the dtype of x; anything in blocks not in use.

    Sums are float32. The numbers of w are rounded to the dtype of x, which changes none.

    Args:
      w: MXFP4 [E,A,Z].
      interpret: run the kernel step by step on any platform (tests).
    """
    experts, deep, wide = w.shape
    blocks = groups.block_expert.shape[0]
    size = x_PA.shape[0] // blocks
    tile = next((n for n in TILES if wide % n == 0), wide)

    def last(block, in_use):
        """Blocks not in use bring nothing new."""
        return jnp.minimum(block, jnp.maximum(in_use[0] - 1, 0))

    def rows(z, block, expert, in_use):
        return last(block, in_use), 0

    def matrix(z, block, expert, in_use):
        return expert[last(block, in_use)], 0, z

    x_PY = pl.BlockSpec((size, deep // 2), rows)
    low_PY, high_PY = halves_of_inputs(x_PA)
    struct = jax.ShapeDtypeStruct(
        (x_PA.shape[0], wide), x_PA.dtype, manual_axis_type=jax.typeof(x_PA).manual_axis_type
    )
    read = min(blocks, experts) / experts
    return pl.pallas_call(
        _one_block,
        out_shape=struct,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(wide // tile, blocks),
            in_specs=[
                x_PY,
                x_PY,
                pl.BlockSpec((None, deep // 2, tile), matrix),
                pl.BlockSpec((None, deep // 2 // HALF, tile), matrix),
            ],
            out_specs=pl.BlockSpec((size, tile), lambda z, block, *_: (block, z)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # if all blocks are in use, each by another expert
            flops=2 * x_PA.size * wide,
            bytes_accessed=int(read * (w.codes.size + w.scale.size))
            + (x_PA.size + struct.size) * x_PA.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="packed_grouped_dot",
    )(groups.block_expert, groups.blocks_in_use[None], low_PY, high_PY, w.codes, w.scale)


def _one_block(expert, in_use, low, high, codes, scale, out):
    del expert
    depth = next(n for n in DEPTHS if codes.shape[0] % n == 0)

    @pl.when(pl.program_id(1) < in_use[0])
    def _():
        exponents = mxfp4_exponent(scale[...])
        total = jnp.zeros(out.shape, jnp.float32)
        for start in range(0, codes.shape[0], depth):
            part = slice(start, start + depth)
            byte = codes[part].astype(jnp.int32)
            blocks = exponents[start // HALF : (start + depth) // HALF, None]
            of_byte = jnp.broadcast_to(blocks, (depth // HALF, HALF, out.shape[1]))
            of_byte = of_byte.reshape(byte.shape)
            total += _dot(low[:, part], mxfp4_value(byte, of_byte))
            total += _dot(high[:, part], mxfp4_value(byte >> 4, of_byte))
        out[...] = total.astype(out.dtype)


def _dot(x, w):
    return lax.dot_general(
        x, w.astype(x.dtype), NN, precision=precision_of(x), preferred_element_type=jnp.float32
    )
