"""Drafts by DSpark: context keys of accepted tokens are kept, a block of tokens comes in one pass.

The rings of the stages hold keys of accepted tokens only, so nothing of theirs is ever taken back.

Shapes: B batch, T positions of a chunk, G tokens of a block, W window, Z width of the joined taps,
H head dim, V vocabulary.
Next file to read: v4jax/generate/sampling.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from v4jax.cache.layer import ChunkSpan
from v4jax.cache.quantized import as_kept
from v4jax.cache.rows import keep_rows, rows_before
from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig
from v4jax.context import Collect, Context
from v4jax.generate.cache import Cache, Chunk
from v4jax.generate.sampling import Sampling, choose_token
from v4jax.model.dspark import (
    ROOT,
    Before,
    DraftLogits,
    choose_block,
    context_keys,
    draft_logits,
    joined_taps,
)
from v4jax.model.segments import read_span


def with_taps(ctx: Context) -> Context:
    """The same, with the taps of every layer among the results."""
    return dataclasses.replace(ctx, collect=Collect(taps=True))


def keep_context(
    cfg: ModelConfig,
    dspark: DSparkConfig,
    params,
    cache: Cache,
    chunk: Chunk,
    span: ChunkSpan,
    ctx: Context,
) -> Cache:
    """The cache with the stages' context keys of a chunk's accepted tokens.

    Args:
      chunk: what `extend` returned, by a context `with_taps`.
      span: the accepted tokens of the chunk.
    """
    assert cache.mtp is not None, "it was made for a drafter"
    tap_BTZ = joined_taps(cfg, dspark, chunk.taps)
    segments = read_span(cfg, tap_BTZ.shape[1], span)
    ring = cache.mtp.window
    found = context_keys(ctx, cfg, dspark, params[ROOT], tap_BTZ, segments)
    for stage, key_BTH in enumerate(found):
        ring, _ = keep_rows(ring, jnp.int32(stage), as_kept(ring, key_BTH), span)
    return cache._replace(mtp=cache.mtp._replace(window=ring))


def draft_block(
    cfg: ModelConfig,
    dspark: DSparkConfig,
    params,
    cache: Cache,
    newest_B: jax.Array,
    seed_B: jax.Array,
    sampling: Sampling,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    """(drafts of the G tokens after the newest one, logits of their confidence) of each row.

    A draft's random key is that of its position, which the trunk's choice will use too: so they
    agree as often as coupled noise allows.

    Args:
      cache: it has all tokens before the newest one.
    """
    found = block_logits(cfg, dspark, params, cache, newest_B, ctx)

    def choose(slot: int, logits_BV: jax.Array) -> jax.Array:
        return choose_token(sampling, logits_BV, seed_B, cache.length_B + 1 + slot)[0]

    return choose_block(params[ROOT], found, newest_B, choose)


def block_logits(
    cfg: ModelConfig, dspark: DSparkConfig, params, cache: Cache, newest_B: jax.Array, ctx: Context
) -> DraftLogits:
    """What the stages give for the block after the cache's tokens, which the newest one begins."""
    assert cache.mtp is not None, "it was made for a drafter"
    block, start_B = dspark.block_size, cache.length_B
    segments = read_span(cfg, block, ChunkSpan(start_B, jnp.full_like(start_B, block)))
    window = cfg.sliding_window
    row_1W = jnp.arange(-window, 0, dtype=jnp.int32)[None]
    seen_BW = start_B[:, None] + row_1W >= 0
    dtype = jnp.dtype(ctx.dtype)
    ring = cache.mtp.window
    before = [
        Before(rows_before(ring, jnp.int32(stage), start_B, window, dtype), seen_BW)
        for stage in range(dspark.stages)
    ]
    return draft_logits(ctx, cfg, dspark, params, newest_B, before, segments)
