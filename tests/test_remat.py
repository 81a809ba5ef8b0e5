"""Every remat policy has the gradients of "none", and holds less where it promises to."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import Var
from reference.weights import random_weights
from test_mesh import CFG, SMALL, batch_of

from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.parameter_tree import abstract_params
from v4jax.planner.estimate import estimate
from v4jax.planner.hardware import hardware_of
from v4jax.remat import POLICIES, policy_name
from v4jax.train.loss import loss_and_routing
from v4jax.train.memories import check_memories

FAST = ("layer", "offload")
SLOW = [name for name in POLICIES if name not in ("none", *FAST)]


@functools.cache
def gradients(remat: str):
    """(path -> gradient, bytes of temporaries of the compiled program)."""
    params = from_official(SMALL, random_weights(SMALL, 0))
    router = params.pop("router")
    batch = {name: x[:2] for name, x in batch_of().items()}

    def loss(params):
        public = params | {"router": router}
        return loss_and_routing(SMALL, public, batch, Context(remat=remat))[0]

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    grads = flatten_dict(jax.tree.map(np.asarray, compiled(params)))
    return grads, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "remat", [*FAST, *[pytest.param(name, marks=pytest.mark.long) for name in SLOW]]
)
def test_gradients_are_those_of_keeping_everything(remat):
    got, expected = gradients(remat)[0], gradients("none")[0]
    for path, value in expected.items():
        # Recomputed sums may be fused in another order, in float32.
        error = np.abs(got[path] - value).max()
        assert error <= 1e-5 * np.abs(value).max() + 1e-8, path


@functools.cache
def kept(remat: str) -> int:
    """Bytes of device memory that the forward pass keeps for the backward pass, by its trace."""
    params = abstract_params(SMALL)
    tokens = jnp.zeros((2, 1024), jnp.int32)

    def loss(params):
        return loss_and_routing(SMALL, params, {"tokens": tokens}, Context(remat=remat))[0]

    traced = jax.make_jaxpr(lambda params: jax.vjp(loss, params)[1])(params).jaxpr
    arrays = {var: var.aval for var in traced.outvars if isinstance(var, Var)}
    return sum(
        math.prod(aval.shape) * aval.dtype.itemsize
        for aval in arrays.values()
        if aval.memory_space != jax.memory.Space.Host
    )


@pytest.mark.slow
def test_each_policy_keeps_less_than_the_one_before():
    order = ("none", "experts", "attention", "dots", "layer", "offload")
    found = [kept(remat) for remat in order]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(order)


def test_layers_keep_a_fraction_and_offload_keeps_no_streams():
    streams = 2 * 1024 * SMALL.hc_mult * SMALL.hidden_size * 4
    assert kept("layer") < 0.2 * kept("none")
    patterns = sum(group.repeats for group in SMALL.layer_groups)
    assert kept("layer") - kept("offload") == patterns * streams


def test_the_estimate_orders_policies_alike():
    """A pattern of several layers works on all of them at once, so its working set is larger."""
    found = {
        remat: estimate(dataclasses.replace(CFG, remat=remat), hardware_of("v5p"))
        for remat in POLICIES
    }
    order = ("none", "experts", "attention", "dots", "layer", "offload")
    held = [found[remat].memory["activations"] for remat in order]
    assert held == sorted(held, reverse=True)
    work = [sum(part[0] for part in found[remat].parts.values()) for remat in POLICIES]
    assert min(work) == work[0] and max(work) == work[1]  # none, layer
    assert found["offload"].parts == found["layer"].parts


def test_true_and_false_are_layer_and_none():
    assert policy_name(True) == dataclasses.replace(CFG, remat=True).remat == "layer"
    assert policy_name(False) == dataclasses.replace(CFG, remat=False).remat == "none"
    assert Context(remat=True) == Context(remat="layer")
    with pytest.raises(ValueError, match="remat: got 'all'; allowed: none, layer, attention, exp"):
        dataclasses.replace(CFG, remat="all")


def test_offload_needs_host_memory():
    kinds = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(
        platform="toaster", process_index=0, addressable_memories=lambda: kinds
    )
    mesh = types.SimpleNamespace(devices=np.array([device]))
    check_memories(CFG, mesh)
    with pytest.raises(ValueError, match="remat: got 'offload'.*toaster has only device"):
        check_memories(dataclasses.replace(CFG, remat="offload"), mesh)
    with pytest.raises(ValueError, match="optimizer_memory: got 'host'.*toaster has only device"):
        check_memories(dataclasses.replace(CFG, optimizer_memory="host"), mesh)
