"""What a model costs, from its configuration: parameters, FLOPs per token and KV bytes, by part.

Parameters, and the products that tokens make with them, are counted from v4jax/parameters.py.

The report's own numbers show how it counts. 284B and 1.6T are the main model with embedding and
head, without MTP (with MTP, Flash would be 291B). 13B and 49B count the head but not the embedding,
which is a lookup and no product (with the embedding they would be 14B and 50B; without the head,
Pro would be 48B).

FLOPs are two per multiplication of a matrix product: of weights, of attention and indexer scores
over the entries that a query really uses (docs/equations.md#trap-46), and of the mixing of residual
streams. Norms, rotary embedding, softmax, Sinkhorn and pooling are left out.

Axes: D hidden, N heads, H head dim, G output groups, O output rank, I index heads, S positions of
the sequence.

Next file to read: v4jax/cost_part.py.
"""

import collections
import dataclasses
import math
from typing import Any

import numpy as np

from v4jax.config import CSA, HCA, WINDOW_ONLY, LayerKind, ModelConfig
from v4jax.cost_part import Part, times, total_of
from v4jax.parameter_tree import MTP_KIND, layer_specs, single_specs
from v4jax.parameters import ParamSpec, sizes

_KIND_NAMES = {WINDOW_ONLY: "SWA", CSA: "CSA", HCA: "HCA"}
"""Compress ratio -> name of the attention; another ratio is called by its number."""
NAMES = {
    "embed": "embedding",
    "attention": "attention",
    "mtp_projection": "attention",
    "compressor": "compressors",
    "indexer": "indexers",
    "gate": "gates",
    "router": "gates",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "hyper": "mHC",
    "norm": "norms",
    "head": "head",
}
"""ParamSpec.part -> what it is called here and in the layout lab, in the order of the report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What `cost` found.

    Attributes:
      context: tokens in the sequence, the newest included.
      parts: those of the main model. `flops` are those of the newest token, `cache` is what the
        sequence keeps.
      mtp: the MTP module, in no total. Its flops include the shared head once more, its cache one
        more window.
      buffers: numbers in selection biases and hash tables, which are not parameters.
      train_flops: forward and backward FLOPs of a token, MTP's included, averaged over a training
        row of `context` tokens.
      v32: DeepSeek-V3.2 at the same context; flops and cache only.
      gqa8: grouped-query attention with 8 heads in bf16; cache only.
    """

    context: int
    parts: tuple[Part, ...]
    mtp: Part
    buffers: int
    train_flops: float
    v32: Part
    gqa8: Part

    @property
    def total(self) -> Part:
        """The sum of the main model's parts."""
        return total_of("total", self.parts)

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people: header, a row per part, the total, and models to compare with."""
        total, v32 = self.total, self.v32
        head = ("part", "parameters", "active", "FLOPs/token", "KV bytes")
        body = [_row(part) for part in (*self.parts, total, self.mtp)]
        training = ("training, mean", "", "", _short(self.train_flops), "")
        peer = (v32.name, "", "", _short(v32.flops), _short(v32.cache))
        shares = (f"{total.flops / v32.flops:.1%}", f"{total.cache / v32.cache:.1%}")
        ratio = ("ratio to it", "", "", *shares)
        share = f"{_short(self.gqa8.cache)} ({total.cache / self.gqa8.cache:.1%})"
        grouped = (self.gqa8.name, "", "", "", share)
        return [head, *body, training, peer, ratio, grouped]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for --json."""
        plain = dataclasses.asdict(self)
        plain["parts"] = [part._asdict() for part in self.parts]
        for name in ("total", "mtp", "v32", "gqa8"):
            plain[name] = getattr(self, name)._asdict()
        return plain


