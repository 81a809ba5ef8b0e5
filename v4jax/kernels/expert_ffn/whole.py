"""The experts on all rows at once, with the grouped products of a platform.

TPU: lax.ragged_dot (a grouped GEMM), with a kernel for its weight gradient
(v4jax/kernels/expert_ffn/grad_tpu.py). NVIDIA GPUs: kernels for both products
(v4jax/kernels/expert_ffn/gpu.py).

Shapes: P rows in blocks, A and Z widths of a product's factors, E experts, D hidden, F expert
hidden.
Next file to read: v4jax/kernels/expert_ffn/grad_tpu.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax

from sharding.experts import Groups
from v4jax.kernels.expert_ffn.formulas import ffn, ffn_backward
from v4jax.kernels.matmul import precision_of


class Products(NamedTuple):
    """A platform's grouped products: dot(x, w, groups), and outer(x, ct, groups) in float32."""

    dot: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]


def forward(products: Products, form, w, x_PD, gate_P, groups):
    """(y, h1, h3); the backward pass needs h1 and h3."""
    return ffn(form, _grouped(products.dot, groups), w, x_PD, gate_P)


def backward(products: Products, form, w, x_PD, gate_P, groups, h1_PF, h3_PF, ct_PD):
    """(gradients of w, of x, of the gate)."""

    def outer(x_PA, ct_PZ):
        return products.outer(x_PA, ct_PZ, groups).astype(w.w1.dtype)

    dot = _grouped(products.dot, groups)
    return ffn_backward(form, dot, outer, w, x_PD, gate_P, h1_PF, h3_PF, ct_PD)


def _grouped(dot, groups: Groups):
    return lambda x_PA, w_EAZ: dot(x_PA, w_EAZ.astype(x_PA.dtype), groups)


def ragged_dot(x_PA, w_EAZ, groups: Groups):
    """out[p] = x[p] w[expert of p], as XLA:TPU's grouped product."""
    return lax.ragged_dot(x_PA, w_EAZ, groups.group_sizes, precision=precision_of(x_PA))
