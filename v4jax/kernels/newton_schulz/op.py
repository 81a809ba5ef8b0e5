"""One step of the Newton-Schulz iteration on a stack of matrices.

    X <- a X + (b G + c G^2) X,   G = X X^T

`reference` is three products; `pallas_tpu` a kernel each, which compute half of the symmetric ones
and write the iterate together with its rounded copy, so that no pass only casts. Equation:
docs/equations.md#muon. No gradient.

Shapes: Z matrices, R rows, K columns, R <= K.
Next file to read: v4jax/kernels/newton_schulz/products_tpu.py.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from v4jax.kernels.choice import pick
from v4jax.kernels.newton_schulz.products_tpu import SIDES, Sizes, symmetric, times
from v4jax.kernels.tpu import LANES, beyond_vmem, check_fits, on_tpu


def newton_schulz_step(
    x_ZRK: jax.Array, factor_ZRK: jax.Array, abc: jax.Array, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(the next iterate, the same as a factor of products).

    Args:
      x_ZRK: float32.
      factor_ZRK: the same, rounded to the dtype of factors. Sums, Gram matrices and the iterate are
        float32: an iterate in bfloat16 would lose the small singular directions.
      abc: float32 [3], the coefficients.

    Raises:
      ValueError: "pallas_tpu" for sizes that it does not take.
    """
    _, rows, columns = x_ZRK.shape
    fault = _unfit(rows, columns, factor_ZRK.dtype.itemsize)
    best = "pallas_tpu" if on_tpu() and not fault else "reference"
    if implementation == "pallas_tpu":
        check_fits("newton_schulz", fault)
    return pick("newton_schulz", IMPLEMENTATIONS, implementation, best)(x_ZRK, factor_ZRK, abc)


def _reference(x_ZRK, factor_ZRK, abc):
    dtype = factor_ZRK.dtype
    gram_ZRR = _product(factor_ZRK, jnp.swapaxes(factor_ZRK, -1, -2))
    rounded_ZRR = _rounded(gram_ZRR, dtype)
    polynomial_ZRR = abc[1] * gram_ZRR + abc[2] * _product(rounded_ZRR, rounded_ZRR)
    x_ZRK = abc[0] * x_ZRK + _product(_rounded(polynomial_ZRR, dtype), factor_ZRK)
    return x_ZRK, _rounded(x_ZRK, dtype)


def _rounded(x: jax.Array, dtype) -> jax.Array:
    """`x` in `dtype`. The barrier keeps XLA:TPU from leaving the cast to each product again."""
    return x if x.dtype == dtype else jax.lax.optimization_barrier(x.astype(dtype))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, float32.

    Factors in float32 run in the platform's own precision (TF32 on GPUs), unlike the model's
    products: Muon tolerates bfloat16 here.
    """
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _pallas_tpu(x_ZRK, factor_ZRK, abc):
    sizes = _sizes(x_ZRK.shape[1], x_ZRK.shape[2])
    one = jnp.asarray([0.0, 1.0], jnp.float32)
    gram_ZRR, rounded_ZRR = symmetric(sizes, factor_ZRK, None, one, keep=True)
    (polynomial_ZRR,) = symmetric(sizes, rounded_ZRR, gram_ZRR, abc[1:], keep=False)
    return times(sizes, polynomial_ZRR, factor_ZRK, x_ZRK, abc[:1])


def _sizes(rows: int, columns: int) -> Sizes:
    """The largest blocks that divide; where kernels are interpreted, any."""
    if not on_tpu():
        return Sizes(_divisor(rows, 8), _divisor(columns, 16), interpret=True)
    here, wide = (next(side for side in SIDES if n % side == 0) for n in (rows, columns))
    return Sizes(here, wide, interpret=False)


def _divisor(n: int, limit: int) -> int:
    return next(side for side in range(min(n, limit), 0, -1) if n % side == 0)


def _unfit(rows: int, columns: int, item: int) -> str:
    """Why the kernels do not take these matrices, in words; "" if they do."""
    if not on_tpu():
        return ""
    if rows % LANES or columns % LANES:
        return f"matrices of {rows} x {columns}, whose sides must divide by {LANES} on TPU"
    sizes = _sizes(rows, columns)
    return beyond_vmem(f"matrices of {rows} x {columns}", sizes.bytes(rows, columns, item))


IMPLEMENTATIONS: Mapping[str, Callable] = {"reference": _reference, "pallas_tpu": _pallas_tpu}
