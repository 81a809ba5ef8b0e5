"""One decoding step on paper: weights and caches held and read, products of one new token a row, what is sent.

Caches are those of v4jax/cost.py (entries in fp8 and bf16, index keys in fp4, as the released model keeps them), cut with the rows
and, where a layout cuts sequences, along them. Weights are held in the compute dtype, or in the released formats.

Next file to read: v4jax/layout/estimate.py.
"""

import math
from collections.abc import Mapping

from sharding.rules import MESH_AXES, AxisRules
from v4jax.config import CSA
from v4jax.cost import cost
from v4jax.layout.terms import Term
from v4jax.layout.traffic import experts_sent, weight_gathered
from v4jax.layout.weights import Weight, cut_of, weights_of
from v4jax.layout.work import layers_by_ratio, part_of
from v4jax.train.config import TrainConfig

RELEASED = {"experts": 0.53, "matrices": 1.0, "rest": 2.0}
"""Bytes a number in the released formats: MXFP4 with a scale byte per 32, fp8 with 128 x 128 blocks, bf16 (deepseek-v4.md section 5)."""


def decode_terms(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], released: bool = False) -> list[Term]:
    """Terms of one step of batch_size rows with seq_len tokens of context each. Rows stand in for tokens: a step makes one each."""
    model = cfg.model
    tokens = [axis for axis in MESH_AXES if sizes[axis] > 1 and axis in rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq")]
    seq, batch = (math.prod(sizes[axis] for axis in rules.mesh_axes(name)) for name in ("act_seq", "act_batch"))
    rows = cfg.batch_size / batch
    terms = []
    for weight in weights_of(model):
        cut, part, item = cut_of(weight, rules, sizes), part_of(weight.name), bytes_held(weight, "released" if released else cfg.dtype)
        terms.append(Term("weights", weight.name, item * weight.size / cut.devices))
        if weight.uses and not weight.name.startswith("mtp"):
            hidden = math.prod(sizes[axis] for axis in rules.mesh_axes("expert_hidden"))
            own = hidden if weight.is_expert else cut.others
            terms.append(Term("flops", part, 2 * weight.size / own * weight.uses, "rows"))
            holders = math.prod(sizes[axis] for axis in rules.mesh_axes("experts"))
            touched = min(1.0, rows * holders * weight.uses) if weight.is_expert else 1.0
            terms.append(Term("hbm", part, item * weight.size / cut.others * touched))
            terms += weight_gathered(weight, cut, [axis for axis in tokens if axis in cut.token_axes], item, sizes)
    terms += _caches(cfg, rules, sizes, seq)
    return terms + experts_sent(cfg, rules, sizes, 1) + _sums(cfg, rules, sizes)


def bytes_held(weight: Weight, dtype: str) -> float:
    """Bytes per number: "float32", "bfloat16", or "released" formats."""
    if dtype != "released":
        return 4 if dtype == "float32" or weight.float32 else 2
    matrix = weight.uses and not weight.float32 and not weight.name.startswith("head/")
    return RELEASED["experts" if weight.is_expert else "matrices" if matrix else "rest"]


def _caches(cfg: TrainConfig, rules: AxisRules, sizes, seq: int) -> list[Term]:
    """All entries are held; a step reads the window, HCA's, the chosen ones of CSA, and every index key."""
    model = cfg.model
    found = cost(model, cfg.seq_len)
    kept = found.total.cache + found.mtp.cache
    entry = model.head_dim - model.qk_rope_head_dim + -(-(model.head_dim - model.qk_rope_head_dim) // 64) + 2 * model.qk_rope_head_dim
    skipped = layers_by_ratio(model)[CSA] * max(0, cfg.seq_len // CSA - model.index_topk) * entry
    heads = math.prod(sizes[axis] for axis in rules.mesh_axes("act_heads"))
    flops = found.total.flops - 2 * sum(w.size * w.uses for w in weights_of(model) if not w.name.startswith("mtp"))
    return [
        Term("caches", "entries and keys", kept / seq, "rows"),
        Term("hbm", "attention", (kept - skipped) / seq, "rows"),
        Term("flops", "attention", max(0.0, flops) / (heads * seq), "rows"),
    ]


def _sums(cfg: TrainConfig, rules: AxisRules, sizes) -> list[Term]:
    axes = tuple(axis for axis in rules.mesh_axes("act_heads") if sizes[axis] > 1)
    n = math.prod(sizes[axis] for axis in axes)
    layers = sum(layers_by_ratio(cfg.model).values())
    size = 2 * 2 * (n - 1) / n * 3 * cfg.model.hidden_size * layers
    return [Term("sent", "tensor sums", size, "rows", axes, "all-reduce", 3 * layers)] if axes else []
