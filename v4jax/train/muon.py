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
"""Hybrid Newton-Schulz: eight steps that grow small singular values, two that settle them at 1.

See docs/equations.md#muon.
"""

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
        # In the platform's own precision (bfloat16 on TPUs, TF32 on GPUs), unlike the model's products: Muon bears bfloat16 here.
        gram = x @ jnp.swapaxes(x, -1, -2)
        return abc[0] * x + (abc[1] * gram + abc[2] * gram @ gram) @ x, None

    x, _ = jax.lax.scan(iterate, x, jnp.asarray(COEFFICIENTS, x.dtype))
    return x if wide else jnp.swapaxes(x, -1, -2)


def scale_by_muon(mu: float = 0.95, specs: Specs | None = None) -> optax.GradientTransformation:
    """Gradient -> orthogonalised Nesterov momentum of RMS 0.18."""
    specs = specs or {}

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: mu * m + g, state.momentum, grads)
        ahead, tree = jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda m, g: mu * m + g, momentum, grads))
        places = [specs[tuple(key.key for key in path)] for path, _ in ahead] if specs else None
        outs = on_whole_matrices(newton_schulz, [x for _, x in ahead], places)
        return jax.tree.unflatten(tree, [out * (max(out.shape[-2:]) ** 0.5 * UPDATE_RMS) for out in outs]), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def is_index(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to an indexer."""
    return "indexer" in path


def optimizer_of(path: tuple[str, ...], trains_index: bool = False) -> str:
    """Which optimizer a parameter gets, by its path: "muon" or "adamw", for the indexer "index_muon" or "index_adamw".

    Where nothing trains the indexer it is "frozen": no gradient passes its top-k, and weight decay alone would only shrink it.
    """
    if is_index(path) and not trains_index:
        return "frozen"
    vector = path[-1] == "weight" and path[0] not in ("embed", "head")  # norms
    kind = "adamw" if vector or path[0] in ("embed", "head") or path[-1] in _ADAMW_LEAVES else "muon"
    return f"index_{kind}" if is_index(path) else kind


def optimizer(
    schedule: optax.Schedule, weight_decay: float = 0.1, mu: float = 0.95, specs: Specs | None = None,
    index_schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:  # fmt: skip
    """Muon for matrices, AdamW (0.9, 0.95, eps 1e-20) for the rest, one learning-rate schedule and decay for both.

    index_schedule: the indexer's learning rate; None: it stays as it is.
    """

    def both(schedule):
        matrices = scale_by_muon(mu, specs), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule)
        return optax.chain(*matrices), optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-20, weight_decay=weight_decay)

    transforms = dict(zip(("muon", "adamw"), both(schedule), strict=True))
    if index_schedule is None:
        transforms["frozen"] = optax.set_to_zero()
    else:
        transforms |= zip(("index_muon", "index_adamw"), both(index_schedule), strict=True)
    return optax.partition(transforms, lambda params: label_parameters(params, index_schedule is not None))


def label_parameters(params, trains_index: bool = False):
    """The tree of optimizer names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: optimizer_of(tuple(key.key for key in path), trains_index), params)


def clip_apart(largest: float) -> optax.GradientTransformation:
    """Clips the gradient of the main model and that of the indexers to norm `largest`, each by itself: teaching an indexer changes
    no step of the main model."""
    clip = optax.clip_by_global_norm(largest)

    def update(grads, state, params=None):
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
        index = [is_index(tuple(key.key for key in path)) for path, _ in leaves]
        parts = [iter(clip.update([g for (_, g), i in zip(leaves, index, strict=True) if i == kind], state)[0]) for kind in (False, True)]
        return jax.tree.unflatten(tree, [next(parts[i]) for i in index]), state

    return optax.GradientTransformation(clip.init, update)


def hold(new, old, is_held):
    """The tree `new` with the arrays of parameters that are held as in `old`: their weights, momenta, moments. Counts go on.

    is_held: path of a parameter -> bool.
    """

    def choose(path, new, old):
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return old if new.ndim and is_held(keys) else new

    return jax.tree_util.tree_map_with_path(choose, new, old)
