"""The time of a round of DSpark beside that of a plain step, on this machine, at batch 1.

    python benchmarks/draft_rounds.py

The demo's trunk with a random drafter, which is hardly ever accepted: what a round costs does not
depend on that, and what it gains does. 2.74 tokens a round is what others measured on Flash-0731.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from configs.demo import get_config
from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig
from v4jax.drafter_parameters import drafter_tensors
from v4jax.functional import init_params
from v4jax.generate.cache import split_layers
from v4jax.generate.steps import STEPS, DecodeConfig, advance, prefill
from v4jax.model.dspark import ROOT

PROMPT, CAPACITY, REPEATS, TOKENS = 200, 2048, 20, 2.74


def random_drafter(cfg: ModelConfig, dspark: DSparkConfig):
    """A tree of random weights."""
    rng, found, experts = np.random.default_rng(0), {}, cfg.n_routed_experts
    for tensor in drafter_tensors(cfg, dspark).values():
        shape = tensor.shape[::-1] if tensor.transpose else tensor.shape
        shape = (experts, *shape) if tensor.index else shape
        if tensor.path not in found:
            found[tensor.path] = jnp.asarray(0.02 * rng.normal(size=shape), jnp.float32)
    return unflatten_dict(found)


def seconds(cfg: ModelConfig, decoding: DecodeConfig, params) -> float:
    """Seconds of a step or round, the median of several calls."""
    prompt = np.random.default_rng(1).integers(0, cfg.vocab_size, PROMPT).tolist()
    seed_B, active_B = np.zeros(1, np.uint32), np.ones(1, bool)
    state, _ = prefill(cfg, decoding, params, [prompt], seed_B, CAPACITY)
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        state, output = advance(cfg, decoding, params, state, active_B, seed_B)
        jax.block_until_ready(output)
        taken.append((time.perf_counter() - start) / STEPS)
    return float(np.median(taken[1:]))


def main() -> None:
    whole = get_config().model
    last = whole.num_hidden_layers
    ratios = whole.compress_ratios[:last]
    cfg = whole.replace(num_nextn_predict_layers=0, compress_ratios=ratios)
    taps = (last - 3, last - 2, last - 1)
    dspark = DSparkConfig(
        stages=3, block_size=5, noise_token_id=2, target_layer_ids=taps, markov_rank=64
    )
    params = init_params(cfg, jax.random.key(0)) | {ROOT: random_drafter(cfg, dspark)}
    params = split_layers(cfg, params)
    plain = seconds(cfg, DecodeConfig(), params)
    drafting = seconds(cfg, DecodeConfig(speculative=True, dspark=dspark), params)
    print(f"plain step {1e3 * plain:.2f} ms, round {1e3 * drafting:.2f} ms: {drafting / plain:.2f}")
    print(f"gain at {TOKENS} tokens a round: {TOKENS * plain / drafting:.2f}")


if __name__ == "__main__":
    main()
