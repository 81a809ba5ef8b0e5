"""What the optimizer holds on a chip when its state lies on the device, and in the host's memory.

    python benchmarks/optimizer_memory.py [--quick]     # needs the extra `tpu`; some minutes

Clipping, Muon and AdamW alone, on gradients that are made first, compiled for 8 v5p chips as a run
compiles (--quick: with the layout lab's quick effort). The model has the widths of the case
tpu-ep-tp of layout_accuracy.py, with two vocabularies: the published one, whose AdamW moments are
large matrices, and a small one.
"""

import dataclasses
import functools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import optax
from layout_accuracy import config

from sharding.mesh import parse_mesh
from sharding.rules import layout_for
from sharding.targets import topology_mesh
from v4jax.parameter_tree import abstract_params
from v4jax.planner.compiled import EFFORTS
from v4jax.train.config import TrainConfig
from v4jax.train.step import optimizer_of, state_from, state_shardings

TARGET, MESH, LAYOUT = "v5p:2x2x2", "fsdp=2,expert=4", "ep_fsdp"


def compiled(cfg: TrainConfig, options: dict):
    """The optimizer of `cfg` as a program of its own."""
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    mesh = topology_mesh(TARGET, sizes)
    places = state_shardings(cfg, rules, mesh)
    shapes = jax.eval_shape(functools.partial(state_from, cfg), abstract_params(cfg.model))
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )

    def step(params, state):
        grads = jax.lax.optimization_barrier(jax.tree.map(lambda p: 2 * p, params))
        updates, state = optimizer_of(cfg, rules).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    out = (places.params, places.optimizer)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=out, donate_argnums=(0, 1))
        return jitted.lower(state.params, state.optimizer).compile(options)


def main() -> None:
    options = EFFORTS["quick" if "--quick" in sys.argv else "full"]
    print("| vocabulary | state lies | on the device before | peak of the device | on the host |")
    print("|---|---|---|---|---|")
    for vocabulary in (129280, 1024):
        cfg, _ = config("tpu-ep-tp")
        model = cfg.model.replace(vocab_size=vocabulary)
        for memory in ("device", "host"):
            one = dataclasses.replace(
                cfg, model=model, mesh=MESH, layout=LAYOUT, optimizer_memory=memory
            )
            found = compiled(one, options).memory_analysis()
            host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
            sizes = (found.argument_size_in_bytes, found.peak_memory_in_bytes - host, host)
            shown = " | ".join(f"{size / 1e9:.2f} GB" for size in sizes)
            print(f"| {vocabulary:,} | {memory} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
