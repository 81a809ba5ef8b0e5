"""What a layout costs a step of training or decoding, found by compiling it for any devices.

The devices need not exist. Weights are never made: the step is lowered from shapes and shardings.

Next file to read: v4jax/planner/lowered.py.
"""

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from sharding.audit import collectives, totals
from sharding.host_memory import is_on_host
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import bytes_per_device
from sharding.rules import layout_for
from sharding.targets import gpu_of, topology_mesh
from v4jax.planner.estimate import platform_of
from v4jax.planner.expert_bytes import least_expert_bytes, sent_to_experts
from v4jax.planner.hardware import target_of
from v4jax.planner.lowered import lower_decode, lower_train
from v4jax.planner.timing import Timing, check_estimate, timing_of
from v4jax.train.config import TrainConfig
from v4jax.train.step import check_batch

EFFORTS = {"quick": {"optimization_level": 19}, "full": {}}
"""Compiler options by name.

19 is XLA's EFFORT_O1, with which a full model compiles for TPUs in less than half the time. "full"
is what a run compiles with; it may hold more where the chip has room, to hide exchanges behind
products. Only XLA:TPU was tried with it.
"""

_KINDS = {"TPU7x": {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": False}}
"""Kind of chip -> options it needs.

Without this one libtpu 0.0.42 ends the process with "Check failed: std::abs(inc) < core_count()"
when it compiles a sum for a sparse core.
"""


@dataclasses.dataclass(frozen=True)
class LayoutReport:
    """What compiling a layout found. Bytes are per device; seconds are this machine's.

    Attributes:
      what: "train" or "decode".
      state_bytes: weights, router tables, and optimizer state or caches; without what the host
        holds.
      host_bytes: what lies in the host's memory for one device: optimizer state and kept streams.
      temporary_bytes: what one step holds at its peak beyond the state. None if the step was only
        lowered. On XLA:CPU it says little about a TPU.
      code_bytes: the program, which lies in a TPU's memory too.
      effort: of the compiler, a name of EFFORTS; "" for a compiler without a choice.
      largest: the parameters with most bytes, as (name, cut, bytes).
      collectives: (mesh axes, kind, calls per step, bytes that a device sends per step), most bytes
        first.
      expert_bytes: what a device sends per step to bring tokens to experts and back, and the least
        that this way of dispatch can send. None if the step was only lowered or no axis holds
        experts.
      timing: XLA's estimate of the step's time; None where it was not asked for.
    """

    what: str
    mesh: str
    layout: str
    target: str
    state_bytes: int
    temporary_bytes: int | None
    code_bytes: int | None
    effort: str
    largest: tuple[tuple[str, str, int], ...]
    collectives: tuple[tuple[str, str, int, int], ...]
    expert_bytes: tuple[int, int] | None
    lower_seconds: float
    compile_seconds: float | None
    timing: Timing | None = None
    host_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple]:
        """A table for people."""
        rows = [
            ("mesh", self.mesh, self.layout, self.target),
            ("state", _bytes(self.state_bytes), "", ""),
        ]
        if self.host_bytes:
            rows.append(("state, in the host's memory", _bytes(self.host_bytes), "", ""))
        if self.temporary_bytes is not None and self.code_bytes is not None:
            rows.append(("temporary", _bytes(self.temporary_bytes), "", ""))
            effort = self.effort and f"compiled with {self.effort} effort"
            rows.append(("program", _bytes(self.code_bytes), effort, ""))
        rows += [("parameter", name, cut, _bytes(size)) for name, cut, size in self.largest]
        rows += [
            ("sent", f"{axes}: {kind}", f"{calls} calls", _bytes(size))
            for axes, kind, calls, size in self.collectives
        ]
        if self.expert_bytes:
            sent, least = self.expert_bytes
            words = (f"{_bytes(sent)} sent", f"{_bytes(least)} at least", f"{sent / least:.2f}")
            rows.append(("experts' tokens", *words))
        rows.append(("lowered in", f"{self.lower_seconds:.1f} s", "", ""))
        return rows + (
            [("compiled in", f"{self.compile_seconds:.1f} s", "", "")]
            if self.compile_seconds is not None
            else []
        )


def report_layout(
    cfg: TrainConfig,
    target: str = "cpu",
    lower_only: bool = False,
    what: str = "train",
    effort: str | None = None,
    estimate: str = "model",
    released: bool = False,
) -> LayoutReport:
    """Lowers a step of `cfg` (its mesh, layout and lengths) for `target`, and compiles it.

    Args:
      target: "cpu" (simulated devices), a TPU topology such as "v5p:4x4x8", or GPUs such as
        "h100:64" or "h200:16".
      lower_only: do not compile.
      what: "train", or "decode": one new token for each of batch_size rows, in a cache of seq_len
        tokens each.
      effort: for TPUs, a name of EFFORTS; default "quick", or "full" with estimate "compiler".
      estimate: one of ESTIMATES (v4jax/planner/timing.py).
      released: decode from packed weights and caches in the released formats.

    Raises:
      ValueError: mesh, layout, batch, target, effort or estimate do not fit together.
    """
    check_estimate(estimate, target, lower_only, effort)
    if estimate == "compiler" and not gpu_of(target):
        effort = "full"
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    check_batch(cfg, rules, sizes)
    mesh = make_mesh(sizes) if target == "cpu" else topology_mesh(target, sizes)
    check_effort(effort, target)
    effort = effort or ("quick" if _is_tpu(mesh) else "")
    start = time.perf_counter()
    if what == "train":
        params, state, lowered = lower_train(cfg, rules, mesh)
    else:
        params, state, lowered = lower_decode(cfg, rules, mesh, released)
    lowered_at = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = None if lower_only else lowered.compile(_options(effort, mesh, estimate))
    text = _text(compiled) if compiled else ""
    found = collectives(text, mesh) if compiled else []
    device = target_of(target).hardware.of_a_device(mesh.size)
    timed = estimate == "compiler"
    least = least_expert_bytes(cfg, rules, sizes, what)
    return LayoutReport(
        what=what,
        mesh=cfg.mesh,
        layout=str(cfg.layout),
        target=target,
        state_bytes=_bytes_of(state, host=False),
        host_bytes=_bytes_of(state, host=True)
        + (_memory(compiled).host_temp_size_in_bytes if compiled else 0),
        temporary_bytes=_temporary(compiled, mesh) if compiled else None,
        code_bytes=_memory(compiled).generated_code_size_in_bytes if compiled else None,
        effort=effort if compiled else "",
        largest=_largest(params),
        collectives=tuple((*key, *value) for key, value in totals(found).items()),
        expert_bytes=(sent_to_experts(found, rules), least) if compiled and least else None,
        lower_seconds=lowered_at - start,
        compile_seconds=time.perf_counter() - lowered_at if compiled else None,
        timing=timing_of(text, totals(found), device, sizes) if timed else None,
    )


def _is_tpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "tpu"


def check_effort(effort: str | None, target: str) -> None:
    """Refuses an effort that is unknown, or for a target whose compiler has no choice.

    Raises:
      ValueError: names the effort.
    """
    if effort is None:
        return
    if platform_of(target_of(target).hardware) != "tpu":
        raise ValueError(
            f"effort: got {effort!r} for {target!r}; only the compiler for TPUs has a choice"
        )
    if effort not in EFFORTS:
        raise ValueError(f"effort: got {effort!r}; known: {', '.join(EFFORTS)}")


def _options(effort: str, mesh: Mesh, estimate: str) -> dict[str, Any] | None:
    if effort:
        return EFFORTS[effort] | _KINDS.get(mesh.devices.flat[0].device_kind, {})
    return {"xla_gpu_collect_cost_model_stats": True} if estimate == "compiler" else None


def _text(compiled: Compiled) -> str:
    text = compiled.as_text()
    assert text is not None, "XLA prints every program"
    return text


def _memory(compiled: Compiled) -> Any:
    """XLA's account of what a program holds; bytes of one device."""
    found = compiled.memory_analysis()
    assert found is not None, "XLA accounts for every program"
    return found


def _temporary(compiled: Compiled, mesh: Mesh) -> int:
    """Bytes that the program holds on a device at its peak beyond its arguments.

    XLA:TPU's temp_size is more than it reserves; its peak is close to what its buffer assignment
    takes, but counts the host's memory too. XLA:CPU's peak leaves temporaries out.
    """
    found = _memory(compiled)
    if not _is_tpu(mesh):
        return found.temp_size_in_bytes
    host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
    return found.peak_memory_in_bytes - found.argument_size_in_bytes - host


def _largest(params, count: int = 8) -> tuple[tuple[str, str, int], ...]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append((name, str(leaf.sharding.spec), _bytes_of(leaf)))
    return tuple(sorted(found, key=lambda row: -row[2])[:count])


def _bytes_of(tree, host: bool = False) -> int:
    """Bytes of one device's share of abstract arrays with shardings.

    Args:
      host: count those in the host's memory, not those on the device.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_on_host(leaf.sharding) == host]
    return bytes_per_device(leaves, [leaf.sharding for leaf in leaves])


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
