"""Chosen entries that a kernel gathers for each query: what it reads, and how they lie.

All entries lie in fast memory. A row of H numbers is a few whole vectors of 32-bit words, so that
it can be read, and its gradient added to, at any place: two bfloat16 numbers share a word.

A step takes a block of Q queries with all their heads, as every head reads the same entries. In
fast memory its rows lie query by query, QN = Q * N, and a query's are then one matrix [N,H].

Shapes: B batch, S positions (padded to whole blocks), Q queries of a block, N heads, H head dim, M
width of all heads N * H, C entries, K chosen entries of a query, P vectors of a row, J lanes of
one, A vectors of a row in float32, T lanes of the rotation's tables, Z all chosen
entries B * S * K.
Next file to read: v4jax/kernels/fused_attention/gathered_forward.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.fused_attention.blocks import HIDDEN
from v4jax.kernels.fused_attention.steps import Form
from v4jax.kernels.tpu import LANES

BLOCK_BYTES = 2**20
"""Most bytes of a block's queries with all their heads."""

NOTHING = 8
"""Rows after the last entry: what a query reads that chooses fewer than K."""

SPARE_BYTES = 2**20
"""What else a kernel takes of fast memory, about."""

UNROLLED = 16
"""Rows that are read, or added to, without a look at the loop."""


class Gathered(NamedTuple):
    """Arrays that the kernels read, and in a kernel the blocks of a step.

    Attributes:
      q_BSM: queries, as the projection made them.
      cos_BST, sin_BST: float32, of a head's last T lanes; 1 and 0 where nothing is rotated.
      entry_BCPJ: entries, and NOTHING rows of zeros.
      slot_Z: int32, in scalar memory; the first row of zeros where a query chooses fewer than K.
      slot_BSK: int32, of each query; -1 likewise.
    """

    q_BSM: Any
    cos_BST: Any
    sin_BST: Any
    entry_BCPJ: Any
    slot_Z: Any
    slot_BSK: Any


def gathered(x, entry_BCH: jax.Array, slot_BSK: jax.Array) -> Gathered:
    """The arrays, of the queries and tables of fused attention's Operands.

    Args:
      x: Operands, padded to whole blocks.
      entry_BCH: entries.
      slot_BSK: int32, which ones each query attends to, each once; -1 for none.
    """
    batch, rows = x.q_BSM.shape[:2]
    entries = entry_BCH.shape[1]
    slot_BSK = jnp.broadcast_to(slot_BSK, (batch, *slot_BSK.shape[1:]))
    more = ((0, 0), (0, rows - slot_BSK.shape[1]), (0, 0))
    slot_BSK = jnp.pad(slot_BSK, more, constant_values=-1)
    slot_Z = jnp.where(slot_BSK < 0, entries, slot_BSK).reshape(-1)
    entry_BCH = jnp.pad(entry_BCH, ((0, 0), (0, NOTHING), (0, 0)))
    return Gathered(x.q_BSM, x.cos_BST, x.sin_BST, _in_words(entry_BCH), slot_Z, slot_BSK)


def _in_words(x_BCH: jax.Array) -> jax.Array:
    """Rows as vectors of 32 bits: [B,C,P,J], of bfloat16 number i and i + H/2 in a word."""
    words = x_BCH
    if x_BCH.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(x_BCH, jnp.uint16).astype(jnp.uint32)
        low, high = jnp.split(bits, 2, axis=2)
        words = lax.bitcast_convert_type(low | (high << 16), jnp.int32)
    lanes = min(LANES, words.shape[2])
    return words.reshape(*words.shape[:2], -1, lanes)


def from_words(row_KPJ, dtype) -> jax.Array:
    """The numbers [K,H] of a reference to gathered rows."""
    count, vectors, lanes = row_KPJ.shape
    flat = row_KPJ.reshape(count * vectors, lanes)
    parts = [flat[pl.ds(n, count, stride=vectors), :] for n in range(vectors)]
    if dtype != jnp.bfloat16:
        return jnp.concatenate(parts, axis=1)
    # The upper half of a float32 is a bfloat16.
    low = [lax.bitcast_convert_type(lax.shift_left(x, jnp.int32(16)), jnp.float32) for x in parts]
    high = [lax.bitcast_convert_type(x & jnp.int32(-(2**16)), jnp.float32) for x in parts]
    return jnp.concatenate([x.astype(dtype) for x in low + high], axis=1)


def block_of(form: Form, x: Gathered) -> int:
    """Queries of a block."""
    return _block(form.window, x.q_BSM.shape[2] * x.q_BSM.dtype.itemsize)


