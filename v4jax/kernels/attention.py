"""Attention of a chunk of queries: one softmax over window keys, compressed entries and a sink.

Keys are values, and all heads share them. The softmax's denominator is a result too, as its
logarithm: partial results of several devices are merged by it, and from it comes the mass that a
query gives to an entry (docs/equations.md#attention).

Shapes: B batch, T query positions of a chunk, U blocks of a chunk, W queries of a block, Y window
keys of a block, N heads, H head dim, C entries (of all queries, or of one), K keys of a query.
Next file to read: v4jax/model/compressor.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.choice import pick
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.top_k import FEW_QUERIES

CHUNK_BYTES = 2**24
"""Limit in bytes on the float32 scores of a chunk on one device, so that they fit a CPU's cache."""

GATHER_FROM = 8
"""CSA gathers its chosen entries where there are at least this many times index_topk entries.

Below that a mask is faster (v4jax/kernels/README.md).
"""


class WindowKeys(NamedTuple):
    """Window keys/values, those of each block of queries.

    Attributes:
      key_BUYH: keys/values.
      mask_BUWY: bool [B or 1,U,W,Y], which keys a query sees.
    """

    key_BUYH: jax.Array
    mask_BUWY: jax.Array


class EntryKeys(NamedTuple):
    """Compressed entries.

    Attributes:
      key: keys/values, [B,C,H], or gathered for each query, [B,T,C,H].
      mask_BTC: bool [B or 1,T,C], which entries a query attends to.
    """

    key: jax.Array
    mask_BTC: jax.Array


