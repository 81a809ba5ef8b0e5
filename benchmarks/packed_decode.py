"""Decoding from packed weights beside bfloat16 and float32: one device, one row, the same checkpoint.

    python benchmarks/packed_decode.py [--tokens 64] [--rounds 5]

The three alternate, round by round, so that a noisy machine disturbs all. The floor is the time to
read the packed bytes that a token touches, at the rate measured here. Bars (issue 26): packed at
most 1.3 times the floor, and no slower than bfloat16.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from decode import models, rates

import v4jax
from v4jax.config import ModelConfig
from v4jax.functional import init_params
from v4jax.generate.cache import split_layers
from v4jax.generate.decode import generate
from v4jax.generate.steps import DecodeConfig

DTYPES = ("packed", "bfloat16", "float32")
PROMPT = list(range(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="tokens a round (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each (default 5)")
    arguments = parser.parse_args()
    cfg = model()
    with tempfile.TemporaryDirectory() as folder:
        there = pathlib.Path(folder) / "model"
        params = init_params(cfg, jax.random.key(0))
        v4jax.save_safetensors(cfg, params, there, dtype="official")
        loaded = {dtype: v4jax.load(there, dtype=dtype)[1] for dtype in DTYPES}
    bytes_read = touched_bytes(cfg, loaded["packed"])
    loaded = {dtype: split_layers(cfg, params) for dtype, params in loaded.items()}
    took: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for number in range(arguments.rounds + 1):
        for dtype, params in loaded.items():
            seconds = step_seconds(cfg, params, dtype, arguments.tokens)
            if number:  # the first compiles
                took[dtype].append(seconds)
    floor = bytes_read / rates()[0]
    print(f"{bytes_read / 1e6:.1f} MB a token, {floor * 1e3:.2f} ms to read them")
    for dtype, seconds in took.items():
        middle = statistics.median(seconds)
        print(f"{dtype:9} {middle * 1e3:7.2f} ms a token, {middle / floor:5.2f} times the floor")


def model() -> ModelConfig:
    """7 layers of every kind, 6 of 64 experts, widths of whole blocks; 320M parameters."""
    return models()["experts"].replace(
        hidden_size=512,
        moe_intermediate_size=384,
        q_lora_rank=256,
        head_dim=128,
        o_groups=4,
        o_lora_rank=128,
        index_head_dim=64,
    )


def touched_bytes(cfg: ModelConfig, params: Any) -> float:
    """Bytes of the weights that one token reads: of experts the chosen share, of tables a row."""
    share, total = cfg.num_experts_per_tok / cfg.n_routed_experts, 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith(("mtp", "router", "embed")):
            continue
        total += leaf.nbytes * (share if "/experts/" in name else 1)
    return total


def step_seconds(cfg: ModelConfig, params: Any, dtype: str, tokens: int) -> float:
    """Seconds a token, after the first."""
    times: list[float] = []

    def stop(_, __) -> bool:
        times.append(time.perf_counter())
        return False

    decoding = DecodeConfig(dtype="bfloat16" if dtype == "packed" else dtype)
    generate(cfg, params, [PROMPT], tokens, stop=stop, decoding=decoding, capacity=256)
    return float(np.diff([times[0], times[-1]])[0]) / (len(times) - 1)


if __name__ == "__main__":
    main()
