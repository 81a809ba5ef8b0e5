"""Dropless expert dispatch: tokens go to their experts, and the sums of the outputs come back.

The rows that experts read are sorted by expert and lie in blocks of `block` rows. All rows of a
block belong to one expert; an expert's last block is filled up with rows of weight 0. So a grouped
matmul works on whole blocks, no token is dropped, and no shape depends on the imbalance.

Example, 2 experts, block 2, five assignments with experts [1, 0, 1, 1, 0]: the rows are
[#1, #4 | #0, #2 | #3, filler], group_sizes is [2, 4], block_expert is [0, 1, 1, 1, 1, 1, 1, 1],
and blocks_in_use is 3.

On a mesh there are two ways from tokens to experts, and the layout chooses (`AxisRules.exchange`).
With n devices in a group that holds all experts:

- Gather: tokens are gathered over the mesh axes that hold experts, every device runs its own
  experts on all of them, and the sums are scattered back. This sends n-1 rows a token each way.
- Exchange: each assignment travels to its expert's device and back (sharding/exchange.py). This
  sends K (n-1)/n rows a token each way.

The experts' hidden width may be cut too; the partial sums are then added.

Shapes: B batch, S positions, T tokens (B*S), K active experts, A assignments (T*K), P rows in
blocks, Q rows of one round of the exchange, G a gate and what travels with it, D hidden, E experts
(those of this device, in what runs on one device); lower case = this device's share.

Next file to read: sharding/expert_weights.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.counting import ranks
from sharding.exchange import (
    exchange,
    expert_of_rows,
    round_rows,
    rounds_needed,
    route,
    sum_rounds,
    travelling,
    window,
)
from sharding.expert_weights import whole_experts
from sharding.manual import vary, vary_like
from sharding.rules import AxisRules

AT_ONCE = 4
"""Blocks in one batched product on XLA:CPU; the number of blocks is a multiple of it.

One block alone is too small a product to keep two cores busy (docs/reports/2026-11.md)."""


class Groups(NamedTuple):
    """Which rows belong to which expert.

    Attributes:
      group_sizes: int32 [E], rows of each expert, filler included, so multiples of the block size.
        The rows of one expert follow those of the one before, from row 0 on.
      block_expert: int32 [P / block], the expert of each block; the last expert for blocks that are
        not in use. Its length is a multiple of AT_ONCE.
      blocks_in_use: int32 [], how many blocks hold rows.

    Where all blocks are B of M rows each, at most (B - E) * M rows are no filler.
    """

    group_sizes: jax.Array
    block_expert: jax.Array
    blocks_in_use: jax.Array


ExpertFunction = Callable[[Any, jax.Array, jax.Array, Groups], jax.Array]
"""(weights, x [P,D], gate [P], groups) -> y [P,D]; a row whose gate is 0 must give 0.

Where numbers travel with the gates, gate is [P,G], and all of a row's are 0 in filler."""


def apply_experts(
    rules: AxisRules,
    expert: ExpertFunction,
    weights,
    axes,
    x_BSD: jax.Array,
    index_BSK: jax.Array,
    gate_BSK: jax.Array,
    share: float = 0.5,
    constants: tuple[str, ...] = (),
) -> jax.Array:
    """y[b,s] = sum_k expert_i(x[b,s], gate[b,s,k]), i = index[b,s,k], over all experts of the mesh.

    The equation is docs/equations.md#moe.

    Args:
      rules: the layout; the empty one means one device.
      expert: runs once on each device, with that device's experts.
      weights: dict of arrays whose first axis is the experts, or of trees of such arrays.
      axes: dict of their logical axis names, such as ("experts", "expert_embed", "expert_hidden").
      x_BSD: tokens.
      index_BSK: int32 in [0, E), the experts of each token.
      gate_BSK: the weight of each assignment; or [B,S,K,G], the weight and what else `expert` takes
        of each: these numbers travel with it, wherever its expert is.
      share: the largest block, as a fraction of an average expert's rows. On average half a block
        per expert is filler.
      constants: names of weights that have no gradient, so that none is computed.

    Returns:
      y_BSD in the dtype of x_BSD.
    """
    num_experts, run = jax.tree.leaves(weights)[0].shape[0], functools.partial(_run, expert, share)
    if not rules:
        return run(weights, num_experts, x_BSD, index_BSK, gate_BSK)
    here = (run, axes, num_experts, constants)
    local = functools.partial(_on_device, rules, here)
    act = rules.spec(("act_batch", "act_seq", None))
    return jax.shard_map(
        local,
        in_specs=({name: rules.spec(axes[name]) for name in weights}, act, act, act),
        out_specs=act,
    )(weights, x_BSD, index_BSK, gate_BSK)


