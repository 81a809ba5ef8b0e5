"""The experts' feed-forward with constant matrices, of which some have a low-rank pair (LoRA).

Each product is x W + (x a) b. Products with W have a gradient for x alone; W's is never computed.
Those with a and b work on whole blocks of rows, each with its expert's pair beside it, on every
platform: a pair is no larger than the rows of its block.

Shapes: P rows in blocks, G blocks, M rows of a block, A and Z widths of a product's factors, R
rank, D hidden, E experts, F expert hidden.
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
    """a [E,A,R] and b [E,R,Z]; those of one expert have no axis E."""

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
) -> jax.Array:
    """`expert_ffn` with constant matrices and their pairs; arguments and errors are those there.

    Args:
      w: not joined; packed ones are read when used.
      pairs: cast to the dtype of x when used. Their gradients are sums in their own dtype.
    """
    op.check(implementation, w, x_PD, groups)
    function = pick("expert_ffn", IMPLEMENTATIONS, implementation, best="best")
    return function(form, w, pairs, x_PD, gate_P, groups)


def _fast(rows: Rows, form, w, pairs: ExpertPairs, x_PD, gate_P, groups):
    """Products with matrices by `rows`, products with pairs block by block."""
    added = functools.partial(_in_blocks, groups, gate_P != 0)
    h1_PF = _plus(_constant(rows, x_PD, w.w1, groups), added, x_PD, pairs.w1)
    if isinstance(w.w3, Packed):  # is read when w1 is no longer needed; backwards, w1 after it
        x_PD, h1_PF = lax.optimization_barrier((x_PD, h1_PF))
    h3_PF = _plus(_constant(rows, x_PD, w.w3, groups), added, x_PD, pairs.w3)
    # What the activation computes inside is recomputed: it is several arrays in float32.
    h_PF = jax.checkpoint(functools.partial(gated, form))(h1_PF, h3_PF, gate_P)
    return _plus(_constant(rows, h_PF, w.w2, groups), added, h_PF, pairs.w2)


def _plus(y, added: Callable, x, pair: Pair | None):
    return y if pair is None else y + added(x, pair)


def _in_blocks(groups: Groups, used_P, x_PA, pair: Pair) -> jax.Array:
    """(x a) b of each row's expert, 0 in rows that are not used.

    These may hold anything on TPU: they are replaced, here and in what flows back.
    """
    rows, blocks = x_PA.shape[0], groups.block_expert.shape[0]
    x_GMA = jnp.where(used_P[:, None], x_PA, 0).reshape(blocks, rows // blocks, -1)
    a_GAR, b_GRZ = (m[groups.block_expert].astype(x_PA.dtype) for m in pair)
    y_GMZ = matmul(matmul(x_GMA, a_GAR), b_GRZ)
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


def _low(x, pair: Pair):
    return matmul(matmul(x, pair.a), pair.b)


def _every(form, w, pairs: ExpertPairs, x_PD, gate_P, groups):
    """One expert after another on all rows: the reference."""
    expert_P, x_PD = expert_of_rows(x_PD, groups), jnp.where(gate_P[:, None] == 0, 0, x_PD)

    def add(y_PD, one):
        expert, own, low = one
        own = ExpertWeights(*(as_numbers(m, x_PD.dtype) for m in own))
        low = jax.tree.map(lambda m: m.astype(x_PD.dtype), low)
        h1_PF, h3_PF = (
            _plus(matmul(x_PD, m), _low, x_PD, pair)
            for m, pair in ((own.w1, low.w1), (own.w3, low.w3))
        )
        h_PF = gated(form, h1_PF, h3_PF, jnp.where(expert_P == expert, gate_P, 0))
        return y_PD + _plus(matmul(h_PF, own.w2), _low, h_PF, low.w2), None

    numbers_E = jnp.arange(groups.group_sizes.shape[0], dtype=expert_P.dtype)
    zeros_PD = vary_like(jnp.zeros_like(x_PD), x_PD)
    return lax.scan(add, zeros_PD, (numbers_E, lax.stop_gradient(w), pairs))[0]


def _whole(dot: Callable, back: Callable) -> Rows:
    """All rows at once, by a platform's grouped products, which read matrices as they lie."""

    def cast(product):
        def multiply(x_PA, w_EAZ, groups):
            return product(x_PA, w_EAZ.astype(x_PA.dtype), groups)

        return multiply

    return Rows(cast(dot), cast(back))


def _of_one(back: Callable) -> Callable:
    """`back` of several pairs of rows and matrices, for one pair."""

    def of_one(ct_PZ, w_EAZ, groups):
        return back(((ct_PZ, w_EAZ),), groups)

    return of_one


BLOCKED = Rows(blocked.dot, blocked.back)
RAGGED = _whole(whole.ragged_dot, _of_one(whole.ragged_back))
TRITON = _whole(gpu.grouped_dot, gpu.grouped_back)


def _best(name: str, *args) -> jax.Array:
    """What the platform computes best, chosen when the program is compiled."""
    loop, ragged, triton = (getattr(rows, name) for rows in (BLOCKED, RAGGED, TRITON))
    x_PA, w_EAZ, groups = args
    size = x_PA.shape[0] // groups.block_expert.shape[0]
    cuda = triton if gpu.suits(size, *w_EAZ.shape[1:]) else loop
    return lax.platform_dependent(*args, cpu=loop, cuda=cuda, rocm=loop, default=ragged)


BEST = Rows(functools.partial(_best, "dot"), functools.partial(_best, "back"))
RAGGED_ANYWHERE = _whole(op.RAGGED_ANYWHERE.dot, _of_one(op.ragged_back_anywhere))
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
