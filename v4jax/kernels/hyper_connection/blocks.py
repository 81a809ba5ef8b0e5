"""What the kernels of hyper-connections share: sizes, the cut into steps, exact products.

A step takes LANES tokens with all their streams, each stream a matrix of its own. Numbers of which
a token has few (logits and weights) lie with the tokens last, so that vectors are full. Where they
multiply streams, a kernel transposes them.

Shapes: B batch, S positions, X streams, D hidden, M weights of a site ((2+X)*X), T tokens of a
step, R tokens of a strip, P columns that are worked on together, W columns for a number of each
token, most of them unused.
Next file to read: v4jax/kernels/hyper_connection/site_tpu.py.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.tpu import LANES, TN, VMEM_BYTES

STRIP = 16
"""Tokens whose streams are worked on together, so that sums stay in registers."""

COLUMNS = 512
"""Hidden numbers that are worked on together."""


class Site(NamedTuple):
    """What a site's kernels are compiled for.

    Attributes:
      streams: X.
      iterations: of Sinkhorn.
      norm_eps: of the streams' RMS norm.
      eps: of Sinkhorn's sums, and what is added to the weights of the collapse.
      interpret: run the kernels step by step, on any platform (tests).
    """

    streams: int
    iterations: int
    norm_eps: float
    eps: float
    interpret: bool


class Block(NamedTuple):
    """An array [B,...] as kernels see it: `shape` without B; `tokens` is its axis of tokens.

    Without such an axis every step sees all of it; each part has one of its own if `apart`.
    """

    shape: tuple[int, ...]
    tokens: int | None = None
    apart: bool = False


def call(
    kernel: Callable[..., None],
    name: str,
    inputs: list[tuple[jax.Array, Block]],
    outputs: list[tuple[jnp.dtype, Block]],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `kernel` on blocks of LANES tokens: those of a row, and of a part of it, in order.

    The first input is an array [B,...] with an axis of tokens.

    Returns:
      Arrays [B,...]; [B,parts,...] for blocks that each part has of its own.
    """
    first, block = inputs[0]
    batch, steps = first.shape[0], first.shape[1:][block.tokens or 0] // LANES
    parts = 2 if steps % 2 == 0 else 1  # a chip's two cores take one each
    manual = jax.typeof(first).manual_axis_type
    structs = [
        jax.ShapeDtypeStruct(
            (batch, *((parts,) if out.apart else ()), *out.shape), dtype, manual_axis_type=manual
        )
        for dtype, out in outputs
    ]
    moved = sum(x.nbytes for x, _ in inputs) + sum(s.size * s.dtype.itemsize for s in structs)
    return pl.pallas_call(
        kernel,
        out_shape=structs,
        grid=(batch, parts, steps // parts),
        in_specs=[_spec(x.ndim == len(one.shape), one, steps // parts) for x, one in inputs],
        out_specs=[_spec(False, one, steps // parts) for _, one in outputs],
        scratch_shapes=[pltpu.VMEM((LANES, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=16 * first.size, bytes_accessed=moved, transcendentals=0
        ),
        interpret=interpret,
        name=name,
    )(*(x for x, _ in inputs))


def _spec(shared: bool, block: Block, steps: int) -> pl.BlockSpec:
    """Where a step finds `block`; `shared`: the array has no axis B."""
    shape = list(block.shape)
    if block.tokens is not None:
        shape[block.tokens] = LANES

    def place(b, part, step):
        at = [0] * len(shape)
        if block.tokens is not None:
            at[block.tokens] = part * steps + step
        return (*(() if shared else (b,)), *((part,) if block.apart else ()), *at)

    squeezed = [None] * (len(place(0, 0, 0)) - len(shape))
    return pl.BlockSpec((*squeezed, *shape), place)


def strips(body: Callable[[Any], None]) -> None:
    """Runs `body` for the rows of each strip of a step's tokens."""

    def one(i, _):
        body(pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP))
        return ()

    lax.fori_loop(0, LANES // STRIP, one, ())


def columns(width: int) -> list[slice]:
    """The hidden axis in pieces."""
    return [slice(at, min(at + COLUMNS, width)) for at in range(0, width, COLUMNS)]


def by_token(rows_MT: jax.Array) -> jax.Array:
    """Numbers [M,T] of tokens as columns [T,W]."""
    more = LANES - rows_MT.shape[0]
    return jnp.concatenate([rows_MT, jnp.zeros((more, LANES), rows_MT.dtype)]).T


def joined(columns_R1: list[jax.Array]) -> jax.Array:
    """Columns [R,1] beside each other [R,W]; the others are 0."""
    lane = lax.broadcasted_iota(jnp.int32, (columns_R1[0].shape[0], LANES), 1)
    found = jnp.zeros(lane.shape, jnp.float32)
    for m, column_R1 in enumerate(columns_R1):
        found = jnp.where(lane == m, column_R1, found)
    return found


def exact(a: jax.Array, b: jax.Array, contraction) -> jax.Array:
    """A product of float32 numbers `a` and numbers `b`, summed in float32.

    Numbers `b` of 16 bits need no more than the three parts of 8 bits that make up `a`, which are
    one product. The rows of `a` are its axis 0, and are kept.
    """
    if b.dtype == jnp.float32:
        return lax.dot_general(
            a, b, contraction, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    n = a.shape[0]
    found = lax.dot_general(
        jnp.concatenate(parts_of(a, 3)).astype(b.dtype),
        b,
        contraction,
        preferred_element_type=jnp.float32,
    )
    return found[:n] + found[n : 2 * n] + found[2 * n :]


def parts_of(a: jax.Array, count: int) -> list[jax.Array]:
    """Numbers of bfloat16, still in float32, whose sum is `a`, the largest first."""
    found = []
    for _ in range(count):
        part = a.astype(jnp.bfloat16).astype(jnp.float32)
        found.append(part)
        a = a - part
    return found


def spread(a_MT: jax.Array, b_MD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """sum_m a[m,t] b[m,d], float32 [T,D], precise enough to be rounded to `dtype`."""
    if dtype == jnp.float32:
        return lax.dot_general(
            a_MT, b_MD, TN, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    (a_high, a_low), (b_high, b_low) = parts_of(a_MT, 2), parts_of(b_MD, 2)
    return lax.dot_general(
        jnp.concatenate([a_high, a_low, a_high]).astype(dtype),
        jnp.concatenate([b_high, b_high, b_low]).astype(dtype),
        TN,
        preferred_element_type=jnp.float32,
    )


def in_lanes(x_RP: jax.Array) -> jax.Array:
    """Sums of columns that lie LANES apart, [R,W]; fewer columns stay as they are."""
    width = x_RP.shape[1]
    if width % LANES:  # only outside of TPUs
        return jnp.pad(x_RP, ((0, 0), (0, -width % LANES))).reshape(len(x_RP), -1, LANES).sum(1)
    return added(x_RP[:, at : at + LANES] for at in range(0, width, LANES))


def added(parts: Iterable[jax.Array]) -> jax.Array:
    """The sum of a few arrays."""
    return functools.reduce(jnp.add, parts)
