"""Grouped products of rows on TPU, as a kernel: x w, and their gradients ct w^T, added up.

lax.ragged_dot wants matrices turned around for the gradient: XLA:TPU copies all of them in each
layer. The kernel reads them as they lie, adds the gradients of products that share their rows, and
leaves out blocks that are not in use.

Shapes: P rows in blocks, E experts, A what is summed over, Z width of the result.
Next file to read: v4jax/kernels/expert_ffn/grad_tpu.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sharding.experts import Groups
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.tpu import LANES, NN, NT, VMEM_BYTES

TILES = (512, 256, 128)
"""Widths of tiles of the result, the best first."""


def suits(pairs, groups: Groups) -> bool:
    """Whether whole vectors cover the blocks and widths of `pairs`, and fast memory holds a step.

    Args:
      pairs: rows and matrices, as the products below take them.
    """
    rows = pairs[0][0].shape[0] // groups.block_expert.shape[0]
    deep = sum(x_PA.shape[1] for x_PA, _ in pairs)
    numbers = deep * (rows + TILES[0]) + rows * TILES[0]
    return (
        rows % 16 == 0
        and all(n % LANES == 0 for _, w in pairs for n in w.shape[1:])
        and 2 * numbers * pairs[0][0].dtype.itemsize <= VMEM_BYTES  # two buffers each
    )


def grouped_dot(
    x_PA: jax.Array, w_EAZ: jax.Array, groups: Groups, interpret: bool = False
) -> jax.Array:
    """out[p] = x[p] w[expert of p], [P,Z] in the dtype of x; anything in blocks not in use.

    Sums are float32. interpret: run the kernel step by step on any platform (tests).
    """
    return _grouped(((x_PA, w_EAZ),), NN, groups, interpret)


def grouped_back(
    pairs: tuple[tuple[jax.Array, jax.Array], ...], groups: Groups, interpret: bool = False
) -> jax.Array:
    """out[p] = sum over (ct, w) of ct[p] w[expert of p]^T, [P,Z]; likewise.

    Args:
      pairs: ct [P,A] and w [E,Z,A], whose A may differ from pair to pair.
    """
    return _grouped(pairs, NT, groups, interpret)


def last(block, in_use):
    """The block whose rows and matrix a step reads: blocks not in use bring nothing new."""
    return jnp.minimum(block, jnp.maximum(in_use[0] - 1, 0))


def _grouped(pairs, contraction, groups: Groups, interpret: bool) -> jax.Array:
    first, w = pairs[0]
    wide = w.shape[2 if contraction == NN else 1]
    blocks = groups.block_expert.shape[0]
    size = first.shape[0] // blocks
    tile = next((n for n in TILES if wide % n == 0), wide)

    def rows(z, block, expert, in_use):
        return last(block, in_use), 0

    def matrix(z, block, expert, in_use):
        e = expert[last(block, in_use)]
        return (e, 0, z) if contraction == NN else (e, z, 0)

    places = []
    for x_PA, _ in pairs:
        deep = x_PA.shape[1]
        shape = (deep, tile) if contraction == NN else (tile, deep)
        places += [pl.BlockSpec((size, deep), rows), pl.BlockSpec((None, *shape), matrix)]
    struct = jax.ShapeDtypeStruct(
        (first.shape[0], wide), first.dtype, manual_axis_type=jax.typeof(first).manual_axis_type
    )
    arrays = [x for pair in pairs for x in pair]
    return pl.pallas_call(
        functools.partial(_one_block, contraction),
        out_shape=struct,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(wide // tile, blocks),
            in_specs=places,
            out_specs=pl.BlockSpec((size, tile), lambda z, block, *_: (block, z)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(  # if all blocks are in use
            flops=sum(2 * x.size * wide for x, _ in pairs),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, struct)),
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_dot" if contraction == NN else "grouped_back",
    )(groups.block_expert, groups.blocks_in_use[None], *arrays)


def _one_block(contraction, expert, in_use, *refs):
    del expert
    *inputs, out = refs

    @pl.when(pl.program_id(1) < in_use[0])
    def _():
        parts = [
            lax.dot_general(
                x[...],
                w[...],
                contraction,
                precision=precision_of(x),
                preferred_element_type=jnp.float32,
            )
            for x, w in zip(inputs[::2], inputs[1::2], strict=True)
        ]
        out[...] = sum(parts[1:], parts[0]).astype(out.dtype)
