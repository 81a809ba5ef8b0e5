"""What XLA:TPU expects of the hot operations on one chip, one row an op, beside their floors.

    JAX_PLATFORMS=cpu python benchmarks/chips.py        # extra `tpu`, no TPU needed
    JAX_PLATFORMS=cpu python benchmarks/chips.py csa q --kernels top_k=reference
    JAX_PLATFORMS=cpu python benchmarks/chips.py hca csa --seq 65536     # its last 4,096 queries

Each row is compiled at full effort for one device, each pass in a process of its own, so that an
abort of the compiler loses one cell. Times are milliseconds: XLA's estimated cycles, loops
multiplied, over the clock. Operations that XLA gives no estimate for are counted apart, with the
least time that they take at the chip's peaks, by the bytes that they write and by what a kernel
states (pl.CostEstimate); copies into fast memory that run beside others are left out. A Pallas
kernel takes the bundles of its code (v4jax/planner/bundles.py), at least its bytes: a lower bound.
A loop whose length depends on data, in a kernel or outside, counts once, or --unknown-runs times.

Floors: the longer of useful FLOPs (a backward pass has twice those of the forward pass) and the
least bytes that memory must move. An op whose floor is 0 would cost nothing inside a kernel.
`_layer` rows are the module Attention with its projections, `projections` are these alone.
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

from chip_cases import FORWARD_ONLY, OPS, Case, case_of

from v4jax.planner.bundles import kernel_cycles
from v4jax.planner.cycles import read_times
from v4jax.planner.hardware import hardware_of

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def main() -> None:
    options = _options()
    if options.row:
        print(json.dumps(measured(options.ops[0], options.row, options)))
        return
    print(f"{options.model}, {options.chip}, {options.queries} queries of {options.seq}, ", end="")
    print(f"kernels: {options.kernels or 'the best'}\n")
    print("| op | forward | floor | with backward | floor | x | no estimate | temporary |")
    print("|---|---|---|---|---|---|---|---|")
    for op in options.ops:
        passes = ("forward",) if op in FORWARD_ONLY else options.passes.split(",")
        print(_line(op, {name: _apart(op, name, options) for name in passes}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"rows: {', '.join(OPS)}")
    parser.add_argument("--model", choices=("flash", "pro"), default="flash")
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5p")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of the row")
    parser.add_argument("--queries", type=int, help="its last ones (default: at most 4096)")
    parser.add_argument("--passes", default="forward,both", help="forward, both or forward,both")
    parser.add_argument("--kernels", default="", help="as --kernels of v4jax train")
    parser.add_argument(
        "--unknown-runs", type=int, default=1, help="of a loop whose length the program hides"
    )
    parser.add_argument("--largest", type=int, default=0, help="also show the N largest operations")
    parser.add_argument("--hlo", help="keep the compiled text in this folder")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--code", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ops = options.ops or list(OPS)
    options.queries = options.queries or min(options.seq, 4096)
    if unknown := [op for op in options.ops if op not in OPS]:
        parser.error(f"got op {unknown[0]!r}; known: {', '.join(OPS)}")
    return options


def _apart(op: str, name: str, options: argparse.Namespace) -> dict:
    """The cell, measured by another process; {"error": ...} if that fails.

    Where there are kernels, a second one compiles them again to print their code.
    """
    found = _process(op, name, options, None)
    if not found.get("kernels"):
        return found
    with tempfile.TemporaryDirectory() as folder:
        return _process(op, name, options, folder)


def _process(op: str, name: str, options: argparse.Namespace, code: str | None) -> dict:
    """What `measured` returns, by another process; libtpu prints code into the folder `code`."""
    command = [sys.executable, __file__, op, "--row", name]
    for option in ("model", "chip", "seq", "queries", "kernels", "largest", "unknown_runs"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    command += ["--hlo", options.hlo] if options.hlo else []
    flags = [os.environ.get("LIBTPU_INIT_ARGS", "")]
    if code is not None:
        command += ["--code", code]
        flags += [f"--xla_jf_dump_to={code}", "--xla_jf_dump_llo_text=true"]
        flags.append("--xla_jf_dump_llo_pass_label_regex=final_bundles")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": " ".join(flags)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit {done.returncode}: {lines[-1][:200]}"}
    found = json.loads(done.stdout.splitlines()[-1])
    for line in found.pop("largest"):
        if code is not None or not found["kernels"]:
            print(line, file=sys.stderr)
    return found


def _line(op: str, rows: dict[str, dict]) -> str:
    """One op; the ratio and the last two columns are those of its last pass."""
    cells = []
    for name in ("forward", "both"):
        row = rows.get(name)
        if row is None:
            cells += ["", ""]
        elif "error" in row:
            cells += [row["error"], ""]
        else:
            cells += [f"{row['ms']:.2f}", f"{row['floor']:.2f}"]
    last = list(rows.values())[-1]
    if "error" in last:
        return f"| {op} | {' | '.join([*cells, '', '', ''])} |"
    ratio = f"{last['ms'] / last['floor']:.1f}" if last["floor"] else ""
    words = ", ".join(f"{count} {kind}" for kind, count in last["blind"].items())
    blind = f"{words}: {last['blind_ms']:.2f}" if words else ""
    return f"| {op} | {' | '.join([*cells, ratio, blind, _mib(last['temporary'])])} |"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def measured(op: str, name: str, options: argparse.Namespace) -> dict:
    """Compiles one op for one pass, and reads its estimate."""
    case = case_of(op, options.model, options.kernels, options.seq, options.queries)
    compiled = _compile(case, name, options.chip)
    text = compiled.as_text()
    if options.hlo:
        folder = pathlib.Path(options.hlo)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{op}_{name}.hlo").write_text(text)
    device = hardware_of(options.chip).of_a_device(1)
    reading = read_times(text, device.clock, options.unknown_runs)
    cycles = {}
    if options.code is not None:
        cycles = kernel_cycles(pathlib.Path(options.code), options.unknown_runs)
    ops = _counted(reading.ops, cycles, device)
    # Copies that start and end apart run beside other operations.
    blind = [one for one in ops if one.seconds is None and not one.kind.endswith("-start")]
    counts = collections.Counter()
    for one in blind:
        counts[one.kind] += one.calls
    hidden = len(reading.loops) + sum(not known for _, known in cycles.values())
    if hidden:
        counts["loops of unknown length"] = hidden
    both = name == "both"
    flops = case.flops + both * case.back_flops
    moved = case.bytes + both * case.back_bytes
    return {
        "ms": 1e3 * sum(one.calls * (one.seconds or 0) for one in ops),
        "floor": 1e3 * max(flops / device.bf16_flops, moved / device.hbm_bandwidth),
        "blind": dict(counts.most_common()),
        "blind_ms": 1e3 * sum(one.calls * _least(one, device) for one in blind),
        "kernels": sum(one.kind == "tpu_custom_call" for one in ops),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "largest": _largest(ops, options.largest),
    }


def _counted(ops, cycles: dict[str, tuple[int, bool]], device) -> list:
    """The operations, with the seconds of kernels: by their bundles, at least by their bytes.

    Equal kernels are compiled once, under the name of one of them.
    """

    def what(one):
        return one.family, one.bytes, one.flops

    compiled = {what(one): cycles[one.name][0] for one in ops if one.name in cycles}
    found = []
    for one in ops:
        if one.kind == "tpu_custom_call" and what(one) in compiled:
            seconds = compiled[what(one)] / device.clock
            seconds = max(seconds, one.bytes / device.hbm_bandwidth)
            one = one._replace(seconds=seconds, kind="kernel")
        found.append(one)
    return found


def _least(one, device) -> float:
    """Seconds of one call at the chip's peaks."""
    return max(one.bytes / device.hbm_bandwidth, one.flops / device.bf16_flops)


def _largest(ops, count: int) -> list[str]:
    """Lines of the operations that take longest."""
    ranked = sorted(ops, key=lambda one: -one.calls * (one.seconds or 0))
    lines = []
    for one in ranked[:count]:
        ms = 1e3 * one.calls * (one.seconds or 0)
        where = one.kind if one.kind == "kernel" else one.source[-70:]
        lines.append(f"  {ms:8.3f} ms  {one.calls:5} x {one.name:40} {where}")
    return lines


def _compile(case: Case, name: str, chip: str):
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
        if name == "both":
            shapes = (jax.eval_shape(case.run, *case.shapes), *case.shapes)
            run = both
        placed = jax.tree.map(
            lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place), shapes
        )
        return jax.jit(run).lower(*placed).compile()


if __name__ == "__main__":
    main()
