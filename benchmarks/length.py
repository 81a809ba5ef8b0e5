"""Forward time and peak memory against sequence length, on 4 layers [SWA, CSA, HCA, CSA].

    python benchmarks/length.py [--lengths 1024 4096 16384 65536]

Each length runs in a process of its own, so that the peak is its own. Bars: the time per token
grows at most 1.25 times per doubling, and memory is linear.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time


def program(length: int):
    """(the jitted forward pass, parameters, tokens [1,length])."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sharding.mesh import simulate_devices
    from v4jax.config import ModelConfig
    from v4jax.functional import apply, init_params

    cfg = ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=4,
        o_lora_rank=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=1.5,
        compress_ratios=(0, 4, 128, 4),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        sliding_window=128,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=128,
        compress_rope_theta=160000.0,
    )
    simulate_devices(1)  # as the command line does: keeps freed memory
    params = init_params(cfg, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (1, length)))
    return jax.jit(lambda p, t: apply(cfg, p, t).x_BSD), params, tokens


def measure(length: int) -> dict:
    import jax

    run, params, tokens = program(length)
    jax.block_until_ready(run(params, tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(params, tokens))
        times.append(time.perf_counter() - start)
    return {
        "seconds": min(times),
        "peak_mb": max(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    print("length   seconds   us/token   beyond linear, per doubling   peak MB")
    last = None
    for length in arguments.lengths:
        out = subprocess.run(
            [sys.executable, __file__, "--one", str(length)],
            check=True,
            capture_output=True,
            text=True,
        )
        row = json.loads(out.stdout.splitlines()[-1])
        beyond = ""
        if last is not None:
            doublings = math.log2(length / last[0])
            beyond = f"{(row['seconds'] / last[1] * last[0] / length) ** (1 / doublings):.2f}"
        print(
            f"{length:6d} {row['seconds']:9.2f} {row['seconds'] / length * 1e6:10.0f} "
            f"{beyond:>18s} {row['peak_mb']:20.0f}",
            flush=True,
        )
        last = (length, row["seconds"])


if __name__ == "__main__":
    main()
