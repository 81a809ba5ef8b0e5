"""Index scores and the choice of the best entries in one TPU kernel, for a block of queries.

The scores of a block never leave fast memory. There they are keys: int32 numbers in the order of
the scores. Each bit of the k-th largest is settled by counting, and of equal scores the smaller
slot wins, as in lax.top_k. Blocks of slots that no query of a block sees are left out.

The choice comes out as a mask, or as words of 32 bits: bit b of word w stands for slot b * P + w.

Shapes: B batch, S positions (padded to whole blocks), U blocks of queries, R queries of a block, C
entries (slots, padded), O slots of a block, I index heads, J index dim, K index heads times index
dim, P words of a query, T lanes of a vector.
Next file to read: v4jax/kernels/index_choice/slots_tpu.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.matmul import precision_of
from v4jax.kernels.top_k_tpu import LOWEST, sortable
from v4jax.kernels.tpu import LANES, NT, VMEM_BYTES

QUERIES = 128
"""Queries of a step."""

SLOTS = 512
"""Slots of a block."""

BITS = 32

HEADS = 8
"""Heads whose scores are added before they are written."""

_UNSEEN = -0x7F800001
"""The key of -inf: less than that of every number."""


class Search(NamedTuple):
    """Arrays that the kernel reads, and in the kernel the blocks of a step; None where is none.

    Attributes:
      q_BSK: the indexer's queries, in the dtype of the keys.
      w_BSI: float32, weights of the heads.
      key_BCJ: the indexer's keys.
      last_B1C: int32, index in the row of the last token of each entry.
      segment_BS1, segment_B1C: documents of queries and entries; None where each row is one.
    """

    q_BSK: Any
    w_BSI: Any
    key_BCJ: Any
    last_B1C: Any
    segment_BS1: Any = None
    segment_B1C: Any = None


class Form(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
      count: how many entries each query chooses.
      queries: of a step.
      slots: of a block.
      in_words: whether the choice comes out as words, not as a mask.
      interpret: run it step by step, on any platform (tests).
    """

    count: int
    queries: int
    slots: int
    in_words: bool
    interpret: bool


