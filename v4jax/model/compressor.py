"""Compression: a window of raw tokens becomes one key/value entry, by a softmax over its rows for each channel.

HCA pools its own 128 rows. CSA pools 8: the four rows of the window before (their first half of channels, "a") and its own
four (second half, "b"). Projections, softmax and pooling are float32 (deepseek-v4.md section 3, report 2.3.1 and 2.3.2).

Shapes: B batch, S positions, D hidden, H entry dim, C compressed entries, M compress ratio.
Next file to read: v4jax/model/indexer.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from v4jax.config import CSA, ModelConfig
from v4jax.model.dense import dense
from v4jax.model.documents import Entries
from v4jax.model.norm import RMSNorm
from v4jax.model.rotary import rotate
from v4jax.model.weights import Weights


def take_windows(x_BSH: jax.Array, entries: Entries, ratio: int, back: int = 0) -> jax.Array:
    """Rows of each window [B,C,M,H], or of the window `back` windows before it (wrong where there is none: mask it)."""
    batch, _, width = x_BSH.shape
    slots = entries.first_BC.shape[1]
    if entries.segment_BC is None:
        x_BCMH = x_BSH[:, : slots * ratio].reshape(batch, slots, ratio, width)
        return jnp.roll(x_BCMH, back, axis=1) if back else x_BCMH
    row_BCM = jnp.maximum(entries.first_BC[..., None] - back * ratio, 0) + jnp.arange(ratio)[None, None]
    return jax.vmap(lambda x_SH, row_CM: x_SH[row_CM])(x_BSH, row_BCM)


def pool(c_BSH: jax.Array, z_BSH: jax.Array, ape_MH: jax.Array, entries: Entries, ratio: int) -> jax.Array:
    """Entry = sum over rows of softmax(z + ape) * c, per channel; float32 [B,C,H] (H halves for CSA)."""
    ape_MH = ape_MH[None, None]
    c = take_windows(c_BSH, entries, ratio)
    z = take_windows(z_BSH, entries, ratio) + ape_MH
    if ratio == CSA:
        half = c.shape[-1] // 2
        before = entries.overlaps_BC[..., None, None]
        c_before = jnp.where(before, take_windows(c_BSH[..., :half], entries, ratio, back=1), 0)
        z_before = jnp.where(before, take_windows(z_BSH[..., :half], entries, ratio, back=1) + ape_MH[..., :half], -jnp.inf)
        c = jnp.concatenate((c_before, c[..., half:]), axis=2)
        z = jnp.concatenate((z_before, z[..., half:]), axis=2)
    return jnp.sum(jax.nn.softmax(z, axis=2) * c, axis=2)


class Compressor(Weights):
    """Hidden rows -> rotated, normalised entries [B,C,H] of size `head_dim`, in the compute dtype."""

    cfg: ModelConfig
    ratio: int
    head_dim: int

    @nn.compact
    def __call__(self, x_BSD: jax.Array, entries: Entries | None) -> jax.Array | None:
        width = self.head_dim * (2 if self.ratio == CSA else 1)
        init = nn.initializers.normal(self.cfg.initializer_range)
        ape = self.weight("ape", (self.ratio, width), ("ape_rows", "entry"), nn.initializers.zeros, True)
        wkv = self.weight("wkv", (x_BSD.shape[-1], width), ("embed", "entry"), init, True)
        wgate = self.weight("wgate", (x_BSD.shape[-1], width), ("embed", "entry"), init, True)
        norm = RMSNorm(self.rules, self.dtype, self.cfg.rms_norm_eps, name="norm")
        if entries is None:  # a row shorter than one window; the norm must exist all the same
            norm(jnp.zeros((1, self.head_dim), self.dtype))
            return None
        x32 = x_BSD.astype(jnp.float32)
        entry = pool(dense(x32, wkv), dense(x32, wgate), ape, entries, self.ratio)
        return rotate(norm(entry.astype(self.dtype)), entries.turn)
