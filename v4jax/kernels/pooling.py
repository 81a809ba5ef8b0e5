"""The compressor's pooling: the tokens of each window become one entry.

    entry = sum over tokens of softmax(z + ape) * c, for each channel alone

HCA pools the tokens of a window; CSA also those of the window before, from other channels, in the
same softmax (docs/equations.md#compressor).

Shapes: B batch, S positions (with those before this device's), W width of entries, C entries,
M tokens of a window.
Next file to read: v4jax/model/indexer.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.choice import pick


class Gated(NamedTuple):
    """Tokens of which windows are pooled.

    Attributes:
      c_BSW, z_BSW: float32, projections and gate logits.
      ape_MW: float32, bias of a token's place in its window.
    """

    c_BSW: jax.Array
    z_BSW: jax.Array
    ape_MW: jax.Array


def pooling(
    tokens: Gated,
    before: Gated | None,
    overlaps_BC: jax.Array,
    start_BC: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The entries of windows.

    Args:
      tokens: those which a window reads from its start on.
      before: CSA's other channels. These arrays begin one window earlier, so the same start leads
        to the window before. None in HCA.
      overlaps_BC: bool [B or 1,C], whether a window's document has a window before it.
      start_BC: int32 [B or 1,C], index of each window's first token; None where windows follow each
        other from the first token on.
      implementation: "reference", or "aligned" where windows follow each other; None: "aligned"
        there, otherwise "reference".

    Returns:
      float32 [B,C,W].

    Raises:
      ValueError: an unknown implementation, or "aligned" for windows that may begin anywhere.
    """
    if implementation == "aligned" and start_BC is not None:
        raise ValueError(
            "kernels: pooling: got 'aligned' for windows that may begin anywhere; must be reference"
        )
    best = "aligned" if start_BC is None else "reference"
    function = pick("pooling", IMPLEMENTATIONS, implementation, best)
    return function(tokens, before, overlaps_BC, start_BC)


def _pool(tokens_of: Callable, tokens, before, overlaps_BC, start_BC) -> jax.Array:
    """`pooling`; tokens_of(x_BSW, start_BC, windows, size) gives the tokens of each window."""
    size = tokens.ape_MW.shape[0]
    read = functools.partial(tokens_of, start_BC=start_BC, windows=overlaps_BC.shape[1], size=size)
    c_BCMW, z_BCMW = read(tokens.c_BSW), read(tokens.z_BSW) + tokens.ape_MW[None, None]
    if before is not None:
        there = overlaps_BC[..., None, None]
        before_c = jnp.where(there, read(before.c_BSW), 0)
        before_z = jnp.where(there, read(before.z_BSW) + before.ape_MW[None, None], -jnp.inf)
        c_BCMW = jnp.concatenate((before_c, c_BCMW), axis=2)
        z_BCMW = jnp.concatenate((before_z, z_BCMW), axis=2)
    return jnp.sum(jax.nn.softmax(z_BCMW, axis=2) * c_BCMW, axis=2)


def _gathered(x_BSW: jax.Array, start_BC, windows: int, size: int) -> jax.Array:
    """[B,C,M,W], each window's tokens from its start on."""
    if start_BC is None:
        start_BC = jnp.arange(windows, dtype=jnp.int32)[None] * size
    row_BCM = start_BC[..., None] + jnp.arange(size)[None, None]
    # Rows of one document all have the same windows.
    if row_BCM.shape[0] == 1:
        return x_BSW[:, row_BCM[0]]
    return jax.vmap(lambda x_SW, row_CM: x_SW[row_CM])(x_BSW, row_BCM)


def _reshaped(x_BSW: jax.Array, start_BC, windows: int, size: int) -> jax.Array:
    """[B,C,M,W], without a copy: windows follow each other."""
    del start_BC
    return x_BSW[:, : windows * size].reshape(len(x_BSW), windows, size, -1)


IMPLEMENTATIONS = {
    "reference": functools.partial(_pool, _gathered),
    "aligned": functools.partial(_pool, _reshaped),
}
