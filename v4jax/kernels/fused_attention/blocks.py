"""What the two kernels of fused attention share: operands, the cut into steps, masks, rotation.

A step takes a block of W queries and a group of their heads. A head is H aligned lanes of the
projection's own layout [S, N*H], so nothing is transposed on the way in. The output comes in groups
of heads, [G, S, I], as the next product wants it. The W queries of
every head of the group lie below each other, head after head: R rows.

What a query may see is the same for all heads. It is written once for each block of queries, as a
bias of 0 or HIDDEN that is added to scores.

Shapes: B batch, S positions (padded to whole blocks), U blocks of queries, W window (and queries of
a block), Y window keys (W, then S), N heads, H head dim, M width of all heads N * H, G groups of
heads, I width of a group, C entries (padded), T lanes of the rotation's tables, R rows of a step, K
keys.
Next file to read: v4jax/kernels/fused_attention/forward.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.matmul import precision_of

LANES = 128
"""Width of a TPU's vectors."""

HEADS = 4
"""Most heads of a group: 4 times 128 rows keep the matrix units busy."""

ENTRIES = 512
"""Most entries of a product; later ones that no query of a block sees are skipped."""

VMEM_BYTES = 62 * 2**20
"""What a kernel may use of a core's fast memory: 64 MiB on v5p and TPU7x, 128 on v5e and v6e."""

HIDDEN = -1e30
"""Added to the score of a key that a query does not see. It is finite, so no sum is NaN."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
"""Contractions: a b^T, a b and a^T b."""


class Form(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      heads: heads of this device.
      together: heads that lie beside each other in the output: those of an output group.
      window: keys that a query sees of the raw tokens, itself included; queries of a block too.
      eps: of the queries' RMS norm.
      interpret: run the kernel step by step, on any platform (tests).
    """

    heads: int
    together: int
    window: int
    eps: float
    interpret: bool

    @property
    def group(self) -> int:
        """Heads of a step."""
        return max(n for n in range(1, HEADS + 1) if self.together % n == 0)

    def in_output(self, at: "Step") -> tuple[Any, ...]:
        """Where the output of a step lies, in blocks of [G, S, I]."""
        steps = self.together // self.group
        return at.group // steps, at.unit, at.group % steps


class Operands(NamedTuple):
    """Arrays that the kernels read, and in a kernel the blocks of a step; None where there is none.

    Attributes:
      q_BSM: queries, as the projection made them.
      kv_BYH: window keys/values; in a kernel the W before the block.
      own_BYH: the same array; in a kernel those of the block.
      cos_BST, sin_BST: float32, of a head's last T lanes; 1 and 0 where nothing is rotated.
      sink_N: float32, in scalar memory.
      entry_BCH: entries.
      last_B1C: int32, index in the row of the last token of each entry.
      chosen_BSC: int8, which entries a query attends to; None: those that it sees.
      segment_BS1, segment_B1Y, own_segment_B1Y, segment_B1C: documents of queries, window keys
        (before the block, and of the block) and entries; None where each row is one document.
    """

    q_BSM: Any
    kv_BYH: Any
    cos_BST: Any
    sin_BST: Any
    sink_N: Any
    own_BYH: Any = None
    entry_BCH: Any = None
    last_B1C: Any = None
    chosen_BSC: Any = None
    segment_BS1: Any = None
    segment_B1Y: Any = None
    own_segment_B1Y: Any = None
    segment_B1C: Any = None

    def with_own(self) -> "Operands":
        """Window keys, and their documents, a second time: for the block beside the W before it."""
        return self._replace(own_BYH=self.kv_BYH, own_segment_B1Y=self.segment_B1Y)


class Scalars(NamedTuple):
    """Numbers that steer the kernels.

    Attributes:
      start_B: int32, index in the row of the first query; one for all rows of the batch, or each.
      blocks_BU: int32, blocks of entries that hold all that a block of queries sees; likewise.
    """

    start_B: Any
    blocks_BU: Any

    def of(self, at: "Step", window: int) -> tuple[Any, Any]:
        """(index in the row of the step's first query, blocks of entries that its queries see)."""
        row = at.batch if self.start_B.shape[0] > 1 else 0
        first = self.start_B[row] + at.unit * window
        row = at.batch if self.blocks_BU.shape[0] > 1 else 0
        return first, self.blocks_BU[row, at.unit]


class Step(NamedTuple):
    """Place of a step in the grid (batch, part, block of the part, group of heads).

    Part p of P has the blocks p, P + p, ...: where two cores share the work, each gets as many
    entries to attend to as the other.
    """

    batch: Any
    unit: Any
    group: Any