def _on_device(rules: AxisRules, here, weights, x_bsd, index_bsk, gate_bsk):
    """`apply_experts` on one device of the mesh: brings tokens to its experts, and their sums back.

    Args:
      here: `_run` with the expert and the share, how many experts all devices have, and `axes` and
        `constants` as for `apply_experts`.
    """
    run, axes, num_experts, constants = here
    holders = rules.mesh_axes("experts")
    cut = rules.mesh_axes("expert_hidden")
    tokens = rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq")
    weights = {
        name: whole_experts(rules, tokens, weights[name], axes[name], x_bsd.dtype)
        for name in weights
    }
    x_bsd, gate_bsk = (vary(a, cut) for a in (x_bsd, gate_bsk))
    index_bsk = vary(index_bsk, cut)
    if holders and rules.exchange:
        fixed = {name: weights.pop(name) for name in constants}
        inputs = (fixed, weights, x_bsd, index_bsk, gate_bsk)
        y_bsd = _run_exchanged(run, num_experts, holders, *inputs)
        return lax.psum(y_bsd, cut) if cut else y_bsd
    if holders:
        x_bsd, index_bsk, gate_bsk = (
            lax.all_gather(a, holders, axis=0, tiled=True) for a in (x_bsd, index_bsk, gate_bsk)
        )
        index_bsk = index_bsk - lax.axis_index(holders) * jax.tree.leaves(weights)[0].shape[0]
    y_bsd = run(weights, num_experts, x_bsd, index_bsk, gate_bsk)
    if holders:
        y_bsd = lax.psum_scatter(y_bsd, holders, scatter_dimension=0, tiled=True)
    return lax.psum(y_bsd, cut) if cut else y_bsd


def _run(
    expert, share, weights, num_experts, x_BSD, index_BSK, gate_BSK, loose: bool = False
) -> jax.Array:
    """Dispatches tokens to the experts in `weights`.

    An assignment outside [0, E) belongs to another device and gives 0; anything if `loose`.
    `num_experts` counts all experts that share the assignments, on this device and on others.
    """
    batch, seq, width = x_BSD.shape
    here, active = jax.tree.leaves(weights)[0].shape[0], index_BSK.shape[-1]
    assignments = batch * seq * active
    # A token chooses an expert at most once, so no expert has more rows than there are tokens.
    block = min(_block_size(assignments, num_experts, share), 1 << (batch * seq - 1).bit_length())
    plan = _plan(index_BSK.reshape(-1), here, block)
    token_P, slot_TK = plan.row // active, plan.slot.reshape(-1, active)
    # Filler repeats the first token, with weight 0: no gradient passes it. In a round of the
    # exchange the first row is there if any is.
    x_PD = _spread(loose, x_BSD.reshape(-1, width), token_P, slot_TK)
    gate_PG = _spread(loose, gate_BSK.reshape(assignments, -1), plan.row, plan.slot[:, None])
    gate_PG = jnp.where(plan.used[:, None], gate_PG, 0)
    gate_P = gate_PG.reshape(-1, *gate_BSK.shape[3:])
    y_PD = expert(weights, x_PD, gate_P, plan.groups)
    y_TD = _collect(loose, y_PD, token_P, slot_TK)
    return y_TD.reshape(batch, seq, width)


def _run_exchanged(
    run, num_experts, holders, constants, weights, x_bsd, index_bsk, gate_bsk
) -> jax.Array:
    """Sends every assignment to its expert's device, and adds up the results that come back.

    constants: the weights that have no gradient.
    """
    batch, seq, width = x_bsd.shape
    active = index_bsk.shape[-1]
    index_TK = index_bsk.reshape(-1, active)
    path = route(index_TK, num_experts, holders)
    rows = round_rows(index_TK.size)
    one = functools.partial(_one_round, run, holders, rows)
    inputs = (weights, x_bsd.reshape(-1, width), gate_bsk.reshape(-1, 1, *gate_bsk.shape[3:]))
    y_td = sum_rounds(one, rounds_needed(path, rows), (path, constants), inputs)
    # functools.partial hides from pyright what custom_vjp returns.
    return y_td.reshape(batch, seq, width)  # pyright: ignore[reportAttributeAccessIssue]


def _one_round(run, holders, rows, turn, fixed, inputs) -> jax.Array:
    """One round of the exchange: rows travel, experts run, results return and are summed.

    fixed: the Route, and weights that have no gradient.
    """
    (path, constants), (weights, x_TD, gate_A1G) = fixed, inputs
    weights = constants | weights
    moves, assignments = window(path, turn, rows), path.token_A.shape[0]
    travels_A = travelling(moves, assignments, holders)
    # What comes back in rows that do not travel is read nowhere: their slot is past the end.
    slot_TK = jnp.where(travels_A[path.slot_TK], path.slot_TK, assignments)
    x_AD = _spread(False, x_TD, path.token_A, slot_TK)
    x_QD = exchange(x_AD, rows, moves, holders)
    gate_AG = gate_A1G.reshape(assignments, -1)
    gate_QG = exchange(
        _spread(False, gate_AG, path.assignment_A, slot_TK.reshape(-1, 1)), rows, moves, holders
    )
    gate_Q1G = gate_QG.reshape(-1, *gate_A1G.shape[1:])
    index_Q = expert_of_rows(path, turn, rows, holders)
    here = jax.tree.leaves(weights)[0].shape[0]  # every row that arrived is for one of these
    y_QD = run(weights, here, x_QD[None], index_Q[None, :, None], gate_Q1G[None], loose=True)[0]
    y_AD = exchange(y_QD, assignments, moves.back(), holders)
    return _collect(False, y_AD, path.token_A, slot_TK)


