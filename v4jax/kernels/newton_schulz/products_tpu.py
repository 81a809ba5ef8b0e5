"""The products of a Newton-Schulz step, in kernels for TPUs.

A symmetric product is computed in blocks on and above the diagonal; each block goes out twice, the
second time transposed, by copies that run while the next block is computed.

Shapes: Z matrices, R rows, K columns, T rows of a block, U columns of a block, J what a product
sums over.
Next file to read: v4jax/train/newton_schulz.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.tpu import NN, NT, VMEM_BYTES

SIDES = (512, 256, 128)
"""Sides of blocks, the best first."""

SUMMED = 4096
"""What a step of a symmetric product sums over at most."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sides of blocks: `rows` divides R, `columns` K. `interpret`: the kernels are interpreted."""

    rows: int
    columns: int
    interpret: bool

    def bytes(self, rows: int, columns: int, item: int) -> int:
        """Of fast memory that the larger kernel uses: inputs and outputs in two buffers each."""
        here, wide = self.rows, self.columns
        whole = 2 * item * rows * (here + wide)  # factors of `times`
        whole += 2 * here * wide * (4 + 4 + item)
        half = 4 * item * here * min(max(rows, SUMMED), max(rows, columns))
        half += 2 * here * here * (4 + 2 * (4 + item))
        return max(whole, half)