def cost(cfg: ModelConfig, context: int | None = None) -> Cost:
    """The cost of `cfg` for a sequence of `context` tokens (default: the longest that it allows).

    Raises:
      ValueError: a context outside [1, max_position_embeddings].
    """
    limit = cfg.max_position_embeddings
    context = limit if context is None else context
    if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= limit:
        raise ValueError(
            f"context: got {context!r}; must be an integer in [1, max_position_embeddings={limit}]"
        )
    last = np.array([context])
    return Cost(
        context=context,
        parts=_main_parts(cfg, last),
        mtp=_mtp(cfg, last),
        buffers=_buffers(cfg),
        train_flops=train_flops_per_token(cfg, context),
        v32=deepseek_v32(context),
        gqa8=gqa8(cfg, context),
    )


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of a training step per token: three times forward, since backward is twice forward.

    MTP is included. A row counts as one document of `seq_len` tokens; shorter packed documents cost
    a little less, because their tokens see fewer others. Rematerialised work is not counted.
    """
    lengths = np.arange(1, seq_len + 1)
    return 3 * (total_of("", _main_parts(cfg, lengths)).flops + _mtp(cfg, lengths).flops)


def deepseek_v32(context: int) -> Part:
    """DeepSeek-V3.2 for the token after `context` tokens, by the numbers of its config.json.

    Attention is in its latent form.

    Cache (docs/equations.md#cost): 512 fp8 + 16 bytes of scales + 64 bf16, and an indexer key of
    128 fp8 + 4 bytes.
    """
    layers, dense, hidden, heads = 61, 3, 7168, 128
    latent, rope, q_rank, index_heads = 512, 64, 1536, 64
    attention = hidden * (q_rank + latent + rope) + q_rank * heads * (128 + rope)
    attention += heads * (latent * (128 + 128) + 128 * hidden)
    indexer = q_rank * index_heads * 128 + hidden * (128 + index_heads)
    routed = 9 * 3 * hidden * 2048 + hidden * 256  # 8 experts and the shared one; gate
    matrices = (
        layers * (attention + indexer)
        + dense * 3 * hidden * 18432
        + (layers - dense) * routed
        + hidden * 129280
    )
    scores = (
        2 * heads * (2 * latent + rope) * min(context, 2048) + 2 * index_heads * (128 + 1) * context
    )
    cache = layers * context * (512 + 16 + 2 * 64 + 128 + 4)
    return Part("DeepSeek-V3.2", flops=2 * matrices + layers * scores, cache=cache)


def gqa8(cfg: ModelConfig, context: int) -> Part:
    """The cache that the report compares with: bf16, with 8 key/value heads of 128 dims a layer."""
    return Part("bf16 GQA-8", cache=cfg.num_hidden_layers * context * 2 * 8 * 128 * 2)


# ---- parts ---------------------------------------------------------------------------------------
# `lengths` holds one number for each token counted: the tokens up to and including it. FLOPs are
# averaged over it; the cache is that of the last.


def _buffers(cfg: ModelConfig) -> int:
    """Numbers that the routers keep."""
    kinds = [*cfg.layer_kinds, *[MTP_KIND] * cfg.num_nextn_predict_layers]
    specs = [spec for kind in kinds for spec in layer_specs(kind) if spec.optimizer is None]
    return sum(math.prod(spec.size(cfg)) for spec in specs)


def _main_parts(cfg: ModelConfig, lengths: np.ndarray) -> tuple[Part, ...]:
    """The main model's parts, each summed over layers."""
    parts = [_weight(cfg, spec) for spec in single_specs(cfg) if spec.where == "model"]
    for kind, layers in collections.Counter(cfg.layer_kinds).items():
        parts += [times(part, layers) for part in _layer(cfg, kind, lengths)]
    parts.append(_last_collapse(cfg))
    order = [name for name in NAMES.values() if name != "attention"]
    ratios = dict.fromkeys((*_KIND_NAMES, *sorted(set(cfg.compress_ratios))))
    order[1:1] = [_attention(ratio) for ratio in ratios]
    by_name = {name: [part for part in parts if part.name == name] for name in order}
    return tuple(total_of(name, same) for name, same in by_name.items() if same)


def _mtp(cfg: ModelConfig, lengths: np.ndarray) -> Part:
    """The MTP module. h_proj runs once per stream, and the shared head runs once more."""
    if not cfg.num_nextn_predict_layers:
        return Part("MTP")
    own = [_weight(cfg, spec) for spec in single_specs(cfg) if spec.where == "mtp"]
    head = Part("head", flops=2 * cfg.hidden_size * cfg.vocab_size)
    return total_of("MTP", [*_layer(cfg, MTP_KIND, lengths), *own, _last_collapse(cfg), head])


def _layer(cfg: ModelConfig, kind: LayerKind, lengths: np.ndarray) -> list[Part]:
    """One layer: its weights, and what it does beside their products."""
    ratio = kind.compress_ratio
    weights = [spec for spec in layer_specs(kind) if spec.optimizer is not None]
    parts = [_weight(cfg, spec, ratio) for spec in weights]
    parts += [_scores(cfg, ratio, lengths), _mixing(cfg), _mixing(cfg)]
    if ratio != WINDOW_ONLY:
        parts.append(_pooling("compressors", ratio, cfg.head_dim))
    if ratio == CSA:
        parts += [_index_scores(cfg, lengths), _pooling("indexers", CSA, cfg.index_head_dim)]
    return parts


def _weight(cfg: ModelConfig, spec: ParamSpec, ratio: int = WINDOW_ONLY) -> Part:
    """One parameter, in a layer that compresses by `ratio`, and the products with it."""
    size = math.prod(spec.size(cfg, ratio))
    used = round(size * sizes(cfg)[spec.uses])
    active = {"embed": 0, "experts": used}.get(spec.part, size)
    name = "norms" if spec.is_norm else NAMES[spec.part]
    if name == "attention":
        name = _attention(ratio)
    return Part(name, size, active, 2 * used)


def _scores(cfg: ModelConfig, ratio: int, lengths: np.ndarray) -> Part:
    """Attention: 4 N H FLOPs for each window token and entry that a query uses."""
    window = np.minimum(lengths, cfg.sliding_window)
    entries = lengths // ratio if ratio else 0 * lengths
    used = np.minimum(entries, cfg.index_topk) if ratio == CSA else entries
    # An entry has fp8 numbers, a scale byte per 64 of them, and rope dims in bf16
    # (docs/equations.md#low-precision).
    plain = cfg.head_dim - cfg.qk_rope_head_dim
    cache = int(window[-1] + entries[-1]) * (plain + -(-plain // 64) + 2 * cfg.qk_rope_head_dim)
    flops = 4 * cfg.num_attention_heads * cfg.head_dim * float(np.mean(window + used))
    return Part(_attention(ratio), flops=flops, cache=cache)


def _attention(ratio: int) -> str:
    return f"attention {_KIND_NAMES.get(ratio, f'1/{ratio}')}"


def _pooling(name: str, ratio: int, dim: int) -> Part:
    """The float32 state (c and z) that the next entry pools."""
    overlap = 2 if ratio == CSA else 1
    return Part(name, cache=4 * 2 * (overlap * ratio) * (overlap * dim))


def _index_scores(cfg: ModelConfig, lengths: np.ndarray) -> Part:
    """I weighted dot products for each of S/4 entries."""
    heads, dim, entries = cfg.index_n_heads, cfg.index_head_dim, lengths // CSA
    # A key has fp4 numbers and a scale byte per 32 of them (docs/equations.md#low-precision).
    key_bytes = -(-dim // 2) + -(-dim // 32)
    flops = 2 * heads * (dim + 1) * float(np.mean(entries))
    return Part("indexers", flops=flops, cache=int(entries[-1]) * key_bytes)


def _mixing(cfg: ModelConfig) -> Part:
    """mHC at one site: the collapse, and the mixed and expanded streams."""
    streams = cfg.hc_mult
    return Part("mHC", flops=2 * streams * cfg.hidden_size * (1 + streams + 1))


def _last_collapse(cfg: ModelConfig) -> Part:
    return Part("mHC", flops=2 * cfg.hc_mult * cfg.hidden_size)


def _row(part: Part) -> tuple[str, ...]:
    return (part.name, *(_short(value) if value else "" for value in part[1:]))


def _short(value: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"
