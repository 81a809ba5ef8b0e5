"""Time of one training step beside transformers' eager model, in the same run.

    python benchmarks/train_step.py      # needs the extra `parity` (torch, transformers)

A step is forward, backward and AdamW in float32. The two models alternate, round by round, so that
a noisy machine disturbs both. Each runs in a process of its own, as its users run it, and one waits
while the other works. The table shows medians and their ratio, the floor (6 x active parameters x
tokens / the measured matmul rate), and where our time goes.
"""

import argparse
import contextlib
import functools
import math
import multiprocessing
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from sharding.mesh import make_mesh, parse_mesh, simulate_devices
from sharding.params import named_shardings
from sharding.rules import AxisRules, layout_for
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.functional import apply, init_params
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.train.loss import loss_and_routing
from v4jax.train.report import matmul_rate

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
    compress_ratios=(0, 0, 4, 128, 4),
    num_hash_layers=2,
    num_nextn_predict_layers=0,
    sliding_window=32,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=16,
    compress_rope_theta=160000.0,
)
BATCH, SEQ = 8, 256


def active_parameters(cfg: ModelConfig, params) -> int:
    """Weights that multiply a token: no embedding table, and only the chosen of routed experts."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith(("embed", "router")):
            continue
        share = cfg.num_experts_per_tok / cfg.n_routed_experts if "/experts/" in name else 1
        total += leaf.size * share
    return int(total)


def program(tokens: np.ndarray, mesh: str):
    """The jitted step, [parameters, optimizer state], and a batch.

    step(*state, batch) returns (*state, loss).
    """
    sizes = parse_mesh(mesh)
    rules = layout_for("full", sizes) if mesh else AxisRules()
    device_mesh = make_mesh(sizes)
    jax.set_mesh(device_mesh)
    places = named_shardings(device_mesh, rules, abstract_params(MODEL), param_axes(MODEL))
    params = jax.device_put(init_params(MODEL, jax.random.key(0)), places)
    router = params.pop("router")
    tx = optax.adamw(1e-4)
    batch = {
        "tokens": jax.device_put(
            tokens, NamedSharding(device_mesh, rules.spec(("act_batch", "act_seq")))
        )
    }

    def step(params, state, batch):
        def objective(p):
            return loss_and_routing(MODEL, p | {"router": router}, batch, Context(rules=rules))[0]

        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1)), [params, tx.init(params)], batch


def ours(tokens: np.ndarray, mesh: str):
    """A function that does one step."""
    step, state, batch = program(tokens, mesh)

    def once():
        *state[:], value = step(*state, batch)
        return float(value)

    return once


def theirs(tokens: np.ndarray):
    """The same step in transformers, eager."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(2)
    raw = {
        key: value
        for key, value in MODEL.to_dict().items()
        if key not in ("architectures", "model_type")
    }
    config = DeepseekV4Config(**raw)
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).float().train()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "tid2eid" in name:
                rows = [
                    torch.randperm(MODEL.n_routed_experts)[: MODEL.num_experts_per_tok]
                    for _ in range(buffer.shape[0])
                ]
                buffer.copy_(torch.stack(rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.tensor(tokens, dtype=torch.long)

    def once():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return once


def times_of_theirs(pipe, tokens: np.ndarray) -> None:
    """Does a step of transformers for each message and answers with its seconds.

    main() starts it as a process.
    """
    step = theirs(tokens)
    with contextlib.suppress(EOFError):  # main() is done
        while pipe.recv():
            pipe.send(seconds(step))


def in_own_process(tokens: np.ndarray):
    """A function that gives the seconds of one step of transformers."""
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    context.Process(target=times_of_theirs, args=(far_end, tokens), daemon=True).start()
    far_end.close()  # reading here ends when that process ends

    def once() -> float:
        pipe.send(True)
        return pipe.recv()

    return once


def forward_only(tokens: np.ndarray):
    params = init_params(MODEL, jax.random.key(0))
    run = jax.jit(lambda p: apply(MODEL, p, jnp.asarray(tokens)).x_BSD.sum())
    return lambda: float(run(params))


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--mesh", default="", help="simulated devices, for example data=2 (default: one device)"
    )
    parser.add_argument("--ours-only", action="store_true", help="skip transformers")
    arguments = parser.parse_args()
    simulate_devices(math.prod(parse_mesh(arguments.mesh).values()))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (BATCH, SEQ))
    steps = {"v4jax step": ours(tokens, arguments.mesh), "v4jax forward": forward_only(tokens)}
    timers = {name: functools.partial(seconds, step) for name, step in steps.items()}
    if not arguments.ours_only:
        timers["transformers step"] = in_own_process(tokens)
    times = {name: [] for name in timers}
    for timer in timers.values():
        timer()
        timer()
    for _ in range(arguments.rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    median = {name: statistics.median(values) for name, values in times.items()}
    rate = matmul_rate(jnp.float32)
    active = active_parameters(MODEL, init_params(MODEL, jax.random.key(0)))
    floor = 6 * active * BATCH * SEQ / rate
    print(
        f"matmul rate {rate / 1e9:.0f} GFLOP/s, active parameters {active / 1e6:.1f}M, tokens "
        f"{BATCH * SEQ}"
    )
    for name, value in median.items():
        print(f"{name:20s} {value * 1e3:8.0f} ms   {value / floor:5.2f} x floor")
    print(f"{'floor':20s} {floor * 1e3:8.0f} ms")
    if "transformers step" in median:
        print(
            f"ratio v4jax / transformers: "
            f"{median['v4jax step'] / median['transformers step']:.3f}  (bar 0.5, aim 0.35)"
        )


if __name__ == "__main__":
    main()
