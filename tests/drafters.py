"""A random DSpark drafter for tests: official weights, and v4jax's tree of them."""

import numpy as np
from flax.traverse_util import unflatten_dict
from releases import BLOCK, RANK, STAGES, drafter_shapes

from v4jax.config.releases import DSparkConfig
from v4jax.drafter_parameters import drafter_tensors


def dspark_config(taps, **changes):
    fields = dict(
        stages=STAGES, block_size=BLOCK, noise_token_id=96, target_layer_ids=taps, markov_rank=RANK
    )
    return DSparkConfig(**fields | changes)


def random_drafter(cfg, dspark, seed=1):
    """Official name -> float32 array."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (shape, _) in drafter_shapes(cfg, len(dspark.target_layer_ids)).items():
        x = rng.normal(size=shape) * shape[-1] ** -0.5
        if name.endswith("norm.weight"):
            x = 1 + 0.1 * rng.normal(size=shape)
        elif "markov" in name or len(shape) == 1:
            x = 0.3 * rng.normal(size=shape)
        found[name] = x.astype(np.float32)
    return found


def tree_of(cfg, dspark, weights):
    """v4jax's parameters of official weights."""
    leaves = {}
    for name, one in drafter_tensors(cfg, dspark).items():
        x = weights[name].T if one.transpose else weights[name]
        if one.index:
            leaves.setdefault(one.path, {})[one.index[0]] = x
        else:
            leaves[one.path] = x
    stacked = {
        path: np.stack([x[e] for e in range(len(x))]) if isinstance(x, dict) else x
        for path, x in leaves.items()
    }
    return unflatten_dict(stacked)
