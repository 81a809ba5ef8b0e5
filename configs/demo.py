"""The demo: a small V4 with every mechanism on, trained on the Python standard library's sources.

Command: make demo (or: JAX_PLATFORMS=cpu v4jax train configs/demo.py)
Hardware: 2 CPU cores, 6 GB; 8 simulated devices as data=2, expert=2, tensor=2.
Time: 8 minutes on two free cores, installation included.
Expected result: a held-out loss below 2 nats per byte, where a unigram model has 3.2.
Next file to read: v4jax/model/transformer.py.
"""

from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig, RopeScaling
from v4jax.train.config import TrainConfig


def get_model() -> ModelConfig:
    """SWA and CSA layers with hash routing, then HCA and CSA with score routing, and MTP."""
    return ModelConfig(
        # 258 byte tokens and room for those of chat (configs/sft_demo.py), rounded up so that the
        # mesh divides it.
        vocab_size=280,
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        compress_ratios=(WINDOW_ONLY, WINDOW_ONLY, CSA, HCA, CSA, WINDOW_ONLY),
        num_hash_layers=3,
        sliding_window=32,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=32,
        compress_rope_theta=160000.0,
        rope_scaling=RopeScaling(),
    )


def get_config() -> TrainConfig:
    """120 steps of 8 rows of 384 bytes."""
    return TrainConfig(
        model=get_model(),
        run_dir="runs/demo",
        mesh="data=2,expert=2,tensor=2",
        steps=120,
        batch_size=8,
        seq_len=384,
        learning_rate=4e-3,
        warmup_steps=20,
        decay_steps=50,
        log_every=5,
        eval_every=30,
        eval_batches=4,
        checkpoint_every=40,
        remat="none",
        sample_prompt="def ",
        sample_tokens=200,
    )
