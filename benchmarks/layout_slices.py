"""Tables of docs/layout-tables.md, estimated by `v4jax layout`.

    python benchmarks/layout_slices.py slices | published | optimizer

`slices`: the smallest TPU slices that hold the full models. `published`: published training runs
beside what the estimate predicts for them. `optimizer`: what the optimizer does under each named
layout.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

OPTIMIZER = {
    "dp": "data=128",
    "fsdp": "fsdp=128",
    "ep": "expert=128",
    "ep_fsdp": "fsdp=8,expert=16",
    "ep_tp": "expert=16,tensor=8",
    "cp_ep": "context=8,expert=16",
    "full": "fsdp=4,expert=16,tensor=2",
    "pod": "fsdp=8,expert=16",
}
"""Layout -> a mesh of 128 devices."""
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def main() -> None:
    tables = {"slices": slices, "published": published, "optimizer": optimizer}
    if len(sys.argv) != 2 or sys.argv[1] not in tables:
        raise SystemExit(f"usage: layout_slices.py {' | '.join(tables)}")
    tables[sys.argv[1]]()


def slices() -> None:
    print(
        "| model | step | chip | chips | layout: mesh | memory of a device | step | bound by | "
        "MFU |\n|---|---|---|---|---|---|---|---|---|"
    )
    for model in ("flash", "pro"):
        for what, seq, per_device in (
            ("train", 4096, 1),
            ("train", 65536, 1 / 16),
            ("decode", 2**20, 1),
        ):
            for chip in ("v5p", "tpu7x"):
                chips, best = smallest(model, what, seq, per_device, chip)
                length = "1M context, released formats" if what == "decode" else f"S {seq}"
                print(
                    f"| V4-{model.capitalize()} | {what}, {length} | {chip} | {chips} | "
                    f"{best.layout}: {best.mesh} | {best.memory_bytes / 1e9:.0f} of "
                    f"{best.hbm / 1e9:.0f} GB | {best.step_seconds * 1e3:,.0f} ms | "
                    f"{best.bound} | {best.mfu:.1%} |",
                    flush=True,
                )


def smallest(model: str, what: str, seq: int, per_device: float, chip: str):
    """(chips, best estimate) of the smallest slice on which some layout fits.

    Rows grow with the devices.
    """
    from v4jax.planner.hardware import hardware_of
    from v4jax.planner.search import search

    hardware = hardware_of(chip)
    for chips in SIZES:
        devices = chips * hardware.devices_per_chip
        cfg = dataclasses.replace(
            training(model), seq_len=seq, batch_size=max(1, int(devices * per_device))
        )
        try:
            return chips, search(cfg, hardware, devices, what, released=what == "decode").ranked[0]
        except ValueError:
            continue
    raise SystemExit(f"{model}, {what}, {seq} fits no {chip} slice up to {SIZES[-1]} chips")


def published() -> None:
    """V4-Pro as NVIDIA/Megatron-Bridge #4808 ran it, and the reported Ascend post-training run."""
    from v4jax.cost import cost
    from v4jax.planner.estimate import estimate
    from v4jax.planner.hardware import hardware_of

    print(
        "| run | estimated mesh | predicted step | predicted | published | gap | bound by |\n"
        "|---|---|---|---|---|---|---|"
    )
    cfg = dataclasses.replace(
        training("pro"), seq_len=4096, batch_size=4096, layout="pod", mesh="fsdp=4,expert=64"
    )
    found = estimate(cfg, hardware_of("gb300"), fp8=True)
    flops = cost(cfg.model, 4096).train_flops * 4096 * 4096 / 256
    print(
        f"| 256 GB300, 4096 x 4K, MXFP8, step | {found.mesh} | {found.step_seconds:.1f} s | "
        f"{found.step_seconds:.1f} s | 21.5 s | {found.step_seconds / 21.5 - 1:+.0%} | "
        f"{found.bound} |"
    )
    rate = flops / found.step_seconds / 1e12
    print(f"| the same, TFLOP/s a GPU | | | {rate:.0f} | 996 | {rate / 996 - 1:+.0%} | |")
    # The published figures against each other: FLOPs a token that 996 TFLOP/s in 21.5 s imply, and
    # ours.
    print(
        f"| the same, model FLOPs a token | | | {flops * 256 / 4096**2 / 1e9:.0f} G | "
        f"{996e12 * 21.5 * 256 / 4096**2 / 1e9:.0f} G | {flops / (996e12 * 21.5) - 1:+.0%} | |"
    )
    for rows in (4096, 1024):  # the run's batch is not published
        cfg = dataclasses.replace(cfg, batch_size=rows, mesh="data=2,fsdp=8,expert=64")
        found = estimate(cfg, hardware_of("cloudmatrix384"))
        print(
            f"| 1,024 Ascend 910C, {rows} x 4K, bf16, MFU | {found.mesh} | "
            f"{found.step_seconds:.1f} s | {found.mfu:.1%} | 34.9% | "
            f"{found.mfu / 0.349 - 1:+.0%} | {found.bound} |"
        )


def optimizer() -> None:
    """V4-Flash's optimizer step on 128 TPU devices.

    FLOPs are set beside an even share; bytes sent beside moving each cut matrix there and back
    once.
    """
    from sharding.mesh import parse_mesh
    from sharding.rules import layout_for
    from v4jax.planner.estimate import terms_of
    from v4jax.planner.terms import bases, constants_of, total

    def of_a_device(layout: str, mesh: str) -> tuple[float, dict[str, float]]:
        cfg, sizes = (
            dataclasses.replace(
                training("flash"), mesh=mesh, layout=layout, seq_len=4096, batch_size=128
            ),
            parse_mesh(mesh),
        )
        rules = layout_for(layout, sizes)
        terms = [term for term in terms_of(cfg, rules, sizes, "tpu") if term.part == "optimizer"]
        values = bases(constants_of(cfg.model, rules, sizes), cfg.seq_len, cfg.batch_size)
        kinds = sorted({term.collective for term in terms if term.kind == "sent"})
        sent = {
            kind: total(
                (term for term in terms if term.kind == "sent" and term.collective == kind), values
            )
            for kind in kinds
        }
        return total((term for term in terms if term.kind == "flops"), values), sent

    whole = of_a_device("full", "")[0]
    print(
        "| layout: mesh | FLOPs of a device | / an even share | sent by a device |\n"
        "|---|---|---|---|"
    )
    for layout, mesh in OPTIMIZER.items():
        flops, sent = of_a_device(layout, mesh)
        kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sent.items()) or "nothing"
        print(
            f"| {layout}: {mesh} | {flops / 1e12:.1f} TFLOP | {flops / whole * 128:.2f} | {kinds} |"
        )


def training(model: str):
    from configs import flash, pro

    cfg = {"flash": flash, "pro": pro}[model].get_config()
    return dataclasses.replace(
        cfg, gradient_accumulation=1, stages=(), attention="sparse", index_learning_rate=0.0
    )


if __name__ == "__main__":
    main()