def best(form: Form, start_B: jax.Array, blocks_BU: jax.Array, x: Search) -> jax.Array:
    """The choice: int8 [B,S,C], or int32 words [B,S,P].

    Args:
      start_B: int32 [B or 1], index in the row of the first query.
      blocks_BU: int32 [B or 1,U], blocks of slots that hold all that a block of queries sees.
    """
    batch, rows, width = x.q_BSK.shape
    slots = x.key_BCJ.shape[1]
    lanes = min(LANES, form.slots)
    out = (slots // BITS, jnp.int32) if form.in_words else (slots, jnp.int8)

    def spec(one, block, place):
        if one is None:
            return None
        shared = one.shape[0] == 1
        return pl.BlockSpec((None, *block), lambda b, i, *_: (0 if shared else b, *place(i)))

    def row(i):
        return i, 0

    def whole(i):
        return 0, 0

    queries = form.queries
    found = jax.ShapeDtypeStruct(
        (batch, rows, out[0]), out[1], manual_axis_type=jax.typeof(x.q_BSK).manual_axis_type
    )
    return pl.pallas_call(
        functools.partial(_choose, form),
        out_shape=found,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, rows // queries),
            in_specs=[
                Search(
                    q_BSK=spec(x.q_BSK, (queries, width), row),
                    w_BSI=spec(x.w_BSI, (queries, x.w_BSI.shape[2]), row),
                    key_BCJ=spec(x.key_BCJ, x.key_BCJ.shape[1:], whole),
                    last_B1C=spec(x.last_B1C, (1, slots), whole),
                    segment_BS1=spec(x.segment_BS1, (queries, 1), row),
                    segment_B1C=spec(x.segment_B1C, (1, slots), whole),
                )
            ],
            out_specs=spec(found, (queries, out[0]), row),
            scratch_shapes=[
                pltpu.VMEM((queries, slots), jnp.int32),
                pltpu.VMEM((queries, form.slots), jnp.float32),
                pltpu.VMEM((queries, lanes), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * rows * width * slots,
            bytes_accessed=x.q_BSK.nbytes + x.key_BCJ.nbytes + found.size * found.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=form.interpret,
        name="index_choice",
    )(start_B, blocks_BU, x)


def _choose(form: Form, start_B, blocks_BU, x: Search, out, key_RC, score_RO, count_RT):
    """One step: the scores of a block of queries, then the bits of each one's k-th largest."""
    batch, unit = pl.program_id(0), pl.program_id(1)
    start = start_B[batch if start_B.shape[0] > 1 else 0] + unit * form.queries
    blocks = blocks_BU[batch if blocks_BU.shape[0] > 1 else 0, unit]
    lax.fori_loop(0, blocks, functools.partial(_write_scores, x, start, key_RC, score_RO), 0)
    size, lanes = score_RO.shape[1], count_RT.shape[1]

    def count(which) -> jax.Array:
        """How many keys of the blocks in use `which` is true for, exact in float32 up to 2^24."""
        count_RT[...] = jnp.zeros_like(count_RT)

        def some(block, nothing):
            here = pl.ds(pl.multiple_of(block * size, size), size)
            hit_RO = jnp.where(which(key_RC[:, here], block * size), 1.0, 0.0)
            parts = [hit_RO[:, n : n + lanes] for n in range(0, size, lanes)]
            count_RT[...] += functools.reduce(jnp.add, parts)
            return nothing

        lax.fori_loop(0, blocks, some, 0)
        return jnp.sum(count_RT[...], axis=1, keepdims=True)

    def settle(n, kth_R1):
        """A bit of the key, as if it had no sign, is 1 if at least k keys are still as large."""
        trial_R1 = kth_R1 | lax.shift_left(jnp.int32(1), 31 - n)
        large_R1 = count(lambda key_RO, first: key_RO >= (trial_R1 ^ LOWEST)) >= form.count
        return jnp.where(large_R1, trial_R1, kth_R1)

    none_R1 = jnp.zeros((form.queries, 1), jnp.int32)
    kth_R1 = lax.fori_loop(0, 32, settle, none_R1) ^ LOWEST
    left_R1 = form.count - count(lambda key_RO, first: key_RO > kth_R1)
    bits = key_RC.shape[1].bit_length()

    def level(key_RO, first, end_R1):
        slot_RO = first + lax.broadcasted_iota(jnp.int32, key_RO.shape, 1)
        return (key_RO == kth_R1) & (slot_RO < end_R1)

    def widen(n, end_R1):
        """A bit of the first slot that is not taken is 1 if all before it are not too many."""
        trial_R1 = end_R1 | lax.shift_left(jnp.int32(1), bits - 1 - n)
        taken_R1 = count(lambda key_RO, first: level(key_RO, first, trial_R1))
        return jnp.where(taken_R1 <= left_R1, trial_R1, end_R1)

    end_R1 = lax.fori_loop(0, bits, widen, none_R1)

    def chosen(key_RO, first):
        taken = (key_RO > kth_R1) | level(key_RO, first, end_R1)
        return taken & (key_RO > _UNSEEN)

    (_write_words if form.in_words else _write_mask)(form, key_RC, blocks, chosen, out)


def _write_scores(x: Search, start, key_RC, score_RO, block, nothing):
    """The keys of a block of slots."""
    rows, size = score_RO.shape
    here = pl.ds(pl.multiple_of(block * size, size), size)
    index_OJ = x.key_BCJ[here, :]
    heads, dim = x.w_BSI.shape[1], index_OJ.shape[1]
    group = max(n for n in range(1, HEADS + 1) if heads % n == 0)
    score_RO[...] = jnp.zeros_like(score_RO)
    for first in range(0, heads, group):
        parts = []
        for head in range(first, first + group):
            q_RJ = x.q_BSK[:, head * dim : (head + 1) * dim]
            dots_RO = lax.dot_general(
                q_RJ, index_OJ, NT, precision=precision_of(q_RJ), preferred_element_type=jnp.float32
            )
            parts.append(jnp.maximum(dots_RO, 0.0) * x.w_BSI[:, head : head + 1])
        score_RO[...] += functools.reduce(jnp.add, parts)
    position_RO = start + lax.broadcasted_iota(jnp.int32, (rows, size), 0)
    seen_RO = x.last_B1C[:, here] <= position_RO
    if x.segment_B1C is not None:
        seen_RO &= x.segment_BS1[...] == x.segment_B1C[:, here]
    key_RC[:, here] = jnp.where(seen_RO, sortable(score_RO[...]), _UNSEEN)
    return nothing


def _write_mask(form: Form, key_RC, blocks, chosen, mask_RC):
    """The mask, block by block; False for the blocks that no query sees."""
    size = form.slots

    def write(block, nothing):
        here = pl.ds(pl.multiple_of(block * size, size), size)
        taken = chosen(key_RC[:, here], block * size) & (block < blocks)
        mask_RC[:, here] = jnp.where(taken, 1, 0).astype(jnp.int8)
        return nothing

    lax.fori_loop(0, key_RC.shape[1] // size, write, 0)


def _write_words(form: Form, key_RC, blocks, chosen, word_RP):
    """The words: bit b of all words together are P slots that follow each other."""
    words = word_RP.shape[1]
    word_RP[...] = jnp.zeros_like(word_RP)

    def write(bit, nothing):
        here = pl.ds(pl.multiple_of(bit * words, words), words)
        slot_RP = bit * words + lax.broadcasted_iota(jnp.int32, word_RP.shape, 1)
        taken = chosen(key_RC[:, here], bit * words) & (slot_RP < blocks * form.slots)
        word_RP[...] |= lax.shift_left(jnp.where(taken, 1, 0), bit)
        return nothing

    lax.fori_loop(0, BITS, write, 0)
