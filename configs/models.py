"""The released DeepSeek-V4 architectures, and two smaller ones of the same shape.

Of the newer releases it is the trunk, without their drafter. The numbers of the released ones are
in docs/equations.md#sizes. The smaller ones are ours: every mechanism, the vocabulary and the
constants of the released models, fewer and narrower layers.

Command: v4jax cost configs/flash.py
Expected result: Flash has 284B parameters and 13B active; Pro has 1.6T and 49B. The model of
    configs/v5e_8.py has 1.7B and 0.33B, that of configs/gpu_node.py 4.5B and 0.78B. MTP layers come
    on top.
Next file to read: v4jax/config/model.py.
"""

from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig, RopeScaling

_ALL = dict(
    vocab_size=129280,
    qk_rope_head_dim=64,
    num_experts_per_tok=6,
    num_hash_layers=3,
    num_nextn_predict_layers=1,
    sliding_window=128,
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
_RELEASED = _ALL | dict(head_dim=512, o_lora_rank=1024, index_n_heads=64)
_SMALL = _ALL | dict(
    head_dim=128, num_attention_heads=16, o_groups=4, n_routed_experts=64, routed_scaling_factor=1.5
)


def flash() -> ModelConfig:
    """DeepSeek-V4-Flash: 43 layers, 284B parameters, 13B active."""
    return ModelConfig(
        **_RELEASED,
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


def flash_0731() -> ModelConfig:
    """The trunk of DeepSeek-V4-Flash-0731 and Flash-DSpark: Flash without the MTP module."""
    return _trunk(flash())


def flash_vision_exp() -> ModelConfig:
    """The trunk of DeepSeek-V4-Flash-Vision-Exp, for text."""
    return _trunk(flash()).replace(rms_norm_eps=1e-20)


def pro_0813() -> ModelConfig:
    """The trunk of DeepSeek-V4-Pro-0813 and Pro-DSpark, as far as is known: Pro without MTP."""
    return _trunk(pro())


def _trunk(cfg: ModelConfig) -> ModelConfig:
    ratios = cfg.compress_ratios[: cfg.num_hidden_layers]
    return cfg.replace(num_nextn_predict_layers=0, compress_ratios=ratios)


def pro() -> ModelConfig:
    """DeepSeek-V4-Pro: 61 layers, 1.6T parameters, 49B active."""
    return ModelConfig(
        **_RELEASED,
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


def small() -> ModelConfig:
    """13 layers, 1.7B parameters, 0.33B active, for configs/v5e_8.py."""
    return ModelConfig(
        **_SMALL,
        num_hidden_layers=13,
        hidden_size=1024,
        q_lora_rank=512,
        o_lora_rank=256,
        moe_intermediate_size=512,
        index_n_heads=8,
        index_topk=256,
        compress_ratios=(WINDOW_ONLY,) * 2 + (CSA, HCA) * 5 + (CSA, WINDOW_ONLY),
    )


def medium() -> ModelConfig:
    """17 layers, 4.5B parameters, 0.78B active, for configs/gpu_node.py."""
    return ModelConfig(
        **_SMALL,
        num_hidden_layers=17,
        hidden_size=1536,
        q_lora_rank=768,
        o_lora_rank=512,
        moe_intermediate_size=768,
        index_n_heads=16,
        index_topk=512,
        compress_ratios=(WINDOW_ONLY,) * 2 + (CSA, HCA) * 7 + (CSA, WINDOW_ONLY),
    )
