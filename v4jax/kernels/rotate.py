"""Rotates interleaved pairs in the last dims of a head, in float32.

Equation: docs/equations.md#rotary.

Shapes: R rope dims, H head dim; `...` any leading axes.
Next file to read: v4jax/model/compressor.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.choice import pick


class Rotation(NamedTuple):
    """cos and sin of every pair's angle, float32 [..., R/2]."""

    cos: jax.Array
    sin: jax.Array

    def heads(self) -> "Rotation":
        """The same rotation with an axis for heads before the last."""
        return Rotation(self.cos[..., None, :], self.sin[..., None, :])


def rotate(
    x: jax.Array, rope: Rotation, inverse: bool = False, implementation: str | None = None
) -> jax.Array:
    """x with pairs (2i, 2i+1) of its last R dims rotated; other dims are unchanged.

    Args:
      x: [..., H] with H >= R.
      rope: broadcastable to [..., R/2]; angles get no gradient.
      inverse: rotate by the negative angle, as for the attention output.
      implementation: "reference" or "written_gradient"; None: "written_gradient".

    Returns:
      [..., H] in the dtype of x.

    Raises:
      ValueError: an unknown implementation.
    """
    return pick("rotate", IMPLEMENTATIONS, implementation, "written_gradient")(x, rope, inverse)


def reference(x: jax.Array, rope: Rotation, inverse: bool) -> jax.Array:
    """Each pair as a complex number, times exp(i angle) or exp(-i angle)."""
    width = 2 * rope.cos.shape[-1]
    pairs = x[..., -width:].astype(jnp.float32)
    rope = jax.lax.stop_gradient(rope)
    factor = jax.lax.complex(rope.cos, -rope.sin if inverse else rope.sin)
    turned = jax.lax.complex(pairs[..., 0::2], pairs[..., 1::2]) * factor
    turned = jnp.stack((turned.real, turned.imag), axis=-1).reshape(*x.shape[:-1], width)
    return jnp.concatenate((x[..., :-width], turned.astype(x.dtype)), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def written_gradient(x: jax.Array, rope: Rotation, inverse: bool) -> jax.Array:
    """Real products. The gradient is the inverse rotation.

    Autodiff would pad and add every slice.
    """
    width = 2 * rope.cos.shape[-1]
    passed, turned = x[..., :-width], x[..., -width:].astype(jnp.float32)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    sin = -rope.sin if inverse else rope.sin
    turned = jnp.stack((even * rope.cos - odd * sin, odd * rope.cos + even * sin), axis=-1)
    return jnp.concatenate((passed, turned.reshape(*x.shape[:-1], width).astype(x.dtype)), axis=-1)


def _fwd(x, rope, inverse):
    return written_gradient(x, rope, inverse), rope


def _bwd(inverse, rope, ct):
    return written_gradient(ct, rope, not inverse), None


written_gradient.defvjp(_fwd, _bwd)

IMPLEMENTATIONS = {"reference": reference, "written_gradient": written_gradient}
