"""Muon for every matrix, after Algorithm 1 of the report, and AdamW for everything else.

    M = mu M + G;  O = HNS(mu M + G) * sqrt(max(rows, cols)) * 0.18;  W = W (1 - lr wd) - lr O

optax.contrib.muon instead averages its momentum with bias correction, so this transform is our own;
the rest is optax. A matrix is what the checkpoint stores as one: stacked layers and experts are
separate matrices. On a mesh, whole matrices are spread over the devices (report 3.5.1;
sharding/matrices.py).

Equation: docs/equations.md#muon.
Next file to read: v4jax/train/step.py.
"""

import functools
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from sharding.host_memory import slice_by_slice
from sharding.matrices import on_whole_matrices
from v4jax.parameter_tree import ADAPTERS, spec_of
from v4jax.train.newton_schulz import newton_schulz

Specs = Mapping[tuple[str, ...], PartitionSpec]
"""Path of a parameter -> how the mesh cuts it; empty on one device."""

UPDATE_RMS = 0.18
_OPTIMIZERS = ("muon", "adamw", "index_muon", "index_adamw", "frozen")


class Numbers(NamedTuple):
    """How the optimizer's numbers are stored. Arithmetic is float32 throughout.

    Dtypes are "float32" or "bfloat16".

    State is rounded to the nearest number when it is stored. Each step forgets at least 5% of it,
    far more than the 0.4% between two neighbours in bfloat16, so errors do not build up
    (docs/training.md).

    Attributes:
      momentum: Muon's momentum, as it is stored.
      moments: AdamW's two moments, as they are stored.
      newton_schulz: factors of the products that orthogonalise (v4jax/train/newton_schulz.py).
      memory: where momentum and moments lie between steps, "device" or "host".
      kernel: implementation of a step that orthogonalises; None: the platform's best.
    """

    momentum: str = "float32"
    moments: str = "float32"
    newton_schulz: str = "float32"
    memory: str = "device"
    kernel: str | None = None


FLOAT32 = Numbers()


class MuonState(NamedTuple):
    """The momentum of every matrix."""

    momentum: optax.Updates


def scale_by_muon(
    mu: float = 0.95, specs: Specs | None = None, numbers: Numbers = FLOAT32
) -> optax.GradientTransformation:
    """Gradient -> orthogonalised Nesterov momentum of RMS 0.18.

    Args:
      mu: momentum, in [0, 1).
      specs: how the mesh cuts each parameter; None or empty: one device.
      numbers: the moments' dtype does not matter here.
    """
    specs = specs or {}
    orthogonalise = functools.partial(
        newton_schulz, dtype=numbers.newton_schulz, implementation=numbers.kernel
    )

    def init(params):
        return MuonState(_stored(jax.tree.map(jnp.zeros_like, params), numbers.momentum))

    def advance(momentum, g):
        """(M, mu M + G), of one matrix or many."""
        new = mu * momentum.astype(jnp.float32) + g
        return new.astype(numbers.momentum), mu * new + g

    def update(updates, state, params=None):
        del params
        momentum, ahead = _each(advance, state.momentum, updates, specs, numbers.memory)
        leaves, tree = jax.tree_util.tree_flatten_with_path(ahead)
        places = [specs[tuple(key.key for key in path)] for path, _ in leaves] if specs else None
        outs = on_whole_matrices(orthogonalise, [x for _, x in leaves], places)
        scaled = [out * (max(out.shape[-2:]) ** 0.5 * UPDATE_RMS) for out in outs]
        return jax.tree.unflatten(tree, scaled), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-20,
    dtype: str = "float32",
    specs: Specs | None = None,
    memory: str = "device",
) -> optax.GradientTransformation:
    """Adam's bias-corrected step m / (sqrt(v) + eps), clipped where rounding makes it too long.

    By Cauchy-Schwarz, |m| <= sqrt(v) (1-b1) / sqrt((1-b2) (1-b1^2/b2)): with the report's numbers
    no step is longer than 1.17. But v underflows for gradients below 5e-19, and m / eps then
    reaches 50.

    Args:
      dtype: of the moments as they are stored.
      specs: as for scale_by_muon.
      memory: where the moments lie between steps, "device" or "host".
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    longest = (1 - b1) / ((1 - b2) * (1 - b1 * b1 / b2)) ** 0.5

    def stored(state, dtype: str):
        return state._replace(mu=_stored(state.mu, dtype), nu=_stored(state.nu, dtype))

    def update(updates, state, params=None):
        del params

        def advance(moments, g):
            before = stored(state._replace(mu=moments[0], nu=moments[1]), "float32")
            step, after = adam.update(g, before)
            after = stored(after, dtype)
            return (after.mu, after.nu), jnp.clip(jnp.asarray(step), -longest, longest)

        pairs = jax.tree.map(lambda mu, nu: (mu, nu), state.mu, state.nu)
        pairs, steps = _each(advance, pairs, updates, specs or {}, memory)
        mu, nu = (jax.tree.map(lambda _, pair, i=i: pair[i], updates, pairs) for i in (0, 1))
        return steps, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(lambda params: stored(adam.init(params), dtype), update)


def _stored(tree, dtype: str):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _each(f, state, updates, specs: Specs, memory: str):
    """f(state, update) -> (new state, result), leaf by leaf of `updates`; two trees of its form.

    Args:
      state: a tree that has a state, itself a tree of arrays, at each leaf of `updates`.
      memory: where `state` lies, and where the new one goes.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
    done = []
    for (path, g), before in zip(leaves, tree.flatten_up_to(state), strict=True):
        if memory == "host":
            if done:  # one leaf at a time: XLA would fetch them all at once
                before, done[-1] = jax.lax.optimization_barrier((before, done[-1]))
            spec = specs[tuple(key.key for key in path)] if specs else None
            done.append(slice_by_slice(f, before, g, spec))
        else:
            done.append(f(before, g))
    return tuple(jax.tree.unflatten(tree, [pair[i] for pair in done]) for i in (0, 1))


