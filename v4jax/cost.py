"""What a model costs, from its configuration: parameters, FLOPs per token and KV bytes, by part.

The report's own numbers show how it counts. 284B and 1.6T are the main model with embedding and
head, without MTP (with MTP, Flash would be 291B). 13B and 49B count the head but not the embedding,
which is a lookup and no product (with the embedding they would be 14B and 50B; without the head,
Pro would be 48B).

FLOPs are two per multiplication of a matrix product: of weights, of attention and indexer scores
over the entries that a query really uses (docs/equations.md#trap-46), and of the mixing of residual
streams. Norms, rotary embedding, softmax, Sinkhorn and pooling are left out.

Axes: D hidden, N heads, H head dim, G output groups, O output rank, I index heads, S positions of
the sequence.

Next file to read: v4jax/checkpoint/names.py.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig

_KIND_NAMES = {WINDOW_ONLY: "SWA", CSA: "CSA", HCA: "HCA"}
_ORDER = (
    *(
        "embedding",
        "attention SWA",
        "attention CSA",
        "attention HCA",
        "compressors",
        "indexers",
        "gates",
    ),
    *("routed experts", "shared experts", "mHC", "norms", "head"),
)


class Part(NamedTuple):
    """The cost of one part of the model.

    Attributes:
      parameters: all of its parameters.
      active: those that one token uses.
      flops: forward FLOPs of one token.
      cache: bytes that the KV cache of one sequence holds.
    """

    name: str
    parameters: int = 0
    active: int = 0
    flops: float = 0
    cache: int = 0


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
        return _sum("total", self.parts)

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people: header, a row per part, the total, and models to compare with."""
        total, v32 = self.total, self.v32
        head = ("part", "parameters", "active", "FLOPs/token", "KV bytes")
        body = [_row(part) for part in (*self.parts, total, self.mtp)]
        training = ("training, mean", "", "", _short(self.train_flops), "")
        peer = (v32.name, "", "", _short(v32.flops), _short(v32.cache))
        ratio = (
            "ratio to it",
            "",
            "",
            f"{total.flops / v32.flops:.1%}",
            f"{total.cache / v32.cache:.1%}",
        )
        grouped = (
            self.gqa8.name,
            "",
            "",
            "",
            f"{_short(self.gqa8.cache)} ({total.cache / self.gqa8.cache:.1%})",
        )
        return [head, *body, training, peer, ratio, grouped]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for --json."""
        plain = dataclasses.asdict(self)
        plain["parts"] = [part._asdict() for part in self.parts]
        plain |= {
            "total": self.total._asdict(),
            "mtp": self.mtp._asdict(),
            "v32": self.v32._asdict(),
        }
        plain["gqa8"] = self.gqa8._asdict()
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
    scored = cfg.num_hidden_layers - cfg.num_hash_layers + cfg.num_nextn_predict_layers
    return Cost(
        context=context,
        parts=_main_parts(cfg, last),
        mtp=_mtp(cfg, last),
        buffers=scored * cfg.n_routed_experts
        + cfg.num_hash_layers * cfg.vocab_size * cfg.num_experts_per_tok,
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
    return 3 * (_sum("", _main_parts(cfg, lengths)).flops + _mtp(cfg, lengths).flops)


def deepseek_v32(context: int) -> Part:
    """DeepSeek-V3.2 for the token after `context` tokens, by the numbers of its config.json.

    Attention is in its latent form.

    Cache (docs/equations.md#cost): 512 fp8 + 16 bytes of scales + 64 bf16, and an indexer key of
    128 fp8 + 4 bytes.
    """
    layers, dense, hidden, heads, latent, rope, q_rank, index_heads = (
        61,
        3,
        7168,
        128,
        512,
        64,
        1536,
        64,
    )
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


def _main_parts(cfg: ModelConfig, lengths: np.ndarray) -> tuple[Part, ...]:
    """The main model's parts, each summed over layers."""
    vocabulary = cfg.vocab_size * cfg.hidden_size
    parts = [Part("embedding", vocabulary)]
    for ratio, layers in collections.Counter(cfg.compress_ratios[: cfg.num_hidden_layers]).items():
        parts += [_times(part, layers) for part in _block(cfg, ratio, lengths)]
    parts += [
        _hyper_head(cfg),
        _weights("norms", cfg.hidden_size, products=False),
        _weights("head", vocabulary),
    ]
    by_name: dict[str, list[Part]] = {name: [] for name in _ORDER}
    for part in parts:
        by_name[part.name].append(part)
    return tuple(_sum(name, same) for name, same in by_name.items() if same)


def _mtp(cfg: ModelConfig, lengths: np.ndarray) -> Part:
    """The MTP module. h_proj runs once per stream, and the shared head runs once more."""
    if not cfg.num_nextn_predict_layers:
        return Part("MTP")
    hidden, streams = cfg.hidden_size, cfg.hc_mult
    projections = Part("", 2 * hidden**2, 2 * hidden**2, 2 * (1 + streams) * hidden**2)
    norms = _weights("", 3 * hidden, products=False)
    head = Part("", flops=2 * hidden * cfg.vocab_size)
    return _sum(
        "MTP", [*_block(cfg, WINDOW_ONLY, lengths), _hyper_head(cfg), projections, norms, head]
    )


def _block(cfg: ModelConfig, ratio: int, lengths: np.ndarray) -> list[Part]:
    """One layer whose attention compresses by `ratio`."""
    hidden, expert = cfg.hidden_size, 3 * cfg.hidden_size * cfg.moe_intermediate_size
    norms = 2 * hidden + cfg.q_lora_rank + cfg.head_dim
    norms += (cfg.head_dim if ratio else 0) + (cfg.index_head_dim if ratio == CSA else 0)
    active = cfg.num_experts_per_tok * expert
    return [
        _attention(cfg, ratio, lengths),
        *([_compressor(cfg, "compressors", ratio, cfg.head_dim)] if ratio else []),
        *([_indexer(cfg, lengths)] if ratio == CSA else []),
        _weights("gates", hidden * cfg.n_routed_experts),
        Part("routed experts", cfg.n_routed_experts * expert, active, 2 * active),
        _weights("shared experts", expert),
        *[_hyper(cfg)] * 2,
        _weights("norms", norms, products=False),
    ]


def _attention(cfg: ModelConfig, ratio: int, lengths: np.ndarray) -> Part:
    """Projections, sinks, and 4 N H FLOPs for each window token and entry that a query uses."""
    wide = cfg.num_attention_heads * cfg.head_dim
    matrices = cfg.hidden_size * (cfg.q_lora_rank + cfg.head_dim) + cfg.q_lora_rank * wide
    # wo_a is block diagonal: G matrices of O x (N/G)H.
    matrices += cfg.o_lora_rank * (wide + cfg.o_groups * cfg.hidden_size)
    window, entries = (
        np.minimum(lengths, cfg.sliding_window),
        lengths // ratio if ratio else 0 * lengths,
    )
    used = np.minimum(entries, cfg.index_topk) if ratio == CSA else entries
    # An entry has fp8 numbers, a scale byte per 64 of them, and rope dims in bf16
    # (docs/equations.md#low-precision).
    plain = cfg.head_dim - cfg.qk_rope_head_dim
    cache = int(window[-1] + entries[-1]) * (plain + -(-plain // 64) + 2 * cfg.qk_rope_head_dim)
    parameters = matrices + cfg.num_attention_heads
    flops = 2 * matrices + 4 * wide * float(np.mean(window + used))
    return Part(f"attention {_KIND_NAMES[ratio]}", parameters, parameters, flops, cache)


def _compressor(cfg: ModelConfig, name: str, ratio: int, dim: int) -> Part:
    """wkv, wgate and ape. The cache is the float32 state (c and z) that the next entry pools."""
    overlap = 2 if ratio == CSA else 1
    matrices = 2 * cfg.hidden_size * overlap * dim
    parameters = matrices + ratio * overlap * dim
    return Part(
        name, parameters, parameters, 2 * matrices, 4 * 2 * (overlap * ratio) * (overlap * dim)
    )


def _indexer(cfg: ModelConfig, lengths: np.ndarray) -> Part:
    """Projections of queries and weights, a compressor, and I weighted dot products per entry.

    There are S/4 entries.
    """
    heads, dim, entries = cfg.index_n_heads, cfg.index_head_dim, lengths // CSA
    queries = _weights("", heads * (cfg.q_lora_rank * dim + cfg.hidden_size))
    # A key has fp4 numbers and a scale byte per 32 of them (docs/equations.md#low-precision).
    key_bytes = -(-dim // 2) + -(-dim // 32)
    scores = Part(
        "",
        flops=2 * heads * (dim + 1) * float(np.mean(entries)),
        cache=int(entries[-1]) * key_bytes,
    )
    return _sum("indexers", [queries, scores, _compressor(cfg, "", CSA, dim)])


def _hyper(cfg: ModelConfig) -> Part:
    """mHC at one site: mixing coefficients, collapse, and the mixed and expanded streams."""
    streams, hidden = cfg.hc_mult, cfg.hidden_size
    outputs = (2 + streams) * streams
    parameters = outputs * (streams * hidden + 1) + 3
    return Part("mHC", parameters, parameters, 2 * streams * hidden * (outputs + 1 + streams + 1))


def _hyper_head(cfg: ModelConfig) -> Part:
    """The last collapse of the streams."""
    streams, hidden = cfg.hc_mult, cfg.hidden_size
    parameters = streams * (streams * hidden + 1) + 1
    return Part("mHC", parameters, parameters, 2 * streams * hidden * (streams + 1))


def _weights(name: str, count: int, products: bool = True) -> Part:
    """Weights that every token uses: multiplied once each, or in no product (norms)."""
    return Part(name, count, count, 2 * count if products else 0)


def _sum(name: str, parts: Iterable[Part]) -> Part:
    return Part(name, *map(sum, zip(*(part[1:] for part in parts), strict=True)))


def _times(part: Part, layers: int) -> Part:
    return Part(part.name, *(layers * value for value in part[1:]))


def _row(part: Part) -> tuple[str, ...]:
    return (part.name, *(_short(value) if value else "" for value in part[1:]))


def _short(value: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"
