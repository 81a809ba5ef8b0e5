"""One training step (loss, gradients, clipping, optimizer, router bias) and where its state lives.

Axes: B batch, S positions.
Next file to read: v4jax/parameters.py.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.host_memory import on_host
from sharding.params import named_shardings
from sharding.rules import AxisRules
from v4jax.adapters.tree import abstract_adapters
from v4jax.api import PACKED, packed_formats
from v4jax.context import Collect, Context, SparseMode
from v4jax.functional import init_params
from v4jax.kernels.choice import kernels_from
from v4jax.packed_tree import Formats, packed_shardings
from v4jax.parameter_tree import ADAPTERS, abstract_params, param_axes
from v4jax.train.adapters import dropout_key, from_b, of_b, split, teacher_shardings, trained_axes
from v4jax.train.balance import load_metrics, update_bias
from v4jax.train.config import TrainConfig
from v4jax.train.gradients import gradients
from v4jax.train.memories import check_memories
from v4jax.train.muon import Numbers, clip_apart, freeze, global_norm, is_index, optimizer
from v4jax.train.programs import CompiledTogether, Compiling
from v4jax.train.schedule import learning_rate
from v4jax.train.watch import watched


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "router", "optimizer", "step", "base"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run, without its place in the data.

    Attributes:
      params: the weights that gradients train; with cfg.lora the pairs, {"lora": ...}.
      router: selection bias and hash tables, which no gradient trains.
      optimizer: optax state.
      step: steps done, int32 scalar.
      base: with cfg.lora all other weights, which never change, and with objective distill the
        pairs of teachers; otherwise {}.
    """

    params: Any
    router: Any
    optimizer: Any
    step: jax.Array
    base: Any = dataclasses.field(default_factory=dict)

    @property
    def public(self):
        """The nested dict that `v4jax.forward` takes."""
        return dict(self.base) | self.saved

    @property
    def saved(self):
        """The part of it that a checkpoint holds: all but the base."""
        return dict(self.params) | {"router": self.router}


def schedule_of(cfg: TrainConfig) -> optax.Schedule:
    """The learning rate of each step (docs/equations.md#schedule)."""
    return learning_rate(
        cfg.learning_rate, cfg.steps, cfg.warmup_steps, cfg.decay_steps, cfg.final_lr_ratio
    )


def optimizer_of(cfg: TrainConfig, rules: AxisRules = AxisRules()) -> optax.GradientTransformation:
    """Clipping by global norm, then Muon and AdamW.

    The layout decides where Muon works; it does not change the state.
    """
    axes = (
        jax.tree_util.tree_leaves_with_path(
            trained_axes(cfg), is_leaf=lambda x: isinstance(x, tuple)
        )
        if rules
        else ()
    )
    specs = {tuple(key.key for key in path): rules.spec(names) for path, names in axes}
    main, ratio = schedule_of(cfg), cfg.index_learning_rate / cfg.learning_rate
    inner = optimizer(
        main,
        cfg.weight_decay,
        cfg.momentum,
        specs,
        (lambda step: ratio * main(step)) if ratio else None,
        Numbers(
            cfg.momentum_dtype,
            cfg.moment_dtype,
            cfg.newton_schulz_dtype,
            cfg.optimizer_memory,
            kernels_from(cfg.kernels).newton_schulz,
        ),
        "adamw" if cfg.lora is None else cfg.lora.optimizer,
    )
    return optax.chain(clip_apart(cfg.clip_norm), inner)


def sparse_mode(cfg: TrainConfig) -> SparseMode:
    """How CSA layers attend in the stage that `cfg` describes, and whether their indexer trains."""
    alone = cfg.attention == "indexer"
    return SparseMode(
        dense=cfg.attention != "sparse",
        train_indexer=alone or (cfg.attention == "sparse" and cfg.index_learning_rate > 0),
    )


