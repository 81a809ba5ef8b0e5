"""Continues prompts: prefill in chunks, then all sequences together, with or without speculation.

Two programs run, whatever the lengths. One continues all rows by a chunk of their prompts, and rows
whose prompt is over wait. The other decodes a few steps at a time. The cache is donated to each, so
it is never copied.

Speculation: MTP drafts the token after the newest one, both run through the model at once, and the
draft stays if the model chooses the same token there. Draft and choice use the same random key,
that of the position, so they agree as often as coupled Gumbel noise allows, and the result equals
plain decoding token for token, greedy or sampled. A rejected draft is taken back by a smaller
length: the cache is addressed by position, so the draft's values are overwritten before anything
reads them.

Shapes: B batch (padded to what the mesh cuts), T positions of a chunk, U the chunk and the token
after it (T + 1), P steps, N new tokens of a step (1 or 2), V vocabulary, X streams, D hidden.
Next file to read: v4jax/generate/text.py.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.process_rows import gather
from sharding.rules import AxisRules
from v4jax.cache.layer import ChunkSpan
from v4jax.config import ModelConfig
from v4jax.generate.cache import (
    Cache,
    check_storage,
    decoding_rules,
    draft,
    empty_cache,
    extend,
    logits_of,
    split_layers,
)
from v4jax.generate.prefix import PrefixStore
from v4jax.generate.sampling import Sampling, choose_token
from v4jax.quant.fake import check_quant
from v4jax.tokenizer import check_tokens

PREFILL_CHUNK = 512
"""Tokens of each prompt that run at once."""

STEPS = 8
"""Steps per call. Starting a program costs as much as half a step of a small model. Tokens after a
stop are dropped."""

StopRule = Callable[[int, Sequence[int]], bool]
"""(sequence, its new tokens) -> whether it ends here. Called once for every new token."""

Listener = Callable[[int, Sequence[int], Sequence[float]], None]
"""Called with (sequence, the tokens that a step added, their log probabilities)."""


class Completion(NamedTuple):
    """The continuation of one prompt.

    Attributes:
      tokens: new tokens, the one that stopped it included.
      log_probs: log probability of each under the model, not as shaped for sampling.
      ended: "stop" or "length".
      drafted, accepted: number of tokens that MTP proposed, and of those that stayed.
    """

    tokens: list[int]
    log_probs: list[float]
    ended: str
    drafted: int = 0
    accepted: int = 0


class DecodeConfig(NamedTuple):
    """What compiled programs depend on besides the model.

    Attributes:
      rules: the layout, with its mesh ambient.
      dtype: compute dtype.
      quant: "none" or "official".
      storage: format of the cache, "dtype" or "official".
      speculative: draft with MTP.
      steps: decoding steps per call.
    """

    rules: AxisRules = AxisRules()
    dtype: str = "float32"
    quant: str = "none"
    storage: str = "dtype"
    sampling: Sampling = Sampling()
    speculative: bool = False
    steps: int = STEPS

    @property
    def compute(self) -> dict:
        """Keyword arguments of `extend` and `draft`."""
        return {"rules": self.rules, "dtype": self.dtype, "quant": self.quant}

    @property
    def formats(self) -> list:
        """What the contents of a cache depend on besides model, weights and tokens."""
        return [self.dtype, self.quant, self.storage, self.speculative]


class State(NamedTuple):
    """The state between steps.

    Attributes:
      token_B: each row's newest token, which is not yet in the cache.
      draft_B: the token that MTP drafts after it; None without speculation.
    """

    cache: Cache
    token_B: jax.Array
    draft_B: jax.Array | None


class StepOutput(NamedTuple):
    """Tokens of P steps with their log probabilities; of a row's N, the first `count` are real."""

    token_PBN: jax.Array
    score_PBN: jax.Array
    count_PB: jax.Array


