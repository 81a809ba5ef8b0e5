"""The compressor's pooling: the tokens of each window become one entry.

    entry = sum over tokens of softmax(z + ape) * c, for each channel alone

HCA pools the tokens of a window; CSA also those of the window before, from other channels, in the
same softmax (docs/equations.md#compressor).

Shapes: B batch, S positions (with those before this device's), H head dim (the width
of entries), C entries, M tokens of a window.
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
      c_BSH, z_BSH: float32, projections and gate logits.
      ape_MH: float32, bias of a token's place in its window.
    """

    c_BSH: jax.Array
    z_BSH: jax.Array
    ape_MH: jax.Array


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
      float32 [B,C,H].

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
    """`pooling`; tokens_of(x_BSH, start_BC, windows, size) gives the tokens of each window."""
    size = tokens.ape_MH.shape[0]
    read = functools.partial(tokens_of, start_BC=start_BC, windows=overlaps_BC.shape[1], size=size)
    c_BCMH, z_BCMH = read(tokens.c_BSH), read(tokens.z_BSH) + tokens.ape_MH[None, None]
    if before is not None:
        there = overlaps_BC[..., None, None]
        before_c = jnp.where(there, read(before.c_BSH), 0)
        before_z = jnp.where(there, read(before.z_BSH) + before.ape_MH[None, None], -jnp.inf)
        c_BCMH = jnp.concatenate((before_c, c_BCMH), axis=2)
        z_BCMH = jnp.concatenate((before_z, z_BCMH), axis=2)
    return jnp.sum(jax.nn.softmax(z_BCMH, axis=2) * c_BCMH, axis=2)


def _gathered(x_BSH: jax.Array, start_BC, windows: int, size: int) -> jax.Array:
    """[B,C,M,H], each window's tokens from its start on."""
    if start_BC is None:
        start_BC = jnp.arange(windows, dtype=jnp.int32)[None] * size
    row_BCM = start_BC[..., None] + jnp.arange(size)[None, None]
    # Rows of one document all have the same windows.
    if row_BCM.shape[0] == 1:
        return x_BSH[:, row_BCM[0]]
    return jax.vmap(lambda x_SH, row_CM: x_SH[row_CM])(x_BSH, row_BCM)


def _reshaped(x_BSH: jax.Array, start_BC, windows: int, size: int) -> jax.Array:
    """[B,C,M,H], without a copy: windows follow each other."""
    del start_BC
    return x_BSH[:, : windows * size].reshape(len(x_BSH), windows, size, -1)


IMPLEMENTATIONS = {
    "reference": functools.partial(_pool, _gathered),
    "aligned": functools.partial(_pool, _reshaped),
}
