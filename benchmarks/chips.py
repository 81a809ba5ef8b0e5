"""What XLA:TPU expects of the hot operations on one chip, one row an op, beside their floors.

    JAX_PLATFORMS=cpu python benchmarks/chips.py        # extra `tpu`, no TPU needed
    JAX_PLATFORMS=cpu python benchmarks/chips.py csa q --kernels top_k=reference
    JAX_PLATFORMS=cpu python benchmarks/chips.py hca csa --seq 65536     # its last 4,096 queries

Each row is compiled at full effort for one device, in a process of its own, so that an abort of the
compiler loses one row. `ms` are XLA's estimated cycles, loops multiplied, over the clock. Apart
stand the operations that XLA gives no estimate for: how often they run, and how long memory takes
for what they write (a kernel: and read), a lower bound. `--profile` simulates those too (slow:
minutes a row). Floors: the longer of useful FLOPs (a backward pass counts twice the forward pass)
and the least bytes that memory must move. An op whose floor is 0 would cost nothing inside a
kernel. `_layer` rows are the module Attention with its projections, `projections` are these alone.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from chip_cases import OPS, Case, case_of

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def main() -> None:
    options = _options()
    if options.row:
        print(json.dumps(measured(options.ops[0], options.row, options)))
        return
    print(f"{options.model}, {options.chip}, {options.queries} queries of {options.seq}, ", end="")
    print(f"kernels: {options.kernels or 'the best'}\n")
    print("| op | pass | ms | floor | x | no estimate | memory ms | temporary |")
    print("|---|---|---|---|---|---|---|---|")
    for op in options.ops:
        for direction in options.directions.split(","):
            if direction == "both" and op in ("choice", "newton_schulz"):
                continue
            print(_line(op, direction, _apart(op, direction, options)), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"rows: {', '.join(OPS)}")
    parser.add_argument("--model", choices=("flash", "pro"), default="flash")
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5p")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of the row")
    parser.add_argument("--queries", type=int, help="its last ones (default: at most 4096)")
    parser.add_argument(
        "--directions", default="forward,both", help="forward, both or forward,both"
    )
    parser.add_argument("--kernels", default="", help="as --kernels of v4jax train")
    parser.add_argument("--profile", action="store_true", help="simulate what has no estimate")
    parser.add_argument("--largest", type=int, default=0, help="also show the N largest operations")
    parser.add_argument("--hlo", help="keep the compiled text in this folder")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ops = options.ops or list(OPS)
    options.queries = options.queries or min(options.seq, 4096)
    if unknown := [op for op in options.ops if op not in OPS]:
        parser.error(f"got op {unknown[0]!r}; known: {', '.join(OPS)}")
    return options


def _apart(op: str, direction: str, options: argparse.Namespace) -> dict:
    """The row, measured by another process; {"error": ...} if that fails."""
    command = [sys.executable, __file__, op, "--row", direction]
    for name in ("model", "chip", "seq", "queries", "kernels", "largest"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--hlo", options.hlo] if options.hlo else []
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        if options.profile:
            flag = f"--xla_jf_dump_static_llo_profile_to={folder}"
            environment["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flag}"
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit {done.returncode}: {lines[-1][:200]}"}
    print(done.stderr if options.largest else "", end="", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _line(op: str, direction: str, row: dict) -> str:
    words = "forward" if direction == "forward" else "forward + backward"
    if "error" in row:
        return f"| {op} | {words} | {row['error']} |"
    ratio = f"{row['ms'] / row['floor']:.1f}" if row["floor"] else ""
    blind = ", ".join(f"{count} {kind}" for kind, count in row["blind"].items())
    return (
        f"| {op} | {words} | {row['ms']:.2f} | {row['floor']:.2f} | {ratio} | {blind} | "
        f"{row['blind_ms']:.2f} | {row['temporary'] / 2**20:.0f} MiB |"
    )


def measured(op: str, direction: str, options: argparse.Namespace) -> dict:
    """Compiles one op, and reads its estimate."""
    from v4jax.planner.cycles import read_cycles
    from v4jax.planner.hardware import hardware_of

    case = case_of(op, options.model, options.kernels, options.seq, options.queries)
    compiled = _compile(case, direction, options.chip)
    text = compiled.as_text()
    if options.hlo:
        folder = pathlib.Path(options.hlo)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{op}_{direction}.hlo").write_text(text)
    reading = read_cycles(text)
    device = hardware_of(options.chip).of_a_device(1)
    blind = [one for one in reading.ops if one.cycles is None]
    counts = collections.Counter()
    for one in blind:
        counts[one.kind] += one.calls
    _show_largest(reading, options.largest, device)
    both = direction == "both"
    flops = case.flops + both * case.back_flops
    moved = case.bytes + both * case.back_bytes
    return {
        "ms": 1e3 * reading.cycles / device.clock,
        "floor": 1e3 * max(flops / device.bf16_flops, moved / device.hbm_bandwidth),
        "blind": dict(counts.most_common()),
        "blind_ms": 1e3 * sum(one.calls * one.bytes for one in blind) / device.hbm_bandwidth,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def _show_largest(reading, count: int, device) -> None:
    """Prints the operations with most cycles, and those without an estimate, on stderr."""
    ranked = sorted(reading.ops, key=lambda one: -one.calls * (one.cycles or 0))
    for one in ranked[:count]:
        ms = 1e3 * one.calls * (one.cycles or 0) / device.clock
        print(f"  {ms:8.3f} ms  {one.calls:5} x {one.name:40} {one.source[-70:]}", file=sys.stderr)


def _compile(case: Case, direction: str, chip: str):
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from sharding.targets import tpu_devices

    first = np.array(tpu_devices(TOPOLOGIES[chip])[:1])
    mesh = Mesh(first, ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())

    def both(cotangents, *arrays):
        kept = arrays[case.diff :]
        out, pull = jax.vjp(lambda *given: case.run(*given, *kept), *arrays[: case.diff])
        return out, pull(cotangents)

    with jax.set_mesh(mesh):
        shapes = case.shapes
        run = case.run
        if direction == "both":
            shapes = (jax.eval_shape(case.run, *case.shapes), *case.shapes)
            run = both
        placed = jax.tree.map(
            lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place), shapes
        )
        return jax.jit(run).lower(*placed).compile()


if __name__ == "__main__":
    main()
