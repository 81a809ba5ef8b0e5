"""Sums of gradients over micro-batches, added to inside the backward pass.

A sum enters the forward pass beside its weight and leaves it unchanged; what flows back along this
path is the sum so far, and each use of the weight adds its gradient to it. In a loop over layers
the sum is carried, so that XLA updates one layer of it in place: neither the gradients of a
micro-batch nor a second sum ever exist whole.

Next file to read: v4jax/model/weights.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from sharding.rules import AxisRules

SUMS, LAYER = "sums", "layer"
"""Collections of variables: a sum for each weight, and for weights of a loop the layer's number."""


def layer_numbers(sums: Any) -> Any:
    """For each sum over layers [L, ...] the numbers [L] that a loop over layers counts, int32."""
    return jax.tree.map(lambda total: jnp.arange(total.shape[0], dtype=jnp.int32), sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_sum(
    rules: AxisRules,
    axes: tuple[str | None, ...],
    w: jax.Array,
    total: jax.Array,
    layer: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(w in float32, total); the cotangent of `total` is its own plus that of `w`.

    The weight itself gets no gradient.

    Args:
      rules, axes: the layout and the weight's logical axes: what is added is cut like the weight.
      total: zeros of the shape of `w`, float32, or [L, ...] with one for each layer.
      layer: which of the layers `w` belongs to, int32; None: `total` has no axis of layers.
    """
    return _as_stored(rules, axes, w).astype(total.dtype), total


def _as_stored(rules: AxisRules, axes: tuple[str | None, ...], w: jax.Array) -> jax.Array:
    """`w`, row-major on each device.

    XLA:TPU would hold all weights of a loop in the layout that its products like best, in a copy
    made before the loop over micro-batches. Transposing one layer at a time is cheap. XLA cannot
    cut the constraint, and would gather whole weights for it; so each device states its own.
    """

    def stored(w: jax.Array) -> jax.Array:
        return with_layout_constraint(w, Layout(tuple(range(w.ndim))))

    if not rules:
        return stored(w)
    spec = rules.spec(axes)
    return jax.shard_map(stored, in_specs=spec, out_specs=spec)(w)


def _forward(rules, axes, w, total, layer):
    return with_sum(rules, axes, w, total, layer), layer


def _backward(rules, axes, layer, cotangents):
    grad, total = cotangents
    grad = rules.constrain(grad, *axes)
    if layer is None:
        total = total + grad
    else:
        total = rules.constrain(total.at[layer].add(grad), "layers", *axes)
    return None, total, None


with_sum.defvjp(_forward, _backward)
