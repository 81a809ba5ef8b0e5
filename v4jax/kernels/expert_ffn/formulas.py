"""The two formulas of the experts' feed-forward, which take the products as arguments.

dot(x, w) multiplies rows by experts' matrices; outer(x, ct) is its gradient for these, and
back((ct, w), ...) the sum of its gradients for rows that several products share.

Shapes: P rows, D hidden, F expert hidden, E experts.
Next file to read: v4jax/kernels/expert_ffn/blocked.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.matmul import precision_of
from v4jax.quant.fake import fp8_input
from v4jax.quant.packed import Packed


class ExpertWeights(NamedTuple):
    """The experts' matrices w1, w3 [E,D,F] and w2 [E,F,D]; those of one expert have no axis E.

    Joined (w3 None, forward only), w1 is both side by side, [E,D,2F]. Forward only, matrices may be
    packed (v4jax/quant/packed.py).
    """

    w1: jax.Array | Packed
    w3: jax.Array | Packed | None
    w2: jax.Array | Packed

    @classmethod
    def of(cls, arrays) -> "ExpertWeights":
        """Those of a dict by name."""
        return cls(arrays["w1"], arrays.get("w3"), arrays["w2"])

    def read(self, dtype) -> "ExpertWeights":
        """Packed matrices as their numbers in `dtype`, the others as they are."""
        w1, w2 = (w.numbers(dtype) if isinstance(w, Packed) else w for w in (self.w1, self.w2))
        w3 = self.w3.numbers(dtype) if isinstance(self.w3, Packed) else self.w3
        return ExpertWeights(w1, w3, w2)


class Activation(NamedTuple):
    """How the hidden activation is made.

    Attributes:
      limit: swiglu_limit.
      quant: "official" rounds it to fp8 before w2.
    """

    limit: float
    quant: str = "none"


def clamped_swiglu(h1: jax.Array, h3: jax.Array, limit: float) -> jax.Array:
    """silu(min(h1, limit)) * clip(h3, -limit, limit), float32.

    The clamp comes before silu (docs/equations.md#trap-29).
    """
    h1, h3 = h1.astype(jnp.float32), h3.astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(h1, limit)) * jnp.clip(h3, -limit, limit)


def matmul(x, w):
    """x @ w, batched where both have leading axes."""
    return jnp.matmul(x, w, precision=precision_of(x))


def gated(form: Activation, h1, h3, gate, axis: int = -1):
    """The hidden activation; `axis` is the axis of its width, which `gate` lacks."""
    gate = jnp.expand_dims(gate, axis)
    # Rows that fill up a block have gate 0 and may hold anything on TPU: they are replaced, not
    # multiplied by 0.
    h = jnp.where(gate == 0, 0, clamped_swiglu(h1, h3, form.limit) * gate).astype(h1.dtype)
    return (
        jnp.moveaxis(fp8_input(jnp.moveaxis(h, axis, -1)), -1, axis)
        if form.quant == "official"
        else h
    )


def ffn(form, dot, w: ExpertWeights, x, gate_P):
    """(y, h1, h3): the formula of the forward pass."""
    if w.w3 is None:
        h1, h3 = jnp.split(dot(x, w.w1), 2, axis=-1)
        return dot(gated(form, h1, h3, gate_P), w.w2), h1, h3
    h1, h3 = dot(x, w.w1), dot(x, w.w3)
    return dot(gated(form, h1, h3, gate_P), w.w2), h1, h3


def turned(dot):
    """`back`, by products with transposed matrices."""

    def back(*pairs):
        first, *rest = (dot(ct, jnp.swapaxes(w, -1, -2)) for ct, w in pairs)
        return sum(rest, first)

    return back


def ffn_backward(form, back, outer, w: ExpertWeights, x, gate_P, h1, h3, ct):
    """(gradients of w, of x, of the gate): the formula of the backward pass."""
    assert w.w3 is not None, "joined matrices run forward only"
    hidden, pull = jax.vjp(functools.partial(gated, form), h1, h3, gate_P)
    ct_h1, ct_h3, ct_gate = pull(back((ct, w.w2)))
    ct_x = back((ct_h1, w.w1), (ct_h3, w.w3))
    ct_w = ExpertWeights(outer(x, ct_h1), outer(x, ct_h3), outer(hidden, ct))
    return ct_w, ct_x, ct_gate
