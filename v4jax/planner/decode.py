"""Estimates a decoding step: what is held, read, computed and sent for one new token a row.

Caches are those of v4jax/generate/cache.py, in the compute dtype or as the released model keeps
them (entries in fp8 and bf16, index keys in fp4). They are cut with the rows and, where a layout
cuts sequences, along them. Weights are held in the compute dtype or in the released formats.

Next file to read: v4jax/planner/estimate.py.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.rules import MESH_AXES, AxisRules
from v4jax.checkpoint.names import held_in, plain_dtype
from v4jax.config import CSA, HCA, ModelConfig
from v4jax.cost import cost
from v4jax.generate.cache import empty_cache
from v4jax.planner.terms import Term, sent
from v4jax.planner.token_traffic import experts_sent
from v4jax.planner.weight_traffic import weight_gathered
from v4jax.planner.weights import RELEASED, Weight, check_packed, cut_of, weights_of
from v4jax.planner.work import layers_by_ratio
from v4jax.train.config import TrainConfig


def decode_terms(
    cfg: TrainConfig,
    rules: AxisRules,
    sizes: Mapping[str, int],
    platform: str,
    released: bool = False,
) -> list[Term]:
    """The terms of one step of batch_size rows with a context of seq_len tokens each.

    Rows stand in for tokens, since a step makes one token a row.

    Raises:
      ValueError: the layout would cut blocks of packed weights.
    """
    model = cfg.model
    if released:
        check_packed(model, rules, sizes)
    tokens = [
        axis
        for axis in MESH_AXES
        if sizes[axis] > 1 and axis in rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq")
    ]
    seq, batch = (
        math.prod(sizes[axis] for axis in rules.mesh_axes(name))
        for name in ("act_seq", "act_batch")
    )
    rows = cfg.batch_size / batch
    terms = []
    for weight in weights_of(model):
        cut, part, item = (
            cut_of(weight, rules, sizes),
            weight.part,
            bytes_held(weight, "released" if released else cfg.dtype),
        )
        terms.append(Term("weights", weight.name, item * weight.size / cut.devices))
        if weight.uses and not weight.in_mtp:
            hidden = math.prod(sizes[axis] for axis in rules.mesh_axes("expert_hidden"))
            own = hidden if weight.is_expert else cut.others
            terms.append(Term("flops", part, 2 * weight.size / own * weight.uses, "rows"))
            holders = math.prod(sizes[axis] for axis in rules.mesh_axes("experts"))
            touched = min(1.0, rows * holders * weight.uses) if weight.is_expert else 1.0
            terms.append(Term("hbm", part, item * weight.size / cut.others * touched))
            terms += weight_gathered(
                weight, cut, [axis for axis in tokens if axis in cut.token_axes], item, sizes
            )
    terms += _caches(cfg, rules, sizes, seq, released)
    return (
        terms
        + experts_sent(cfg, rules, sizes, platform, "decode")
        + _sums(cfg, rules, sizes, platform)
    )


def bytes_held(weight: Weight, dtype: str) -> float:
    """Bytes of a number of `weight`; dtype is "float32", "bfloat16" or "released"."""
    if dtype == "released":
        return RELEASED[weight.precision]
    return held_in(weight.precision, plain_dtype(dtype)).itemsize


class CacheBytes(NamedTuple):
    """Bytes of one row's cache.

    Attributes:
      rings: what is kept of the newest tokens.
      slots: entries and index keys.
      unread: the part of `slots` that a step does not read: CSA entries it does not choose.
    """

    rings: int
    slots: int
    unread: float


@functools.lru_cache(64)
def cache_bytes(model: ModelConfig, seq: int, dtype: str, released: bool) -> CacheBytes:
    """Bytes of the cache of a row with room for `seq` tokens; released: in the released formats."""
    shapes = jax.eval_shape(
        lambda: empty_cache(model, 1, seq, jnp.dtype(dtype), "official" if released else "dtype")
    )
    rings, slots, unread = 0, 0, 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.layers | {"mtp": shapes.mtp}):
        names = [getattr(key, "name", "") for key in path]
        if "slots" not in names:
            rings += leaf.size * leaf.dtype.itemsize
            continue
        size, count = leaf.size * leaf.dtype.itemsize, leaf.shape[2]
        slots += size
        if "entry" in names and count > model.index_topk and count >= seq // CSA:
            unread += size * (1 - model.index_topk / count)
    return CacheBytes(rings, slots, unread)


def _caches(cfg: TrainConfig, rules: AxisRules, sizes, seq: int, released: bool) -> list[Term]:
    """The caches: all entries are held, and some are read.

    A step reads the rings, HCA's entries, the chosen entries of CSA, and every index key.
    """
    model = cfg.model
    found, own = cost(model, cfg.seq_len), cache_bytes(model, cfg.seq_len, cfg.dtype, released)
    heads = math.prod(sizes[axis] for axis in rules.mesh_axes("act_heads"))
    flops = found.total.flops - 2 * sum(w.size * w.uses for w in weights_of(model) if not w.in_mtp)
    return [
        Term("caches", "entries and keys", own.rings + own.slots / seq, "rows"),
        Term("hbm", "attention", own.rings + (own.slots - own.unread) / seq, "rows"),
        Term("flops", "attention", max(0.0, flops) / (heads * seq), "rows"),
    ]


def _sums(cfg: TrainConfig, rules: AxisRules, sizes, platform: str) -> list[Term]:
    """What is sent: partial sums of heads and experts, results along a cut cache, table rows."""
    terms = _over_heads(cfg, rules, sizes, platform) + _along_caches(cfg, rules, sizes)
    return [term for term in terms if term.axes and term.coefficient]


def _over_heads(cfg: TrainConfig, rules: AxisRules, sizes, platform: str) -> list[Term]:
    """Partial sums of heads and experts, those of the indexers' heads, and rows of the table."""
    model, layers, item = cfg.model, layers_by_ratio(cfg.model), 4 if cfg.dtype == "float32" else 2
    count = sum(layers.values()) - model.num_nextn_predict_layers
    tensor, n = _cut(rules, sizes, "act_heads")
    words, v = _cut(rules, sizes, "vocab")
    ring = 2 * (n - 1) / n
    sums = 3 if platform == "cpu" or rules.exchange else 2  # planner/token_traffic.py says why
    wide = ring * item * sums * model.hidden_size * count
    looked_up = 2 * (v - 1) / v * 4 * model.hidden_size
    terms = [
        sent("tensor sums", tensor, "all-reduce", wide, "rows", sums * count),
        sent("embedding", words, "all-reduce", looked_up, "rows"),
    ]
    _, s = _cut(rules, sizes, "act_seq")
    entries = cfg.seq_len // CSA / s
    if entries * s > model.index_topk and rules.mesh_axes("index_heads"):
        scores = ring * 4 * entries * layers[CSA]
        terms.append(sent("indexers", tensor, "all-reduce", scores, "rows", layers[CSA]))
    return terms


def _along_caches(cfg: TrainConfig, rules: AxisRules, sizes) -> list[Term]:
    """What joins the parts of a cache that is cut along the sequence: choices, and attention."""
    model, layers = cfg.model, layers_by_ratio(cfg.model)
    slots, s = _cut(rules, sizes, "act_seq")
    _, n = _cut(rules, sizes, "act_heads")
    best = min(model.index_topk, cfg.seq_len // CSA / s)
    chosen = 4 * best * (s - 1) * layers[CSA]
    far = layers[CSA] + layers[HCA]
    own = model.num_attention_heads / n
    parts = 2 * (s - 1) / s * 4 * own * (2 + model.head_dim) * far
    return [
        sent("indexers", slots, "all-gather", chosen, "rows", layers[CSA]),
        sent("attention", slots, "all-reduce", parts, "rows", 3 * far),
    ]


def _cut(rules: AxisRules, sizes: Mapping[str, int], name: str) -> tuple[list[str], int]:
    """(the mesh axes that cut a logical axis, into how many parts)."""
    axes = [axis for axis in rules.mesh_axes(name) if sizes[axis] > 1]
    return axes, math.prod(sizes[axis] for axis in axes)
