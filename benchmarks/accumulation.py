"""What gradient accumulation costs: time beside separate passes, and memory beside one micro-batch.

    python benchmarks/accumulation.py             # time, on this CPU
    python benchmarks/accumulation.py --memory    # compiled for v5p; needs the extra `tpu`

Time: a step of N micro-batches against N forward and backward passes and one optimizer step, each a
program of its own. They alternate, round by round; the table shows medians and their ratio.
Memory: what the compiler for TPUs reserves on a v5p chip for a step of V4-Flash.
"""

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import numpy as np
import optax

from configs import demo, flash
from sharding.rules import AxisRules
from v4jax.context import Context
from v4jax.functional import init_params
from v4jax.planner.compiled import report_layout
from v4jax.train.gradients import gradients
from v4jax.train.step import optimizer_of, state_from, train_step

COUNT = 8


def programs(seq: int, rows: int):
    """(the step of COUNT micro-batches, the same work as separate programs), each a function."""
    cfg = dataclasses.replace(
        demo.get_config(),
        mesh="",
        seq_len=seq,
        batch_size=COUNT * rows,
        gradient_accumulation=COUNT,
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.model.vocab_size, (cfg.batch_size, seq)).astype(np.int32)
    state = state_from(cfg, init_params(cfg.model, jax.random.key(0)))
    whole = jax.jit(functools.partial(train_step, cfg, AxisRules()))

    one = dataclasses.replace(cfg, batch_size=rows, gradient_accumulation=1)
    grads_of = jax.jit(functools.partial(gradients, one, Context()))

    @jax.jit
    def update(params, optimizer, grads):
        updates, optimizer = optimizer_of(one).update(grads, optimizer, params)
        return optax.apply_updates(params, updates), optimizer

    def separate():
        for part in np.split(tokens, COUNT):
            found = grads_of(state.params, state.router, {"tokens": part})
            jax.block_until_ready(found)
        jax.block_until_ready(update(state.params, state.optimizer, found[0]))

    def together():
        jax.block_until_ready(whole(state, {"tokens": tokens}))

    return together, separate


def times(rounds: int) -> None:
    print(f"{'rows x tokens':>14} {'step':>9} {'separate':>9} {'ratio':>6}")
    for rows, seq in ((1, 384), (2, 384)):
        found = ([], [])
        pair = programs(seq, rows)
        for run in pair:
            run()
        for _ in range(rounds):
            for run, seconds in zip(pair, found, strict=True):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
        step, separate = (statistics.median(seconds) for seconds in found)
        ratio = statistics.median(a / b for a, b in zip(*found, strict=True))
        print(f"{COUNT} x {rows} x {seq:>5} {step:8.3f}s {separate:8.3f}s {ratio:6.3f}", flush=True)


def memory(target: str, mesh: str, layout: str) -> None:
    cfg = dataclasses.replace(
        flash.get_config(),
        mesh=mesh,
        layout=layout,
        stages=(),
        attention="sparse",
        index_learning_rate=0.0,
    )
    devices = int(np.prod([int(part.split("=")[1]) for part in mesh.split(",")]))
    for count in (1, COUNT):
        one = dataclasses.replace(cfg, batch_size=devices * count, gradient_accumulation=count)
        report = report_layout(one, target)
        total = report.state_bytes + report.temporary_bytes
        print(
            f"{count} micro-batches of {devices} rows: state {report.state_bytes / 1e9:.1f} GB, "
            f"temporary {report.temporary_bytes / 1e9:.1f} GB, together {total / 1e9:.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--target", default="v5p:4x4x8")
    parser.add_argument("--mesh", default="fsdp=32,expert=4")
    parser.add_argument("--layout", default="ep_fsdp")
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.target, arguments.mesh, arguments.layout)
    else:
        times(arguments.rounds)