def parts_of(units: int) -> int:
    """Parts of the grid that may run at the same time, on the two cores of a chip."""
    return 2 if units % 2 == 0 else 1


def step(parts: int) -> Step:
    """The place of the step that runs."""
    return Step(pl.program_id(0), pl.program_id(2) * parts + pl.program_id(1), pl.program_id(3))


def spec(x: Any, block: tuple[int | None, ...], place: Callable[[Step], tuple], parts: int) -> Any:
    """The BlockSpec of an operand whose first axis is the batch; an axis of 1 serves all rows."""
    if x is None:
        return None
    whole_batch = x.shape[0] == 1

    def index(b, p, i, g, *_):
        at = Step(b, i * parts + p, g)
        return (0 if whole_batch else b, *place(at))

    return pl.BlockSpec((None, *block), index)


def operand_specs(form: Form, x: Operands, parts: int) -> Operands:
    """The blocks of a step."""
    window, dim = form.window, x.kv_BYH.shape[2]
    entries = 0 if x.entry_BCH is None else x.entry_BCH.shape[1]
    of = functools.partial(spec, parts=parts)

    def whole(at: Step):
        return 0, 0

    def rows(at: Step):
        return at.unit, 0

    return Operands(
        q_BSM=of(x.q_BSM, (window, form.group * dim), lambda at: (at.unit, at.group)),
        kv_BYH=of(x.kv_BYH, (window, dim), rows),
        cos_BST=of(x.cos_BST, (window, x.cos_BST.shape[2]), rows),
        sin_BST=of(x.sin_BST, (window, x.sin_BST.shape[2]), rows),
        sink_N=pl.BlockSpec(memory_space=pltpu.SMEM),
        own_BYH=of(x.own_BYH, (window, dim), lambda at: (at.unit + 1, 0)),
        entry_BCH=of(x.entry_BCH, (entries, dim), whole),
        last_B1C=of(x.last_B1C, (1, entries), whole),
        chosen_BSC=of(x.chosen_BSC, (window, entries), rows),
        segment_BS1=of(x.segment_BS1, (window, 1), rows),
        segment_B1Y=of(x.segment_B1Y, (1, window), lambda at: (0, at.unit)),
        own_segment_B1Y=of(x.own_segment_B1Y, (1, window), lambda at: (0, at.unit + 1)),
        segment_B1C=of(x.segment_B1C, (1, entries), whole),
    )


def dot(a: jax.Array, b: jax.Array, contraction) -> jax.Array:
    """A product with sums in float32."""
    return lax.dot_general(
        a, b, contraction, precision=precision_of(a), preferred_element_type=jnp.float32
    )


def below(x_WT: jax.Array, heads: int) -> jax.Array:
    """What all heads share, once for each: [heads * W, T]."""
    return jnp.concatenate([x_WT] * heads, axis=0) if heads > 1 else x_WT


def rows_of_heads(ref, heads: int) -> jax.Array:
    """A block [W, heads * H], its heads below each other: [heads * W, H]."""
    dim = ref.shape[1] // heads
    return jnp.concatenate([ref[:, k * dim : (k + 1) * dim] for k in range(heads)], axis=0)


def write_heads(ref, x_RH: jax.Array, heads: int):
    """The inverse of rows_of_heads."""
    rows, dim = x_RH.shape[0] // heads, x_RH.shape[1]
    for k in range(heads):
        ref[:, k * dim : (k + 1) * dim] = x_RH[k * rows : (k + 1) * rows].astype(ref.dtype)


def of_heads(row_1N: jax.Array, first, heads: int) -> jax.Array:
    """Columns `first` to `first + heads` of [W, N], below each other: [heads * W, 1]."""
    place = lax.broadcasted_iota(jnp.int32, row_1N.shape, 1)
    columns = [
        jnp.sum(jnp.where(place == first + k, row_1N, 0.0), axis=1, keepdims=True)
        for k in range(heads)
    ]
    return jnp.concatenate(columns, axis=0)


def sinks_of_heads(sink_N, first, heads: int, rows: int) -> jax.Array:
    """The sinks of a group of heads, [heads * rows, 1]."""
    return jnp.concatenate(
        [jnp.full((rows, 1), sink_N[first + k], jnp.float32) for k in range(heads)], axis=0
    )


