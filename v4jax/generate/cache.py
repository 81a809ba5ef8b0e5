"""Continues sequences: one pure function reads a chunk of any length, for prefill and decoding.

    cache = empty_cache(cfg, batch, capacity)
    chunk, cache = extend(cfg, params, cache, prompt_BT, count_B)  # the prompt, whole or in chunks
    chunk, cache = extend(cfg, params, cache, token_B1, ones_B)    # one token more

Each row of the batch has its own position. A row with fewer tokens than the chunk has them at the
left, and `count_B` says how many are real; nothing of the others is kept. The modules of
v4jax/model declare the weights; this file applies them.

MTP is one token late: position t needs token t+1. So `draft` is a function of its own, which takes
the streams that `extend` returns.

Shapes: B batch, T positions of a chunk, X streams, D hidden, V vocabulary, E experts, F expert
hidden.
Next file to read: v4jax/cache/layer.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sharding.embedding import embed_lookup
from sharding.rules import AxisRules
from v4jax.cache.layer import CacheView, ChunkSpan, LayerCache, empty_layer
from v4jax.cache.quantized import STORAGES
from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig
from v4jax.model.block import Pattern, stack
from v4jax.model.hyper import HyperHead
from v4jax.model.mtp import MTP
from v4jax.model.norm import RMSNorm
from v4jax.model.segments import read_span
from v4jax.model.transformer import project_logits
from v4jax.model.weights import SparseMode

BLOCK = math.lcm(CSA, HCA)
"""Capacity is a multiple of this, so that it is in whole windows of both ratios."""


APART = 8
"""A group with at most this many repetitions runs layer by layer, without a scan."""


class Cache(NamedTuple):
    """The cache of a batch of rows.

    Attributes:
      length_B: int32, tokens kept of each row. A smaller number takes tokens back: at most
        SPARE_ROWS of those written last.
      layers: group name -> block name -> LayerCache, stacked over the group's repetitions.
      mtp: the cache of MTP's one layer, or None.
    """

    length_B: jax.Array
    layers: dict[str, dict[str, LayerCache]]
    mtp: LayerCache | None


class Chunk(NamedTuple):
    """What `extend` returns of a chunk.

    Attributes:
      x_BTD: normalised hidden states, for the head.
      streams_BTXD: residual streams, for `draft`.
    """

    x_BTD: jax.Array
    streams_BTXD: jax.Array


def decoding_rules(rules: AxisRules) -> AxisRules:
    """The layout for decoding: devices that cut sequences cut the cache instead.

    A single token cannot be cut. Each of these devices holds a contiguous part of the entries and
    index keys, and computes every token from whole weights. The mesh is ambient.
    """
    cut = rules.mesh_axes("act_seq")
    slots = cut if rules.shards("act_seq") > 1 else ()
    rest = ((name, tuple(axis for axis in axes if axis not in cut)) for name, axes in rules.table)
    return dataclasses.replace(
        rules, table=tuple((name, slots if name == "cache_slots" else axes) for name, axes in rest)
    )


def split_layers(
    cfg: ModelConfig, params, rules: AxisRules = AxisRules(), take: Callable = lambda x, n: x[n]
):
    """Arranges the parameters as `extend` and `draft` run them fastest.

    Layers of short groups become arrays of their own, a tuple per group. A scan over stacked layers
    would copy each layer's weights off the stack, with all experts, where a token needs a few. On
    one device w1 and w3 of the experts become one array, [E,D,2F], so that one product computes
    both (v4jax/kernels/expert_ffn.py, `every_expert`).

    Args:
      take: returns layer n of stacked layers.
    """
    params = dict(params, router=dict(params["router"]))
    for group in cfg.layer_groups:
        if group.repeats <= APART and not isinstance(params[group.name], tuple):
            for tree in (params, params["router"]):
                tree[group.name] = tuple(
                    jax.tree.map(functools.partial(take, n=n), tree[group.name])
                    for n in range(group.repeats)
                )
            if not rules:
                params[group.name] = tuple(
                    jax.tree.map(_join, layer, is_leaf=_is_swiglu) for layer in params[group.name]
                )
    return params


def _is_swiglu(tree) -> bool:
    return isinstance(tree, dict) and "w3" in tree


def _join(leaf):
    """Concatenates w1 and w3 of routed experts, [E,D,2F]; returns anything else unchanged."""
    if not _is_swiglu(leaf) or leaf["w1"].ndim == 2:
        return leaf
    return {"w1": jnp.concatenate((leaf["w1"], leaf["w3"]), axis=-1), "w2": leaf["w2"]}


def check_storage(storage: str, quant: str) -> None:
    """Raises ValueError for an unknown storage, or one that rounds more than the model does."""
    if storage not in STORAGES:
        raise ValueError(f"cache: got {storage!r}; allowed: {', '.join(map(repr, STORAGES))}")
    if storage == "official" and quant != "official":
        raise ValueError(
            f"cache: got 'official' with quant {quant!r}; it holds rows that quant 'official' has "
            "rounded"
        )


def empty_cache(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype = jnp.float32,
    storage: str = "dtype",
    rules: AxisRules = AxisRules(),
) -> Cache:
    """An empty cache for `batch` rows of `capacity` tokens.

    Capacity is rounded up to whole blocks of 128 tokens on each device that cuts the cache.

    Args:
      storage: "dtype", or "official" (packed).
    """
    block = BLOCK * rules.shards("cache_slots")
    layer = functools.partial(
        empty_layer,
        rules,
        cfg,
        batch=batch,
        capacity=-(-capacity // block) * block,
        dtype=dtype,
        storage=storage,
    )
    layers = {
        group.name: {
            f"block_{i}": layer(kind.compress_ratio, group.repeats)
            for i, kind in enumerate(group.kinds)
        }
        for group in cfg.layer_groups
    }
    return Cache(
        jnp.zeros(batch, jnp.int32),
        layers,
        layer(WINDOW_ONLY, 1) if cfg.num_nextn_predict_layers else None,
    )


def cache_shardings(mesh: Mesh, rules: AxisRules, cache: Cache) -> Cache:
    """NamedSharding of every array of `cache`, of which only the shapes are read."""

    def place(path, leaf):
        slots = "cache_slots" if any(getattr(key, "name", "") == "slots" for key in path) else None
        return NamedSharding(
            mesh, rules.spec((None,) if leaf.ndim == 1 else (None, "act_batch", slots, None))
        )

    return jax.tree_util.tree_map_with_path(place, cache)


def extend(
    cfg: ModelConfig,
    params,
    cache: Cache,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    *,
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.float32,
    quant: str = "none",
) -> tuple[Chunk, Cache]:
    """Continues each row by the first `count_B` of its tokens.

    Results at later positions mean nothing. The caller must not let a row outgrow the cache:
    entries without a place are dropped.

    Args:
      params: as everywhere, or as `split_layers` returns them.
      tokens_BT: token ids, int32.
      count_B: int32, real tokens of each row, 0 to T.
    """
    span = ChunkSpan(cache.length_B, count_B)
    context = (rules, jnp.dtype(dtype), quant, SparseMode())
    segments = read_span(cfg, tokens_BT.shape[1], span)
    x_BTD = embed_lookup(rules, params["embed"]["weight"], tokens_BT).astype(dtype)
    x_BTXD = jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], cfg.hc_mult, cfg.hidden_size))
    layers = {}
    for group in cfg.layer_groups:
        weights, router = params[group.name], params["router"][group.name]
        view = CacheView(cache.layers[group.name], jnp.int32(0), span)
        if isinstance(weights, tuple):
            run = Pattern(*context, cfg, group.kinds)
        else:
            run, weights, router = (
                stack(*context, cfg, group.kinds, group.repeats, False, group.name),
                (weights,),
                (router,),
            )
        for part in zip(weights, router, strict=True):
            ((x_BTXD, view), _) = run.apply(
                dict(zip(("params", "router"), part, strict=True)),
                (x_BTXD, view),
                tokens_BT,
                segments,
            )
        layers[group.name] = view.cache
    x_BTD = HyperHead(*context, cfg).apply({"params": params["hc_head"]}, x_BTXD)
    x_BTD = RMSNorm(*context, cfg.rms_norm_eps).apply({"params": params["norm"]}, x_BTD)
    return Chunk(x_BTD, x_BTXD), Cache(cache.length_B + count_B, layers, cache.mtp)


def draft(
    cfg: ModelConfig,
    params,
    cache: Cache,
    streams_BTXD: jax.Array,
    next_BT: jax.Array,
    span: ChunkSpan,
    *,
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.float32,
    quant: str = "none",
) -> tuple[jax.Array, Cache]:
    """Runs MTP at positions start_B, start_B + 1, ... of each row.

    Args:
      streams_BTXD: the streams of these positions, from `extend`.
      next_BT: the token after each position.

    Returns:
      x_BTD, from which the head computes logits of the token after `next_BT`, and the cache with
        these positions in MTP's window.
    """
    segments = read_span(cfg, next_BT.shape[1], span)
    next_BTD = embed_lookup(rules, params["embed"]["weight"], next_BT).astype(dtype)
    weights = {"params": params["mtp"], "router": params["router"]["mtp"]}
    view = CacheView(cache.mtp, jnp.int32(0), span)
    x_BTD, _, view = MTP(rules, jnp.dtype(dtype), quant, SparseMode(), cfg).apply(
        weights, streams_BTXD, next_BTD, next_BT, segments, view
    )
    return x_BTD, cache._replace(mtp=view.cache)


def logits_of(params, x_BTD: jax.Array, rules: AxisRules = AxisRules()) -> jax.Array:
    """Logits of hidden states x_BTD, float32 [B,T,V]."""
    head_DV = rules.gather(params["head"]["weight"].astype(x_BTD.dtype), ("embed", "vocab"))
    return project_logits(rules, x_BTD, head_DV)