def _block_size(assignments: int, num_experts: int, share: float) -> int:
    """Rows per block: 128, halved while above 8 and above `share` of an average expert's rows."""
    block = 128
    while block > 8 and block * num_experts > share * assignments:
        block //= 2
    return block


class _Plan(NamedTuple):
    """Where each assignment lies.

    Attributes:
      row: int32 [P], the assignment in each row, 0 in filler.
      used: bool [P], whether the row holds an assignment.
      slot: int32 [A], the row of each assignment; P or more for those of other devices.
      groups: which rows belong to which expert.
    """

    row: jax.Array
    used: jax.Array
    slot: jax.Array
    groups: Groups


def _plan(index_A: jax.Array, num_experts: int, block: int) -> _Plan:
    """Sorts assignments by expert, stably, and lays out each expert's in whole blocks."""
    n = index_A.shape[0]
    blocks = -(-(-(-n // block) + num_experts) // AT_ONCE) * AT_ONCE
    rank_A, count_E = ranks(index_A, num_experts)
    sizes_E = -(-count_E // block) * block
    ends_E = jnp.cumsum(sizes_E)
    first_row = vary_like(jnp.arange(blocks, dtype=jnp.int32), index_A) * block
    expert_of_block = jnp.minimum(
        jnp.searchsorted(ends_E, first_row, side="right"), num_experts - 1
    ).astype(jnp.int32)

    iota_A = vary_like(jnp.arange(n, dtype=jnp.int32), index_A)
    inside_A = (index_A >= 0) & (index_A < num_experts)
    row_A = (ends_E - sizes_E)[jnp.clip(index_A, 0, num_experts - 1)] + rank_A
    # Assignments of other devices get distinct rows past the end, where the scatter drops them.
    slot_A = jnp.where(inside_A, row_A, blocks * block + iota_A)
    assignment_P = vary_like(jnp.full(blocks * block, n, jnp.int32), index_A)
    assignment_P = assignment_P.at[slot_A].set(iota_A, mode="drop", unique_indices=True)
    used_P = assignment_P < n
    return _Plan(
        jnp.where(used_P, assignment_P, 0),
        used_P,
        slot_A,
        Groups(sizes_E, expert_of_block, ends_E[-1] // block),
    )


def _rows_of_tokens(loose: bool, x_TD, token_P, slot_TK) -> jax.Array:
    """x[token] in each row. What stands in rows that no slot points to is read nowhere.

    Its transpose is `_collect`, with the same `loose`. Both are gathers, which are fast on CPUs and
    TPUs, and no scatter.
    """
    return x_TD[token_P]


def _spread_fwd(loose, x_TD, token_P, slot_TK):
    return _spread(loose, x_TD, token_P, slot_TK), (token_P, slot_TK)


def _spread_bwd(loose, saved, ct_PD):
    return _collect(loose, ct_PD, *saved), None, None


def _sums_of_tokens(loose: bool, y_PD, token_P, slot_TK) -> jax.Array:
    """The sum of each token's rows, in float32, in the order of its assignments; 0 without rows.

    Args:
      loose: K is 1, and what tokens without rows get is read nowhere: it may be anything.
    """
    rows = y_PD.shape[0]

    def of_assignment(k: int) -> jax.Array:
        slot_T1 = slot_TK[:, k : k + 1]
        y_TD = y_PD[jnp.minimum(slot_T1[:, 0], rows - 1)]
        return (y_TD if loose else jnp.where(slot_T1 < rows, y_TD, 0)).astype(jnp.float32)

    first, *rest = map(of_assignment, range(slot_TK.shape[1]))
    return sum(rest, first).astype(y_PD.dtype)


def _collect_fwd(loose, y_PD, token_P, slot_TK):
    return _collect(loose, y_PD, token_P, slot_TK), (token_P, slot_TK)


def _collect_bwd(loose, saved, ct_TD):
    return _spread(loose, ct_TD, *saved), None, None


_spread = jax.custom_vjp(_rows_of_tokens, nondiff_argnums=(0,))
_collect = jax.custom_vjp(_sums_of_tokens, nondiff_argnums=(0,))
_spread.defvjp(_spread_fwd, _spread_bwd)
_collect.defvjp(_collect_fwd, _collect_bwd)