def rotated(x_RH: jax.Array, x: Operands, heads: int, inverse: bool) -> jax.Array:
    """float32 rows with the pairs of their last lanes rotated (docs/equations.md#rotary)."""
    width, lanes = x_RH.shape[1], x.cos_BST.shape[1]
    tail = x_RH[:, width - lanes :]
    even = lax.broadcasted_iota(jnp.int32, tail.shape, 1) % 2 == 0
    # (a, b) -> (-b, a) of each pair; what wraps around is never used.
    swapped = jnp.where(even, -pltpu.roll(tail, lanes - 1, 1), pltpu.roll(tail, 1, 1))
    sin = below(x.sin_BST[...], heads)
    turned = tail * below(x.cos_BST[...], heads) + (-sin if inverse else sin) * swapped
    return turned if lanes == width else jnp.concatenate((x_RH[:, :-lanes], turned), axis=1)


def first_entries(x: Operands) -> int:
    """Entries that are taken in one product with the window keys: a whole block, or none."""
    return 0 if x.entry_BCH is None else entry_block(x.entry_BCH.shape[-2])


def entry_block(entries: int) -> int:
    """Entries of a product."""
    return min(entries, ENTRIES)


def has_more_entries(x: Operands) -> bool:
    """Whether there are blocks of entries after the first."""
    return x.entry_BCH is not None and x.entry_BCH.shape[-2] > ENTRIES


class Scratch(NamedTuple):
    """What a kernel keeps while it goes through the heads of a block of queries.

    Attributes:
      key_KH: the 2W window keys, then the first block of entries.
      bias_WK: float32, 0 or HIDDEN, of the 2W window keys and all entries.
    """

    key_KH: Any
    bias_WK: Any

    def write(self, x: Operands, first):
        """Keys and bias of a block whose first query has index `first` in the row."""
        window = x.kv_BYH.shape[0]
        self.key_KH[:window, :] = x.kv_BYH[...]
        self.key_KH[window : 2 * window, :] = x.own_BYH[...]
        self.bias_WK[:, : 2 * window] = _window_bias(x, first)
        if x.entry_BCH is not None:
            self.key_KH[2 * window :, :] = x.entry_BCH[: first_entries(x), :]
            self.bias_WK[:, 2 * window :] = entry_bias(x, first)


def scratch_shapes(form: Form, x: Operands) -> list[Any]:
    """The memory of a Scratch."""
    entries = 0 if x.entry_BCH is None else x.entry_BCH.shape[1]
    near, dim = 2 * form.window, x.kv_BYH.shape[2]
    return [
        pltpu.VMEM((near + first_entries(x), dim), x.kv_BYH.dtype),
        pltpu.VMEM((form.window, near + entries), jnp.float32),
    ]


def block_of_entries(x: Operands, block) -> tuple[Any, Any]:
    """(rows of a block of entries, columns of their bias)."""
    size, near = first_entries(x), 2 * x.kv_BYH.shape[0]
    rows = pl.ds(pl.multiple_of(block * size, size), size)
    # ENTRIES are whole vectors, and so are the window's columns on TPU.
    column = near + block * size
    column = column if near % LANES else pl.multiple_of(column, LANES)
    return rows, pl.ds(column, size)


def _window_bias(x: Operands, first) -> jax.Array:
    """Bias of a block's window keys, float32 [W, 2W]: the W before the block, then its own.

    A query sees itself and the W - 1 tokens before it, in its document.

    Args:
      first: index in the row of the block's first query.
    """
    window = x.kv_BYH.shape[0]
    query = lax.broadcasted_iota(jnp.int32, (window, 2 * window), 0)
    key = lax.broadcasted_iota(jnp.int32, (window, 2 * window), 1)
    seen = (key > query) & (key <= query + window) & (key >= window - first)
    if x.segment_BS1 is not None:
        segment = jnp.concatenate((x.segment_B1Y[...], x.own_segment_B1Y[...]), axis=1)
        seen &= x.segment_BS1[...] == segment
    return jnp.where(seen, 0.0, HIDDEN)


def entry_bias(x: Operands, first) -> jax.Array:
    """Bias of the entries, float32 [W, C]: those that are chosen, or all that a query sees."""
    if x.chosen_BSC is not None:
        return jnp.where(x.chosen_BSC[...].astype(jnp.int32) != 0, 0.0, HIDDEN)
    window, entries = x.kv_BYH.shape[0], x.last_B1C.shape[1]
    position = first + lax.broadcasted_iota(jnp.int32, (window, entries), 0)
    seen = x.last_B1C[...] <= position
    if x.segment_B1C is not None:
        seen &= x.segment_BS1[...] == x.segment_B1C[...]
    return jnp.where(seen, 0.0, HIDDEN)