def is_index(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to an indexer."""
    return spec_of(path).part == "indexer"


def optimizer_of(path: tuple[str, ...], trains_index: bool = False, pairs: str = "adamw") -> str:
    """The optimizer of a parameter, as v4jax/parameters.py says; of a low-rank pair, `pairs`.

    It is "muon" or "adamw", and "index_muon" or "index_adamw" for the indexer. If nothing trains
    the indexer, it is "frozen": no gradient passes top-k, and weight decay alone would only shrink
    it.

    Raises:
      ValueError: a path of no parameter, or of one that the router keeps.
    """
    kind = pairs if path[0] == ADAPTERS else spec_of(path).optimizer
    if kind is None:
        raise ValueError(f"{'/'.join(path)}: no optimizer moves what the router keeps")
    if not is_index(path):
        return kind
    return f"index_{kind}" if trains_index else "frozen"


def optimizer(
    schedule: optax.Schedule,
    weight_decay: float = 0.1,
    mu: float = 0.95,
    specs: Specs | None = None,
    index_schedule: optax.Schedule | None = None,
    numbers: Numbers = FLOAT32,
    pairs: str = "adamw",
) -> optax.GradientTransformation:
    """Muon for matrices and AdamW (0.9, 0.95, eps 1e-20) for the rest, with one schedule and decay.

    Args:
      schedule: the learning rate of both.
      weight_decay: decoupled, relative to the learning rate; 0 or more.
      mu: Muon's momentum, in [0, 1).
      specs: as for scale_by_muon.
      index_schedule: the indexer's learning rate; None: the indexer does not change.
      numbers: how state is stored, and dtypes of Muon's products.
      pairs: what trains low-rank pairs, "muon" or "adamw".

    Its `init` raises ValueError for a parameter that v4jax/parameters.py does not have.
    """

    def pair(schedule):
        rest = optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule)
        adam = scale_by_adam(dtype=numbers.moments, specs=specs, memory=numbers.memory)
        steps = scale_by_muon(mu, specs, numbers), adam
        return [optax.chain(step, *rest) for step in steps]

    transforms: dict[Hashable, optax.GradientTransformation] = {}
    transforms["muon"], transforms["adamw"] = pair(schedule)
    if index_schedule is None:
        transforms["frozen"] = optax.set_to_zero()
    else:
        transforms["index_muon"], transforms["index_adamw"] = pair(index_schedule)
    return optax.partition(
        transforms, lambda params: label_parameters(params, index_schedule is not None, pairs)
    )


def label_parameters(params, trains_index: bool = False, pairs: str = "adamw"):
    """The tree of optimizer names, one for each parameter (see `optimizer_of`)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: optimizer_of(tuple(key.key for key in path), trains_index, pairs), params
    )


def clip_apart(largest: float) -> optax.GradientTransformation:
    """Clips the gradients of the main model and of the indexers to norm `largest`, each by itself.

    So training an indexer changes no step of the main model.
    """

    def clip(grads):
        norm = global_norm(grads)
        return [jnp.where(norm < largest, g, g / norm * largest) for g in grads]

    def update(updates, state, params=None):
        del params
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        index = [is_index(tuple(key.key for key in path)) for path, _ in leaves]
        parts = [
            iter(clip([g for (_, g), i in zip(leaves, index, strict=True) if i == kind]))
            for kind in (False, True)
        ]
        return jax.tree.unflatten(tree, [next(parts[i]) for i in index]), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree) -> jax.Array:
    """The root of the sum of all squares, float32 scalar; correct up to the largest float32.

    Squares overflow from 1e19 on, so large trees are scaled first. Elements below 1e-19 count as 0.
    """

    def root(scale: float):
        scaled = [x.astype(jnp.float32) * scale for x in jax.tree.leaves(tree)]
        return jnp.sqrt(sum((jnp.sum(x * x) for x in scaled), start=jnp.zeros(())))

    # Two sums at once: finding the largest element first would read everything twice.
    norm, large = root(1), root(2.0**-96) * 2.0**96
    return jnp.where(jnp.isfinite(norm), norm, large)


def freeze(new, old, is_frozen):
    """The tree `new`, but with the frozen parameters' weights, momenta and moments of `old`.

    Scalars such as step counts are those of `new`.

    Args:
      is_frozen: path of a parameter -> bool.
    """

    def choose(path, new, old):
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        if keys and keys[0] in _OPTIMIZERS:  # an optimizer's state begins with its name
            keys = keys[1:]
        return old if new.ndim and is_frozen(keys) else new

    return jax.tree_util.tree_map_with_path(choose, new, old)
