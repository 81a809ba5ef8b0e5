"""A run harmed on purpose, beside a clean one: a batch of noise, then an update 100 times too long.

    python benchmarks/spike.py [--steps N] [--out DIR]

A small model trains three times on the standard library's sources: clean; harmed, with rollbacks
and anticipatory routing; harmed, without. The table shows held-out nats per token at the end.
`v4jax plot DIR/recovered` draws the second run.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from sharding.mesh import simulate_devices
from v4jax.config import ModelConfig
from v4jax.data.config import tokenizer_of
from v4jax.train import loop, run_steps
from v4jax.train.config import TrainConfig
from v4jax.train.prepare import stage_batches
from v4jax.train.stability import StabilityConfig

MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=64,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 128, 4, 0),
    num_hash_layers=1,
    sliding_window=32,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=16,
    compress_rope_theta=160000.0,
)


class Harmed:
    """The jitted step with two harmed batches, known by their first rows.

    One batch becomes noise; the update of the other is 100 times too long.
    """

    def __init__(self, jitted, noise, inflate):
        self._jitted, self._noise, self._inflate = jitted, noise, inflate

    def lower(self, *arguments):
        return Harmed(self._jitted.lower(*arguments), self._noise, self._inflate)

    def compile(self):
        return Harmed(self._jitted.compile(), self._noise, self._inflate)

    def __call__(self, state, batch, *chosen):
        row = np.asarray(batch["tokens"])[0]
        if np.array_equal(row, self._noise):
            noise = np.random.default_rng(0).integers(0, 256, batch["tokens"].shape, np.int32)
            batch = batch | {"tokens": jax.device_put(noise, batch["tokens"].sharding)}
        if not np.array_equal(row, self._inflate):
            return self._jitted(state, batch, *chosen)
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics = self._jitted(state, batch, *chosen)
        longer = jax.tree.map(lambda new, old: old + 100 * (new - old), state.params, before)
        return dataclasses.replace(state, params=longer), metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument(
        "--out", default=None, help="where the runs are left (default: a new temporary folder)"
    )
    arguments = parser.parse_args()
    simulate_devices(1)  # as the command line does
    out, steps = pathlib.Path(arguments.out or tempfile.mkdtemp()), arguments.steps
    guard = StabilityConfig(rollbacks=3, window=32, least=16, anticipate=steps // 8)
    cfg = TrainConfig(
        model=MODEL,
        run_dir=str(out / "clean"),
        steps=steps,
        batch_size=8,
        seq_len=128,
        learning_rate=3e-3,
        warmup_steps=10,
        decay_steps=steps // 2,
        log_every=2,
        watch_every=4,
        eval_every=steps // 4,
        eval_batches=8,
        checkpoint_every=steps // 16,
        remat="none",
        export="none",
    )
    data = stage_batches(cfg, tokenizer_of(cfg.data), None)
    rows = [next(data)["tokens"][0] for _ in range(steps)]
    real = run_steps.compile_step
    ends = {"clean": loop.train(cfg)}
    for name, stability in (("recovered", guard), ("not recovered", StabilityConfig())):
        run_steps.compile_step = lambda *a, **kind: Harmed(
            real(*a, **kind), rows[steps // 3], rows[2 * steps // 3]
        )
        ends[name] = loop.train(
            dataclasses.replace(cfg, run_dir=str(out / name.replace(" ", "_")), stability=stability)
        )
    print(f"{'run':16s} {'held-out nats':>14s} {'/ clean':>8s}     in {out}")
    for name, end in ends.items():
        print(
            f"{name:16s} {end['held_out_nll']:14.4f} "
            f"{end['held_out_nll'] / ends['clean']['held_out_nll']:8.4f}"
        )


if __name__ == "__main__":
    main()
