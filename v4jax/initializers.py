"""Initial values of parameters: functions of the configuration that return an initializer.

An initializer is called as initializer(key, shape, dtype), as those of JAX.

Axes: V vocabulary, E experts, K experts of a token, R rounds of the deal.
Next file to read: v4jax/parameters.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

DYNAMIC_SCALE = 0.01
"""Initial scale of input-dependent logits: a new model starts near its static mix (report 2.2)."""


def normal(cfg: ModelConfig) -> Initializer:
    """Normal with standard deviation initializer_range, for matrices."""
    return jax.nn.initializers.normal(cfg.initializer_range)


def zeros(cfg: ModelConfig) -> Initializer:
    """Zeros, for sinks, ape and selection biases."""
    del cfg
    return jax.nn.initializers.zeros


def ones(cfg: ModelConfig) -> Initializer:
    """Ones, for norms."""
    del cfg
    return jax.nn.initializers.ones


def dynamic_scale(cfg: ModelConfig) -> Initializer:
    """DYNAMIC_SCALE, for the scales of hyper-connections."""
    del cfg
    return _constant(DYNAMIC_SCALE)


def static_mix(cfg: ModelConfig) -> Initializer:
    """Reads the mean of the streams, writes to each, keeps them mostly apart.

    For the base of a hyper-connection (docs/equations.md#mhc).
    """

    def values(key, shape, dtype):
        n = cfg.hc_mult
        static = jnp.concatenate(
            (jnp.full(n, -jnp.log(n - 1.0 + 1e-9)), jnp.zeros(n), 4 * jnp.eye(n).reshape(-1))
        )
        return _constant(static)(key, shape, dtype)

    return values


def static_mean(cfg: ModelConfig) -> Initializer:
    """Reads the mean of the streams, for the base of the last collapse."""

    def values(key, shape, dtype):
        return _constant(-jnp.log(cfg.hc_mult - 1.0 + 1e-9))(key, shape, dtype)

    return values


def hash_table(cfg: ModelConfig) -> Initializer:
    """A balanced table, for hash-routed layers."""

    def values(key, shape, dtype):
        vocab, active = shape
        return balanced_table(key, vocab, cfg.n_routed_experts, active).astype(dtype)

    return values


def balanced_table(key: jax.Array, vocab: int, experts: int, active: int) -> jax.Array:
    """A hash table for training from scratch: K different experts per token id, as float32 [V,K].

    Ids are shuffled and dealt in rounds of E. Within a round, column k maps ids one-to-one to
    experts, so every expert serves equally many ids (up to one round). The recipe of the released
    tables is unpublished.
    """
    rounds = -(-vocab // experts)
    shuffle_key, offset_key, order_key = jax.random.split(key, 3)
    place = jax.random.permutation(shuffle_key, vocab)
    offset_RK = jnp.argsort(jax.random.uniform(offset_key, (rounds, experts)), axis=1)[:, :active]
    order_RE = jnp.argsort(jax.random.uniform(order_key, (rounds, experts)), axis=1)
    turn_V, seat_V = place // experts, place % experts
    seat_VK = (seat_V[:, None] + offset_RK[turn_V]) % experts
    return jnp.take_along_axis(order_RE[turn_V], seat_VK, axis=1).astype(jnp.float32)


def _constant(value) -> Initializer:
    """Broadcasts `value` to the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
