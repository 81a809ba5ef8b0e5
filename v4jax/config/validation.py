"""Checks a ModelConfig: each value by itself, layers, and sizes that must divide each other.

A `cfg` here is a ModelConfig, whose file (v4jax/config/model.py) imports this one. Every check
raises a ValueError that names the field, the value and the rule.

Next file to read: v4jax/config/rope.py.
"""

from typing import Any, TypeGuard

from v4jax.config.layers import CSA, is_ratio

_SIZES = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "sliding_window",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
]
_AT_MOST = {
    "num_hidden_layers": 1000,
    "n_routed_experts": 16384,
    "hc_mult": 64,
    "hc_sinkhorn_iters": 1000,
    "max_position_embeddings": 2**31,
}
"""Largest values; larger ones can only be mistakes, and would keep a reader busy without end.
Other sizes: `_LARGEST_SIZE`."""
_LARGEST_SIZE = 2**24
_ABSURD = 1e30
_LEAST_EPS = 1e-24
"""The gradient of a norm's rsqrt at a vector of zeros is eps^-1.5, which float32 must hold."""
_INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_topk")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number of sane size, and no bool."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -_ABSURD < value < _ABSURD
    )


def is_token(value: Any, vocab_size: int) -> bool:
    """Whether `value` is a token id: an integer in [0, vocab_size), and no bool."""
    return type(value) is int and 0 <= value < vocab_size


def check(cfg) -> None:
    """Raises a ValueError unless `cfg` is a V4 that this code can build."""
    _check_sizes(cfg)
    _check_tokens(cfg)
    _check_layers(cfg)
    _check_divisions(cfg)


def _check_sizes(cfg) -> None:
    for name in _SIZES + list(_INDEX_SIZES if CSA in cfg.compress_ratios else ()):
        value = getattr(cfg, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}; must be a positive integer")
        if value > (most := _AT_MOST.get(name, _LARGEST_SIZE)):
            raise ValueError(f"{name}: got {str(value)[:40]}; must be at most {most}")
    for name in (
        "routed_scaling_factor",
        "hc_eps",
        "rms_norm_eps",
        "swiglu_limit",
        "rope_theta",
        "initializer_range",
    ):
        value = getattr(cfg, name)
        if not is_number(value) or not value > 0:
            raise ValueError(f"{name}: got {value!r}; must be a number above 0")
    for name in ("hc_eps", "rms_norm_eps"):
        if getattr(cfg, name) < _LEAST_EPS:
            raise ValueError(f"{name}: got {getattr(cfg, name)!r}; must be at least {_LEAST_EPS}")
    if type(cfg.num_nextn_predict_layers) is not int or cfg.num_nextn_predict_layers not in (0, 1):
        raise ValueError(
            f"num_nextn_predict_layers: got {cfg.num_nextn_predict_layers!r}; allowed: 0 or 1"
        )


def _check_tokens(cfg) -> None:
    ids = [("eos_token_id", token) for token in cfg.eos_token_ids]
    if cfg.bos_token_id is not None:
        ids.append(("bos_token_id", cfg.bos_token_id))
    for name, value in ids:
        if not is_token(value, cfg.vocab_size):
            raise ValueError(f"{name}: got {value!r}; must be in [0, vocab_size={cfg.vocab_size})")


def _check_layers(cfg) -> None:
    expected = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    if len(cfg.compress_ratios) != expected:
        raise ValueError(
            f"compress_ratios: got {len(cfg.compress_ratios)} entries; must be {expected} "
            f"(num_hidden_layers {cfg.num_hidden_layers} + num_nextn_predict_layers "
            f"{cfg.num_nextn_predict_layers})"
        )
    odd = [ratio for ratio in cfg.compress_ratios if not is_ratio(ratio)]
    if odd:
        raise ValueError(
            f"compress_ratios: got {odd[0]!r}; allowed: 0 (window only), 4 (CSA), 128 (HCA), and "
            "the other divisors of 128 from 2 on, which pool as HCA does"
        )
    if any(cfg.compress_ratios[cfg.num_hidden_layers :]):
        raise ValueError(
            f"compress_ratios: the MTP entry is {cfg.compress_ratios[-1]}; the MTP layer allows "
            "only 0"
        )
    if (
        type(cfg.num_hash_layers) is not int
        or not 0 <= cfg.num_hash_layers <= cfg.num_hidden_layers
    ):
        raise ValueError(
            f"num_hash_layers: got {cfg.num_hash_layers!r}; must be in [0, "
            f"num_hidden_layers={cfg.num_hidden_layers}]"
        )
    if any(cfg.compress_ratios) and not (
        is_number(cfg.compress_rope_theta) and cfg.compress_rope_theta > 0
    ):
        # Published code and config.json disagree on its default, so any guess would be wrong for
        # some checkpoint (docs/equations.md#trap-6).
        raise ValueError(
            f"compress_rope_theta: got {cfg.compress_rope_theta!r}; a model with compressed layers "
            "must state it (160000 in the released checkpoints)"
        )


def _check_divisions(cfg) -> None:
    if cfg.num_attention_heads % cfg.o_groups:
        raise ValueError(
            f"o_groups: got {cfg.o_groups}; must divide "
            f"num_attention_heads={cfg.num_attention_heads}"
        )
    if cfg.qk_rope_head_dim % 2:
        raise ValueError(
            f"qk_rope_head_dim: got {cfg.qk_rope_head_dim}; must be even (rotary pairs)"
        )
    if cfg.qk_rope_head_dim > cfg.head_dim:
        raise ValueError(
            f"qk_rope_head_dim: got {cfg.qk_rope_head_dim}; must be at most head_dim={cfg.head_dim}"
        )
    if CSA in cfg.compress_ratios and cfg.qk_rope_head_dim > cfg.index_head_dim:
        raise ValueError(
            f"index_head_dim: got {cfg.index_head_dim}; must be at least "
            f"qk_rope_head_dim={cfg.qk_rope_head_dim}"
        )
    if cfg.num_experts_per_tok > cfg.n_routed_experts:
        raise ValueError(
            f"num_experts_per_tok: got {cfg.num_experts_per_tok}; must be at most n_routed_experts="
            f"{cfg.n_routed_experts}"
        )
