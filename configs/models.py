"""The two released DeepSeek-V4 architectures, with every number from docs/equations.md#sizes.

Command: v4jax cost configs/flash.py
Expected result: Flash has 284B parameters and 13B active; Pro has 1.6T and 49B.
Next file to read: v4jax/config/model.py.
"""

from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig, RopeScaling

_BOTH = dict(
    vocab_size=129280,
    head_dim=512,
    qk_rope_head_dim=64,
    o_lora_rank=1024,
    num_experts_per_tok=6,
    num_hash_layers=3,
    num_nextn_predict_layers=1,
    sliding_window=128,
    index_n_heads=64,
    index_head_dim=128,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    swiglu_limit=10.0,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(
        factor=16.0, original_max_position_embeddings=65536, beta_fast=32.0, beta_slow=1.0
    ),
    max_position_embeddings=1048576,
    bos_token_id=0,
    eos_token_id=1,
)


def flash() -> ModelConfig:
    """DeepSeek-V4-Flash: 43 layers, 284B parameters, 13B active."""
    return ModelConfig(
        **_BOTH,
        num_hidden_layers=43,
        hidden_size=4096,
        num_attention_heads=64,
        q_lora_rank=1024,
        o_groups=8,
        n_routed_experts=256,
        moe_intermediate_size=2048,
        routed_scaling_factor=1.5,
        index_topk=512,
        compress_ratios=(WINDOW_ONLY,) * 2 + (CSA, HCA) * 20 + (CSA, WINDOW_ONLY),
    )


def pro() -> ModelConfig:
    """DeepSeek-V4-Pro: 61 layers, 1.6T parameters, 49B active."""
    return ModelConfig(
        **_BOTH,
        num_hidden_layers=61,
        hidden_size=7168,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
        index_topk=1024,
        compress_ratios=(HCA,) * 2 + (CSA, HCA) * 29 + (CSA, WINDOW_ONLY),
    )
