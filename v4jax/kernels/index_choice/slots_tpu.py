"""The places of the bits that are 1 in each query's words, as a list, in a TPU kernel.

The n-th is in the first word up to which more than n are 1; which of its bits it is, halving tells.

Shapes: B batch, S positions, R queries of a step, P words of a query, K places.
Next file to read: v4jax/kernels/sinkhorn.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.tpu import NN, VMEM_BYTES


def places(word_BSP: jax.Array, count: int, queries: int, interpret: bool) -> jax.Array:
    """int32 [B,S,K], in any order: bit b of word w is at b * P + w. -1 where there are fewer.

    Args:
      count: K, at least as many as a query has.
      queries: of a step; S is a multiple.
    """
    batch, rows, words = word_BSP.shape
    word_BPS = jnp.moveaxis(word_BSP, 1, 2)
    return pl.pallas_call(
        functools.partial(_places, count),
        out_shape=jax.ShapeDtypeStruct(
            (batch, rows, count), jnp.int32, manual_axis_type=jax.typeof(word_BSP).manual_axis_type
        ),
        grid=(batch, rows // queries),
        in_specs=[pl.BlockSpec((None, words, queries), lambda b, i: (b, 0, i))],
        out_specs=pl.BlockSpec((None, queries, count), lambda b, i: (b, i, 0)),
        scratch_shapes=[
            pltpu.VMEM((words, queries), jnp.float32),
            *[pltpu.VMEM((queries, count), jnp.int32)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="index_choice_places",
    )(word_BPS)


def _places(count: int, word_PR, place_RK, upto_PR, found_RK, left_RK):
    """One step: the word of each place, query by query, then its bit."""
    words, queries = word_PR.shape
    ones_PR = lax.population_count(word_PR[...]).astype(jnp.float32)
    row = lax.broadcasted_iota(jnp.int32, (words, words), 0)
    before = jnp.where(lax.broadcasted_iota(jnp.int32, (words, words), 1) <= row, 1.0, 0.0)
    # Both factors are at most 32, so they are exact in bfloat16.
    upto_PR[...] = lax.dot_general(before, ones_PR, NN, preferred_element_type=jnp.float32)

    def one(query, nothing):
        here_PR = lax.broadcasted_iota(jnp.int32, (words, queries), 1) == query
        word_P1 = jnp.sum(jnp.where(here_PR, word_PR[...], 0), axis=1, keepdims=True)
        upto_P1 = jnp.sum(jnp.where(here_PR, upto_PR[...], 0.0), axis=1, keepdims=True)
        before_P1 = upto_P1.astype(jnp.int32) - lax.population_count(word_P1)
        n_PK = lax.broadcasted_iota(jnp.int32, (words, count), 1)
        left_PK = n_PK - before_P1
        first_PK = (left_PK >= 0) & (n_PK < upto_P1.astype(jnp.int32))
        which_PK = lax.broadcasted_iota(jnp.int32, (words, count), 0)
        here = pl.ds(query, 1)
        found_RK[here, :] = jnp.sum(jnp.where(first_PK, word_P1, 0), axis=0, keepdims=True)
        left_RK[here, :] = jnp.sum(jnp.where(first_PK, left_PK, 0), axis=0, keepdims=True)
        place_RK[here, :] = jnp.sum(jnp.where(first_PK, which_PK, 0), axis=0, keepdims=True)
        return nothing

    lax.fori_loop(0, queries, one, 0)
    word_RK, left = found_RK[...], left_RK[...]
    there_RK, bit_RK = word_RK != 0, jnp.zeros_like(word_RK)
    for half in (16, 8, 4, 2, 1):
        low_RK = lax.population_count(word_RK & jnp.int32((1 << half) - 1))
        up_RK = left >= low_RK
        word_RK = jnp.where(up_RK, lax.shift_right_logical(word_RK, jnp.int32(half)), word_RK)
        left = jnp.where(up_RK, left - low_RK, left)
        bit_RK = bit_RK + jnp.where(up_RK, half, 0)
    place_RK[...] = jnp.where(there_RK, bit_RK * words + place_RK[...], -1)