def generate(
    cfg: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    stop: StopRule | None = None,
    on_tokens: Listener | None = None,
    capacity: int | None = None,
    rows: int = 1,
    decoding: DecodeConfig = DecodeConfig(),
    prefixes: PrefixStore | None = None,
) -> list[Completion]:
    """Continues each prompt by at most max_new_tokens: one number for all, or one for each.

    Args:
      seeds: one per prompt; default: 0, 1, 2, ...
      stop: when a sequence ends; default: at any of cfg.eos_token_ids.
      on_tokens: called after every step.
      capacity: tokens that fit in the cache, per row; default: what the longest prompt needs.
      rows: least number of rows of the batch.
      decoding: its rules are a layout, with the mesh ambient (jax.set_mesh).
      prefixes: the store in which beginnings of prompts are looked up and kept.

    Raises:
      ValueError: no prompt, an empty one, ids outside the vocabulary, lengths beyond the cache or
        the model, no MTP to draft with, or NaN logits.
    """
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    check_request(cfg, prompts, seeds, max_new_tokens, capacity, decoding)
    stop = stop or (lambda _, tokens: tokens[-1] in cfg.eos_token_ids)
    decoding = decoding._replace(rules=decoding_rules(decoding.rules))
    params = split_layers(cfg, params, decoding.rules)
    shards = decoding.rules.shards("act_batch")
    max_new_tokens = _each(max_new_tokens, prompts)
    rows = -(-max(rows, len(prompts)) // shards) * shards
    padded = [*prompts, *[prompts[0][:1]] * (rows - len(prompts))]  # every device must hold a row
    seed_B = np.array([*seeds, *[0] * (rows - len(prompts))], np.uint32)
    capacity = (
        max(len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True))
        if capacity is None
        else capacity
    )
    cache, known, keep = None, [0] * rows, None
    if prefixes is not None:
        cache, known = prefixes.begin(
            _start(cfg, decoding._replace(sampling=Sampling()), rows, capacity), padded
        )
        keep = functools.partial(prefixes.keep, padded, known)
    state, output = prefill(
        cfg,
        decoding,
        params,
        [row[n:] for row, n in zip(padded, known, strict=True)],
        seed_B,
        capacity,
        cache,
        keep,
    )
    return decode(cfg, decoding, params, state, output, seed_B, stop, max_new_tokens, on_tokens)[0]


def decode(
    cfg: ModelConfig,
    decoding: DecodeConfig,
    params,
    state: State,
    output: StepOutput,
    seed_B,
    stop: StopRule,
    max_new_tokens: Sequence[int],
    on_tokens: Listener | None = None,
) -> tuple[list[Completion], Cache]:
    """Continues the first rows until each stops or has its number of new tokens.

    Returns:
      The continuations, and the cache, which lacks the newest token of each row.
    """
    sequences = [_Sequence(b, stop, on_tokens, new) for b, new in enumerate(max_new_tokens)]
    count = len(sequences)
    while True:
        for token_BN, score_BN, count_B in zip(
            *(gather(array).tolist() for array in output), strict=True
        ):
            for b, sequence in enumerate(sequences):
                sequence.take(token_BN[b][: count_B[b]], score_BN[b])
        active_B = np.array([b < count and sequences[b].ended is None for b in range(len(seed_B))])
        if not active_B.any():
            return [sequence.completion() for sequence in sequences], state.cache
        state, output = advance(cfg, decoding, params, state, active_B, seed_B)


