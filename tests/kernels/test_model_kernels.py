"""Every op of the model is computed as its Context says, in training and in decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_kernel_choice import OPS
from trees import small_config

from configs import demo
from v4jax.context import Context
from v4jax.generate.cache import empty_cache, extend, logits_of, split_layers
from v4jax.kernels.choice import Kernels, kernels_from
from v4jax.parameter_tree import abstract_params
from v4jax.train.loss import loss_and_routing
from v4jax.train.step import optimizer_of

CFG = small_config(compress_ratios=(4, 128, 0), num_hidden_layers=2, num_hash_layers=0)


@pytest.fixture
def called(monkeypatch):
    """The set of (op, implementation) that were called by name."""
    names = set()

    def noted(function, name):
        def run(*args):
            names.add(name)
            return function(*args)

        return run

    for op, file in OPS.items():
        for name, found in list(file.IMPLEMENTATIONS.items()):
            if isinstance(found, tuple):
                spy = type(found)(*(noted(function, (op, name)) for function in found))
            else:
                spy = noted(found, (op, name))
            monkeypatch.setitem(file.IMPLEMENTATIONS, name, spy)
    return names


def trace_training(ctx):
    tokens = jax.ShapeDtypeStruct((2, 140), jnp.int32)
    jax.eval_shape(
        lambda params, tokens: jax.grad(
            lambda params: loss_and_routing(CFG, params, {"tokens": tokens}, ctx)[0]
        )(params),
        abstract_params(CFG),
        tokens,
    )


def trace_decoding(ctx):
    def step(params):
        cache = empty_cache(CFG, 2, 2**15)
        tokens, count = jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
        chunk, _ = extend(CFG, split_layers(CFG, params), cache, tokens, count, ctx)
        return logits_of(params, chunk.x_BTD, ctx)

    jax.eval_shape(step, abstract_params(CFG))


@pytest.mark.parametrize("trace", [trace_training, trace_decoding])
def test_all_ops_are_the_reference(called, trace):
    trace(Context(kernels=kernels_from("reference")))
    assert called == {(op, "reference") for op in OPS} - {("newton_schulz", "reference")}


@pytest.mark.parametrize("name", OPS["newton_schulz"].IMPLEMENTATIONS)
def test_the_optimizer_takes_the_name_that_is_chosen(called, name):
    cfg = dataclasses.replace(demo.get_config(), model=CFG, kernels=f"newton_schulz={name}")
    params = {key: x for key, x in abstract_params(CFG).items() if key != "router"}
    optimizer = optimizer_of(cfg)
    jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    assert called == {("newton_schulz", name)}


@pytest.mark.parametrize("trace", [trace_training, trace_decoding])
def test_ops_have_the_names_that_are_chosen(called, trace):
    """What a name excludes is not called: no op goes its own way."""
    chosen = Kernels(
        attention="blocked",
        fused_attention="reference",
        index_scores="by_head",
        top_k="bisection",
        expert_ffn="every_expert",
        sinkhorn="factors",
        streams="multiply_adds",
        hyper_connection="reference",
        matmul="written_gradient",
        rotate="written_gradient",
    )
    trace(Context(kernels=chosen))
    names = {(op, name) for op, name in dataclasses.asdict(chosen).items() if name is not None}
    assert {one for one in called if one[0] != "pooling"} <= names
    assert names - called <= {("expert_ffn", "every_expert")}  # it may be called by itself
