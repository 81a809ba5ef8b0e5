"""Sends assignments to the devices of their experts, and results back, in rounds of bounded size.

Each device sorts its assignments by expert, so that the rows for one device are contiguous. A
device's queue is everything that all devices send it, sender after sender. Round r moves places
[r*C, (r+1)*C) of every queue, with C the rows of a round. C exceeds an even load, so one round
nearly always suffices; a longer queue takes more rounds. So nothing is dropped, and no buffer is
sized for the worst case, in which every token of the group wants the same device.

Example, 2 devices, C = 4, rows sent [[3, 1], [2, 2]] ([sender][receiver]): the queue of device 0
holds rows 0-2 of sender 0, then two rows of sender 1. Round 0 moves three rows of sender 0 and one
of sender 1; round 1 moves the last row.

Shapes: T tokens of this device, K active experts, A assignments (T*K), Q rows of one round, D
hidden, E experts, P senders, Z receivers; lower case = this device's share.

Next file to read: sharding/params.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.counting import ranks
from sharding.manual import vary_like

HEADROOM = 1.5
"""Rows of one round, as a multiple of the rows that an even load brings."""

NOT_LANDED = 0.0
"""On CPUs, what `exchange` puts where no row lands; a test shows that NaN changes nothing."""

FURTHER_ROUND = "further_round"
"""Scope of the rounds after the first; sharding/audit.py recognises them by it."""


class Route(NamedTuple):
    """Who sends what to whom, in one group of devices that together hold all experts.

    Attributes:
      assignment_A: int32, the assignment in each row; rows are sorted by expert.
      token_A: int32, the token in each row.
      slot_TK: int32, the row of each assignment.
      count_PE: int32, rows that each device of the group sends to each expert.
    """

    assignment_A: jax.Array
    token_A: jax.Array
    slot_TK: jax.Array
    count_PE: jax.Array


class Window(NamedTuple):
    """The moves of one round between all devices of the group, int32 [P,Z].

    A sender's `size` rows from `source` on land at `target` of the receiver.
    """

    source: jax.Array
    size: jax.Array
    target: jax.Array

    def back(self) -> "Window":
        """The moves that take each row home."""
        return Window(self.target.T, self.size.T, self.source.T)


def route(index_TK: jax.Array, experts: int, holders: tuple[str, ...]) -> Route:
    """The route of assignments to experts in [0, experts).

    The devices along `holders` hold equal, contiguous shares of the experts.
    """
    tokens, active = index_TK.shape
    index_A = index_TK.reshape(-1)
    iota_A = vary_like(jnp.arange(tokens * active, dtype=jnp.int32), index_A)
    rank_A, count_E = ranks(index_A, experts)
    slot_A = _before(count_E, 0)[index_A] + rank_A
    order_A = jnp.zeros_like(iota_A).at[slot_A].set(iota_A, unique_indices=True)
    return Route(
        order_A, order_A // active, slot_A.reshape(tokens, active), lax.all_gather(count_E, holders)
    )


def round_rows(assignments: int) -> int:
    """Rows of one round for `assignments` assignments per device, a multiple of 8."""
    return -(-int(HEADROOM * assignments) // 8) * 8


def rounds_needed(path: Route, rows: int) -> jax.Array:
    """How many rounds of `rows` rows the group's longest queue takes; equal on all its devices."""
    return -(-jnp.max(_sent(path).sum(0)) // rows)


def _sent(path: Route) -> jax.Array:
    """Rows that each device sends to each, [P,Z]."""
    senders, experts = path.count_PE.shape
    return path.count_PE.reshape(senders, senders, experts // senders).sum(-1)


def _before(count: jax.Array, axis: int) -> jax.Array:
    """For each element the sum of those before it."""
    return jnp.cumsum(count, axis) - count


def window(path: Route, turn: jax.Array | int, rows: int) -> Window:
    """The moves of round `turn`."""
    sent_PZ = _sent(path)
    place_PZ = _before(sent_PZ, 0)  # sender's first row in the receiver's queue
    first = jnp.clip(place_PZ, turn * rows, (turn + 1) * rows)
    last = jnp.clip(place_PZ + sent_PZ, turn * rows, (turn + 1) * rows)
    return Window(_before(sent_PZ, 1) + first - place_PZ, last - first, first - turn * rows)


def travelling(moves: Window, count: int, holders: tuple[str, ...]) -> jax.Array:
    """Which of this device's `count` rows travel by `moves`: bool [A]."""
    me = lax.axis_index(holders)
    first_1Z, size_1Z = moves.source[me][None], moves.size[me][None]
    row_A1 = vary_like(jnp.arange(count, dtype=jnp.int32)[:, None], first_1Z)
    return jnp.any((row_A1 >= first_1Z) & (row_A1 < first_1Z + size_1Z), axis=1)


def expert_of_rows(
    path: Route, turn: jax.Array | int, rows: int, holders: tuple[str, ...]
) -> jax.Array:
    """Which of this device's experts each row of round `turn` is for: int32 [Q], -1 for none.

    This needs no exchange: every sender's rows are sorted by expert, and all counts are known.
    """
    senders, experts = path.count_PE.shape
    here = experts // senders
    mine_Pe = lax.dynamic_slice_in_dim(path.count_PE, lax.axis_index(holders) * here, here, axis=1)
    ends = jnp.cumsum(mine_Pe.reshape(-1))
    place_Q = turn * rows + vary_like(jnp.arange(rows, dtype=jnp.int32), ends)
    segment_Q = jnp.searchsorted(ends, place_Q, side="right").astype(jnp.int32)
    return jnp.where(place_Q < ends[-1], segment_Q % here, -1)


def exchange(x_AD: jax.Array, rows: int, moves: Window, holders: tuple[str, ...]) -> jax.Array:
    """The rows that land on this device by `moves`, [rows,D]; where none lands, anything.

    Its gradient, too, is anything in rows of x_AD that do not travel. XLA:TPU expects zeros
    in these buffers to cost about as much as the experts' products.

    XLA:CPU cannot run a ragged all-to-all. There every device gathers all rows and takes its own.
    """
    moves = Window(*(vary_like(a, x_AD) for a in moves))
    return lax.platform_dependent(
        x_AD,
        moves,
        cpu=functools.partial(_exchange_by_gather, rows=rows, holders=holders),
        default=functools.partial(_exchange_ragged, rows=rows, holders=holders),
    )


def _exchange_ragged(x_AD, moves: Window, rows, holders):
    return _ragged(holders, rows, x_AD.shape[0], x_AD, moves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ragged(holders, rows: int, given: int, x_AD, moves: Window):
    """`exchange` of `given` rows by XLA's own operation, whose gradient takes the rows home.

    The gradient that JAX derives would fill its buffer with zeros.
    """
    me = lax.axis_index(holders)
    return lax.ragged_all_to_all(
        x_AD,
        vary_like(lax.empty((rows, x_AD.shape[1]), x_AD.dtype), x_AD),
        moves.source[me],
        moves.size[me],
        moves.target[me],
        moves.size[:, me],
        axis_name=holders if len(holders) > 1 else holders[0],
    )


def _ragged_fwd(holders, rows, given, x_AD, moves):
    return _ragged(holders, rows, given, x_AD, moves), moves


def _ragged_bwd(holders, rows, given, moves, ct_QD):
    return _ragged(holders, given, rows, ct_QD, moves.back()), None


_ragged.defvjp(_ragged_fwd, _ragged_bwd)


def _exchange_by_gather(x_AD, moves: Window, rows, holders):
    me = lax.axis_index(holders)
    # Rows are the same in every round. Without a barrier XLA would gather those of further rounds
    # before their loop, whether or not it runs.
    x_AD, moves = lax.optimization_barrier((x_AD, moves))
    x_PAD = lax.all_gather(x_AD, holders)
    offset_PQ = (
        vary_like(jnp.arange(rows, dtype=jnp.int32), x_AD)[None] - moves.target[:, me][:, None]
    )
    lands_PQ = (offset_PQ >= 0) & (offset_PQ < moves.size[:, me][:, None])
    sender_Q = jnp.argmax(lands_PQ, axis=0)
    row_Q = moves.source[sender_Q, me] + jnp.take_along_axis(offset_PQ, sender_Q[None], axis=0)[0]
    found_QD = x_PAD[sender_Q, jnp.clip(row_Q, 0, x_AD.shape[0] - 1)]
    return jnp.where(lands_PQ.any(0)[:, None], found_QD, NOT_LANDED)


Round = Callable[[jax.Array | int, Any, Any], jax.Array]
"""(turn, what is not differentiated, what is) -> the turn's part of the result."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_rounds(one: Round, count: jax.Array, fixed: Any, inputs: Any) -> jax.Array:
    """Sum of one(turn, fixed, inputs) over turns 0 to count - 1; turn 0 always runs.

    Turn 0 keeps what its gradient needs. Later turns, which are rare, recompute it, so that
    memory does not grow with their number. `count` may differ between devices that exchange nothing
    in `one`.
    """
    return _sum_rounds_fwd(one, count, fixed, inputs)[0]


def _sum_rounds_fwd(one, count, fixed, inputs):
    total, pull = jax.vjp(functools.partial(one, 0, fixed), inputs)
    with jax.named_scope(FURTHER_ROUND):
        total = lax.fori_loop(1, count, lambda turn, total: total + one(turn, fixed, inputs), total)
    return total, (pull, count, fixed, inputs)


def _sum_rounds_bwd(one, saved, ct):
    pull, count, fixed, inputs = saved

    def add(turn, total):
        return jax.tree.map(
            jnp.add, total, jax.vjp(functools.partial(one, turn, fixed), inputs)[1](ct)[0]
        )

    first = pull(ct)[0]
    with jax.named_scope(FURTHER_ROUND):
        return None, None, lax.fori_loop(1, count, add, first)


sum_rounds.defvjp(_sum_rounds_fwd, _sum_rounds_bwd)
