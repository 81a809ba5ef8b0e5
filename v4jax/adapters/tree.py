"""The tree of pairs: it has the places of the matrices that they adapt.

    {group: {block: {"attn": {"wq_b": {"a": [L,I,r], "b": [L,r,O]}}}}}

It stands under "lora" in a dict of parameters, beside "router"; for several adapters in one batch
see v4jax/adapters/several.py. There the scale is a factor of b:
a matrix multiplies as x W + (x a) b, whatever alpha and rank a run trains with. Only gradients and
optimizer know the b that is not scaled (v4jax/train/adapters.py).

Next file to read: v4jax/model/adapted.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from v4jax.adapters.config import Lora, adapted_paths
from v4jax.adapters.several import refuse_several
from v4jax.config import ModelConfig
from v4jax.parameter_tree import leaves


def abstract_adapters(cfg: ModelConfig, lora: Lora) -> Any:
    """Shapes of the pairs, float32 (jax.ShapeDtypeStruct): a [..., I, r] and b [..., r, O].

    Raises:
      ValueError: see adapted_paths.
    """
    found = {}
    for path in adapted_paths(cfg, lora):
        *lead, rows, columns = leaves(cfg)[path].shape
        for name, shape in (("a", (rows, lora.rank)), ("b", (lora.rank, columns))):
            found[(*path, name)] = jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
    return unflatten_dict(found)


def adapter_axes(cfg: ModelConfig, lora: Lora) -> Any:
    """Logical axes of the pairs: those of the matrix, and None for the rank."""
    return axes_like(cfg, abstract_adapters(cfg, lora))


def axes_like(cfg: ModelConfig, adapters: Any) -> Any:
    """`adapter_axes` of a tree of pairs of one or several adapters, whatever they adapt."""
    found = {}
    flat: Any = flatten_dict(adapters)
    for path, leaf in flat.items():
        *lead, rows, columns = leaves(cfg)[path[:-1]].axes
        ranks = (None,) * (len(leaf.shape) - len(lead) - 1)
        found[path] = (*lead, rows, *ranks) if path[-1] == "a" else (*lead, *ranks, columns)
    return unflatten_dict(found)


def init_adapters(cfg: ModelConfig, lora: Lora, key: jax.Array) -> Any:
    """Fresh pairs in float32: a is uniform in +-1/sqrt(I), b is 0, so that no logit changes.

    Raises:
      ValueError: see adapted_paths.
    """
    shapes: Any = flatten_dict(abstract_adapters(cfg, lora))
    keys = jax.random.split(key, len(shapes))
    found = {}
    for (path, leaf), one in zip(shapes.items(), keys, strict=True):
        limit = 1 / math.sqrt(leaf.shape[-2])
        found[path] = (
            jax.random.uniform(one, leaf.shape, leaf.dtype, -limit, limit)
            if path[-1] == "a"
            else jnp.zeros(leaf.shape, leaf.dtype)
        )
    return unflatten_dict(found)


def times(factor: float, adapters: Any) -> Any:
    """The pairs with each b multiplied by `factor`."""

    def one(path, leaf):
        return leaf * factor if path[-1].key == "b" else leaf

    return jax.tree_util.tree_map_with_path(one, adapters)


def merged(params: Any) -> Any:
    """The parameters with each pair's product added to its matrix, without "lora".

    Whole matrices are made: this is for checks and small models. `v4jax convert --adapter` merges a
    model of any size, tensor by tensor.

    Raises:
      ValueError: several adapters.
    """
    refuse_several(params, "merged")
    flat: Any = flatten_dict({name: tree for name, tree in params.items() if name != "lora"})
    pairs: Any = flatten_dict(params["lora"])
    for path in pairs:
        if path[-1] == "a":
            w, a, b = flat[path[:-1]], pairs[path], pairs[(*path[:-1], "b")]
            delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            flat[path[:-1]] = (w.astype(jnp.float32) + delta).astype(w.dtype)
    return unflatten_dict(flat)
