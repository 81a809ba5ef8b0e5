"""Chooses the next token from logits: greedily, or by sampling with temperature and filters.

Each sequence has a seed, and a token's key is that of its position. So what a sequence samples
depends neither on the rest of its batch nor on how often it was interrupted.

Shapes: B batch, V vocabulary.
Next file to read: v4jax/generate/decode.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest token and allows no filter.

    Attributes:
      temperature: 0, or 1e-6 and above; smaller values overflow logits.
      top_k: keep the k likeliest tokens, and ties with the k-th; 0: all.
      top_p: keep the likeliest tokens whose probabilities add up to top_p, including the one that
        reaches it; 1: all.
      min_p: keep tokens at least min_p times as likely as the likeliest; 0: all.

    Raises:
      ValueError: a value out of range, or filters with temperature 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        # Logits overflow below 1e-6.
        if not (self.temperature == 0 or self.temperature >= 1e-6) or not math.isfinite(
            self.temperature
        ):
            raise ValueError(
                f"temperature: got {self.temperature}; must be 0 (the likeliest token), or 1e-6 or "
                "above"
            )
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(
                f"top_k: got {self.top_k!r}; must be an integer, 0 (all tokens) or above"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}; must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: got {self.min_p}; must be in [0, 1]")
        used = [
            name
            for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))
            if getattr(self, name) != off
        ]
        if self.temperature == 0 and used:
            value = getattr(self, used[0])
            raise ValueError(
                f"{used[0]}: got {value} with temperature 0, which takes the likeliest token; set "
                "a temperature"
            )


def shaped_logits(sampling: Sampling, logits_BV: jax.Array) -> jax.Array:
    """Logits of the distribution to sample from, float32 [B,V]: divided by temperature, filtered.

    Filtered tokens have -inf. Filters apply in the order of transformers, each to what the last one
    left: top-k, top-p, min-p.
    """
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        prob_BV = jax.nn.softmax(logits_BV)
        falling_BV = jnp.sort(prob_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(falling_BV, axis=-1) - falling_BV
        least_B1 = jnp.min(
            jnp.where(before_BV < sampling.top_p, falling_BV, 1), axis=-1, keepdims=True
        )
        logits_BV = jnp.where(prob_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.min_p > 0:
        least_B1 = logits_BV.max(-1, keepdims=True) + math.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def choose_token(
    sampling: Sampling, logits_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(token, log of its probability under the unshaped logits): int32 and float32, [B].

    Args:
      seed_B: uint32, seed of each sequence.
      position_B: position of the token to choose.
    """
    if sampling.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        shaped_BV = shaped_logits(sampling, logits_BV)

        def draw(seed, position, logits_V):
            return jax.random.categorical(token_key(seed, position), logits_V)

        token_B = jax.vmap(draw)(seed_B, position_B, shaped_BV).astype(jnp.int32)
    return token_B, log_prob(logits_BV, token_B)


def token_key(seed: jax.Array, position: jax.Array) -> jax.Array:
    """The random key of one position of one sequence."""
    return jax.random.fold_in(jax.random.key(seed), position)


def log_prob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(logits)[token], float32 [B]."""
    picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return picked_B - jax.nn.logsumexp(logits_BV, axis=-1)
