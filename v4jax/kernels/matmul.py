"""x @ w, with its gradient by autodiff or written out.

Autodiff computes ct^T x and transposes the result. For that XLA:CPU computes whatever made ct one
number at a time, in transposed order, which is slow. x^T ct has the same numbers without that;
other platforms do not mind. The first factor is copied in transposed order, so the narrower one
comes first (figures: v4jax/kernels/README.md).

Shapes: A input width, Z output width; `...` any leading axes.
Next file to read: v4jax/kernels/norm.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from v4jax.kernels.choice import pick


def precision_of(x: jax.Array) -> lax.Precision | None:
    """Precision of a product with x: full for float32, otherwise the platform's own.

    By default TPUs round float32 factors to bfloat16, and GPUs to TF32.
    """
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def dense(
    x: jax.Array,
    w: jax.Array,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x @ w.

    Args:
      x: [..., A].
      w: [A, Z], in the dtype of x.
      out_dtype: dtype of the result; None: that of x.
      implementation: "reference" or "written_gradient"; None: "written_gradient".

    Returns:
      [..., Z].

    Raises:
      ValueError: an unknown implementation.
    """
    return pick("matmul", IMPLEMENTATIONS, implementation, "written_gradient")(x, w, out_dtype)


def reference(x: jax.Array, w: jax.Array, out_dtype: DTypeLike | None) -> jax.Array:
    """The product, whose gradient is autodiff's."""
    return _dot(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def written_gradient(x: jax.Array, w: jax.Array, out_dtype: DTypeLike | None) -> jax.Array:
    """The same product; its gradient is written out."""
    return reference(x, w, out_dtype)


def _dot(a, b, dimensions, **options):
    return lax.dot_general(a, b, dimensions, precision=precision_of(a), **options)


def _fwd(x, w, out_dtype):
    return reference(x, w, out_dtype), (x, w)


def _bwd(out_dtype, saved, ct):
    x, w = saved
    ct = ct.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    ct_x = _dot(ct, w, (((x.ndim - 1,), (1,)), ((), ())))
    if w.shape[0] <= w.shape[1]:
        return ct_x, _dot(x, ct, ((rows, rows), ((), ())))
    # Without the barrier XLA turns this back into the line above.
    return ct_x, lax.optimization_barrier(_dot(ct, x, ((rows, rows), ((), ())))).T


written_gradient.defvjp(_fwd, _bwd)

IMPLEMENTATIONS = {"reference": reference, "written_gradient": written_gradient}