def symmetric(
    sizes: Sizes, factor_ZRJ: jax.Array, base_ZRR: jax.Array | None, bc: jax.Array, keep: bool
) -> list[jax.Array]:
    """b * base + c * factor factor^T: [Z,R,R] as a factor; with `keep` first in float32.

    Args:
      base_ZRR: float32, symmetric; None for 0.
      bc: float32 [2].
    """
    count, rows, summed = factor_ZRJ.shape
    block = sizes.rows
    part = summed if summed <= SUMMED else next(n for n in _parts(summed) if n <= SUMMED)
    above = np.array(np.triu_indices(rows // block), np.int32)
    dtypes = [jnp.float32] * keep + [factor_ZRJ.dtype]
    places = [
        pl.BlockSpec((None, block, part), lambda z, n, j, at, bc, side=side: (z, at[side, n], j))
        for side in (0, 1)
    ]
    inputs = [factor_ZRJ, factor_ZRJ]
    if base_ZRR is not None:
        inputs.append(base_ZRR)
        places.append(
            pl.BlockSpec((None, block, block), lambda z, n, j, at, bc: (z, at[0, n], at[1, n]))
        )
    structs = [_like(factor_ZRJ, (count, rows, rows), dtype) for dtype in dtypes]
    return pl.pallas_call(
        functools.partial(_symmetric, len(inputs), len(dtypes)),
        out_shape=structs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(count, above.shape[1], summed // part),
            in_specs=places,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(dtypes),
            scratch_shapes=[
                pltpu.VMEM((block, block), jnp.float32),
                *[pltpu.VMEM((2, block, block), dtype) for dtype in dtypes],
                pltpu.SemaphoreType.DMA((len(dtypes), 2)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(
            2 * above.shape[1] * block**2 * summed * count, [*inputs[1:], *structs]
        ),
        interpret=sizes.interpret,
        name="newton_schulz_symmetric",
    )(jnp.asarray(above), bc, *inputs)


def _parts(summed: int) -> list[int]:
    """Divisors of `summed`, the largest first; on TPUs multiples of 128 are among them."""
    return [summed // n for n in range(1, summed + 1) if summed % n == 0]


def _symmetric(inputs: int, outputs: int, at, bc, *refs):
    """One step: a part of a block's sum; after the last part the block is sent."""
    left_TJ, right_TJ, *base = refs[:inputs]
    out = refs[inputs : inputs + outputs]
    sum_TT, *sent, semaphores = refs[inputs + outputs :]
    z, n, j = (pl.program_id(axis) for axis in range(3))
    last = j == pl.num_programs(2) - 1

    def copies(n):
        """The copies of block `n`, and of the same transposed."""
        block = sum_TT.shape[0]
        first, second = (
            pl.ds(pl.multiple_of(at[side, n] * block, block), block) for side in (0, 1)
        )
        for o in range(outputs):
            for side, there in enumerate(((first, second), (second, first))):
                yield pltpu.make_async_copy(
                    sent[o].at[side], out[o].at[(z, *there)], semaphores.at[o, side]
                )

    def wait(n):
        for copy in copies(n):
            copy.wait()

    @pl.when(j == 0)
    def _():
        sum_TT[...] = jnp.zeros_like(sum_TT)

    _add(sum_TT, left_TJ, right_TJ, NT)

    @pl.when(last & (n > 0))
    def _():
        wait(n - 1)

    @pl.when(last)
    def _():
        block_TT = bc[1] * sum_TT[...]
        if base:
            block_TT = block_TT + bc[0] * base[0][...]
        turned_TT = block_TT.T
        for ref in sent:
            ref[0] = block_TT.astype(ref.dtype)
            ref[1] = turned_TT.astype(ref.dtype)
        for copy in copies(n):
            copy.start()

    @pl.when(last & (n == pl.num_programs(1) - 1))
    def _():
        wait(n)


def times(
    sizes: Sizes, polynomial_ZRR: jax.Array, factor_ZRK: jax.Array, x_ZRK: jax.Array, a: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """a x + polynomial factor: (float32, the same as a factor).

    Args:
      polynomial_ZRR: in the dtype of factors.
      a: float32 [1].
    """
    count, rows, columns = x_ZRK.shape
    here, wide = sizes.rows, sizes.columns
    block = pl.BlockSpec((None, here, wide), lambda z, k, r, a: (z, r, k))
    structs = tuple(_like(x_ZRK, x_ZRK.shape, dtype) for dtype in (jnp.float32, factor_ZRK.dtype))
    return pl.pallas_call(
        _times,
        out_shape=structs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, columns // wide, rows // here),
            in_specs=[
                pl.BlockSpec((None, here, rows), lambda z, k, r, a: (z, r, 0)),
                pl.BlockSpec((None, rows, wide), lambda z, k, r, a: (z, 0, k)),
                block,
            ],
            out_specs=(block, block),
            scratch_shapes=[pltpu.VMEM((here, wide), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(2 * rows * x_ZRK.size, [polynomial_ZRR, factor_ZRK, x_ZRK, *structs]),
        input_output_aliases={3: 0},  # a loop would copy the iterate
        interpret=sizes.interpret,
        name="newton_schulz_times",
    )(a, polynomial_ZRR, factor_ZRK, x_ZRK)


def _times(a, polynomial_TR, factor_RU, x_TU, new_TU, rounded_TU, sum_TU):
    sum_TU[...] = a[0] * x_TU[...]
    _add(sum_TU, polynomial_TR, factor_RU, NN)
    new_TU[...] = sum_TU[...]
    rounded_TU[...] = sum_TU[...].astype(rounded_TU.dtype)


def _add(total, left, right, contraction) -> None:
    """total += the product, a piece at a time: a whole one would be a very long program."""
    summed = left.shape[1]
    piece = next(n for n in (*SIDES, summed) if summed % n == 0)

    def one(n, _):
        here = pl.ds(pl.multiple_of(n * piece, piece), piece)
        other = right[:, here] if contraction == NT else right[here, :]
        total[...] += lax.dot_general(
            left[:, here], other, contraction, preferred_element_type=jnp.float32
        )
        return ()

    lax.fori_loop(0, summed // piece, one, ())


def _like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The shape of a result that varies over the mesh as `x` does."""
    manual = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)


def _cost(flops: int, arrays) -> pl.CostEstimate:
    """What XLA cannot see in a kernel, which moves each of these arrays once."""
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