def state_from(cfg: TrainConfig, params) -> TrainState:
    """A fresh state around the public parameter dict."""
    weights = {name: value for name, value in params.items() if name != "router"}
    trained, base = split(cfg, weights)
    begun = optimizer_of(cfg).init(trained)
    return TrainState(trained, params["router"], begun, jnp.zeros((), jnp.int32), base)


def train_step(
    cfg: TrainConfig,
    rules: AxisRules,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    chosen=None,
    *,
    watch: bool = False,
):
    """(state, batch) -> (state, metrics), one optimizer step.

    Pure; jit it with cfg, rules and watch static and state donated. Metrics are float32 scalars:
    loss, nll, mtp_nll, balance, grad_norm, learning_rate, expert_load_max, expert_load_mean. If the
    indexer trains, there are also index_kl, index_kl_uniform and index_captured. With
    attention="indexer" all other weights stay unchanged.

    Args:
      batch: as for `loss` (train/loss.py).
      chosen: experts chosen beforehand (train/anticipate.py); None: the step chooses them.
      watch: also return metrics["watch"], a tree of measurements (train/watch.py).
    """

    sparse, alone = sparse_mode(cfg), cfg.attention == "indexer"
    ctx = Context(
        rules=rules,
        dtype=cfg.dtype,
        quant=cfg.quant,
        sparse=sparse,
        collect=Collect(watch=watch),
        kernels=kernels_from(cfg.kernels),
        remat=cfg.remat,
        dropout=0.0 if cfg.lora is None else cfg.lora.dropout,
    )

    frozen = {"base": state.base, "key": dropout_key(cfg, state.step)}
    weights = (state.params, state.router)
    grads, metrics, routing = gradients(cfg, ctx, *weights, batch, chosen, **frozen)
    with jax.named_scope("optimizer"):
        grads, weights = from_b(cfg, grads), of_b(cfg, state.params)
        updates, opt_state = optimizer_of(cfg, rules).update(grads, state.optimizer, weights)
        params = optax.apply_updates(state.params, from_b(cfg, updates))
        # One of the two, indexer and main model, does not train in this stage.
        if alone or (cfg.index_learning_rate and not sparse.train_indexer):

            def held(path):
                return is_index(path) != alone

            params, opt_state = (
                freeze(params, state.params, held),
                freeze(opt_state, state.optimizer, held),
            )
    metrics |= load_metrics(routing)
    metrics |= {"grad_norm": global_norm(grads), "learning_rate": schedule_of(cfg)(state.step)}
    if watch:
        metrics["watch"] = watched(cfg.model, routing, state.router, grads, updates)
    router = state.router if alone else update_bias(state.router, routing, cfg.router_bias_rate)
    return TrainState(params, router, opt_state, state.step + 1, state.base), metrics


def state_shardings(
    cfg: TrainConfig,
    rules: AxisRules,
    mesh: Mesh,
    formats: Formats | None = None,
    teachers: Any = None,
) -> TrainState:
    """NamedSharding of every array of the state; optimizer state is cut like its weight.

    Where cfg.optimizer_memory says so, it lies in the host's memory, except scalars.

    Args:
      formats: of a packed base; None: those of the files at cfg.init_from.
      teachers: their pairs (teacher_pairs), of which the shapes count; None: those of the files at
        cfg.distill.teachers.

    Raises:
      ValueError: a weight that does not divide over the mesh (see named_shardings), a layout that
        would cut blocks of a packed base, or teachers that cannot be read.
    """
    weights = named_shardings(mesh, rules, abstract_params(cfg.model), param_axes(cfg.model))
    router = weights.pop("router")
    params, base = weights, {}
    if cfg.lora is not None:
        pairs = abstract_adapters(cfg.model, cfg.lora)
        params = {ADAPTERS: named_shardings(mesh, rules, pairs, trained_axes(cfg)[ADAPTERS])}
        base = weights
        if cfg.lora.base_dtype == PACKED:
            formats = packed_formats(cfg.init_from) if formats is None else formats
            base = packed_shardings(mesh, rules, cfg.model, formats)
            base.pop("router")
        base |= teacher_shardings(cfg, rules, mesh, teachers)
    everywhere: Any = NamedSharding(mesh, PartitionSpec())  # it takes the place of an array
    abstract = jax.eval_shape(lambda: state_from(cfg, init_params(cfg.model, jax.random.key(0))))

    def masked(leaf):
        return isinstance(leaf, optax.MaskedNode)  # another optimizer's parameter

    away = cfg.optimizer_memory == "host"
    opt_state = optax.tree.map_params(
        optimizer_of(cfg),
        lambda leaf, place: leaf if masked(leaf) else place,
        abstract.optimizer,
        jax.tree.map(on_host, params) if away else params,
        transform_non_params=lambda _: everywhere,
        is_leaf=masked,
    )
    return TrainState(params, router, opt_state, everywhere, base)


