"""Every remat policy has the gradients of "none", and holds less where it promises to."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference.weights import random_weights
from test_mesh import CFG, SMALL, batch_of

from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.remat import POLICIES, check_host_memory, policy_name
from v4jax.train.loss import loss_and_routing

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
    "remat", [*FAST, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]
)
def test_gradients_are_those_of_keeping_everything(remat):
    got, expected = gradients(remat)[0], gradients("none")[0]
    for path, value in expected.items():
        error = np.abs(got[path] - value).max()
        assert error <= 1e-6 * np.abs(value).max() + 1e-9, path


def test_true_and_false_are_layer_and_none():
    assert policy_name(True) == dataclasses.replace(CFG, remat=True).remat == "layer"
    assert policy_name(False) == dataclasses.replace(CFG, remat=False).remat == "none"
    assert Context(remat=True) == Context(remat="layer")
    with pytest.raises(ValueError, match="remat: got 'all'; allowed: none, layer, attention, exp"):
        dataclasses.replace(CFG, remat="all")


def test_offload_needs_host_memory():
    kinds = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(platform="toaster", addressable_memories=lambda: kinds)
    check_host_memory("layer", [device])
    with pytest.raises(ValueError, match="remat: got 'offload'.*toaster has only device"):
        check_host_memory("offload", [device])