class _Sequence:
    """The new tokens of one sequence so far, and whether it goes on."""

    def __init__(
        self, number: int, stop: StopRule, on_tokens: Listener | None, max_new_tokens: int
    ):
        self.number, self.stop = number, stop
        self.on_tokens, self.max_new_tokens = on_tokens, max_new_tokens
        self.tokens, self.scores, self.ended, self.drafted, self.accepted = [], [], None, 0, 0

    def take(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        if self.ended is not None:
            return
        self.drafted += len(scores) - 1
        self.accepted += len(tokens) - 1
        before = len(self.tokens)
        self._append(tokens, scores)
        if self.on_tokens is not None:
            self.on_tokens(self.number, self.tokens[before:], self.scores[before:])

    def _append(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        for token, score in zip(tokens, scores, strict=False):
            if math.isnan(score):
                raise ValueError(
                    f"sequence {self.number}: the model's logits are NaN at new token "
                    f"{len(self.tokens)}; are all its weights numbers?"
                )
            self.tokens.append(token)
            self.scores.append(score)
            if self.stop(self.number, self.tokens):
                self.ended = "stop"
            elif len(self.tokens) == self.max_new_tokens:
                self.ended = "length"
            if self.ended is not None:
                return

    def completion(self) -> Completion:
        return Completion(self.tokens, self.scores, self.ended, self.drafted, self.accepted)


def _each(max_new_tokens: int | Sequence[int], prompts) -> list[int]:
    return (
        [int(max_new_tokens)] * len(prompts)
        if np.ndim(max_new_tokens) == 0
        else [int(new) for new in max_new_tokens]
    )


def check_request(
    cfg: ModelConfig,
    prompts,
    seeds,
    max_new_tokens: int | Sequence[int],
    capacity: int | None,
    decoding: DecodeConfig,
) -> None:
    """Raises ValueError for a request that `generate` cannot serve."""
    check_storage(decoding.storage, decoding.quant)
    check_quant(cfg, decoding.quant)
    if decoding.speculative and not cfg.num_nextn_predict_layers:
        raise ValueError("speculative: the model has no MTP layer to draft with")
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            "prompt: got no tokens; at least one is needed (the begin-of-text token, for example)"
        )
    for prompt in prompts:
        check_tokens(np.asarray(prompt), cfg.vocab_size, "prompt")
    if len(seeds) != len(prompts) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(
            f"seeds: got {seeds}; must be one number in [0, 2^32) for each of {len(prompts)} "
            "prompt(s)"
        )
    max_new_tokens = _each(max_new_tokens, prompts)
    if len(max_new_tokens) != len(prompts):
        raise ValueError(
            f"max_new_tokens: got {len(max_new_tokens)} numbers; must be one, or one for each of "
            f"{len(prompts)} prompt(s)"
        )
    if min(max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens: got {min(max_new_tokens)}; must be at least 1")
    needed, new = max(
        (len(prompt) + new, new) for prompt, new in zip(prompts, max_new_tokens, strict=True)
    )
    text, limit = (
        f"prompt of {needed - new} tokens + max_new_tokens {new} is longer than",
        cfg.max_position_embeddings,
    )
    if capacity is not None and needed > capacity:
        raise ValueError(f"{text} the cache, which has room for {capacity}")
    if needed > limit:
        raise ValueError(f"{text} max_position_embeddings={limit}")
    if capacity is not None and capacity > limit:
        raise ValueError(
            f"the cache: got room for {capacity} tokens; max_position_embeddings={limit} are the "
            "most that the model takes"
        )


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
    cache = _start(cfg, plain, len(prompts), capacity) if cache is None else cache
    last = _no_state(cfg, plain, len(prompts))
    for start in range(0, length_B.max(), chunk):
        # One token more than the chunk, for MTP.
        tokens_BU = np.zeros((len(prompts), chunk + 1), np.int32)
        for b, prompt in enumerate(prompts):
            part = prompt[start : start + chunk + 1]
            tokens_BU[b, : len(part)] = part
        cache, last = _continue(
            cfg, plain, params, cache, tokens_BU, (length_B - start).astype(np.int32), last
        )
        if after is not None:
            after(cache, start + chunk)
    return _first(cfg, decoding, params, cache, last, seed_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(cfg, decoding: DecodeConfig, batch: int, capacity: int) -> Cache:
    return empty_cache(
        cfg, batch, capacity, jnp.dtype(decoding.dtype), decoding.storage, decoding.rules
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _no_state(cfg, decoding: DecodeConfig, batch: int):
    """A placeholder for each row's last state: x_BD, and streams_BXD if MTP drafts."""
    dtype = jnp.dtype(decoding.dtype)
    streams_BXD = (
        jnp.zeros((batch, cfg.hc_mult, cfg.hidden_size), dtype) if decoding.speculative else None
    )
    return jnp.zeros((batch, cfg.hidden_size), dtype), streams_BXD


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 6))
def _continue(cfg, decoding: DecodeConfig, params, cache, tokens_BU, left_B, last):
    """Runs one chunk; returns the cache and the last state of each row.

    A row without tokens in the chunk keeps its state. left_B counts its tokens from here on.
    """
    size, start_B = tokens_BU.shape[1] - 1, cache.length_B
    count_B = jnp.clip(left_B, 0, size)
    chunk, cache = extend(cfg, params, cache, tokens_BU[:, :-1], count_B, **decoding.compute)
    states = (chunk.x_BTD, chunk.streams_BTXD if decoding.speculative else None)
    if decoding.speculative:
        known = ChunkSpan(start_B, jnp.clip(left_B - 1, 0, size))
        _, cache = draft(
            cfg, params, cache, chunk.streams_BTXD, tokens_BU[:, 1:], known, **decoding.compute
        )

    def pick(new, old):
        return jnp.where(_spread(count_B > 0, old), _at(new, jnp.maximum(count_B - 1, 0)), old)

    return cache, jax.tree.map(pick, states, last)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _first(cfg, decoding: DecodeConfig, params, cache, last, seed_B):
    x_BD, streams_BXD = last
    logits_BV = logits_of(params, x_BD[:, None], decoding.rules)[:, 0]
    token_B, score_B = choose_token(decoding.sampling, logits_BV, seed_B, cache.length_B)
    output = StepOutput(
        token_B[None, :, None], score_B[None, :, None], jnp.ones_like(token_B)[None]
    )
    if not decoding.speculative:
        return State(cache, token_B, None), output
    span = ChunkSpan(cache.length_B - 1, jnp.ones_like(token_B))
    draft_B, cache = _draft(
        cfg, decoding, params, cache, streams_BXD[:, None], token_B[:, None], span, seed_B
    )
    return State(cache, token_B, draft_B), output


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
    tokens_BN = (
        jnp.stack((token_B, state.draft_B), axis=1) if decoding.speculative else token_B[:, None]
    )
    size = tokens_BN.shape[1]
    chunk, cache = extend(
        cfg, params, state.cache, tokens_BN, size * active_B.astype(jnp.int32), **decoding.compute
    )
    logits_BNV = logits_of(params, chunk.x_BTD, decoding.rules)
    chosen = [
        choose_token(decoding.sampling, logits_BNV[:, n], seed_B, start_B + 1 + n)
        for n in range(size)
    ]
    chosen_BN, score_BN = (jnp.stack(parts, axis=1) for parts in zip(*chosen, strict=True))
    if not decoding.speculative:
        return State(cache, chosen_BN[:, 0], None), StepOutput(
            chosen_BN, score_BN, active_B.astype(jnp.int32)
        )
    count_B = jnp.where(active_B, 1 + (chosen_BN[:, 0] == state.draft_B), 0)
    cache = cache._replace(length_B=start_B + count_B)
    span = ChunkSpan(start_B, count_B)
    draft_B, cache = _draft(
        cfg, decoding, params, cache, chunk.streams_BTXD, chosen_BN, span, seed_B
    )
    return State(cache, _at(chosen_BN, jnp.maximum(count_B - 1, 0)), draft_B), StepOutput(
        chosen_BN, score_BN, count_B
    )


def _draft(
    cfg, decoding: DecodeConfig, params, cache, streams_BTXD, next_BT, span: ChunkSpan, seed_B
) -> tuple[jax.Array, Cache]:
    """Chooses MTP's token after the last real one of `next_BT`."""
    x_BTD, cache = draft(cfg, params, cache, streams_BTXD, next_BT, span, **decoding.compute)
    x_BD = _at(x_BTD, jnp.maximum(span.count_B - 1, 0))
    logits_BV = logits_of(params, x_BD[:, None], decoding.rules)[:, 0]
    return choose_token(decoding.sampling, logits_BV, seed_B, span.start_B + span.count_B + 1)[
        0
    ], cache


def _at(x_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    """x[b, index[b]] for every b; x may have any further axes."""
    return jnp.take_along_axis(x_BT, _spread(index_B, x_BT), axis=1)[:, 0]


def _spread(x_B: jax.Array, like: jax.Array) -> jax.Array:
    return x_B.reshape((-1,) + (1,) * (like.ndim - 1))
