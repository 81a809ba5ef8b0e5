"""A training loop of your own on a mesh: v4jax.loss, jax.value_and_grad and an optimizer of optax.

Command: JAX_PLATFORMS=cpu python examples/own_loop.py

Hardware: 2 CPU cores; 8 simulated devices as data=2, expert=2, tensor=2. It takes half a minute,
most of it compiling.

Expected result: the loss falls from 5.6 to below 3.

`v4jax train` also writes checkpoints, resumes, and moves the router's bias; a loop of your own
decides that itself.

Shapes: B batch, S positions.
Next file to read: docs/examples.md.
"""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import optax

import v4jax
from configs.demo import get_model
from sharding.mesh import make_mesh, parse_mesh, simulate_devices
from sharding.params import named_shardings
from sharding.rules import layout_for

STEPS, BATCH, LENGTH = 20, 8, 64
MODEL = dataclasses.replace(
    get_model(),
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    num_hash_layers=1,
    compress_ratios=(0, 4),
)
"""Two layers: window attention with hash-routed experts, then CSA with score-routed ones."""


def placed_params(cfg: v4jax.ModelConfig, mesh, rules):
    """Fresh parameters, each made on the devices that keep it."""
    shardings = named_shardings(mesh, rules, v4jax.abstract_params(cfg), v4jax.param_axes(cfg))
    init = functools.partial(v4jax.init_params, cfg)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(0))


def batches(mesh, rules):
    """Rows of bytes from this file, int32 [B,S], each device with its own rows."""
    text = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8)
    place = jax.sharding.NamedSharding(mesh, rules.spec(("act_batch", "act_seq")))
    rng = np.random.default_rng(0)
    while True:
        starts_B = rng.integers(0, len(text) - LENGTH, BATCH)
        tokens_BS = text[starts_B[:, None] + np.arange(LENGTH)].astype(np.int32)
        yield {"tokens": jax.device_put(tokens_BS, place)}


def train(mesh_spec: str = "data=2,expert=2,tensor=2", layout: str = "full") -> tuple:
    """(weights, optimizer state, losses of all steps)."""
    sizes = parse_mesh(mesh_spec)
    mesh, rules = make_mesh(sizes), layout_for(layout, sizes)
    optimizer = optax.adamw(optax.warmup_constant_schedule(0, 3e-3, 5))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, router, batch):
        def objective(weights):
            return v4jax.loss(MODEL, weights | {"router": router}, batch, rules=rules)

        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(weights)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, metrics

    losses = []
    with jax.set_mesh(mesh):
        weights = placed_params(MODEL, mesh, rules)
        router = weights.pop("router")  # selection bias and hash tables: no gradient moves them
        state = optimizer.init(weights)  # zeros_like: moments lie where their weights lie
        for n, batch in zip(range(STEPS), batches(mesh, rules), strict=False):
            weights, state, metrics = step(weights, state, router, batch)
            losses.append(float(metrics["loss"]))
            print(f"step {n + 1:2}  loss {losses[-1]:.3f}  next token {metrics['nll']:.3f} nats")
    return weights, state, losses


if __name__ == "__main__":
    simulate_devices(8)
    train()
