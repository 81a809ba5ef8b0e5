"""The compiled programs of decoding: a prompt's chunks, the first token, and some steps at a time.

Shapes: B batch, T positions of a chunk (1 in a step of decoding, more with drafts), G drafts, U the
chunk and the token after it (T + 1), P steps, V vocabulary, X streams, D hidden.
Next file to read: v4jax/generate/drafts.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import AxisRules
from v4jax.cache.layer import ChunkSpan
from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig
from v4jax.context import Context
from v4jax.generate.cache import Cache, Chunk, draft, empty_cache, extend, logits_of
from v4jax.generate.drafts import draft_block, keep_context, with_taps
from v4jax.generate.sampling import Sampling, choose_token
from v4jax.kernels.choice import kernels_from

PREFILL_CHUNK = 512
"""Tokens of each prompt that run at once."""

STEPS = 8
"""Steps per call. Starting a program costs as much as half a step of a small model. Tokens after a
stop are dropped."""


class DecodeConfig(NamedTuple):
    """What compiled programs depend on besides the model.

    Attributes:
      rules: the layout, with its mesh ambient.
      dtype: compute dtype.
      quant: "none" or "official".
      storage: format of the cache, "dtype" or "official".
      speculative: draft, with MTP or with `dspark`.
      steps: decoding steps per call.
      kernels: implementations of ops, as kernels_from reads them (v4jax/kernels/choice.py).
      dspark: the drafter whose parameters are among the model's, under "dspark"; None: none.
    """

    rules: AxisRules = AxisRules()
    dtype: str = "float32"
    quant: str = "none"
    storage: str = "dtype"
    sampling: Sampling = Sampling()
    speculative: bool = False
    steps: int = STEPS
    kernels: str = ""
    dspark: DSparkConfig | None = None

    @property
    def drafter(self) -> DSparkConfig | None:
        """The DSpark drafter that drafts; None for MTP and where nothing does."""
        return self.dspark if self.speculative else None

    @property
    def ctx(self) -> Context:
        """What the network needs."""
        kernels = kernels_from(self.kernels)
        return Context(rules=self.rules, dtype=self.dtype, quant=self.quant, kernels=kernels)

    @property
    def formats(self) -> list:
        """What the contents of a cache depend on besides model, weights and tokens."""
        formats = [self.dtype, self.quant, self.storage, self.speculative]
        return formats + ([dataclasses.asdict(self.drafter)] if self.drafter else [])


class State(NamedTuple):
    """The state between steps.

    Attributes:
      token_B: each row's newest token, which is not yet in the cache.
      draft_BG: the tokens drafted after it, by MTP one; None without speculation.
    """

    cache: Cache
    token_B: jax.Array
    draft_BG: jax.Array | None


class StepOutput(NamedTuple):
    """Tokens of P steps with their log probabilities; of a row's T, the first `count` are real."""

    token_PBT: jax.Array
    score_PBT: jax.Array
    count_PB: jax.Array


