"""What the kernels of fused attention read, and the cut of their work into steps.

A step takes a block of W queries and a group of their heads. A head is H aligned lanes of the
projection's own layout [S, N*H], so nothing is transposed on the way in. The output comes in groups
of heads, [G, S, I], as the next product wants it.

Shapes: B batch, S positions (padded to whole blocks), U blocks of queries, W window (and queries of
a block), Y window keys (W, then S), N heads, H head dim, M width of all heads N * H, G groups of
heads, I width of a group, C entries (padded), T lanes of the rotation's tables.
Next file to read: v4jax/kernels/fused_attention/blocks.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HEADS = 4
"""Most heads of a group: 4 times 128 rows keep the matrix units busy."""


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
