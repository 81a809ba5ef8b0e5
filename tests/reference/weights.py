"""Random weights under official names, at the scale of trained ones.

Small random models pass where real weights fail (trap 45): norms around 1, sinks, biases, `ape`,
mHC base and scale away from 0, gates that tell experts apart, expert inputs that reach the clamp.

Legend: as in transformer.py.
"""

import numpy as np

from v4jax.config import CSA, WINDOW_ONLY, ModelConfig


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every official tensor, matrices [out, in] (docs/equations.md#checkpoint-names)."""
    d, v = cfg.hidden_size, cfg.vocab_size
    result = {"embed.weight": (v, d), "head.weight": (v, d), "norm.weight": (d,)} | _hc_head_shapes(
        cfg, ""
    )
    for number, kind in enumerate(cfg.layer_kinds):
        result |= _block_shapes(cfg, f"layers.{number}", *kind)
    if cfg.num_nextn_predict_layers:
        result |= {f"mtp.0.{name}.weight": (d, d) for name in ("e_proj", "h_proj")}
        result |= {f"mtp.0.{name}.weight": (d,) for name in ("enorm", "hnorm", "norm")}
        result |= _hc_head_shapes(cfg, "mtp.0.") | _block_shapes(cfg, "mtp.0", WINDOW_ONLY, False)
    return result


def _hc_head_shapes(cfg, prefix):
    n = cfg.hc_mult
    return {
        f"{prefix}hc_head_fn": (n, n * cfg.hidden_size),
        f"{prefix}hc_head_base": (n,),
        f"{prefix}hc_head_scale": (1,),
    }


def _block_shapes(cfg, name, compress_ratio, hash_routed):
    d, h, n, f = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.moe_intermediate_size
    mixes = (2 + cfg.hc_mult) * cfg.hc_mult
    result = {f"{name}.attn_norm.weight": (d,), f"{name}.ffn_norm.weight": (d,)}
    for site in ("hc_attn", "hc_ffn"):
        result |= {f"{name}.{site}_fn": (mixes, cfg.hc_mult * d), f"{name}.{site}_base": (mixes,)}
        result |= {f"{name}.{site}_scale": (3,)}
    result |= {
        f"{name}.attn.attn_sink": (n,),
        f"{name}.attn.wq_a.weight": (cfg.q_lora_rank, d),
        f"{name}.attn.q_norm.weight": (cfg.q_lora_rank,),
        f"{name}.attn.wq_b.weight": (n * h, cfg.q_lora_rank),
        f"{name}.attn.wkv.weight": (h, d),
        f"{name}.attn.kv_norm.weight": (h,),
        f"{name}.attn.wo_a.weight": (cfg.o_groups * cfg.o_lora_rank, n * h // cfg.o_groups),
        f"{name}.attn.wo_b.weight": (d, cfg.o_groups * cfg.o_lora_rank),
        f"{name}.ffn.gate.weight": (cfg.n_routed_experts, d),
    }
    if compress_ratio != WINDOW_ONLY:
        result |= _compressor_shapes(f"{name}.attn.compressor", compress_ratio, d, h)
    if compress_ratio == CSA:
        heads, dim = cfg.index_n_heads, cfg.index_head_dim
        result[f"{name}.attn.indexer.wq_b.weight"] = (heads * dim, cfg.q_lora_rank)
        result[f"{name}.attn.indexer.weights_proj.weight"] = (heads, d)
        result |= _compressor_shapes(f"{name}.attn.indexer.compressor", CSA, d, dim)
    if hash_routed:
        result[f"{name}.ffn.gate.tid2eid"] = (cfg.vocab_size, cfg.num_experts_per_tok)
    else:
        result[f"{name}.ffn.gate.bias"] = (cfg.n_routed_experts,)
    for expert in [f"experts.{e}" for e in range(cfg.n_routed_experts)] + ["shared_experts"]:
        result |= {f"{name}.ffn.{expert}.{w}.weight": (f, d) for w in ("w1", "w3")}
        result[f"{name}.ffn.{expert}.w2.weight"] = (d, f)
    return result


def _compressor_shapes(name, compress_ratio, hidden, width):
    channels = 2 * width if compress_ratio == CSA else width
    result = {f"{name}.{w}.weight": (channels, hidden) for w in ("wkv", "wgate")}
    return result | {f"{name}.ape": (compress_ratio, channels), f"{name}.norm.weight": (width,)}


def random_weights(cfg: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """float32 arrays with activations of unit scale.

    tid2eid is int64, with k distinct experts per token.
    """
    rng = np.random.default_rng(seed)
    return {name: _random(cfg, rng, name, shape) for name, shape in shapes(cfg).items()}


def _random(cfg, rng, name, shape):
    if name.endswith("tid2eid"):
        rows = [rng.permutation(cfg.n_routed_experts)[: shape[1]] for _ in range(shape[0])]
        return np.array(rows, dtype=np.int64)
    normal = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        value = 1 + 0.2 * normal
    elif name.endswith("_scale"):
        value = rng.uniform(0.3, 0.9, shape)
    elif name.endswith("gate.bias"):
        value = 0.3 * normal
    elif name.endswith(("_base", "attn_sink", "ape")) or name == "embed.weight":
        value = normal
    else:
        gain = {"w1": 4.0, "w3": 4.0, "w2": 0.1, "gate": 2.0}.get(name.split(".")[-2:][0], 1.0)
        value = gain * normal / np.sqrt(shape[-1])
    return value.astype(np.float32)