def batch_sharding(rules: AxisRules, mesh: Mesh) -> NamedSharding:
    """The sharding of tokens and segment ids [B,S]."""
    return NamedSharding(mesh, rules.spec(("act_batch", "act_seq")))


def check_batch(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> None:
    """Raises ValueError if batch_size or seq_len does not divide over what cuts it.

    These are the mesh axes and, for batch_size, gradient_accumulation too.
    """
    count = cfg.micro_batches
    for field, name, more in (("batch_size", "act_batch", count), ("seq_len", "act_seq", 1)):
        axes = rules.mesh_axes(name)
        parts = math.prod(sizes[axis] for axis in axes) * more
        if (got := getattr(cfg, field)) % parts:
            factors = [f"{axis}={sizes[axis]}" for axis in axes]
            factors += [f"gradient_accumulation={more}"] if more > 1 else []
            raise ValueError(
                f"{field}: got {got}; must divide by what splits it, "
                f"{' x '.join(factors)} = {parts}"
            )


def init_state(cfg: TrainConfig, shardings: TrainState) -> TrainState:
    """A fresh state with random weights, created shard by shard where it will live."""
    init = jax.jit(
        lambda key: state_from(cfg, init_params(cfg.model, key)), out_shardings=shardings
    )
    return init(jax.random.key(cfg.seed))


def compile_step(
    cfg: TrainConfig,
    rules: AxisRules,
    shardings: TrainState,
    mesh: Mesh,
    *,
    watch: bool = False,
    ahead: bool = False,
):
    """The jitted step, with donated state, outputs placed like inputs, and replicated metrics.

    Args:
      ahead: whether it takes chosen experts too.

    Raises:
      ValueError: see check_memories.
    """
    check_memories(cfg, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = batch_sharding(rules, mesh)
    return jax.jit(
        functools.partial(train_step, cfg, rules, watch=watch),
        in_shardings=(shardings, place, None) if ahead else (shardings, place),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


class Steps:
    """The steps of a run: plain, watched, or with experts chosen ahead.

    Each kind compiles when it is first needed.
    """

    def __init__(self, compile_step: Callable, compiling: Compiling = contextlib.nullcontext):
        """Takes the function `compile_step`, with all arguments bound but watch and ahead.

        compiling: as for CompiledTogether.
        """
        self._compile, self._compiling = compile_step, compiling
        self._kinds: dict[tuple[bool, bool], CompiledTogether] = {}

    def __call__(self, state: TrainState, batch, chosen=None, *, watch: bool = False):
        """(state, metrics), as train_step."""
        kind = watch, chosen is not None
        if kind not in self._kinds:
            jitted = self._compile(watch=watch, ahead=chosen is not None)
            self._kinds[kind] = CompiledTogether(jitted, self._compiling)
        return self._kinds[kind](state, batch, *(() if chosen is None else (chosen,)))

    def texts(self) -> list[str]:
        """The compiled steps so far, as HLO text."""
        return [text for program in self._kinds.values() for text in program.texts()]