def prefill(
    cfg: ModelConfig,
    decoding: DecodeConfig,
    params,
    prompts,
    seed_B,
    capacity: int,
    cache: Cache | None = None,
    after: Callable[[Cache, int], None] | None = None,
) -> tuple[State, StepOutput]:
    """Runs the prompts through the model.

    Args:
      cache: what the prompts continue; donated. None: an empty cache.
      after: called after every chunk with the cache and the number of tokens run so far.

    Returns:
      The state with every prompt in the cache, and each row's first new token.
    """
    length_B = np.array([len(prompt) for prompt in prompts])
    chunk = min(PREFILL_CHUNK, 1 << int(length_B.max() - 1).bit_length())
    plain = decoding._replace(sampling=Sampling())  # so every sampling shares one program
    filled: Cache = start_cache(cfg, plain, len(prompts), capacity) if cache is None else cache
    last = _no_state(cfg, plain, len(prompts))
    for start in range(0, length_B.max(), chunk):
        # One token more than the chunk, for MTP.
        tokens_BU = np.zeros((len(prompts), chunk + 1), np.int32)
        for b, prompt in enumerate(prompts):
            part = prompt[start : start + chunk + 1]
            tokens_BU[b, : len(part)] = part
        filled, last = _continue(
            cfg, plain, params, filled, tokens_BU, (length_B - start).astype(np.int32), last
        )
        if after is not None:
            after(filled, start + chunk)
    return _first(cfg, decoding, params, filled, last, seed_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def start_cache(cfg, decoding: DecodeConfig, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` rows of `capacity` tokens."""
    stages = 0 if decoding.drafter is None else decoding.drafter.stages
    formats = (jnp.dtype(decoding.dtype), decoding.storage)
    return empty_cache(cfg, batch, capacity, *formats, decoding.rules, stages)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _no_state(cfg, decoding: DecodeConfig, batch: int):
    """A placeholder for each row's last state: x_BD, and streams_BXD if MTP drafts."""
    dtype = jnp.dtype(decoding.dtype)
    streams_BXD = None
    if _by_mtp(decoding):
        streams_BXD = jnp.zeros((batch, cfg.hc_mult, cfg.hidden_size), dtype)
    return jnp.zeros((batch, cfg.hidden_size), dtype), streams_BXD


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 6))
def _continue(cfg, decoding: DecodeConfig, params, cache, tokens_BU, left_B, last):
    """Runs one chunk; returns the cache and the last state of each row.

    A row without tokens in the chunk keeps its state. left_B counts its tokens from here on.
    """
    size, start_B = tokens_BU.shape[1] - 1, cache.length_B
    count_B = jnp.clip(left_B, 0, size)
    chunk, cache = _extend(cfg, decoding, params, cache, tokens_BU[:, :-1], count_B)
    states = (chunk.x_BTD, chunk.streams_BTXD if _by_mtp(decoding) else None)
    if decoding.drafter is not None:
        cache = _keep(cfg, decoding, params, cache, chunk, ChunkSpan(start_B, count_B))
    elif decoding.speculative:
        known = ChunkSpan(start_B, jnp.clip(left_B - 1, 0, size))
        _, cache = draft(
            cfg, params, cache, chunk.streams_BTXD, tokens_BU[:, 1:], known, decoding.ctx
        )

    def pick(new, old):
        return jnp.where(_spread(count_B > 0, old), _at(new, jnp.maximum(count_B - 1, 0)), old)

    return cache, jax.tree.map(pick, states, last)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _first(cfg, decoding: DecodeConfig, params, cache, last, seed_B):
    x_BD, streams_BXD = last
    logits_BV = logits_of(params, x_BD[:, None], decoding.ctx)[:, 0]
    token_B, score_B = choose_token(decoding.sampling, logits_BV, seed_B, cache.length_B)
    output = StepOutput(
        token_B[None, :, None], score_B[None, :, None], jnp.ones_like(token_B)[None]
    )
    if not decoding.speculative:
        return State(cache, token_B, None), output
    if decoding.drafter is not None:
        return _with_block(cfg, decoding, params, cache, token_B, seed_B), output
    span = ChunkSpan(cache.length_B - 1, jnp.ones_like(token_B))
    draft_BG, cache = _draft(
        cfg, decoding, params, cache, streams_BXD[:, None], token_B[:, None], span, seed_B
    )
    return State(cache, token_B, draft_BG), output


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def advance(
    cfg, decoding: DecodeConfig, params, state: State, active_B, seed_B
) -> tuple[State, StepOutput]:
    """Runs `decoding.steps` steps of every active row."""
    return jax.lax.scan(
        lambda state, _: _step(cfg, decoding, params, state, active_B, seed_B),
        state,
        length=decoding.steps,
    )


def _step(
    cfg, decoding: DecodeConfig, params, state: State, active_B, seed_B
) -> tuple[State, StepOutput]:
    start_B, token_B = state.cache.length_B, state.token_B
    tokens_BT = token_B[:, None]
    if state.draft_BG is not None:
        tokens_BT = jnp.concatenate((tokens_BT, state.draft_BG), axis=1)
    size = tokens_BT.shape[1]
    count_B = size * active_B.astype(jnp.int32)
    chunk, cache = _extend(cfg, decoding, params, state.cache, tokens_BT, count_B)
    logits_BTV = logits_of(params, chunk.x_BTD, decoding.ctx)
    chosen = [
        choose_token(decoding.sampling, logits_BTV[:, n], seed_B, start_B + 1 + n)
        for n in range(size)
    ]
    chosen_BT, score_BT = (jnp.stack(parts, axis=1) for parts in zip(*chosen, strict=True))
    if state.draft_BG is None:
        return State(cache, chosen_BT[:, 0], None), StepOutput(chosen_BT, score_BT, count_B)
    count_B = jnp.where(active_B, 1 + _accepted(chosen_BT, state.draft_BG), 0)
    output = StepOutput(chosen_BT, score_BT, count_B)
    cache = cache._replace(length_B=start_B + count_B)
    span = ChunkSpan(start_B, count_B)
    token_B = _at(chosen_BT, jnp.maximum(count_B - 1, 0))
    if decoding.drafter is not None:
        cache = _keep(cfg, decoding, params, cache, chunk, span)
        return _with_block(cfg, decoding, params, cache, token_B, seed_B), output
    draft_BG, cache = _draft(
        cfg, decoding, params, cache, chunk.streams_BTXD, chosen_BT, span, seed_B
    )
    return State(cache, token_B, draft_BG), output


def _accepted(chosen_BT: jax.Array, draft_BG: jax.Array) -> jax.Array:
    """How many drafts the model itself chooses before the first that it does not, int32 [B].

    Example: chosen [5 7 2 9] and drafts [5 7 3] give 2.
    """
    same_BG = (chosen_BT[:, :-1] == draft_BG).astype(jnp.int32)
    return jnp.sum(jnp.cumprod(same_BG, axis=1), axis=1)


def _by_mtp(decoding: DecodeConfig) -> bool:
    return decoding.speculative and decoding.dspark is None


def _extend(cfg, decoding: DecodeConfig, params, cache, tokens_BT, count_B) -> tuple[Chunk, Cache]:
    """`extend`, with taps if a DSpark drafter reads them."""
    ctx = decoding.ctx if decoding.drafter is None else with_taps(decoding.ctx)
    return extend(cfg, params, cache, tokens_BT, count_B, ctx)


def _keep(cfg, decoding: DecodeConfig, params, cache, chunk: Chunk, span: ChunkSpan) -> Cache:
    assert decoding.drafter is not None, "the caller asked"
    return keep_context(cfg, decoding.drafter, params, cache, chunk, span, decoding.ctx)


def _with_block(cfg, decoding: DecodeConfig, params, cache, token_B, seed_B) -> State:
    """The state with the newest token and a drafted block after it."""
    assert decoding.drafter is not None, "the caller asked"
    own = (decoding.sampling, decoding.ctx)
    draft_BG, _ = draft_block(cfg, decoding.drafter, params, cache, token_B, seed_B, *own)
    return State(cache, token_B, draft_BG)


def _draft(
    cfg, decoding: DecodeConfig, params, cache, streams_BTXD, next_BT, span: ChunkSpan, seed_B
) -> tuple[jax.Array, Cache]:
    """Chooses MTP's token after the last real one of `next_BT`, [B,1]."""
    x_BTD, cache = draft(cfg, params, cache, streams_BTXD, next_BT, span, decoding.ctx)
    x_BD = _at(x_BTD, jnp.maximum(span.count_B - 1, 0))
    logits_BV = logits_of(params, x_BD[:, None], decoding.ctx)[:, 0]
    position_B = span.start_B + span.count_B + 1
    token_B, _ = choose_token(decoding.sampling, logits_BV, seed_B, position_B)
    return token_B[:, None], cache


def _at(x_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    """x[b, index[b]] for every b; x may have any further axes."""
    return jnp.take_along_axis(x_BT, _spread(index_B, x_BT), axis=1)[:, 0]


def _spread(x_B: jax.Array, like: jax.Array) -> jax.Array:
    return x_B.reshape((-1,) + (1,) * (like.ndim - 1))
