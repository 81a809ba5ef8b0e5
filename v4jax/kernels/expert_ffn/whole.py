"""The experts on all rows at once, with the grouped products of a platform.

TPU: kernels (v4jax/kernels/expert_ffn/rows_tpu.py, grad_tpu.py), and lax.ragged_dot for sizes that
they do not take. NVIDIA GPUs: kernels for both products (v4jax/kernels/expert_ffn/gpu.py). Both
have one for packed matrices (v4jax/kernels/expert_ffn/packed_tpu.py, packed_gpu.py).

Shapes: P rows in blocks, A and Z widths of a product's factors, E experts, D hidden, F expert
hidden.
Next file to read: v4jax/kernels/expert_ffn/grad_tpu.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax

from sharding.experts import Groups
from v4jax.kernels.expert_ffn import rows_tpu
from v4jax.kernels.expert_ffn.formulas import ffn, ffn_backward, turned
from v4jax.kernels.matmul import precision_of
from v4jax.quant.packed import Packed, as_numbers


class Products(NamedTuple):
    """A platform's grouped products.

    Attributes:
      dot: dot(x, w, groups).
      outer: outer(x, ct, groups), float32: its gradient for w.
      back: back(pairs of ct and w, groups): its gradients for x, added up; None: by `dot`.
      packed: packed(x, w, groups) of MXFP4 matrices; None: by `dot`.
      suits: suits(x, w, groups): whether `packed` takes them, and is faster.
    """

    dot: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    back: Callable[..., jax.Array] | None = None
    packed: Callable[..., jax.Array] | None = None
    suits: Callable[..., bool] | None = None

    def product(self, x_PA: jax.Array, w: jax.Array | Packed, groups: Groups) -> jax.Array:
        """x w of each row's expert, w packed or not."""
        kernel = self.packed
        taken = isinstance(w, Packed) and self.suits is not None and self.suits(x_PA, w, groups)
        if taken and kernel is not None:
            return kernel(x_PA, w, groups)
        return self.dot(x_PA, as_numbers(w, x_PA.dtype), groups)


def forward(products: Products, form, w, x_PD, gate_P, groups):
    """(y, h1, h3); the backward pass needs h1 and h3."""
    return ffn(form, lambda x, w: products.product(x, w, groups), w, x_PD, gate_P)


def backward(products: Products, form, w, x_PD, gate_P, groups, h1_PF, h3_PF, ct_PD):
    """(gradients of w, of x, of the gate)."""

    def outer(x_PA, ct_PZ):
        return products.outer(x_PA, ct_PZ, groups).astype(w.w1.dtype)

    def back(*pairs):
        if products.back is None:
            return turned(_grouped(products.dot, groups))(*pairs)
        return products.back(tuple((ct, w.astype(ct.dtype)) for ct, w in pairs), groups)

    return ffn_backward(form, back, outer, w, x_PD, gate_P, h1_PF, h3_PF, ct_PD)


def _grouped(dot, groups: Groups):
    return lambda x_PA, w_EAZ: dot(x_PA, as_numbers(w_EAZ, x_PA.dtype), groups)


def ragged_dot(x_PA, w_EAZ, groups: Groups, kernel=rows_tpu.grouped_dot):
    """out[p] = x[p] w[expert of p]: by the kernel where blocks and widths suit it, else by XLA."""
    if rows_tpu.suits(((x_PA, w_EAZ),), groups):
        return kernel(x_PA, w_EAZ, groups)
    return lax.ragged_dot(x_PA, w_EAZ, groups.group_sizes, precision=precision_of(x_PA))


def ragged_back(pairs, groups: Groups, kernel=rows_tpu.grouped_back):
    """The gradients of products for the rows that they share, likewise."""
    if rows_tpu.suits(pairs, groups):
        return kernel(pairs, groups)
    return turned(_grouped(ragged_dot, groups))(*pairs)
