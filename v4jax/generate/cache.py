"""Continues sequences: one pure function reads a chunk of any length, for prefill and decoding.

    cache = empty_cache(cfg, batch, capacity)
    chunk, cache = extend(cfg, params, cache, prompt_BT, count_B)  # the prompt, whole or in chunks
    chunk, cache = extend(cfg, params, cache, token_B1, ones_B)    # one token more

Each row of the batch has its own position. A row with fewer tokens than the chunk has them at the
left, and `count_B` says how many are real; nothing of the others is kept.

MTP is one token late: position t needs token t+1. So `draft` is a function of its own, which takes
the streams that `extend` returns.

Shapes: B batch, S and T positions of a chunk, X streams, D hidden, V vocabulary, E experts, F
expert hidden.
Next file to read: v4jax/cache/layer.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sharding.embedding import embed_lookup
from sharding.rules import AxisRules
from v4jax.cache.layer import CacheView, ChunkSpan, LayerCache, empty_layer
from v4jax.cache.quantized import STORAGES
from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig
from v4jax.context import Context
from v4jax.model.adapted import ROW, with_pair, with_rows
from v4jax.model.dspark import ROOT
from v4jax.model.mtp import Drafter
from v4jax.model.router import Routing
from v4jax.model.segments import read_span
from v4jax.model.transformer import Hidden, Transformer, project_logits
from v4jax.parameter_tree import ADAPTERS, ROWS
from v4jax.quant import fp8
from v4jax.quant.packed import Packed

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
      mtp: the cache of what drafts: MTP's one layer, or a ring of each stage of a DSpark drafter,
        which holds its context keys; or None.
    """

    length_B: jax.Array
    layers: dict[str, dict[str, LayerCache]]
    mtp: LayerCache | None


