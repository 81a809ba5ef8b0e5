"""What a layout costs a step of training or decoding, found by compiling it for any devices.

The devices need not exist. Weights are never made: the step is lowered from shapes and shardings.

Shapes: B batch.

Next file to read: sharding/audit.py.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.audit import Collective, collectives, totals
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import bytes_per_device, named_shardings
from sharding.rules import AxisRules, layout_for
from sharding.targets import topology_mesh
from v4jax.checkpoint.names import leaf_dtypes
from v4jax.generate.cache import cache_shardings, decoding_rules, empty_cache, split_layers
from v4jax.generate.steps import DecodeConfig, State, advance
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.train.config import TrainConfig
from v4jax.train.step import batch_sharding, check_batch, compile_step, state_from, state_shardings

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
      state_bytes: weights, router tables, and optimizer state or caches.
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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple]:
        """A table for people."""
        rows = [
            ("mesh", self.mesh, self.layout, self.target),
            ("state", _bytes(self.state_bytes), "", ""),
        ]
        if self.temporary_bytes is not None:
            rows.append(("temporary", _bytes(self.temporary_bytes), "", ""))
            rows.append(
                (
                    "program",
                    _bytes(self.code_bytes),
                    self.effort and f"compiled with {self.effort} effort",
                    "",
                )
            )
        rows += [("parameter", name, cut, _bytes(size)) for name, cut, size in self.largest]
        rows += [
            ("sent", f"{axes}: {kind}", f"{calls} calls", _bytes(size))
            for axes, kind, calls, size in self.collectives
        ]
        if self.expert_bytes:
            sent, least = self.expert_bytes
            rows.append(
                (
                    "experts' tokens",
                    f"{_bytes(sent)} sent",
                    f"{_bytes(least)} at least",
                    f"{sent / least:.2f}",
                )
            )
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
) -> LayoutReport:
    """Lowers a step of `cfg` (its mesh, layout and lengths) for `target`, and compiles it.

    Args:
      target: "cpu" (simulated devices), a TPU topology such as "v5p:4x4x8", or GPUs such as
        "h100:64".
      lower_only: do not compile.
      what: "train", or "decode": one new token for each of batch_size rows, in a cache of seq_len
        tokens each.
      effort: for TPUs, a name of EFFORTS; default "quick".

    Raises:
      ValueError: mesh, layout, batch, target or effort do not fit together.
    """
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    check_batch(cfg, rules, sizes)
    mesh = make_mesh(sizes) if target == "cpu" else topology_mesh(target, sizes)
    effort = _effort(effort, mesh)
    start = time.perf_counter()
    params, state, lowered = (_lower_train if what == "train" else _lower_decode)(cfg, rules, mesh)
    lowered_at = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = None if lower_only else lowered.compile(_options(effort, mesh))
    found = collectives(compiled.as_text(), mesh) if compiled else []
    least = least_expert_bytes(cfg, rules, sizes, what)
    return LayoutReport(
        what=what,
        mesh=cfg.mesh,
        layout=str(cfg.layout),
        target=target,
        state_bytes=_bytes_of(state),
        temporary_bytes=_temporary(compiled, mesh) if compiled else None,
        code_bytes=compiled.memory_analysis().generated_code_size_in_bytes if compiled else None,
        effort=effort if compiled else "",
        largest=_largest(params),
        collectives=tuple((*key, *value) for key, value in totals(found).items()),
        expert_bytes=(sent_to_experts(found, rules), least) if compiled and least else None,
        lower_seconds=lowered_at - start,
        compile_seconds=time.perf_counter() - lowered_at if compiled else None,
    )


def _is_tpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "tpu"


def _effort(effort: str | None, mesh: Mesh) -> str:
    if not _is_tpu(mesh):
        if effort is not None:
            raise ValueError(f"effort: got {effort!r}; only the compiler for TPUs has a choice")
        return ""
    effort = "quick" if effort is None else effort
    if effort not in EFFORTS:
        raise ValueError(f"effort: got {effort!r}; known: {', '.join(EFFORTS)}")
    return effort


def _options(effort: str, mesh: Mesh) -> dict[str, Any] | None:
    return EFFORTS[effort] | _KINDS.get(mesh.devices.flat[0].device_kind, {}) if effort else None


def _temporary(compiled, mesh: Mesh) -> int:
    """Bytes that the program holds at its peak beyond its arguments.

    XLA:TPU's temp_size is more than it reserves; its peak is close to what its buffer assignment
    takes. XLA:CPU's peak leaves temporaries out.
    """
    found = compiled.memory_analysis()
    return (
        found.peak_memory_in_bytes - found.argument_size_in_bytes
        if _is_tpu(mesh)
        else found.temp_size_in_bytes
    )


def _lower_train(cfg: TrainConfig, rules: AxisRules, mesh: Mesh):
    """(abstract parameters, abstract state, the lowered training step)."""
    places = state_shardings(cfg, rules, mesh)
    abstract = jax.eval_shape(functools.partial(state_from, cfg), abstract_params(cfg.model))
    state = jax.tree.map(_placed, abstract, places)
    rows = jax.ShapeDtypeStruct(
        (cfg.batch_size, cfg.seq_len), jnp.int32, sharding=batch_sharding(rules, mesh)
    )
    with jax.set_mesh(mesh):
        return (
            state.public,
            state,
            compile_step(cfg, rules, places, mesh).lower(
                state, {"tokens": rows, "segment_ids": rows}
            ),
        )


def _lower_decode(cfg: TrainConfig, rules: AxisRules, mesh: Mesh):
    """(abstract parameters, these and the cache, the lowered decoding step).

    The step is that of v4jax/generate/decode.py on loaded weights.
    """
    model = cfg.model
    dtypes = leaf_dtypes(model, cfg.dtype)
    abstract = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, dtypes[tuple(key.key for key in path)]),
        abstract_params(model),
    )
    params = jax.tree.map(
        _placed, abstract, named_shardings(mesh, rules, abstract, param_axes(model))
    )
    token_B, active_B, seed_B = (
        jax.ShapeDtypeStruct((cfg.batch_size,), dtype)
        for dtype in (jnp.int32, jnp.bool, jnp.uint32)
    )
    with jax.set_mesh(mesh):
        decoding = DecodeConfig(
            rules=decoding_rules(rules), dtype=cfg.dtype, steps=1, kernels=cfg.kernels
        )
        cache = jax.eval_shape(
            lambda: empty_cache(
                model, cfg.batch_size, cfg.seq_len, jnp.dtype(cfg.dtype), rules=decoding.rules
            )
        )
        cache = jax.tree.map(_placed, cache, cache_shardings(mesh, decoding.rules, cache))
        split = split_layers(model, params, decoding.rules, _layer)
        return (
            params,
            (params, cache),
            advance.lower(model, decoding, split, State(cache, token_B, None), active_B, seed_B),
        )


def _placed(leaf, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _layer(stack: jax.ShapeDtypeStruct, n: int) -> jax.ShapeDtypeStruct:
    """One layer of a stack; the axis of layers is not cut."""
    del n
    spec = PartitionSpec(*stack.sharding.spec[1:])
    return jax.ShapeDtypeStruct(
        stack.shape[1:], stack.dtype, sharding=NamedSharding(stack.sharding.mesh, spec)
    )


def least_expert_bytes(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], what: str = "train"
) -> int:
    """Bytes that a device must send per step so that tokens reach experts and come back.

    The load is taken as even; the result is 0 if no axis holds experts. Tokens travel there and
    back in the forward pass; in training, again where layers are rematerialised, and once each way
    as gradients. With K experts a token and n devices a group, a token is sent n-1 times where
    tokens are gathered, and K (n-1)/n times where they are exchanged.
    """
    holders = math.prod(sizes[axis] for axis in rules.mesh_axes("experts"))
    if holders == 1:
        return 0
    model = cfg.model
    if what == "decode":
        tokens, ways, layers = cfg.batch_size, 2, model.num_hidden_layers
        devices = math.prod(sizes[axis] for axis in rules.mesh_axes("act_batch"))
    else:
        tokens, ways, layers = (
            cfg.batch_size * cfg.seq_len,
            6 if cfg.remat else 4,
            model.num_hidden_layers + model.num_nextn_predict_layers,
        )
        devices = math.prod(
            sizes[axis] for axis in rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq")
        )
    rows = (
        tokens
        // devices
        * (model.num_experts_per_tok * (holders - 1) / holders if rules.exchange else holders - 1)
    )
    return int(rows * ways * layers * model.hidden_size * jnp.dtype(cfg.dtype).itemsize)


def sent_to_experts(found: list[Collective], rules: AxisRules) -> int:
    """Bytes of the collectives that the experts' dispatch makes among devices that hold experts.

    All-reduces are left out: XLA sums many gradients in one, under the joined names of all their
    sources. Every ragged all-to-all counts: nothing else makes one, and XLA:GPU does not name its
    source.
    """
    holders = set(rules.mesh_axes("experts"))
    among = [one for one in found if one.kind != "all-reduce" and set(one.axes) <= holders]
    return sum(
        one.calls * one.bytes
        for one in among
        if one.kind == "ragged-all-to-all" or "experts/shard_map" in one.source
    )


def _largest(params, count: int = 8) -> tuple[tuple[str, str, int], ...]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append((name, str(leaf.sharding.spec), _bytes_of(leaf)))
    return tuple(sorted(found, key=lambda row: -row[2])[:count])


def _bytes_of(tree) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    return bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
