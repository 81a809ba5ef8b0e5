"""What a training step costs with one thing more, beside the plain step, in the same run.

    python benchmarks/overheads.py [--rounds N] [--no-remat]

All kinds of step (forward, backward, Muon) alternate, round by round, so that a noisy machine
disturbs all of them. The table shows medians, their ratio to the plain step, and the floor of that
ratio. The floor is the plain step as measured plus the least matmul work of the addition (2 x
active weights x tokens of one forward pass) at the measured matmul rate.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from sharding.mesh import make_mesh, parse_mesh, simulate_devices
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.train.anticipate import compile_choice
from v4jax.train.config import TrainConfig
from v4jax.train.report import matmul_rate
from v4jax.train.step import Steps, compile_step, init_state, state_shardings

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    moe_intermediate_size=256,
    num_hidden_layers=5,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=64,
    o_groups=4,
    o_lora_rank=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 0, 4, 128, 4, 0),
    num_hash_layers=2,
    sliding_window=32,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=16,
    compress_rope_theta=160000.0,
)
BATCH, SEQ = 8, 256


def routing_weights(params) -> float:
    """Weights that multiply a token up to the last expert index: no head, no experts of MTP."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        late = name.startswith("mtp") and ("experts" in name or "hc_head" in name)
        if not name.startswith(("embed", "head")) and not late:
            total += leaf.size * (
                MODEL.num_experts_per_tok / MODEL.n_routed_experts if "/experts/" in name else 1
            )
    return total


def kinds_of_step(cfg: TrainConfig):
    """Name -> (a function that does one step, the least FLOPs that it adds to the plain step)."""
    rules, mesh = AxisRules(), make_mesh(parse_mesh(""))
    jax.set_mesh(mesh)
    places = state_shardings(cfg, rules, mesh)
    take = Steps(lambda **kind: compile_step(cfg, rules, places, mesh, **kind))
    choose = compile_choice(cfg, rules, places, mesh)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (BATCH, SEQ)).astype(np.int32)
    batch = {"tokens": jax.device_put(tokens), "segment_ids": jax.device_put(np.ones_like(tokens))}
    held = [init_state(cfg, places)]

    def step(chosen=None, watch=False):
        held[0], metrics = take(held[0], batch, chosen, watch=watch)
        return jax.block_until_ready(metrics)

    return {
        "plain": (step, 0),
        "anticipatory routing (lag 1)": (
            lambda: step(choose(held[0].public, batch)),
            2 * routing_weights(held[0].params) * BATCH * SEQ,
        ),
        "look inside (at watch_every steps)": (lambda: step(watch=True), 0),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-remat", action="store_true", help="keep all activations")
    arguments = parser.parse_args()
    simulate_devices(1)  # as the command line does
    cfg = TrainConfig(
        model=MODEL,
        run_dir="unused",
        steps=1000,
        batch_size=BATCH,
        seq_len=SEQ,
        learning_rate=1e-4,
        warmup_steps=0,
        remat="none" if arguments.no_remat else "layer",
    )
    kinds = kinds_of_step(cfg)
    rate = matmul_rate(np.float32)
    times = {name: [] for name in kinds}
    for step, _ in kinds.values():
        step()
    for _ in range(arguments.rounds):
        for name, (step, _) in kinds.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    plain = statistics.median(times["plain"])
    print(
        f"{BATCH} x {SEQ} tokens, float32, remat {cfg.remat}, "
        f"{rate / 1e9:.0f} GFLOP/s, {jax.devices()[0].device_kind}"
    )
    print(f"{'step':36s} {'ms':>8s} {'/ plain':>8s} {'floor':>8s}")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:36s} {median * 1e3:8.0f} {median / plain:8.3f} "
            f"{1 + kinds[name][1] / rate / plain:8.3f}"
        )


if __name__ == "__main__":
    main()
