"""Measurements inside the model during a run.

They cover expert loads, router bias, gates and mixing, activations, and gradients and updates by
group. Values of layers come in the model's order, MTP last. A hash-routed layer has no bias (NaN,
written as null).

Shapes: L layers, E experts.
Next file to read: v4jax/train/step.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.parameter_tree import spec_of
from v4jax.train.muon import global_norm


def watched(cfg: ModelConfig, routing, router, grads, updates) -> dict[str, dict[str, jax.Array]]:
    """{"layers": name -> float32 [L], "grad_rms": group -> scalar, "update_rms": group -> scalar}.

    Names of layers' values: load_max (busiest expert over the mean; 1 is perfect), load_entropy (as
    a share of an even load's; 1 is perfect), load_dead (experts that no token of the batch chose),
    bias_min, bias_max, and the fields of model/watch.Diagnostics. An update is what the optimizer
    adds to the weights.
    """
    load_LE = _by_layer(cfg, routing, lambda route: route.load_E)
    share_LE = load_LE / jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
    entropy_L = -jnp.sum(share_LE * jnp.log(jnp.maximum(share_LE, 1e-30)), axis=-1)
    bias_LE = _by_layer(cfg, router, lambda state: state["ffn"].get("bias"))
    layers = {
        "load_max": share_LE.max(-1) * load_LE.shape[-1],
        "load_entropy": entropy_L / math.log(load_LE.shape[-1]),
        "load_dead": jnp.sum(load_LE == 0, axis=-1).astype(jnp.float32),
        "bias_min": bias_LE.min(-1),
        "bias_max": bias_LE.max(-1),
    }
    first = next(iter(next(iter(routing.values())).values())).diagnostics
    layers |= {
        name: _by_layer(cfg, routing, lambda route, name=name: getattr(route.diagnostics, name))
        for name in first._fields
    }
    return {"layers": layers, "grad_rms": rms_by_group(grads), "update_rms": rms_by_group(updates)}


def _by_layer(cfg: ModelConfig, tree, read) -> jax.Array:
    """[L, ...] in the model's order; NaN for a layer that has no value.

    `tree` maps group -> block -> values stacked over repeats, and `read` takes the value from a
    block.
    """
    rows = []
    for group in cfg.layer_groups:
        blocks = [read(tree[group.name][f"block_{i}"]) for i in range(len(group.kinds))]
        rows += [
            None if block is None else block[repeat]
            for repeat in range(group.repeats)
            for block in blocks
        ]
    if cfg.num_nextn_predict_layers:
        rows.append(read(tree["mtp"]["block"]))
    some = next((row for row in rows if row is not None), jnp.full(1, jnp.nan))
    return jnp.stack([jnp.full_like(some, jnp.nan) if row is None else row for row in rows])


def rms_by_group(tree) -> dict[str, jax.Array]:
    """Root mean square over all elements of each group of parameters (ParamSpec.part)."""
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        part = spec_of(tuple(key.key for key in path)).part
        groups.setdefault(part, []).append(leaf)
    sizes = {name: sum(leaf.size for leaf in leaves) for name, leaves in groups.items()}
    return {name: global_norm(groups[name]) / math.sqrt(size) for name, size in sizes.items()}


def plain(tree) -> Any:
    """Arrays as numbers and lists that JSON can hold; null for a number that is not finite."""
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    if hasattr(tree, "tolist"):
        return plain(tree.tolist())
    return float(f"{tree:.6g}") if math.isfinite(tree) else None
