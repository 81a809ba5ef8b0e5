"""Small models for tests: a configuration, and random parameter trees, without the model's code."""

import jax
import numpy as np

from v4jax.config import CSA, WINDOW_ONLY, LayerKind, ModelConfig, RopeScaling


def small_config(**changes) -> ModelConfig:
    """Seven layers of Flash's pattern, with sizes that are no powers of two; change any field."""
    fields = dict(
        vocab_size=97,
        hidden_size=48,
        moe_intermediate_size=40,
        num_hidden_layers=7,
        num_attention_heads=6,
        head_dim=24,
        qk_rope_head_dim=8,
        q_lora_rank=20,
        o_groups=3,
        o_lora_rank=8,
        n_routed_experts=6,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 0),
        index_n_heads=4,
        index_head_dim=16,
        index_topk=4,
        sliding_window=8,
        compress_rope_theta=160000.0,
        rope_scaling=RopeScaling(),
    )
    return ModelConfig(**fields | changes)


def random_params(cfg: ModelConfig, seed: int = 0) -> dict:
    """A parameter tree of random float32 NumPy arrays.

    Norms are near 1, and hash tables have no repeats.
    """
    rng = np.random.default_rng(seed)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    hidden, streams = cfg.hidden_size, cfg.hc_mult
    params = {
        "embed": {"weight": random(cfg.vocab_size, hidden)},
        "head": {"weight": random(hidden, cfg.vocab_size)},
        "norm": {"weight": 1 + 0.1 * random(hidden)},
        "hc_head": _hyper(random, streams * hidden, streams, 1),
        "router": {},
    }
    for group in cfg.layer_groups:
        blocks = {
            f"block_{i}": _block(cfg, kind, random, (group.repeats,))
            for i, kind in enumerate(group.kinds)
        }
        params[group.name] = blocks
        params["router"][group.name] = {
            f"block_{i}": {"ffn": _router(cfg, kind, rng, (group.repeats,))}
            for i, kind in enumerate(group.kinds)
        }
    if cfg.num_nextn_predict_layers:
        kind = LayerKind(WINDOW_ONLY, hash_routed=False)
        params["mtp"] = {
            "e_proj": random(hidden, hidden),
            "h_proj": random(hidden, hidden),
            **{name: {"weight": 1 + 0.1 * random(hidden)} for name in ("enorm", "hnorm", "norm")},
            "hc_head": _hyper(random, streams * hidden, streams, 1),
            "block": _block(cfg, kind, random, ()),
        }
        params["router"]["mtp"] = {"block": {"ffn": _router(cfg, kind, rng, ())}}
    return params


def _hyper(random, width, outputs, scales, lead=()):
    return {
        "fn": random(*lead, width, outputs),
        "base": random(*lead, outputs),
        "scale": random(*lead, scales),
    }


def _block(cfg: ModelConfig, kind: LayerKind, random, lead):
    hidden, expert, experts = cfg.hidden_size, cfg.moe_intermediate_size, cfg.n_routed_experts
    heads, dim, rank, streams = cfg.num_attention_heads, cfg.head_dim, cfg.q_lora_rank, cfg.hc_mult

    def norm(size):
        return {"weight": 1 + 0.1 * random(*lead, size)}

    def compressor(ratio, size):
        wide = 2 * size if ratio == CSA else size
        weights = {"wkv": random(*lead, hidden, wide), "wgate": random(*lead, hidden, wide)}
        return weights | {"ape": random(*lead, ratio, wide), "norm": norm(size)}

    attention = {
        "attn_sink": random(*lead, heads),
        "wq_a": random(*lead, hidden, rank),
        "q_norm": norm(rank),
        "wq_b": random(*lead, rank, heads * dim),
        "wkv": random(*lead, hidden, dim),
        "kv_norm": norm(dim),
        "wo_a": random(*lead, heads // cfg.o_groups * dim, cfg.o_groups * cfg.o_lora_rank),
        "wo_b": random(*lead, cfg.o_groups * cfg.o_lora_rank, hidden),
    }
    if kind.compress_ratio != WINDOW_ONLY:
        attention["compressor"] = compressor(kind.compress_ratio, dim)
    if kind.compress_ratio == CSA:
        attention["indexer"] = {
            "wq_b": random(*lead, rank, cfg.index_n_heads * cfg.index_head_dim),
            "weights_proj": random(*lead, hidden, cfg.index_n_heads),
            "compressor": compressor(CSA, cfg.index_head_dim),
        }

    def swiglu(*lead):
        into = {name: random(*lead, hidden, expert) for name in ("w1", "w3")}
        return into | {"w2": random(*lead, expert, hidden)}

    return {
        "attn_norm": norm(hidden),
        "ffn_norm": norm(hidden),
        "hc_attn": _hyper(random, streams * hidden, (2 + streams) * streams, 3, lead),
        "hc_ffn": _hyper(random, streams * hidden, (2 + streams) * streams, 3, lead),
        "attn": attention,
        "ffn": {
            "gate": random(*lead, hidden, experts),
            "experts": swiglu(*lead, experts),
            "shared_experts": swiglu(*lead),
        },
    }


def _router(cfg: ModelConfig, kind: LayerKind, rng, lead):
    if not kind.hash_routed:
        return {"bias": rng.normal(size=(*lead, cfg.n_routed_experts)).astype(np.float32)}
    noise = rng.random((*lead, cfg.vocab_size, cfg.n_routed_experts))
    return {
        "tid2eid": np.argsort(noise, axis=-1)[..., : cfg.num_experts_per_tok].astype(np.float32)
    }


def close(got, expected, tolerance=2e-6):
    """The tolerance is that of sums of the same products in another order.

    It is relative to the largest number of an array, or to 1.
    """
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())))
