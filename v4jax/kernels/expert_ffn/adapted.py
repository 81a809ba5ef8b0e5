"""The experts' feed-forward with constant matrices, of which some have a low-rank pair (LoRA).

Each product is x W + (x a) b. Products with W have a gradient for x alone; W's is never computed.
Those with a and b work on whole blocks of rows, each with its expert's pair beside it, on every
platform: a pair is no larger than the rows of its block. Where rows of a block have different
adapters, the pairs of all lie side by side: one product with a serves all rows, and each keeps the
ranks of its own adapter before the product with b.

A few rows, as in decoding, fill few of the blocks. Each then has its own pair beside it: that takes
the same time for any number of adapters.

Shapes: P rows in blocks, G blocks, M rows of a block, Q rows in use, A and Z widths of a product's
factors, U adapters, R rank, J ranks of all adapters (U*R), D hidden, E experts, F expert hidden.
Next file to read: v4jax/kernels/expert_ffn/op.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.experts import Groups
from sharding.manual import vary_like
from v4jax.kernels.choice import pick
from v4jax.kernels.expert_ffn import blocked, gpu, op, whole
from v4jax.kernels.expert_ffn.every_expert import expert_of_rows
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights, gated, matmul
from v4jax.quant.packed import Packed, as_numbers


class Pair(NamedTuple):
    """a [E,A,R] and b [E,R,Z]; of several adapters a [E,A,U,R] and b [E,U,R,Z].

    Those of one expert have no axis E.
    """

    a: jax.Array
    b: jax.Array


class ExpertPairs(NamedTuple):
    """The pairs of the experts' matrices; None for a matrix without one."""

    w1: Pair | None = None
    w3: Pair | None = None
    w2: Pair | None = None

    @classmethod
    def of(cls, arrays) -> "ExpertPairs":
        """Those of a dict of arrays, where w1.a and w1.b are the pair of w1."""
        there = {name for name in cls._fields if f"{name}.a" in arrays}
        return cls(**{name: Pair(arrays[f"{name}.a"], arrays[f"{name}.b"]) for name in there})


class Rows(NamedTuple):
    """How a platform multiplies rows by constant matrices.

    Attributes:
      dot: dot(x, w, groups).
      back: back(ct, w, groups): its gradient for x.
    """

    dot: Callable[..., jax.Array]
    back: Callable[..., jax.Array]


def adapted_ffn(
    form: Activation,
    w: ExpertWeights,
    pairs: ExpertPairs,
    x_PD: jax.Array,
    gate_P: jax.Array,
    groups: Groups,
    implementation: str | None = None,
    adapter_P: jax.Array | None = None,
) -> jax.Array:
    """`expert_ffn` with constant matrices and their pairs; arguments and errors are those there.

    Args:
      w: not joined; packed ones are read when used.
      pairs: cast to the dtype of x when used. Their gradients are sums in their own dtype.
      adapter_P: int32, the number of each row's adapter; below 0: none. Then pairs are those
        of several adapters. None: they are those of one.
    """
    op.check(implementation, w, x_PD, groups)
    function = pick("expert_ffn", IMPLEMENTATIONS, implementation, best="best")
    return function(form, w, pairs, x_PD, gate_P, groups, adapter_P)


def kept_ranks(adapter: jax.Array, adapters: int, rank: int) -> jax.Array:
    """Which of the ranks of all adapters are those of the given ones, bool [..., U*R].

    Example: numbers [1, -1] of 2 adapters of rank 2 give [[0, 0, 1, 1], [0, 0, 0, 0]].
    """
    return jnp.repeat(jax.nn.one_hot(adapter, adapters, dtype=bool), rank, axis=-1)


