"""Decoding and prefill beside transformers' generate: the same checkpoint, float32, two cores.

    python benchmarks/decode.py [--models demo small experts] [--tokens 64] [--prompt 4096]
                                [--only 64] [--ours-only]

transformers needs the extra `parity`. The three models have random weights, which decode as fast as
trained ones: `demo` of `make demo`; `small`, 7 layers of every kind with 4 of 16 experts;
`experts`, the same with 6 of 64, since tokens of a released model choose few of many.

The floor of decoding is the time to read every weight that the rows touch once a step, at the
machine's measured rate. The floor of prefill is its matrix products at the measured matmul rate.
Times are medians of three runs after one that compiles. Bars: 5 times transformers' tokens per
second at batch 1 and 8, 3 times its prefill of 4K tokens.
"""

import argparse
import dataclasses
import os
import pathlib
import runpy
import statistics
import tempfile
import time

THREADS = 2


def models() -> dict:
    """Name -> model.

    Total and active parameters without MTP are 2.7M and 1.2M, 30M and 11M, 96M and 14M.
    """
    from v4jax.config import ModelConfig

    small = ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=7,
        num_attention_heads=8,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=128,
        o_groups=4,
        o_lora_rank=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=1.5,
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 0),
        num_hash_layers=3,
        sliding_window=128,
        index_n_heads=8,
        index_head_dim=32,
        index_topk=128,
        compress_rope_theta=160000.0,
        max_position_embeddings=16384,
    )
    many = dataclasses.replace(small, n_routed_experts=64, num_experts_per_tok=6)
    demo = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "configs/demo.py"))["get_model"]()
    return {"demo": demo, "small": small, "experts": many}


def make_checkpoint(folder, cfg):
    import jax

    import v4jax
    from v4jax.functional import init_params

    v4jax.save_safetensors(cfg, init_params(cfg, jax.random.key(0)), folder, dtype="float32")


def rates() -> tuple[float, float]:
    """(bytes read, float32 operations of a matrix product) per second, each the best of five."""
    import jax
    import jax.numpy as jnp

    x, w = jnp.ones(2**26), jnp.ones((2048, 2048))
    add, dot = jax.jit(jnp.sum), jax.jit(jnp.dot)
    return x.nbytes / _best(lambda: add(x).block_until_ready()), 2 * 2048**3 / _best(
        lambda: dot(w, w).block_until_ready()
    )


def _best(run, times: int = 5) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def steps_of(run, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and seconds of each further one.

    `run(tokens, tell)` calls `tell` for every token.
    """
    run(2, lambda: None)  # compiles
    first, further = zip(*(_one_run(run, tokens) for _ in range(3)), strict=True)
    return statistics.median(first), statistics.median(further)


def _one_run(run, tokens: int) -> tuple[float, float]:
    times, start = [], time.perf_counter()
    run(tokens, lambda: times.append(time.perf_counter()))
    return times[0] - start, (times[-1] - times[0]) / (tokens - 1)


def touched_parameters(cfg, active: float, batch: int) -> float:
    """Weights that `batch` rows read if each chooses its experts evenly; some are chosen twice."""
    experts, chosen = cfg.n_routed_experts, cfg.num_experts_per_tok
    touched = experts * (1 - (1 - chosen / experts) ** batch)
    return (
        active
        + (touched - chosen)
        * cfg.num_hidden_layers
        * 3
        * cfg.hidden_size
        * cfg.moe_intermediate_size
    )


def ours(folder, prompts, tokens: int) -> tuple[float, float]:
    import v4jax
    from v4jax.generate.cache import split_layers
    from v4jax.generate.decode import generate

    cfg, params = v4jax.load(folder)
    params, capacity = split_layers(cfg, params), len(prompts[0]) + tokens

    def run(count, tell):
        generate(
            cfg,
            params,
            prompts,
            count,
            stop=lambda row, _: bool(row == 0 and tell()),
            capacity=capacity,
        )

    return steps_of(run, tokens)


def theirs(folder, prompts, tokens: int) -> tuple[float, float]:
    import torch
    from transformers import DeepseekV4ForCausalLM

    torch.set_num_threads(THREADS)
    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = torch.tensor(prompts)

    def run(count, tell):
        def heard(ids, scores, **_):
            tell()
            return torch.zeros(len(ids), dtype=torch.bool)

        with torch.no_grad():
            model.generate(
                rows,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[heard],
            )

    return steps_of(run, tokens)


def compare(cfg, folder, cases, tokens: int, ours_only: bool, read: float, products: float):
    """Prints a line for the prefill and one for the decoding of each case.

    A case is (batch, length of prompts).
    """
    import numpy as np

    from v4jax.cost import cost

    for batch, length in cases:
        prompts = np.random.default_rng(0).integers(2, cfg.vocab_size, (batch, length)).tolist()
        count = (tokens if length < 1024 else tokens // 4) + 1
        found = ours(folder, prompts, count)
        peer = None if ours_only else theirs(folder, prompts, count)
        total = cost(cfg, length).total
        bytes_read = 4 * touched_parameters(cfg, total.active, batch)
        floors = (
            batch * length * total.flops / products,
            max(bytes_read / read, batch * total.flops / products),
        )
        for i, what in enumerate((f"prefill {length}", f"decode at {length}, a step")):
            last = f"{1000 * peer[i]:15.2f}   {peer[i] / found[i]:13.1f}" if peer else ""
            print(
                f"batch {batch}, {what:24s} {1000 * floors[i]:9.2f} {1000 * found[i]:10.2f} {last}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        choices=["demo", "small", "experts"],
        default=["demo", "small", "experts"],
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=64,
        help="decoded after the first; a quarter of it after long prompts",
    )
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--only", type=int, help="cases of this prompt length")
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from sharding.mesh import simulate_devices

    simulate_devices(1)  # as the command line does: keeps freed memory
    read, products = rates()
    print(f"measured: {read / 1e9:.1f} GB/s read, {products / 1e9:.0f} GFLOP/s")
    cases = [
        case
        for case in ((1, 64), (8, 64), (1, arguments.prompt))
        if arguments.only in (None, case[1])
    ]
    for name in arguments.models:
        print(f"{name:25s} floor ms   v4jax ms   transformers ms   times as fast")
        cfg = models()[name]
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(folder, cfg)
            compare(cfg, folder, cases, arguments.tokens, arguments.ours_only, read, products)


if __name__ == "__main__":
    main()
