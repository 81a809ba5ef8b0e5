"""The k largest scores of each query, as a list of slots or as a mask.

Of equal scores the smaller slot wins, as in lax.top_k, in every implementation.

Shapes: B batch, T queries, C slots of entries, K chosen slots, P groups of neighbouring slots
(in `_places`: words), G slots of a group.
Next file to read: v4jax/kernels/top_k_tpu.py.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.counting import running_sum
from sharding.manual import vary_like
from v4jax.kernels.choice import pick
from v4jax.kernels.top_k_tpu import MOST_SLOTS, mask_in_kernel
from v4jax.kernels.tpu import on_tpu

FEW_QUERIES = 8
"""Fewer queries than this are decoding."""


class TopK(NamedTuple):
    """One implementation: of the list and of the mask."""

    best: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    mask: Callable[[jax.Array, int], jax.Array]


def top_k(
    score_BTC: jax.Array, k: int, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k best slots of each query, in any order.

    Args:
      score_BTC: float32.
      k: 1 to C.
      implementation: "reference", "bisection", "groups" or "pallas_tpu"; None: groups on CPU, where
        lax.top_k uses one core, unless there are few queries; otherwise lax.top_k.

    Returns:
      (scores, slots), float32 and int32 [B,T,K].

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation is None and score_BTC.shape[1] >= FEW_QUERIES:
        return jax.lax.platform_dependent(
            score_BTC,
            cpu=functools.partial(_best_of_groups, k=k),
            default=functools.partial(_best_reference, k=k),
        )
    return pick("top_k", IMPLEMENTATIONS, implementation, best="reference").best(score_BTC, k)


def top_k_mask(score_BTC: jax.Array, k: int, implementation: str | None = None) -> jax.Array:
    """Mask of the k largest scores of each query.

    Example: scores [3, 1, 3, 3], k 2 -> [True, False, True, False].

    Args:
      score_BTC: float32.
      k: 1 to C.
      implementation: "reference", "bisection", "groups" or "pallas_tpu"; None: "pallas_tpu" on TPU,
        for up to MOST_SLOTS slots, otherwise "bisection", which is what "groups" means here too.

    Returns:
      bool [B,T,C].

    Raises:
      ValueError: an unknown implementation.
    """
    best = "pallas_tpu" if on_tpu() and score_BTC.shape[2] <= MOST_SLOTS else "bisection"
    return pick("top_k", IMPLEMENTATIONS, implementation, best).mask(score_BTC, k)


def _best_reference(score_BTC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    score_BTK, slot_BTK = jax.lax.top_k(score_BTC, k)
    return score_BTK, slot_BTK


def _mask_reference(score_BTC: jax.Array, k: int) -> jax.Array:
    rank_BTC = jnp.argsort(jnp.argsort(-score_BTC, axis=-1, stable=True), axis=-1)
    return rank_BTC < k


def _mask_by_bisection(score_BTC: jax.Array, k: int) -> jax.Array:
    """`top_k_mask`: what exceeds the k-th largest score, and the first of those that equal it."""
    key_BTC = _sortable(score_BTC)
    kth = _kth_largest(key_BTC, k)
    above, level = key_BTC > kth, key_BTC == kth
    room = k - jnp.sum(above, axis=-1, keepdims=True)

    def some_of_level(_):
        return above | (level & (running_sum(level[..., None])[..., 0] <= room))

    # Usually all scores equal to the k-th fit, and nothing has to be counted.
    fits = jnp.all(jnp.sum(level, axis=-1, keepdims=True) == room)
    return jax.lax.cond(fits, lambda _: above | level, some_of_level, None)


def _sortable(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of the float32 numbers x; 0 and -0 have the same key."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _kth_largest(key_BTC: jax.Array, k: int) -> jax.Array:
    """The k-th largest key of each query, uint32 [B,T,1].

    Bits are settled from the highest down: a bit is 1 if at least k keys are still as large. On
    XLA:CPU this is faster than a sort, and counting in float32 (exact up to 2^24 keys) is faster
    than in int32.
    """

    def settle(n, kth):
        trial = kth | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
        return jnp.where(
            jnp.sum(key_BTC >= trial, axis=-1, keepdims=True, dtype=jnp.float32) >= k, trial, kth
        )

    return jax.lax.fori_loop(0, 32, settle, vary_like(jnp.zeros_like(key_BTC[..., :1]), key_BTC))


def _best_by_bisection(score_BTC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`top_k`, in the order of slots: where the mask is True."""
    slot_BTK = _places(_mask_by_bisection(score_BTC, k), k)
    return jnp.take_along_axis(score_BTC, slot_BTK, axis=-1), slot_BTK


