"""The mask of the k best slots as a TPU kernel: each bit is settled without leaving fast memory.

XLA runs three fusions for each of 32 bits, and starting one takes longer than its work on a chunk
of queries. Of equal scores the smaller slot wins, as in lax.top_k.

Shapes: B batch, T queries, R queries of a step, C slots of entries.
Next file to read: v4jax/kernels/sinkhorn.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sharding.manual import vary_like
from v4jax.kernels.tpu import LANES, VMEM_BYTES

ROWS = 32
"""Fewest queries of a step: vectors of 8-bit numbers have 32 rows."""

STEP_BYTES = 2**19
"""Most bytes of a step's scores, unless ROWS queries need more."""

MOST_SLOTS = 2**16
"""Most slots of a query: ROWS queries of them take half of a core's fast memory of 64 MiB."""

LOWEST = -(2**31)
"""The sign bit of an int32: keys with it flipped are in the order of numbers without a sign."""


def mask_in_kernel(score_BTC: jax.Array, k: int, interpret: bool) -> jax.Array:
    """Mask of the k largest scores of each query, bool [B,T,C]; see `top_k_mask`.

    Raises:
      ValueError: more than MOST_SLOTS slots.
    """
    batch, queries, slots = score_BTC.shape
    if slots > MOST_SLOTS:
        raise ValueError(
            f"kernels: top_k: got 'pallas_tpu' for {slots} slots; must be at most {MOST_SLOTS}"
        )
    rows = batch * queries
    score_RC = lax.stop_gradient(score_BTC).reshape(rows, slots)
    # Empty slots come last, so they lose every tie.
    wide = slots + -slots % LANES
    step = ROWS * max(1, min(STEP_BYTES // (4 * ROWS * wide), -(-rows // ROWS)))
    ends = ((0, -rows % step), (0, wide - slots))
    score_RC = jnp.pad(score_RC, ends, constant_values=-jnp.inf)
    block = pl.BlockSpec((step, wide), lambda i: (i, 0))
    mask_RC = pl.pallas_call(
        functools.partial(_mask, k),
        out_shape=jax.ShapeDtypeStruct(
            score_RC.shape, jnp.int8, manual_axis_type=jax.typeof(score_RC).manual_axis_type
        ),
        grid=(score_RC.shape[0] // step,),
        in_specs=[block],
        out_specs=block,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="top_k_mask",
    )(score_RC)
    return vary_like(mask_RC[:rows, :slots].reshape(score_BTC.shape) != 0, score_BTC)


def _mask(k: int, score_RC, mask_RC):
    """One step: bits of the k-th largest score, then of how many slots equal to it are taken."""
    key_RC = sortable(score_RC[...])
    slot_RC = lax.broadcasted_iota(jnp.int32, key_RC.shape, 1)

    def count(which_RC) -> jax.Array:
        """Exact in float32 up to 2^24 slots."""
        return jnp.sum(jnp.where(which_RC, 1.0, 0.0), axis=1, keepdims=True)

    def settle(n, kth_R1):
        """A bit of the key, as if it had no sign, is 1 if at least k keys are still as large."""
        trial_R1 = kth_R1 | lax.shift_left(jnp.int32(1), 31 - n)
        return jnp.where(count(key_RC >= (trial_R1 ^ LOWEST)) >= k, trial_R1, kth_R1)

    kth_R1 = lax.fori_loop(0, 32, settle, jnp.zeros((key_RC.shape[0], 1), jnp.int32)) ^ LOWEST
    above_RC, level_RC = key_RC > kth_R1, key_RC == kth_R1
    left_R1 = k - count(above_RC)
    bits = key_RC.shape[1].bit_length()

    def widen(n, end_R1):
        """A bit of the first slot that is not taken is 1 if all before it are not too many."""
        trial_R1 = end_R1 | lax.shift_left(jnp.int32(1), bits - 1 - n)
        fits_R1 = count(level_RC & (slot_RC < trial_R1)) <= left_R1
        return jnp.where(fits_R1, trial_R1, end_R1)

    end_R1 = lax.fori_loop(0, bits, widen, jnp.zeros_like(kth_R1))
    chosen_RC = above_RC | (level_RC & (slot_RC < end_R1))
    mask_RC[...] = jnp.where(chosen_RC, 1, 0).astype(jnp.int8)


def sortable(x: jax.Array) -> jax.Array:
    """int32 keys in the order of the float32 numbers x; 0 and -0 have the same key."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