def _block(window: int, row_bytes: int) -> int:
    most = max(8, BLOCK_BYTES // row_bytes)
    return max(n for n in range(1, window + 1) if window % n == 0 and n <= most)


def gradient_bytes(q_BSNH, window: int, entries: int, chosen: int) -> int:
    """Fast memory that the gradient's kernel takes, which takes the most."""
    heads, dim = q_BSNH.shape[2:]
    size = q_BSNH.dtype.itemsize
    block = _block(window, heads * dim * size)
    # Queries, gradients of the output and of the queries, in two buffers; both kinds of rows.
    rows = block * heads * dim * (3 * 2 * size + 2 * 4)
    lists = chosen * dim * (size + 4)
    return (entries + NOTHING) * dim * (size + 4) + lists + rows + SPARE_BYTES


class Place(NamedTuple):
    """A step's place in the grid (batch, part, block of the part); parts are those of Step."""

    batch: Any
    unit: Any


def spec(block: tuple[int | None, ...], parts: int, where: Callable[[Place], tuple], **more) -> Any:
    """The BlockSpec of an operand whose first axis is the batch."""

    def index(b, p, i):
        return (b, *where(Place(b, i * parts + p)))

    return pl.BlockSpec((None, *block), index, **more)


def gathered_specs(x: Gathered, block: int, parts: int) -> Gathered:
    """The blocks of a step."""
    units, chosen = x.q_BSM.shape[1] // block, x.slot_BSK.shape[2]
    of = functools.partial(spec, parts=parts)

    def rows(at: Place):
        return at.unit, 0

    def whole(at: Place):
        return 0, 0, 0

    shared = x.cos_BST.shape[0] == 1
    table = pl.BlockSpec(
        (None, block, x.cos_BST.shape[2]), lambda b, p, i: (0 if shared else b, i * parts + p, 0)
    )
    return Gathered(
        q_BSM=of((block, x.q_BSM.shape[2]), where=rows),
        cos_BST=table,
        sin_BST=table,
        entry_BCPJ=of(x.entry_BCPJ.shape[1:], where=whole, pipeline_mode=pl.Buffered(1)),
        slot_Z=pl.BlockSpec(
            (block * chosen,), lambda b, p, i: (b * units + i * parts + p,), memory_space=pltpu.SMEM
        ),
        slot_BSK=of((block, chosen), where=rows),
    )


def fetch(x: Gathered, query, row_KPJ, first: Any = 0, count: int | None = None):
    """Copies the entries that a query of the block chose: all, or `count` from `first` on."""
    chosen = row_KPJ.shape[0]
    for k in range(chosen if count is None else count):
        row_KPJ[first + k] = x.entry_BCPJ[x.slot_Z[query * chosen + first + k]]


def unrolled_of(chosen: int) -> int:
    """Rows of one turn of a loop over the chosen entries."""
    return max(n for n in range(1, UNROLLED + 1) if chosen % n == 0)


def bias_of(x: Gathered, query) -> jax.Array:
    """0, or HIDDEN where the query chose nothing: float32 [1,K]."""
    return jnp.where(x.slot_BSK[pl.ds(query, 1), :] < 0, HIDDEN, 0.0)


def column(x_1N: jax.Array) -> jax.Array:
    """[1,N] as [N,1]."""
    count = x_1N.shape[1]
    row = lax.broadcasted_iota(jnp.int32, (count, count), 0)
    here = row == lax.broadcasted_iota(jnp.int32, (count, count), 1)
    return jnp.sum(jnp.where(here, x_1N, 0.0), axis=1, keepdims=True)


def row(x_N1: jax.Array) -> jax.Array:
    """[N,1] as [1,N]."""
    count = x_N1.shape[0]
    row = lax.broadcasted_iota(jnp.int32, (count, count), 0)
    here = row == lax.broadcasted_iota(jnp.int32, (count, count), 1)
    return jnp.sum(jnp.where(here, x_N1, 0.0), axis=0, keepdims=True)


class Rows(NamedTuple):
    """float32 rows of all heads of a block in fast memory, query by query: [A, QN, J]."""

    ref: Any
    heads: int

    def write_head(self, head, x_QH: jax.Array):
        """Puts a head's rows of all queries in their places."""
        lanes = self.ref.shape[2]
        for n in range(self.ref.shape[0]):
            here = pl.ds(head, x_QH.shape[0], stride=self.heads)
            self.ref.at[n][here, :] = x_QH[:, n * lanes : (n + 1) * lanes]

    def head(self, head, queries: int) -> jax.Array:
        """A head's rows of all queries, [Q,H]."""
        here = pl.ds(head, queries, stride=self.heads)
        parts = [self.ref.at[n][here, :] for n in range(self.ref.shape[0])]
        return jnp.concatenate(parts, axis=1)

    def query(self, query) -> jax.Array:
        """All heads of a query, [N,H]."""
        here = pl.ds(pl.multiple_of(query * self.heads, self.heads), self.heads)
        parts = [self.ref.at[n][here, :] for n in range(self.ref.shape[0])]
        return jnp.concatenate(parts, axis=1)

    def write_query(self, query, x_NH: jax.Array):
        """Puts all heads of a query in their places."""
        here = pl.ds(pl.multiple_of(query * self.heads, self.heads), self.heads)
        lanes = self.ref.shape[2]
        for n in range(self.ref.shape[0]):
            self.ref.at[n][here, :] = x_NH[:, n * lanes : (n + 1) * lanes]


def rows_memory(form: Form, block: int, dim: int) -> Any:
    """The memory of Rows."""
    lanes = min(LANES, dim)
    return pltpu.VMEM((dim // lanes, block * form.heads, lanes), jnp.float32)
