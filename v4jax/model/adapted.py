"""Products with weights that may have a low-rank pair (LoRA): x W + (dropout(x) a) b.

W and a b are never added up: that would cost a product as large as W's gradient.

Rows of a batch may have different adapters. The pairs of all then lie side by side, a [I,U*R] and b
[U*R,O], and each row keeps only the R numbers of x a that are its own adapter's. So one product
serves all rows, and rows without an adapter get zeros.

Shapes: B batch, S positions, G groups of heads, I width of a group, O output rank, R rank, U
adapters, J ranks of all adapters (U*R), D hidden, V vocabulary.
Next file to read: v4jax/model/weights.py.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from v4jax.context import Context
from v4jax.kernels.expert_ffn.adapted import kept_ranks, side_by_side
from v4jax.kernels.matmul import dense, precision_of
from v4jax.parameter_tree import ADAPTERS, spec_of

ROW = "row"
"""Beside a and b of a pair of several adapters: the number of each row's adapter, int32 [B]."""

DROPOUT = "dropout"
"""The name of the random numbers that drop inputs."""


class Adapted(NamedTuple):
    """A matrix and its pair, all in the dtype of their products.

    Attributes:
      w: [I,O], a constant.
      a, b: [I,R] and [R,O], or [I,J] and [J,O] of several adapters; the scale is a factor of b.
      key: of the inputs of a that are dropped; None: none are.
      kept_BJ: bool, which ranks are those of each row's adapter; None: all rows have the same.
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    kept_BJ: jax.Array | None = None


Weight = jax.Array | Adapted


def with_rows(pairs: Any, adapter_B: jax.Array) -> Any:
    """Pairs of several adapters, each with the number of every row's adapter beside it, as ROW.

    Args:
      pairs: a tree of a [...,I,U,R] and b [...,U,R,O].
      adapter_B: int32; below 0 for a row without an adapter.
    """
    flat: Any = flatten_dict(pairs)
    found = dict(flat)
    for path, a in flat.items():
        if path[-1] == "a":
            axes = spec_of((ADAPTERS, *path)).axes
            layers = a.shape[: a.ndim - len(axes) - 1]
            found[(*path[:-1], ROW)] = jnp.broadcast_to(adapter_B, (*layers, *adapter_B.shape))
    return unflatten_dict(found)


def with_pair(
    w: jax.Array,
    pair: Mapping[str, jax.Array],
    axes: tuple[str | None, ...],
    whole: Callable[[jax.Array, tuple[str | None, ...]], jax.Array],
    key: jax.Array | None = None,
) -> Adapted:
    """w [I,O] with its pair, cast to the dtype of w.

    Args:
      pair: a [I,R] and b [R,O]; or a [I,U,R], b [U,R,O] and ROW.
      axes: the logical axes of w.
      whole: gathers an array with such axes.
      key: of dropped inputs.

    Raises:
      ValueError: pairs of several adapters without ROW.
    """
    a, b, kept_BJ = pair["a"], pair["b"], None
    if a.ndim > w.ndim and ROW not in pair:
        raise ValueError(f"lora: a {a.shape} is of several adapters, and no row says which it has")
    if ROW in pair:
        kept_BJ = kept_ranks(pair[ROW], *a.shape[-2:])
        a, b = side_by_side(a, b)
    a = whole(a.astype(w.dtype), (axes[0], None))
    b = whole(b.astype(w.dtype), (None, axes[1]))
    return Adapted(w, a, b, key, kept_BJ)


def product(ctx: Context, x: jax.Array, w: Weight, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x @ w, w with or without a pair; [..., O] in `out_dtype`, by default that of x."""
    if isinstance(w, Adapted):
        added = dense(_narrowed(ctx, x, w), w.b, out_dtype, ctx.kernels.matmul)
        return base_product(ctx, x, w.w, out_dtype) + added
    return base_product(ctx, x, w, out_dtype)


def base_product(ctx: Context, x, w: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x @ w. Autodiff knows which of the two is a constant; a written gradient computes both."""
    return dense(x, w, out_dtype, "reference" if ctx.frozen else ctx.kernels.matmul)


def _narrowed(ctx: Context, x: jax.Array, w: Adapted) -> jax.Array:
    """dropped(x) a; 0 in the ranks of other adapters than the row's."""
    narrow = dense(dropped(ctx, x, w), w.a, implementation=ctx.kernels.matmul)
    if w.kept_BJ is None:
        return narrow
    batch, ranks = w.kept_BJ.shape
    kept = w.kept_BJ.reshape(batch, *(1,) * (narrow.ndim - 2), ranks)
    return jnp.where(kept, narrow, jnp.zeros((), narrow.dtype))


def dropped(ctx: Context, x: jax.Array, w: Adapted) -> jax.Array:
    """x, some of its numbers 0 and the others scaled up, as `ctx.dropout` says; x without a key."""
    if w.key is None:
        return x
    keep = jax.random.bernoulli(w.key, 1 - ctx.dropout, x.shape)
    return jnp.where(keep, x / (1 - ctx.dropout), jnp.zeros((), x.dtype)).astype(x.dtype)


def grouped_product(ctx: Context, x_BSGI: jax.Array, w: Weight) -> jax.Array:
    """[B,S,G,O]: each group through its own columns of w [I,G*O]; all groups share a."""
    if isinstance(w, Adapted):
        return _by_group(x_BSGI, w.w) + _by_group(_narrowed(ctx, x_BSGI, w), w.b)
    return _by_group(x_BSGI, w)


def _by_group(x_BSGI: jax.Array, w: jax.Array) -> jax.Array:
    w_IGO = w.reshape(w.shape[0], x_BSGI.shape[2], -1)
    return jnp.einsum("BSGI,IGO->BSGO", x_BSGI, w_IGO, precision=precision_of(x_BSGI))


def factors(
    ctx: Context, x_BSD: jax.Array, head: Weight
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Pairs of rows [B,S,...] and columns [...,V] whose products, added up, are x @ head.

    So a loss can apply the head piece by piece: to some positions, and to some of the vocabulary.
    """
    if not isinstance(head, Adapted):
        return ((x_BSD, head),)
    return (x_BSD, head.w), (_narrowed(ctx, x_BSD, head), head.b)