def _mask_in_kernel(score_BTC: jax.Array, k: int) -> jax.Array:
    return mask_in_kernel(score_BTC, k, interpret=not on_tpu())


def _best_in_kernel(score_BTC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`top_k`, in the order of slots: where the mask is True."""
    slot_BTK = _places(_mask_in_kernel(score_BTC, k), k)
    return jnp.take_along_axis(score_BTC, slot_BTK, axis=-1), slot_BTK


def _best_of_groups(score_BTC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`top_k`, in the order of slots: the k groups of highest peak contain the k best slots."""
    batch, rows, slots = score_BTC.shape
    # About as many groups as there are slots in k groups.
    size = 1 << round(math.log2(slots / k) / 2)
    group_BTPG = jnp.pad(
        score_BTC, ((0, 0), (0, 0), (0, -slots % size)), constant_values=-jnp.inf
    ).reshape(batch, rows, -1, size)
    group_BTK = _places(_mask_by_bisection(group_BTPG.max(-1), k), k)
    near = jnp.take_along_axis(group_BTPG, group_BTK[..., None], axis=2).reshape(batch, rows, -1)
    place_BTK = _places(_mask_by_bisection(near, k), k)
    slot_BTK = jnp.take_along_axis(group_BTK, place_BTK // size, axis=-1) * size + place_BTK % size
    return jnp.take_along_axis(near, place_BTK, axis=-1), slot_BTK


def _places(mask_BTC: jax.Array, k: int) -> jax.Array:
    """Where the k True of each query's mask are, int32 [B,T,K], ascending.

    The mask is packed into words. Counting finds the word of the n-th True, then its bit, halving
    the word at each step.
    """
    bits = jnp.pad(mask_BTC, ((0, 0), (0, 0), (0, -mask_BTC.shape[-1] % 32))).reshape(
        *mask_BTC.shape[:2], -1, 32
    )
    value = (jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)).reshape(1, 1, 1, 32)
    word_BTP = jnp.sum(jnp.where(bits, value, 0), axis=-1, dtype=jnp.uint32)
    upto_BTP = jnp.cumsum(jax.lax.population_count(word_BTP).astype(jnp.int32), axis=-1)
    n = jnp.arange(k, dtype=jnp.int32).reshape(1, 1, k)
    at = jnp.sum(upto_BTP[..., None, :] <= n[..., None], axis=-1, dtype=jnp.int32)
    word = jnp.take_along_axis(word_BTP, at, axis=-1)
    n = n - jnp.take_along_axis(jnp.pad(upto_BTP, ((0, 0), (0, 0), (1, 0))), at, axis=-1)
    place = at * 32
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(word & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        up = n >= low
        word, n, place = (
            jnp.where(up, word >> half, word),
            jnp.where(up, n - low, n),
            place + jnp.where(up, half, 0),
        )
    return place


IMPLEMENTATIONS = {
    "reference": TopK(_best_reference, _mask_reference),
    "bisection": TopK(_best_by_bisection, _mask_by_bisection),
    "groups": TopK(_best_of_groups, _mask_by_bisection),
    "pallas_tpu": TopK(_best_in_kernel, _mask_in_kernel),
}
