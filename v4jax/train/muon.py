"""Muon as the report writes it (Algorithm 1), for every matrix; AdamW for everything else.

    M = mu M + G;  O = HNS(mu M + G) * sqrt(max(rows, cols)) * 0.18;  W = W (1 - lr wd) - lr O

optax.contrib.muon averages its momentum with bias correction instead (9% off at step 2), so the transform is our own; the
rest is optax. A matrix is what the checkpoint stores as one: stacked layers and experts are separate matrices. On a mesh whole
matrices are spread over the devices (report 3.5.1; sharding/matrices.py).

Next file to read: v4jax/train/step.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from sharding.matrices import on_whole_matrices

Specs = Mapping[tuple[str, ...], PartitionSpec]
"""Path of a parameter -> how it is cut over the mesh; empty on one device."""

FAST, SHARP = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (FAST,) * 8 + (SHARP,) * 2
"""Hybrid Newton-Schulz: eight steps that grow small singular values, two that settle them at 1 (deepseek-v4.md section 6)."""

UPDATE_RMS = 0.18
_ADAMW_LEAVES = {"base", "scale", "attn_sink", "ape"}


class MuonState(NamedTuple):
    momentum: optax.Updates


def newton_schulz(g: jax.Array) -> jax.Array:
    """The matrices [..., rows, cols] with their singular values moved to 1 (0 stays 0)."""
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else jnp.swapaxes(g, -1, -2)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)

    def iterate(x, abc):
        gram = x @ jnp.swapaxes(x, -1, -2)
        return abc[0] * x + (abc[1] * gram + abc[2] * gram @ gram) @ x, None

    x, _ = jax.lax.scan(iterate, x, jnp.asarray(COEFFICIENTS, x.dtype))
    return x if wide else jnp.swapaxes(x, -1, -2)


def scale_by_muon(mu: float = 0.95, specs: Specs | None = None) -> optax.GradientTransformation:
    """Gradient -> orthogonalised Nesterov momentum of RMS 0.18."""
    specs = specs or {}

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def direction(path, m, g):
        scale = max(g.shape[-2:]) ** 0.5 * UPDATE_RMS
        return on_whole_matrices(newton_schulz, mu * m + g, specs.get(tuple(key.key for key in path))) * scale

    def update(grads, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: mu * m + g, state.momentum, grads)
        return jax.tree_util.tree_map_with_path(direction, momentum, grads), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def optimizer_of(path: tuple[str, ...]) -> str:
    """Which optimizer a parameter gets, by its path: "muon", "adamw", or "frozen".

    The indexer is frozen: no gradient passes its top-k, and weight decay alone would only shrink it. Its own loss is not
    built yet.
    """
    if "indexer" in path:
        return "frozen"
    vector = path[-1] == "weight" and path[0] not in ("embed", "head")  # norms
    return "adamw" if vector or path[0] in ("embed", "head") or path[-1] in _ADAMW_LEAVES else "muon"


def optimizer(
    schedule: optax.Schedule, weight_decay: float = 0.1, mu: float = 0.95, specs: Specs | None = None
) -> optax.GradientTransformation:
    """Muon for matrices, AdamW (0.9, 0.95, eps 1e-20) for the rest, one learning-rate schedule and decay for both."""
    transforms = {
        "muon": optax.chain(
            scale_by_muon(mu, specs), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule)
        ),
        "adamw": optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-20, weight_decay=weight_decay),
        "frozen": optax.set_to_zero(),
    }
    return optax.partition(transforms, label_parameters)


def label_parameters(params):
    """The tree of optimizer names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: optimizer_of(tuple(key.key for key in path)), params)
