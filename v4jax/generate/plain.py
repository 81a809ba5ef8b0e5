"""Generation by full recomputation: every new token runs the whole row again. Exact and simple; caches come later.

Rows are padded on the right to few fixed lengths, so that few programs are compiled; attention is causal, so what stands
behind a token cannot change it.

Next file to read: v4jax/cli.py.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sharding.processes import gather
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.model.transformer import apply, project_logits
from v4jax.tokenizer import check_tokens


def generate(
    cfg: ModelConfig,
    params,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.float32,
) -> list[int]:
    """Ids that follow `prompt`, at most max_new_tokens, up to and without the end-of-text token.

    Args:
      temperature: 0 takes the likeliest token; otherwise samples from softmax(logits / temperature) with `seed`.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, or lengths beyond max_position_embeddings.
    """
    if len(prompt) < 1:
        raise ValueError("prompt: got no tokens; at least one is needed (the begin-of-text token, for example)")
    check_tokens(np.asarray(prompt), cfg.vocab_size, "prompt")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}; must be 0 or above")
    if len(prompt) + max_new_tokens > cfg.max_position_embeddings:
        raise ValueError(
            f"prompt of {len(prompt)} tokens + max_new_tokens {max_new_tokens} is longer than max_position_embeddings="
            f"{cfg.max_position_embeddings}"
        )
    ids = list(prompt)
    rng = np.random.default_rng(seed)
    rows = rules.shards("act_batch")  # every device must hold a row
    for _ in range(max_new_tokens):
        length = _padded_length(len(ids), len(prompt) + max_new_tokens)
        row = np.zeros((rows, length), np.int32)
        row[:, : len(ids)] = ids
        logits = gather(_last_logits(cfg, rules, jnp.dtype(dtype), params, row, len(ids) - 1))
        if temperature == 0:
            token = int(logits.argmax())
        else:
            scaled = logits.astype(np.float64) / temperature
            weights = np.exp(scaled - scaled.max())
            token = int(rng.choice(len(weights), p=weights / weights.sum()))
        if token == cfg.eos_token_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _padded_length(now: int, final: int) -> int:
    """One length for short texts; powers of two, from 1024 on, for long ones."""
    return 64 * -(-final // 64) if final <= 1024 else max(1024, 1 << (now - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _last_logits(cfg, rules, dtype, params, tokens_BS, last) -> jax.Array:
    """Logits [V] after position `last` of the first row."""
    hidden = apply(cfg, params, tokens_BS, rules=rules, dtype=dtype)
    x_B1D = jax.lax.dynamic_slice_in_dim(hidden.x_BSD, last, 1, axis=1)
    return project_logits(rules, x_B1D, hidden.head_DV)[0, 0]
