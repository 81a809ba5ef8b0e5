"""Rows that go on: one pure function continues them by a chunk of any length, so it prefills and decodes alike.

    cache = empty_cache(cfg, batch, capacity)
    hidden, cache = extend(cfg, params, cache, prompt_BT, count_B)       # the prompt, whole or in chunks
    hidden, cache = extend(cfg, params, cache, token_B1, ones_B)         # one token more

Rows of a batch stand at positions of their own: those with fewer tokens in a chunk have them at its left, and `count_B` says how
many are real. Nothing of the others is kept. The weights are declared by the modules of v4jax/model; here they are only applied.

MTP runs one token behind: position t needs token t+1. So `draft` is a function of its own, given the streams that `extend` returns.

Shapes: B batch, T positions of a chunk, X streams, D hidden, V vocabulary.
Next file to read: v4jax/model/state.py.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.embedding import embed_lookup
from sharding.rules import AxisRules
from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig
from v4jax.model.block import stack
from v4jax.model.documents import read_stretch
from v4jax.model.hyper import HyperHead
from v4jax.model.mtp import MTP
from v4jax.model.norm import RMSNorm
from v4jax.model.packed import STORAGES
from v4jax.model.state import Kept, LayerCache, Stretch, empty_layer
from v4jax.model.transformer import project_logits
from v4jax.model.weights import Csa

BLOCK = math.lcm(CSA, HCA)
"""Capacity comes in whole windows of both ratios."""


class Cache(NamedTuple):
    """What is kept of a batch of rows.

    Attributes:
      length_B: int32, tokens kept of each row. A smaller number takes tokens back: at most SPARE_ROWS of them since they came.
      layers: group name -> block name -> LayerCache, stacked over the group's repeats. mtp: its one layer, or None.
    """

    length_B: jax.Array
    layers: dict[str, dict[str, LayerCache]]
    mtp: LayerCache | None


class Chunk(NamedTuple):
    """What a chunk gives: x_BTD, normalised, for the head; streams_BTXD for `draft`."""

    x_BTD: jax.Array
    streams_BTXD: jax.Array


def decoding_rules(rules: AxisRules) -> AxisRules:
    """The layout with devices that cut sequences cutting the batch instead: a token cannot be cut."""
    if not rules:
        return rules
    moved = {"act_batch": rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq"), "act_seq": ()}
    return dataclasses.replace(rules, table=tuple((name, moved.get(name, axes)) for name, axes in rules.table))


def check_storage(storage: str, quant: str) -> None:
    """Raises ValueError for a storage that does not exist, or would round what the model does not."""
    if storage not in STORAGES:
        raise ValueError(f"cache: got {storage!r}; allowed: {', '.join(map(repr, STORAGES))}")
    if storage == "official" and quant != "official":
        raise ValueError(f"cache: got 'official' with quant {quant!r}; it holds rows that quant 'official' has rounded")


def empty_cache(
    cfg: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32, storage: str = "dtype",
    rules: AxisRules = AxisRules(),
) -> Cache:  # fmt: skip
    """Room for `batch` rows of `capacity` tokens, rounded up to whole blocks of 128; storage: "dtype", or "official" (packed)."""
    capacity = -(-capacity // BLOCK) * BLOCK
    layers = {
        group.name: {
            f"block_{i}": empty_layer(cfg, kind.compress_ratio, group.repeats, batch, capacity, dtype, storage)
            for i, kind in enumerate(group.kinds)
        }
        for group in cfg.layer_groups
    }
    mtp = empty_layer(cfg, WINDOW_ONLY, 1, batch, capacity, dtype, storage) if cfg.num_nextn_predict_layers else None
    layers, mtp = jax.tree.map(lambda x: rules.constrain(x, None, "act_batch", None, None), (layers, mtp))
    return Cache(jnp.zeros(batch, jnp.int32), layers, mtp)


def extend(
    cfg: ModelConfig, params, cache: Cache, tokens_BT: jax.Array, count_B: jax.Array, *,
    rules: AxisRules = AxisRules(), dtype: jnp.dtype = jnp.float32, quant: str = "none",
) -> tuple[Chunk, Cache]:  # fmt: skip
    """Continues each row by the first `count_B` of its tokens; positions behind those mean nothing.

    The caller sees to it that no row outgrows the cache: entries that find no place are dropped.
    """
    stretch, own = Stretch(cache.length_B, count_B), (rules, jnp.dtype(dtype), quant, Csa())
    documents = read_stretch(cfg, tokens_BT.shape[1], stretch)
    x_BTD = embed_lookup(rules, params["embed"]["weight"], tokens_BT).astype(dtype)
    x_BTXD = jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], cfg.hc_mult, cfg.hidden_size))
    layers = {}
    for group in cfg.layer_groups:
        weights = {"params": params[group.name], "router": params["router"][group.name]}
        kept = Kept(cache.layers[group.name], jnp.int32(0), stretch)
        run = stack(*own, cfg, group.kinds, group.repeats, False, group.name)
        ((x_BTXD, kept), _) = run.apply(weights, (x_BTXD, kept), tokens_BT, documents)
        layers[group.name] = kept.cache
    x_BTD = HyperHead(*own, cfg).apply({"params": params["hc_head"]}, x_BTXD)
    x_BTD = RMSNorm(*own, cfg.rms_norm_eps).apply({"params": params["norm"]}, x_BTD)
    return Chunk(x_BTD, x_BTXD), Cache(cache.length_B + count_B, layers, cache.mtp)


def draft(
    cfg: ModelConfig, params, cache: Cache, streams_BTXD: jax.Array, next_BT: jax.Array, stretch: Stretch, *,
    rules: AxisRules = AxisRules(), dtype: jnp.dtype = jnp.float32, quant: str = "none",
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """MTP of positions start_B, start_B + 1, ... of rows, given their streams and the token behind each.

    Returns:
      x_BTD, which the head turns into logits of the token after `next_BT`; the cache with these rows in MTP's window.
    """
    documents = read_stretch(cfg, next_BT.shape[1], stretch)
    next_BTD = embed_lookup(rules, params["embed"]["weight"], next_BT).astype(dtype)
    weights = {"params": params["mtp"], "router": params["router"]["mtp"]}
    kept = Kept(cache.mtp, jnp.int32(0), stretch)
    x_BTD, _, kept = MTP(rules, jnp.dtype(dtype), quant, Csa(), cfg).apply(weights, streams_BTXD, next_BTD, next_BT, documents, kept)
    return x_BTD, cache._replace(mtp=kept.cache)


def logits_of(params, x_BTD: jax.Array, rules: AxisRules = AxisRules()) -> jax.Array:
    """float32 [B,T,V]."""
    head_DV = rules.gather(params["head"]["weight"].astype(x_BTD.dtype), ("embed", "vocab"))
    return project_logits(rules, x_BTD, head_DV)