def side_by_side(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a [...,A,U,R] and b [...,U,R,Z] of several adapters as one pair [...,A,U*R], [...,U*R,Z]."""
    return a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:-3], -1, b.shape[-1])


def _fast(rows: Rows, form, w, pairs: ExpertPairs, x_PD, gate_P, groups, adapter_P):
    """Products with matrices by `rows`, products with pairs block by block."""
    added = _added(groups, gate_P != 0, adapter_P, pairs)
    h1_PF = _plus(_constant(rows, x_PD, w.w1, groups), added, x_PD, pairs.w1)
    if isinstance(w.w3, Packed):  # is read when w1 is no longer needed; backwards, w1 after it
        x_PD, h1_PF = lax.optimization_barrier((x_PD, h1_PF))
    h3_PF = _plus(_constant(rows, x_PD, w.w3, groups), added, x_PD, pairs.w3)
    # What the activation computes inside is recomputed: it is several arrays in float32.
    h_PF = jax.checkpoint(functools.partial(gated, form))(h1_PF, h3_PF, gate_P)
    return _plus(_constant(rows, h_PF, w.w2, groups), added, h_PF, pairs.w2)


def _plus(y, added: Callable, x, pair: Pair | None):
    return y if pair is None else y + added(x, pair)


def _added(groups: Groups, used_P, adapter_P, pairs: ExpertPairs) -> Callable[..., jax.Array]:
    """What adds (x a) b of each row's expert and adapter, 0 in rows that are not used."""
    rank_axes = [pair.a.shape[2:] for pair in pairs if pair is not None]
    adapters = 1 if adapter_P is None else rank_axes[0][0]
    blocks = groups.block_expert.shape[0]
    size = used_P.shape[0] // blocks
    most_rows = (blocks - groups.group_sizes.shape[0]) * size  # as Groups says
    if most_rows > blocks * adapters:
        return functools.partial(_in_blocks, groups, used_P, adapter_P)
    # What would lie beside rows is no more than what would lie beside blocks.
    place_P = jnp.cumsum(used_P.astype(jnp.int32))
    wanted_Q = vary_like(jnp.arange(1, most_rows + 1, dtype=jnp.int32), place_P)
    row_Q = jnp.minimum(jnp.searchsorted(place_P, wanted_Q), used_P.shape[0] - 1)
    in_use = _InUse(
        row_Q,
        groups.block_expert[row_Q // size],
        None if adapter_P is None else adapter_P[row_Q],
        used_P,
        jnp.clip(place_P - 1, 0, most_rows - 1),
    )
    return functools.partial(_by_row, in_use)


class _InUse(NamedTuple):
    """The rows in use, one after another, and where each is.

    Example: P rows in use [0 1 0 1] and Q = 3 give row [1 3 3] and place [0 0 0 1].

    Attributes:
      row_Q: int32; what follows the last one means nothing.
      expert_Q, adapter_Q: of each; adapter_Q is None where all have one adapter.
      used_P: bool.
      place_P: int32, which of the Q rows each is, if it is in use.
    """

    row_Q: jax.Array
    expert_Q: jax.Array
    adapter_Q: jax.Array | None
    used_P: jax.Array
    place_P: jax.Array


def _by_row(rows: _InUse, x_PA, pair: Pair) -> jax.Array:
    """(x a) b of the rows in use, each with its own pair beside it."""
    has_Q = rows.used_P[rows.row_Q]
    if rows.adapter_Q is None:
        a_QAR, b_QRZ = pair.a[rows.expert_Q], pair.b[rows.expert_Q]
    else:
        has_Q &= rows.adapter_Q >= 0
        adapter_Q = jnp.maximum(rows.adapter_Q, 0)
        a_QAR, b_QRZ = pair.a[rows.expert_Q, :, adapter_Q], pair.b[rows.expert_Q, adapter_Q]
    x_Q1A = jnp.where(has_Q[:, None], x_PA[rows.row_Q], 0)[:, None]
    y_QZ = matmul(matmul(x_Q1A, a_QAR.astype(x_PA.dtype)), b_QRZ.astype(x_PA.dtype))[:, 0]
    return jnp.where(rows.used_P[:, None], y_QZ[rows.place_P], 0)


def _in_blocks(groups: Groups, used_P, adapter_P, x_PA, pair: Pair) -> jax.Array:
    """(x a) b block by block, with the pair of its expert beside each.

    Rows that are not used may hold anything on TPU: they are replaced, here and in what flows back.
    """
    kept_PJ, pair = _kept(adapter_P, pair)
    rows, blocks = x_PA.shape[0], groups.block_expert.shape[0]
    x_GMA = jnp.where(used_P[:, None], x_PA, 0).reshape(blocks, rows // blocks, -1)
    a_GAR, b_GRZ = (m[groups.block_expert].astype(x_PA.dtype) for m in pair)
    low_GMR = matmul(x_GMA, a_GAR)
    if kept_PJ is not None:
        low_GMR = jnp.where(kept_PJ.reshape(low_GMR.shape), low_GMR, 0)
    y_GMZ = matmul(low_GMR, b_GRZ)
    return jnp.where(used_P[:, None], y_GMZ.reshape(rows, -1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _constant(rows: Rows, x_PA, w, groups: Groups) -> jax.Array:
    """x w of each row's expert; the gradient is that of x. A packed w is read in each pass."""
    return rows.dot(*_read(x_PA, w), groups)


def _forward(rows, x_PA, w, groups):
    return _constant(rows, x_PA, w, groups), (w, groups)


def _backward(rows, saved, ct_PZ):
    w, groups = saved
    return rows.back(*_read(ct_PZ, w), groups), None, None


def _read(x, w: jax.Array | Packed) -> tuple[jax.Array, jax.Array]:
    """x, and the numbers of w in its dtype.

    XLA would read the packed matrices of several layers at once, and keep them from one pass to the
    other. The barrier makes it wait for x. What is not packed is left to `rows`.
    """
    if not isinstance(w, Packed):
        return x, w
    x, w = lax.optimization_barrier((x, w))
    return x, as_numbers(w, x.dtype)


_constant.defvjp(_forward, _backward)


def _kept(adapter_P, pair: Pair) -> tuple[jax.Array | None, Pair]:
    """(which ranks each row keeps, or None for all; the pairs of all adapters as one)."""
    if adapter_P is None:
        return None, pair
    return kept_ranks(adapter_P, *pair.a.shape[-2:]), Pair(*side_by_side(*pair))


def _low(adapter_P, x_PA, pair: Pair):
    kept_PJ, pair = _kept(adapter_P, pair)
    low_PR = matmul(x_PA, pair.a)
    return matmul(low_PR if kept_PJ is None else jnp.where(kept_PJ, low_PR, 0), pair.b)


def _every(form, w, pairs: ExpertPairs, x_PD, gate_P, groups, adapter_P):
    """One expert after another on all rows: the reference."""
    expert_P, x_PD = expert_of_rows(x_PD, groups), jnp.where(gate_P[:, None] == 0, 0, x_PD)
    added = functools.partial(_low, adapter_P)

    def add(y_PD, one):
        expert, own, low = one
        own = ExpertWeights(*(as_numbers(m, x_PD.dtype) for m in own))
        low = jax.tree.map(lambda m: m.astype(x_PD.dtype), low)
        h1_PF, h3_PF = (
            _plus(matmul(x_PD, m), added, x_PD, pair)
            for m, pair in ((own.w1, low.w1), (own.w3, low.w3))
        )
        h_PF = gated(form, h1_PF, h3_PF, jnp.where(expert_P == expert, gate_P, 0))
        return y_PD + _plus(matmul(h_PF, own.w2), added, h_PF, low.w2), None

    numbers_E = jnp.arange(groups.group_sizes.shape[0], dtype=expert_P.dtype)
    zeros_PD = vary_like(jnp.zeros_like(x_PD), x_PD)
    return lax.scan(add, zeros_PD, (numbers_E, lax.stop_gradient(w), pairs))[0]


def _cast(product: Callable, x_PA, w_EAZ, groups: Groups) -> jax.Array:
    """A grouped product with matrices in the dtype of the rows."""
    return product(x_PA, w_EAZ.astype(x_PA.dtype), groups)


def _of_one(back: Callable, ct_PZ, w_EAZ, groups: Groups) -> jax.Array:
    """`back`, which takes several pairs of rows and matrices, of one."""
    return back(((ct_PZ, w_EAZ),), groups)


def _whole(dot: Callable, back: Callable) -> Rows:
    """All rows at once, by a platform's grouped products, which read matrices as they lie."""
    return Rows(functools.partial(_cast, dot), functools.partial(_cast, back))


BLOCKED = Rows(blocked.dot, blocked.back)
RAGGED = _whole(whole.ragged_dot, functools.partial(_of_one, whole.ragged_back))
TRITON = _whole(gpu.grouped_dot, gpu.grouped_back)


def _best(name: str, *args) -> jax.Array:
    """What the platform computes best, chosen when the program is compiled."""
    loop, ragged, triton = (getattr(rows, name) for rows in (BLOCKED, RAGGED, TRITON))
    x_PA, w_EAZ, groups = args
    size = x_PA.shape[0] // groups.block_expert.shape[0]
    cuda = triton if gpu.suits(size, *w_EAZ.shape[1:]) else loop
    return lax.platform_dependent(*args, cpu=loop, cuda=cuda, rocm=loop, default=ragged)


BEST = Rows(functools.partial(_best, "dot"), functools.partial(_best, "back"))
RAGGED_ANYWHERE = _whole(
    op.RAGGED_ANYWHERE.dot, functools.partial(_of_one, op.ragged_back_anywhere)
)
TRITON_ANYWHERE = _whole(op.TRITON_ANYWHERE.dot, op.grouped_back_anywhere)
IMPLEMENTATIONS = {
    "reference": _every,
    "best": functools.partial(_fast, BEST),
    "blocked": functools.partial(_fast, BLOCKED),
    "ragged": functools.partial(_fast, RAGGED_ANYWHERE),
    "triton": functools.partial(_fast, TRITON_ANYWHERE),
    "every_expert": _every,
}
"""Those of `expert_ffn`; "every_expert" is the reference, as decoding has no loop of its own."""