class Chunk(NamedTuple):
    """What `extend` returns of a chunk.

    Attributes:
      x_BTD: normalised hidden states, for the head.
      streams_BTXD: residual streams, for `draft`.
      taps: what a DSpark drafter reads (v4jax/model/dspark.py), if it was asked for.
    """

    x_BTD: jax.Array
    streams_BTXD: jax.Array
    taps: dict[str, dict[str, jax.Array]]


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

    Layers of short groups become arrays of their own, named by LayerGroup.layer. A scan over
    stacked layers would copy each layer's weights off the stack, with all experts, where a token
    needs a few. On one device w1 and w3 of the experts become one array, [E,D,2F], so that one
    product computes both (v4jax/kernels/expert_ffn/every_expert.py); not where they have low-rank
    pairs.

    Args:
      take: returns layer n of stacked layers.
    """
    low = dict(params.get(ADAPTERS, {}))
    params = dict(params, router=dict(params["router"])) | ({ADAPTERS: low} if low else {})
    for group in cfg.layer_groups:
        if group.repeats > APART or group.name not in params:
            continue
        for tree in (params, params["router"], low):
            if group.name not in tree:
                continue
            stacked = tree.pop(group.name)
            for n in range(group.repeats):
                tree[group.layer(n)] = jax.tree.map(functools.partial(take, n=n), stacked)
        if not rules:
            for n in range(group.repeats):
                for name, block in params[group.layer(n)].items():
                    if "experts" not in low.get(group.layer(n), {}).get(name, {}).get("ffn", {}):
                        joined = jax.tree.map(_join, block, is_leaf=_is_swiglu)
                        params[group.layer(n)][name] = joined
    return params


def _is_swiglu(tree) -> bool:
    return isinstance(tree, dict) and "w3" in tree


def _join(leaf):
    """Concatenates w1 and w3 of routed experts, [E,D,2F]; returns anything else unchanged.

    So do experts that are packed in different ways, or as fp8 with a width of partial blocks.
    """
    if not _is_swiglu(leaf) or leaf["w1"].ndim == 2:
        return leaf
    w1, w3 = leaf["w1"], leaf["w3"]
    partial = isinstance(w1, Packed) and w1.format == "fp8" and w1.shape[-1] % fp8.BLOCK
    if partial or jax.tree.structure(w1) != jax.tree.structure(w3):
        return leaf
    joined = jax.tree.map(lambda a, b: jnp.concatenate((a, b), axis=-1), w1, w3)
    return {"w1": joined, "w2": leaf["w2"]}


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
    dtype: jnp.dtype = jnp.dtype("float32"),
    storage: str = "dtype",
    rules: AxisRules = AxisRules(),
    stages: int = 0,
) -> Cache:
    """An empty cache for `batch` rows of `capacity` tokens.

    Capacity is rounded up to whole blocks of 128 tokens on each device that cuts the cache.

    Args:
      storage: "dtype", or "official" (packed).
      stages: those of a DSpark drafter; 0 without one.
    """
    stages = stages or cfg.num_nextn_predict_layers
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
        jnp.zeros(batch, jnp.int32), layers, layer(WINDOW_ONLY, stages) if stages else None
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
    ctx: Context = Context(),
) -> tuple[Chunk, Cache]:
    """Continues each row by the first `count_B` of its tokens.

    Pairs of several adapters need the number of each row's beside them (ROWS in
    v4jax/parameter_tree.py).

    Results at later positions mean nothing. The caller must not let a row outgrow the cache:
    entries without a place are dropped.

    Args:
      params: as everywhere, or as `split_layers` returns them.
      tokens_BT: token ids, int32.
      count_B: int32, real tokens of each row, 0 to T.
    """
    span = ChunkSpan(cache.length_B, count_B)
    apart = ("router", ADAPTERS, ROWS, ROOT)
    weights = {name: params[name] for name in params if name not in apart}
    variables, ctx = _with_pairs(params, {"params": weights, "router": params["router"]}, ctx)
    view = CacheView(cache.layers, jnp.int32(0), span)
    segments = read_span(cfg, tokens_BT.shape[1], span)
    hidden = cast(Hidden, Transformer(ctx, cfg).apply(variables, tokens_BT, segments, view))
    assert hidden.cache is not None, "it was given one"
    chunk = Chunk(hidden.x_BSD, hidden.streams_BSXD, hidden.taps)
    return chunk, Cache(cache.length_B + count_B, hidden.cache, cache.mtp)


def draft(
    cfg: ModelConfig,
    params,
    cache: Cache,
    streams_BTXD: jax.Array,
    next_BT: jax.Array,
    span: ChunkSpan,
    ctx: Context = Context(),
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
    next_BTD = embed_lookup(ctx.rules, params["embed"]["weight"], next_BT).astype(ctx.dtype)
    weights = {"params": {"mtp": params["mtp"]}, "router": {"mtp": params["router"]["mtp"]}}
    variables, ctx = _with_pairs(params, weights, ctx)
    view = CacheView(cache.mtp, jnp.int32(0), span)
    drafted = Drafter(ctx, cfg).apply(variables, streams_BTXD, next_BTD, next_BT, segments, view)
    x_BTD, _, view = cast(tuple[jax.Array, Routing, CacheView], drafted)
    return x_BTD, cache._replace(mtp=view.cache)


def _with_pairs(params, variables, ctx: Context):
    """(variables, ctx) of a module with the low-rank pairs of `params`, if it has some."""
    if ADAPTERS not in params:
        return variables, ctx
    pairs = params[ADAPTERS]
    if ROWS in params:
        pairs = with_rows(pairs, params[ROWS])
    return variables | {ADAPTERS: pairs}, dataclasses.replace(ctx, frozen=True)


def logits_of(params, x_BTD: jax.Array, ctx: Context = Context()) -> jax.Array:
    """Logits of hidden states x_BTD, float32 [B,T,V]."""

    axes = ("embed", "vocab")
    head_DV = ctx.rules.gather(params["head"]["weight"].astype(x_BTD.dtype), axes)
    pair = params.get(ADAPTERS, {}).get("head", {}).get("weight")
    if pair is not None:
        pair = pair | ({ROW: params[ROWS]} if ROWS in params else {})
        head_DV = with_pair(head_DV, pair, axes, ctx.rules.gather)
    return project_logits(ctx, x_BTD, head_DV)
