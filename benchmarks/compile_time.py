"""Time to trace and compile a train step at 7, 23 and 43 layers.

    python benchmarks/compile_time.py

The first 3 layers are hash-routed; pairs of HCA and CSA follow, as in V4-Flash. Bar: 43 layers take
at most 1.3 times as long as 7, because pairs are scanned.
"""

import functools
import time

import jax

from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.functional import init_params
from v4jax.train.config import TrainConfig
from v4jax.train.step import state_from, train_step


def config(layers: int) -> TrainConfig:
    ratios = (0, 0, 4) + (128, 4) * ((layers - 3) // 2) + (0,)
    model = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        compress_ratios=ratios,
        sliding_window=32,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=32,
        compress_rope_theta=160000.0,
    )
    return TrainConfig(
        model=model,
        run_dir="unused",
        steps=10,
        batch_size=2,
        seq_len=256,
        learning_rate=1e-3,
        warmup_steps=1,
        remat="layer",
    )


def seconds(layers: int) -> tuple[float, float]:
    """Seconds to trace and lower the whole step, and to compile it."""
    cfg = config(layers)
    state = jax.eval_shape(lambda: state_from(cfg, init_params(cfg.model, jax.random.key(0))))
    batch = {"tokens": jax.ShapeDtypeStruct((cfg.batch_size, cfg.seq_len), "int32")}
    start = time.perf_counter()
    lowered = jax.jit(functools.partial(train_step, cfg, AxisRules()), donate_argnums=0).lower(
        state, batch
    )
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main():
    seconds(5)  # the first call in a process is slower
    totals = {}
    print("layers   trace  compile   ratio to 7")
    for layers in (7, 23, 43):
        jax.clear_caches()
        trace, compiling = seconds(layers)
        totals[layers] = trace + compiling
        print(
            f"{layers:6d} {trace:6.1f}s {compiling:7.1f}s   {totals[layers] / totals[7]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
