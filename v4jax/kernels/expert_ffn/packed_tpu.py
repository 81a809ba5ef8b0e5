"""Grouped products with MXFP4 matrices on TPU, as a kernel that reads them where it multiplies.

Decoding is bound by bytes: a token reads every matrix that it needs once. Numbers written out in
bfloat16 would be four times the packed bytes, written and read again. Here an expert's codes travel
to fast memory, a tile at a time, and become numbers there, once for all blocks of its rows. Experts
without rows are not read.

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
from v4jax.kernels.expert_ffn.rows_tpu import TILES, last
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.tpu import LANES, NN, VMEM_BYTES
from v4jax.quant.packed import HALF, Packed, halves_of_inputs, mxfp4_exponent, mxfp4_value

LEAST = 16
"""Fewest rows of a block in the kernel; smaller ones are filled."""

DEPTHS = (256, 128, 64)
"""Rows of bytes that become numbers at a time, the best first: their numbers fill registers."""


def suits(x_PA: jax.Array, w: Packed, groups: Groups) -> bool:
    """Whether whole vectors cover the widths, and fast memory holds a step."""
    _, deep, wide = w.shape
    rows = max(LEAST, x_PA.shape[0] // groups.block_expert.shape[0])
    size = x_PA.dtype.itemsize
    need = 2 * rows * (deep + TILES[0]) * size + deep * TILES[0] * (size + 2)  # codes and sums too
    whole = deep % (2 * DEPTHS[-1]) == 0 and wide % LANES == 0
    return w.format == "mxfp4" and whole and need <= VMEM_BYTES


def in_whole_blocks(x_PA: jax.Array, blocks: int) -> jax.Array:
    """Rows whose blocks are filled with zeros to a multiple of LEAST rows each."""
    size = x_PA.shape[0] // blocks
    parts = x_PA.reshape(blocks, size, -1)
    return jnp.pad(parts, ((0, 0), (0, -size % LEAST), (0, 0))).reshape(-1, x_PA.shape[1])


def without_filler(y_PZ: jax.Array, blocks: int, size: int) -> jax.Array:
    """The first `size` rows of each block."""
    return y_PZ.reshape(blocks, -1, y_PZ.shape[1])[:, :size].reshape(blocks * size, -1)


def grouped_dot(x_PA: jax.Array, w: Packed, groups: Groups, interpret: bool = False) -> jax.Array:
    """out[p] = x[p] w[expert of p], [P,Z] in the dtype of x; anything in blocks not in use.

    Sums are float32. The numbers of w are rounded to the dtype of x, which changes none.

    Args:
      w: MXFP4 [E,A,Z].
      interpret: run the kernel step by step on any platform (tests).
    """
    experts, deep, wide = w.shape
    blocks = groups.block_expert.shape[0]
    given = x_PA.shape[0] // blocks
    x_PA = in_whole_blocks(x_PA, blocks)
    size = x_PA.shape[0] // blocks
    tile = next((n for n in TILES if wide % n == 0), wide)

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
    out_PZ = pl.pallas_call(
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
            scratch_shapes=[pltpu.VMEM((2, deep // 2, tile), x_PA.dtype)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(  # if all blocks are in use, each by another expert
            flops=2 * x_PA.size * wide,
            bytes_accessed=int(read * (w.codes.size + w.scale.size))
            + (x_PA.size + struct.size) * x_PA.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="packed_grouped_dot",
    )(groups.block_expert, groups.blocks_in_use[None], low_PY, high_PY, w.codes, w.scale)
    return without_filler(out_PZ, blocks, given)


def _one_block(expert, in_use, low, high, codes, scale, out, numbers):
    block = pl.program_id(1)
    used, before = block < in_use[0], jnp.maximum(block - 1, 0)

    @pl.when(used & ((block == 0) | (expert[block] != expert[before])))
    def _():
        _read(codes, scale, numbers)

    @pl.when(used)
    def _():
        out[...] = (_dot(low[...], numbers[0]) + _dot(high[...], numbers[1])).astype(out.dtype)


def _read(codes, scale, numbers) -> None:
    """Puts the numbers of a tile where products read them: low halves, then high ones."""
    depth = next(n for n in DEPTHS if codes.shape[0] % n == 0)
    exponents = mxfp4_exponent(scale[...])
    for start in range(0, codes.shape[0], depth):
        part = slice(start, start + depth)
        byte = codes[part].astype(jnp.int32)
        blocks = exponents[start // HALF : (start + depth) // HALF, None]
        of_byte = jnp.broadcast_to(blocks, (depth // HALF, HALF, byte.shape[1]))
        of_byte = of_byte.reshape(byte.shape)
        numbers[0, part] = mxfp4_value(byte, of_byte).astype(numbers.dtype)
        numbers[1, part] = mxfp4_value(byte >> 4, of_byte).astype(numbers.dtype)


def _dot(x, w):
    return lax.dot_general(x, w, NN, precision=precision_of(x), preferred_element_type=jnp.float32)
