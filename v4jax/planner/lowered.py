"""Lowers a step of training or decoding from shapes and shardings alone.

Shapes: B batch.

Next file to read: v4jax/planner/expert_bytes.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.params import named_shardings
from sharding.rules import AxisRules
from v4jax.adapters.tree import abstract_adapters
from v4jax.api import PACKED
from v4jax.checkpoint.names import leaf_dtypes
from v4jax.config import ModelConfig
from v4jax.generate.cache import cache_shardings, decoding_rules, empty_cache, split_layers
from v4jax.generate.steps import DecodeConfig, State, advance
from v4jax.packed_tree import abstract_packed, packed_shardings, released_formats
from v4jax.parameter_tree import TEACHERS, abstract_params, param_axes
from v4jax.train.config import TrainConfig
from v4jax.train.step import batch_sharding, compile_step, state_from, state_shardings


def lower_train(cfg: TrainConfig, rules: AxisRules, mesh: Mesh):
    """(abstract parameters, abstract state, the lowered training step).

    A packed base has the formats of an instruct release, whatever is at cfg.init_from, and teachers
    have the pairs of cfg.lora.
    """
    teachers = _teachers(cfg)
    places = state_shardings(cfg, rules, mesh, released_formats(cfg.model), teachers)
    given = _given(cfg) | ({TEACHERS: teachers} if cfg.objective == "distill" else {})
    abstract = jax.eval_shape(functools.partial(state_from, cfg), given)
    state = jax.tree.map(_placed, abstract, places)
    rows = jax.ShapeDtypeStruct(
        (cfg.batch_size, cfg.seq_len), jnp.int32, sharding=batch_sharding(rules, mesh)
    )
    names = ("tokens", "segment_ids", "loss_mask") if cfg.data.masked else ("tokens", "segment_ids")
    with jax.set_mesh(mesh):
        step = compile_step(cfg, rules, places, mesh)
        return state.public, state, step.lower(state, dict.fromkeys(names, rows))


def lower_decode(cfg: TrainConfig, rules: AxisRules, mesh: Mesh, released: bool = False):
    """(abstract parameters, these and the cache, the lowered decoding step).

    The step is that of v4jax/generate/decode.py on loaded weights.

    Args:
      released: weights are packed, and the cache is in the released formats; numbers are those of
        the served model, in bfloat16.
    """
    model = cfg.model
    params = _packed_params(model, rules, mesh) if released else _plain_params(cfg, rules, mesh)
    dtype = "bfloat16" if released else cfg.dtype
    token_B, active_B, seed_B = (
        jax.ShapeDtypeStruct((cfg.batch_size,), dtype)
        for dtype in (jnp.int32, jnp.bool, jnp.uint32)
    )
    with jax.set_mesh(mesh):
        decoding = DecodeConfig(
            rules=decoding_rules(rules), dtype=dtype, steps=1, kernels=cfg.kernels
        )
        if released:
            decoding = decoding._replace(quant="official", storage="official")
        cache = jax.eval_shape(
            lambda: empty_cache(
                model,
                cfg.batch_size,
                cfg.seq_len,
                jnp.dtype(dtype),
                decoding.storage,
                rules=decoding.rules,
            )
        )
        cache = jax.tree.map(_placed, cache, cache_shardings(mesh, decoding.rules, cache))
        split = split_layers(model, params, decoding.rules, _layer)
        state = State(cache, token_B, None)  # pyright: ignore[reportArgumentType] (no array yet)
        lowered = advance.lower(model, decoding, split, state, active_B, seed_B)
        return params, (params, cache), lowered


def _teachers(cfg: TrainConfig):
    """Abstract pairs of the teachers that are adapters, by number."""
    if cfg.objective != "distill" or cfg.lora is None:
        return {}
    pairs = abstract_adapters(cfg.model, cfg.lora)
    return {str(n): pairs for n, name in enumerate(cfg.distill.teachers) if name}


def _given(cfg: TrainConfig):
    """Abstract parameters that a run begins with: float32, or the base of adapters."""
    if cfg.lora is None or cfg.lora.base_dtype == "float32":
        return abstract_params(cfg.model)
    if cfg.lora.base_dtype == PACKED:
        return abstract_packed(cfg.model, released_formats(cfg.model))
    return _loaded(cfg.model, cfg.lora.base_dtype)


def _plain_params(cfg: TrainConfig, rules: AxisRules, mesh: Mesh):
    """Abstract parameters as `v4jax.load` gives them in cfg.dtype, with their places."""
    abstract = _loaded(cfg.model, cfg.dtype)
    places = named_shardings(mesh, rules, abstract, param_axes(cfg.model))
    return jax.tree.map(_placed, abstract, places)


def _loaded(model: ModelConfig, dtype):
    """Abstract parameters as `v4jax.load` gives them in `dtype`."""
    dtypes = leaf_dtypes(model, dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, dtypes[tuple(key.key for key in path)]),
        abstract_params(model),
    )


def _packed_params(model: ModelConfig, rules: AxisRules, mesh: Mesh):
    """Abstract parameters of an instruct release, as `v4jax.load` gives them packed."""
    formats = released_formats(model)
    places = packed_shardings(mesh, rules, model, formats)
    return jax.tree.map(_placed, abstract_packed(model, formats), places)


def _placed(leaf, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _layer(stack: jax.ShapeDtypeStruct, n: int) -> jax.ShapeDtypeStruct:
    """One layer of a stack; the axis of layers is not cut."""
    del n
    spec = PartitionSpec(*stack.sharding.spec[1:])
    return jax.ShapeDtypeStruct(
        stack.shape[1:], stack.dtype, sharding=NamedSharding(stack.sharding.mesh, spec)
    )
