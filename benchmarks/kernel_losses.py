"""Loss curves with the kernels for TPUs, interpreted here, beside those of plain equations.

    python benchmarks/kernel_losses.py                  # one device and every named layout
    python benchmarks/kernel_losses.py ep_tp --steps 2

A model with every kind of layer, the demo's sizes but short, trains on random tokens in float32:
once with `--kernels reference` on one device, then with the kernels of attention, of the choice of
entries (once under a mask, once gathered), of hyper-connections, of the experts (where their sizes
suit them) and of Muon, on each layout's mesh of 8 simulated devices. The bar is 1e-5 of the loss at
every step: sums in another order, through a few updates. Where heads of the indexer are cut, scores
are added over devices, and that choice is XLA's.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

MESHES = {
    "": "",
    "full": "fsdp=2,context=2,tensor=2",
    "dp": "data=8",
    "fsdp": "data=2,fsdp=4",
    "ep": "data=2,expert=4",
    "ep_fsdp": "fsdp=2,expert=4",
    "ep_tp": "expert=4,tensor=2",
    "cp_ep": "context=2,expert=4",
    "pod": "fsdp=2,context=2,expert=2",
}
"""Layout -> a mesh that uses it; "" is one device."""

KERNELS = (
    "fused_attention=pallas_tpu,top_k=pallas_tpu,hyper_connection=pallas_tpu,"
    "newton_schulz=pallas_tpu,expert_ffn=ragged"
)
BAR = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layouts", nargs="*", help=f"of {', '.join(filter(None, MESHES))}")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    if unknown := set(arguments.layouts) - set(MESHES):
        parser.error(f"got layout {min(unknown)!r}; known: {', '.join(filter(None, MESHES))}")

    # Interpreted kernels are large programs, and run for a moment only.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    from sharding.mesh import simulate_devices

    simulate_devices(8)
    print("| entries | layout | mesh | largest difference of a loss |\n|---|---|---|---|")
    worst = 0.0
    for name, most in (("mask", 16), ("gathered", 4)):
        want = losses("", most, "reference", arguments.steps)
        for layout in arguments.layouts or MESHES:
            got = losses(layout, most, KERNELS, arguments.steps)
            fault = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
            worst = max(worst, fault)
            where = f"{layout} | {MESHES[layout]}" if layout else "one device |"
            print(f"| {name} | {where} | {fault:.1e} |", flush=True)
    if worst > BAR:
        raise SystemExit(f"a loss differs by {worst:.1e}; the bar is {BAR:.0e}")


def losses(layout: str, most: int, kernels: str, steps: int) -> list[float]:
    """The loss of each step.

    Args:
      layout: a key of MESHES.
      most: how many entries a query of a CSA layer chooses, of 40.
    """
    import jax
    import numpy as np

    from configs import demo
    from sharding.mesh import make_mesh, parse_mesh
    from sharding.rules import AxisRules, layout_for
    from v4jax.config import CSA, HCA, WINDOW_ONLY
    from v4jax.train.step import batch_sharding, compile_step, init_state, state_shardings

    model = demo.get_model().replace(
        num_hidden_layers=2,
        num_hash_layers=1,
        compress_ratios=(CSA, HCA, WINDOW_ONLY),
        index_topk=most,
    )
    cfg = dataclasses.replace(
        demo.get_config(),
        model=model,
        mesh=MESHES[layout],
        layout=layout or "full",
        batch_size=8,
        seq_len=160,
        warmup_steps=1,
        kernels=kernels,
    )
    sizes = parse_mesh(cfg.mesh)
    mesh, rules = make_mesh(sizes), layout_for(layout, sizes) if layout else AxisRules()
    with jax.set_mesh(mesh):
        places = state_shardings(cfg, rules, mesh)
        state = init_state(cfg, places)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, model.vocab_size, (cfg.batch_size, cfg.seq_len), dtype=np.int32)
        segments = 1 + (np.arange(cfg.seq_len) > rng.integers(0, cfg.seq_len, (8, 1)))
        batch = jax.device_put(
            {"tokens": tokens, "segment_ids": segments.astype(np.int32)},
            batch_sharding(rules, mesh),
        )
        step = compile_step(cfg, rules, places, mesh)
        found = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    return found


if __name__ == "__main__":
    main()