def attention(
    q_BTNH: jax.Array,
    window: WindowKeys | None,
    entries: EntryKeys | None,
    sink_N: jax.Array | None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax of q . k * H^-0.5 over all keys that a query sees and the sink, times the keys.

    Args:
      q_BTNH: queries, T = U * W.
      window: None without window keys.
      entries: None without entries.
      sink_N: float32, a logit per head, in the denominator only; None without.
      implementation: "reference" or "blocked"; None: "blocked".

    Returns:
      (out [B,T,N,H], lse [B,T,N]), float32; lse is the logarithm of the denominator. A query that
      sees no key, where there is no sink, has out 0 and lse -inf.

    Raises:
      ValueError: an unknown implementation.
    """
    function = pick("attention", IMPLEMENTATIONS, implementation, best="blocked")
    return function(q_BTNH, window, entries, sink_N)


def entry_mass(q_BTNH: jax.Array, entries: EntryKeys, lse_BTN: jax.Array) -> jax.Array:
    """Shares of a softmax that all heads give to each entry, float32 [B,T,C]; without gradient."""
    q_BTNH, entries, lse_BTN = jax.lax.stop_gradient((q_BTNH, entries, lse_BTN))
    score_BTNC = _entry_scores(q_BTNH * q_BTNH.shape[-1] ** -0.5, entries)
    return jnp.sum(jnp.exp(score_BTNC - lse_BTN[..., None]), axis=2)


def gathers(slots: int, rows: int, topk: int) -> bool:
    """Whether to gather chosen entries for each query, instead of masking the others.

    A few queries (decoding) gather whenever there are at least `topk` slots.
    """
    return slots >= (GATHER_FROM if rows >= FEW_QUERIES else 1) * topk


def chunks_of(batch: int, rows: int, block: int, scores: int) -> tuple[int, int]:
    """(blocks in a chunk, chunks), such that a chunk's scores stay within CHUNK_BYTES.

    Args:
      rows: queries.
      block: queries of a block.
      scores: float32 numbers that a query makes.
    """
    blocks = max(1, CHUNK_BYTES // (4 * block * scores * batch))
    chunks = -(-rows // (min(blocks, -(-rows // block)) * block))
    return -(-rows // (chunks * block)), chunks


def reference(q_BTNH, window: WindowKeys | None, entries: EntryKeys | None, sink_N):
    """One softmax of one array, from a copy of its keys for each query."""
    batch, rows, _, dim = q_BTNH.shape
    key, mask = [], []
    if window is not None:
        per_block = window.mask_BUWY.shape[2]
        key.append(jnp.repeat(window.key_BUYH, per_block, axis=1))
        mask.append(window.mask_BUWY.reshape(-1, rows, window.mask_BUWY.shape[3]))
    if entries is not None:
        each = entries.key if entries.key.ndim == 4 else entries.key[:, None]
        key.append(jnp.broadcast_to(each, (batch, rows, *each.shape[2:])))
        mask.append(entries.mask_BTC)
    key_BTKH = jnp.concatenate(key, axis=2)
    mask_BTK = jnp.concatenate([jnp.broadcast_to(m, (batch, *m.shape[1:])) for m in mask], axis=2)
    score_BTNK = _einsum("BTNH,BTKH->BTNK", q_BTNH * dim**-0.5, key_BTKH)
    score_BTNK = jnp.where(mask_BTK[:, :, None], score_BTNK, -jnp.inf)
    lse_BTN = jax.nn.logsumexp(score_BTNK, axis=-1)
    if sink_N is not None:
        lse_BTN = jnp.logaddexp(lse_BTN, sink_N[None, None])
    share_BTNK = jnp.exp(score_BTNK - jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN)[..., None])
    return _einsum("BTNK,BTKH->BTNH", share_BTNK.astype(q_BTNH.dtype), key_BTKH), lse_BTN


def blocked(q_BTNH, window: WindowKeys | None, entries: EntryKeys | None, sink_N):
    """Window keys are shared by a block of queries, entries by all, unless they were gathered.

    The scores of both stay arrays of their own, with one maximum.
    """
    dtype, q_BTNH = q_BTNH.dtype, q_BTNH * q_BTNH.shape[-1] ** -0.5
    parts = []
    if window is not None:
        parts.append((_window_scores(q_BTNH, window), functools.partial(_window_sum, window)))
    if entries is not None:
        parts.append((_entry_scores(q_BTNH, entries), functools.partial(_entry_sum, entries)))
    peaks = [score_BTNK.max(-1) for score_BTNK, _ in parts]
    if sink_N is not None:
        peaks.append(sink_N[None, None])
    peak_BTN = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    if sink_N is None:
        peak_BTN = jnp.where(peak_BTN == -jnp.inf, 0, peak_BTN)
    totals = [] if sink_N is None else [jnp.exp(sink_N[None, None] - peak_BTN)]
    outs = []
    for score_BTNK, weighted_sum in parts:
        share_BTNK = jnp.exp(score_BTNK - peak_BTN[..., None])
        totals.append(share_BTNK.sum(-1))
        outs.append(weighted_sum(share_BTNK.astype(dtype)))
    total_BTN = functools.reduce(jnp.add, totals)
    lse_BTN = peak_BTN + jnp.log(total_BTN)
    if sink_N is None:
        total_BTN = jnp.maximum(total_BTN, jnp.finfo(jnp.float32).tiny)
    return functools.reduce(jnp.add, outs) / total_BTN[..., None], lse_BTN


def _window_scores(q_BTNH, window: WindowKeys) -> jax.Array:
    """Scores of each query's window keys, float32 [B,T,N,Y]; -inf where the mask is False."""
    batch, rows, heads, dim = q_BTNH.shape
    q_BUWNH = q_BTNH.reshape(batch, window.key_BUYH.shape[1], -1, heads, dim)
    score_BUWNY = _einsum("BUWNH,BUYH->BUWNY", q_BUWNH, window.key_BUYH)
    score_BUWNY = jnp.where(window.mask_BUWY[:, :, :, None], score_BUWNY, -jnp.inf)
    return score_BUWNY.reshape(batch, rows, heads, -1)


def _window_sum(window: WindowKeys, share_BTNY: jax.Array) -> jax.Array:
    """Window keys, weighted and added, float32 [B,T,N,H]."""
    batch, rows, heads, _ = share_BTNY.shape
    blocks, per_block = window.key_BUYH.shape[1:3]
    share_BUWNY = share_BTNY.reshape(batch, blocks, rows // blocks, heads, per_block)
    out_BUWNH = _einsum("BUWNY,BUYH->BUWNH", share_BUWNY, window.key_BUYH)
    return out_BUWNH.reshape(batch, rows, heads, -1)


def _entry_scores(q_BTNH, entries: EntryKeys) -> jax.Array:
    """Scores of entries, float32 [B,T,N,C]; -inf where the mask is False."""
    score_BTNC = _einsum(f"BTNH,{_axes(entries)}->BTNC", q_BTNH, entries.key)
    return jnp.where(entries.mask_BTC[:, :, None], score_BTNC, -jnp.inf)


def _entry_sum(entries: EntryKeys, share_BTNC: jax.Array) -> jax.Array:
    """EntryKeys, weighted and added, float32 [B,T,N,H]."""
    return _einsum(f"BTNC,{_axes(entries)}->BTNH", share_BTNC, entries.key)


def _axes(entries: EntryKeys) -> str:
    return "BTCH" if entries.key.ndim == 4 else "BCH"


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=precision_of(a), preferred_element_type=jnp.float32)


IMPLEMENTATIONS = {"reference": reference, "blocked": blocked}
