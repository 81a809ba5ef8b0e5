"""What an operation that chips.py compiles is made of."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.context import Context


class Case(NamedTuple):
    """An op to compile.

    Attributes:
      run: a function of arrays.
      shapes: of these; the first `diff` of them get gradients. 0: there is no backward pass.
      flops, bytes: useful ones of a forward pass.
      back_flops, back_bytes: the same of a backward pass.
    """

    run: Any
    shapes: tuple
    diff: int
    flops: float = 0
    bytes: float = 0
    back_flops: float = 0
    back_bytes: float = 0


class Sizes(NamedTuple):
    """What a case is made for: the last `queries` positions of a row of `seq`."""

    ctx: Context
    cfg: ModelConfig
    seq: int
    queries: int


def of(shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
