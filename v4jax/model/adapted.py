"""Products with weights that may have a low-rank pair (LoRA): x W + (dropout(x) a) b.

W and a b are never added up: that would cost a product as large as W's gradient.

Shapes: B batch, S positions, G groups of heads, I width of a group, O output rank, R rank, D
hidden, V vocabulary.
Next file to read: v4jax/model/weights.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from v4jax.context import Context
from v4jax.kernels.matmul import dense, precision_of

DROPOUT = "dropout"
"""The name of the random numbers that drop inputs."""


class Adapted(NamedTuple):
    """A matrix and its pair, all in the dtype of their products.

    Attributes:
      w: [I,O], a constant.
      a, b: [I,R] and [R,O]; the scale is a factor of b.
      key: of the inputs of a that are dropped; None: none are.
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None


Weight = jax.Array | Adapted


def product(ctx: Context, x: jax.Array, w: Weight, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x @ w, w with or without a pair; [..., O] in `out_dtype`, by default that of x."""
    if isinstance(w, Adapted):
        low = dense(dropped(ctx, x, w), w.a, implementation=ctx.kernels.matmul)
        added = dense(low, w.b, out_dtype, ctx.kernels.matmul)
        return base_product(ctx, x, w.w, out_dtype) + added
    return base_product(ctx, x, w, out_dtype)


def base_product(ctx: Context, x, w: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x @ w. Autodiff knows which of the two is a constant; a written gradient computes both."""
    return dense(x, w, out_dtype, "reference" if ctx.frozen else ctx.kernels.matmul)


def dropped(ctx: Context, x: jax.Array, w: Adapted) -> jax.Array:
    """x, some of its numbers 0 and the others scaled up, as `ctx.dropout` says; x without a key."""
    if w.key is None:
        return x
    keep = jax.random.bernoulli(w.key, 1 - ctx.dropout, x.shape)
    return jnp.where(keep, x / (1 - ctx.dropout), jnp.zeros((), x.dtype)).astype(x.dtype)


def grouped_product(ctx: Context, x_BSGI: jax.Array, w: Weight) -> jax.Array:
    """[B,S,G,O]: each group through its own columns of w [I,G*O]; all groups share a."""
    if isinstance(w, Adapted):
        low_BSGR = dense(dropped(ctx, x_BSGI, w), w.a, implementation=ctx.kernels.matmul)
        return _by_group(x_BSGI, w.w) + _by_group(low_BSGR, w.b)
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
    low_BSR = dense(dropped(ctx, x_BSD, head), head.a, implementation=ctx.kernels.matmul)
    return (x_BSD, head.w), (low_BSR, head.b)
