"""Prompts in, continuations out: prefill in chunks, then a token at a time for all sequences together.

Two programs run, whatever the lengths: one continues all rows by a chunk of their prompts (rows whose prompt is over wait), one by a
token. The cache is donated to each, so nothing of it is copied.

Shapes: B batch (padded to what the mesh cuts), T positions of a chunk, D hidden.
Next file to read: v4jax/generate/text.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.processes import gather
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.generate.cache import Cache, decoding_rules, empty_cache, extend, logits_of
from v4jax.generate.sampling import Sampling, choose_token
from v4jax.tokenizer import check_tokens

PREFILL_CHUNK = 512
"""Tokens of each prompt that are run at once."""

StopRule = Callable[[int, Sequence[int]], bool]
"""(sequence, its new tokens) -> whether it ends here. Called once for every new token."""


class Completion(NamedTuple):
    """What followed one prompt: tokens, the log of each one's probability under the model, and why it ended: "stop" or "length".

    The token that stopped it is the last one.
    """

    tokens: list[int]
    log_probs: list[float]
    ended: str


class Setting(NamedTuple):
    """What compiled programs depend on besides the model."""

    rules: AxisRules
    dtype: str
    sampling: Sampling


def generate(
    cfg: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] | None = None,
    stop: StopRule | None = None,
    room: int | None = None,
    rules: AxisRules = AxisRules(),
    dtype: str = "float32",
) -> list[Completion]:
    """Continues each prompt by at most max_new_tokens.

    Args:
      seeds: one per prompt; default 0, 1, 2, ... stop: default, the end-of-text token.
      room: tokens the cache has room for in each row; default: what the longest prompt needs.
      rules: a layout, with its mesh ambient (jax.set_mesh).

    Raises:
      ValueError: no prompt, an empty one, ids outside the vocabulary, lengths beyond the cache or the model.
    """
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    check_request(cfg, prompts, seeds, max_new_tokens, room)
    stop = stop or (lambda _, tokens: tokens[-1] == cfg.eos_token_id)
    setting = Setting(decoding_rules(rules), dtype, sampling)
    rows = -(-len(prompts) // setting.rules.shards("act_batch")) * setting.rules.shards("act_batch")
    padded = [*prompts, *[prompts[0][:1]] * (rows - len(prompts))]  # every device must hold a row
    seed_B = np.array([*seeds, *[0] * (rows - len(prompts))], np.uint32)
    room = max(map(len, prompts)) + max_new_tokens if room is None else room
    cache, x_BD = prefill(cfg, setting, params, padded, room)
    tokens, scores = [[] for _ in prompts], [[] for _ in prompts]
    ended = ["length"] * len(prompts)
    active_B = np.arange(rows) < len(prompts)
    token_B, score_B = _first(setting, params, cache, x_BD, seed_B)
    for turn in range(max_new_tokens):
        for b, (token, score) in enumerate(zip(gather(token_B).tolist(), gather(score_B).tolist(), strict=True)):
            if active_B[b]:
                tokens[b].append(token)
                scores[b].append(score)
                if stop(b, tokens[b]):
                    active_B[b], ended[b] = False, "stop"
        if turn + 1 == max_new_tokens or not active_B.any():
            break
        token_B, score_B, cache = _next(cfg, setting, params, cache, token_B, active_B.astype(np.int32), seed_B)
    return [Completion(*parts) for parts in zip(tokens, scores, ended, strict=True)]


def check_request(cfg: ModelConfig, prompts, seeds, max_new_tokens: int, room: int | None) -> None:
    """Raises ValueError for what `generate` cannot do."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompt: got no tokens; at least one is needed (the begin-of-text token, for example)")
    for prompt in prompts:
        check_tokens(np.asarray(prompt), cfg.vocab_size, "prompt")
    if len(seeds) != len(prompts) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds: got {seeds}; must be one number in [0, 2^32) for each of {len(prompts)} prompt(s)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; must be at least 1")
    needed, limit = max(map(len, prompts)) + max_new_tokens, cfg.max_position_embeddings
    text = f"prompt of {needed - max_new_tokens} tokens + max_new_tokens {max_new_tokens} is longer than"
    if room is not None and needed > room:
        raise ValueError(f"{text} the cache, which has room for {room}")
    if needed > limit:
        raise ValueError(f"{text} max_position_embeddings={limit}")


def prefill(cfg: ModelConfig, setting: Setting, params, prompts, room: int) -> tuple[Cache, jax.Array]:
    """(the cache with every prompt in it, the state [B,D] behind each one's last token)."""
    length_B = np.array([len(prompt) for prompt in prompts])
    chunk = min(PREFILL_CHUNK, 1 << int(length_B.max() - 1).bit_length())
    cache, x_BD = _start(cfg, setting, len(prompts), room)
    for start in range(0, length_B.max(), chunk):
        tokens_BT = np.zeros((len(prompts), chunk), np.int32)
        count_B = np.clip(length_B - start, 0, chunk).astype(np.int32)
        for b, prompt in enumerate(prompts):
            tokens_BT[b, : count_B[b]] = prompt[start : start + count_B[b]]
        cache, x_BD = _continue(cfg, setting, params, cache, tokens_BT, count_B, x_BD)
    return cache, x_BD


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(cfg, setting: Setting, batch: int, room: int):
    dtype = jnp.dtype(setting.dtype)
    return empty_cache(cfg, batch, room, dtype, setting.rules), jnp.zeros((batch, cfg.hidden_size), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _continue(cfg, setting: Setting, params, cache, tokens_BT, count_B, x_BD):
    """The last real state of each row, or the one before where the chunk brings nothing."""
    chunk, cache = extend(cfg, params, cache, tokens_BT, count_B, rules=setting.rules, dtype=setting.dtype)
    last_BD = jnp.take_along_axis(chunk.x_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where((count_B > 0)[:, None], last_BD, x_BD)


@functools.partial(jax.jit, static_argnums=0)
def _first(setting: Setting, params, cache, x_BD, seed_B):
    logits_BV = logits_of(params, x_BD[:, None], setting.rules)[:, 0]
    return choose_token(setting.sampling, logits_BV, seed_B, cache.length_B)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _next(cfg, setting: Setting, params, cache, token_B, count_B, seed_B):
    chunk, cache = extend(cfg, params, cache, token_B[:, None], count_B, rules=setting.rules, dtype=setting.dtype)
    logits_BV = logits_of(params, chunk.x_BTD, setting.rules)[:, 0]
    return *choose_token(setting.sampling, logits_BV, seed_B, cache.length_B), cache
