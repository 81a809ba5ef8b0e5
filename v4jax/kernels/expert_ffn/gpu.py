"""Grouped products on NVIDIA GPUs, as kernels (Pallas, Triton), and when they can be used.

`grouped_dot` multiplies rows by their experts' matrices, `grouped_back` is its gradient for rows,
`grouped_outer` the one for matrices.
Rows lie in whole blocks of one expert each (sharding/experts.py), so each block is an ordinary
matrix product. XLA:GPU makes lax.ragged_dot by masking all rows for every expert. In a loop over
blocks it starts several kernels at each turn and asks the GPU whether to go on. Both are many times
slower (v4jax/kernels/README.md).

Shapes: P rows in blocks, E experts, A and Z widths of the two factors.
Next file to read: sharding/experts.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sharding.experts import Groups
from v4jax.kernels.matmul import precision_of

DEPTH = 64
"""A program makes one tile of the result, and multiplies at most this deep in one step."""

WIDE, SQUARE = 256, 128
"""Widest tiles of products with matrices, and of `grouped_outer`: the fastest that fit a GPU's
shared memory."""

LEAST = 16
"""Tensor cores take no narrower tiles."""


def suits(*widths: int) -> bool:
    """Whether whole tiles can cover these widths (and rows of a block)."""
    return all(width % LEAST == 0 for width in widths)


def grouped_dot(
    x_PA: jax.Array, w_EAZ: jax.Array, groups: Groups, interpret: bool = False
) -> jax.Array:
    """out[p] = x[p] w[expert of p], [P,Z] in the dtype of x; 0 for rows of blocks not in use.

    Sums are float32. interpret: run the kernel step by step on any platform (tests).
    """

    def part(w, expert, deep, columns):
        return w[expert, deep, columns]

    return _grouped(part, w_EAZ.shape[2], x_PA, w_EAZ, groups, interpret)


def grouped_back(
    ct_PZ: jax.Array, w_EAZ: jax.Array, groups: Groups, interpret: bool = False
) -> jax.Array:
    """out[p] = ct[p] w[expert of p]^T, [P,A]; likewise.

    It reads matrices as they lie. XLA:GPU would turn all of them around in memory, and those of all
    layers before a loop over layers.
    """

    def part(w, expert, deep, columns):
        return w[expert, columns, deep].T

    return _grouped(part, w_EAZ.shape[1], ct_PZ, w_EAZ, groups, interpret)


def _grouped(part_of, wide: int, x_PA, w, groups: Groups, interpret: bool) -> jax.Array:
    """Rows times their experts' matrices, [P,wide].

    Args:
      part_of: (w, expert, rows, columns) -> that part of the matrix that rows multiply.
    """
    blocks, (rows, deep) = groups.block_expert.shape[0], x_PA.shape
    size, tile, depth = rows // blocks, tile_of(wide, WIDE), tile_of(deep, DEPTH)

    def one_tile(expert, in_use, x, w, out):
        block, columns = pl.program_id(0), pl.ds(pl.program_id(1) * tile, tile)

        def add(k, total):
            part = pl.ds(k * depth, depth)
            return total + dot(x[:, part], part_of(w, expert[block], part, columns))

        steps = (block < in_use[0]).astype(jnp.int32) * (deep // depth)
        out[...] = lax.fori_loop(0, steps, add, jnp.zeros((size, tile), jnp.float32)).astype(
            out.dtype
        )

    return pl.pallas_call(
        one_tile,
        out_shape=like(x_PA, (rows, wide), x_PA.dtype),
        grid=(blocks, wide // tile),
        in_specs=[
            *anywhere(2),
            pl.BlockSpec((size, deep), lambda block, z: (block, 0)),
            *anywhere(1),
        ],
        out_specs=pl.BlockSpec((size, tile), lambda block, z: (block, z)),
        compiler_params=options(x_PA),
        interpret=interpret,
    )(groups.block_expert, groups.blocks_in_use[None], x_PA, w)


def grouped_outer(
    x_PA: jax.Array, ct_PZ: jax.Array, groups: Groups, interpret: bool = False
) -> jax.Array:
    """out[e] = sum over rows p of expert e of x[p]^T ct[p], float32 [E,A,Z]; 0 without rows."""
    widths = x_PA.shape[1], ct_PZ.shape[1]
    size, tiles = (
        x_PA.shape[0] // groups.block_expert.shape[0],
        tuple(tile_of(width, SQUARE) for width in widths),
    )
    blocks_E = groups.group_sizes // size
    last_E = jnp.cumsum(blocks_E)

    def one_tile(first, last, x, ct, out):
        expert = pl.program_id(0)
        columns = tuple(pl.ds(pl.program_id(1 + i) * tile, tile) for i, tile in enumerate(tiles))

        def add(block, total):
            rows = pl.ds(block * size, size)
            return total + dot(x[rows, columns[0]].T, ct[rows, columns[1]])

        out[...] = lax.fori_loop(first[expert], last[expert], add, jnp.zeros(tiles, jnp.float32))

    return pl.pallas_call(
        one_tile,
        out_shape=like(x_PA, (groups.group_sizes.shape[0], *widths), jnp.float32),
        grid=(
            groups.group_sizes.shape[0],
            *(width // tile for width, tile in zip(widths, tiles, strict=True)),
        ),
        in_specs=anywhere(4),
        out_specs=pl.BlockSpec((None, *tiles), lambda expert, a, z: (expert, a, z)),
        compiler_params=options(x_PA),
        interpret=interpret,
    )(last_E - blocks_E, last_E, x_PA, ct_PZ)


def dot(a, b):
    """a b with sums in float32, inside a kernel."""
    return lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=precision_of(a),
        preferred_element_type=jnp.float32,
    )


def tile_of(width: int, limit: int) -> int:
    """The largest power of two that cuts `width` evenly, up to `limit`."""
    return min(width & -width, limit)


def anywhere(count: int) -> list[pl.BlockSpec]:
    """Specs of arrays that a program indexes itself."""
    return [pl.BlockSpec(memory_space=pl.ANY)] * count


def like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """What a kernel returns that varies over the mesh as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def options(x: jax.Array) -> plgpu.CompilerParams:
    """How kernels on rows of the dtype of x are compiled."""
    # Tiles of float32 fill twice the memory.
    wide = x.dtype == jnp.float32
    return plgpu.CompilerParams(num_warps=8, num_stages=2 if wide else 3)
