"""Gradients of pairs on 8 devices are those on one, whatever the layout."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference.weights import random_weights
from test_mesh import SMALL, batch_of

from configs.pro_lora import NODES
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import named_shardings
from sharding.rules import AxisRules, layout_for
from v4jax.adapters.config import Lora
from v4jax.adapters.tree import abstract_adapters, adapter_axes, init_adapters
from v4jax.checkpoint.names import from_official
from v4jax.context import Context, SparseMode
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.train.loss import loss_and_routing
from v4jax.train.step import batch_sharding

LORA = Lora(rank=2, targets=("*", "indexer.*"))


def pairs():
    """Neither factor is 0, so that both have gradients."""
    fresh = init_adapters(SMALL, LORA, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), fresh)


def run(mesh: str, layout: str | AxisRules = "full"):
    """(loss, gradients of the pairs) of 8 packed rows."""
    sizes = parse_mesh(mesh)
    rules = layout_for(layout, sizes) if mesh else AxisRules()
    ctx = Context(rules=rules, sparse=SparseMode(train_indexer=True), remat="layer")

    def loss(low, params, batch):
        return loss_and_routing(SMALL, params | {"lora": low}, batch, ctx)[0]

    device_mesh = make_mesh(sizes)
    with jax.set_mesh(device_mesh):
        places = [
            named_shardings(device_mesh, rules, abstract, axes)
            for abstract, axes in (
                (abstract_adapters(SMALL, LORA), adapter_axes(SMALL, LORA)),
                (abstract_params(SMALL), param_axes(SMALL)),
            )
        ]
        places.append(batch_sharding(rules, device_mesh))
        inputs = pairs(), from_official(SMALL, random_weights(SMALL, 0)), batch_of()
        placed = jax.device_put(inputs, tuple(places))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places[0]))
        return jax.tree.map(np.asarray, step(*placed))


@functools.cache
def on_one_device():
    return run("")


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        pytest.param("fsdp=2,expert=2,tensor=2", "full", marks=pytest.mark.long),
        pytest.param("context=2,expert=2,tensor=2", "pod", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=4", NODES, marks=pytest.mark.long),
        pytest.param("fsdp=2,expert=4", "pod", marks=pytest.mark.long),
        pytest.param("fsdp=8", "fsdp", marks=pytest.mark.long),
        pytest.param("data=8", "dp", marks=pytest.mark.long),
        pytest.param("expert=8", "ep", marks=pytest.mark.long),
        pytest.param("data=2,fsdp=2,expert=2", "ep_fsdp", marks=pytest.mark.long),
        pytest.param("expert=4,tensor=2", "ep_tp", marks=pytest.mark.long),
        pytest.param("context=4,expert=2", "cp_ep", marks=pytest.mark.long),
        pytest.param("context=2,fsdp=2,tensor=2", "full", marks=pytest.mark.long),
    ],
)
def test_gradients_on_eight_devices_are_those_on_one(mesh, layout):
    loss, grads = run(mesh, layout)
    expected_loss, expected = on_one_device()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    expected = flatten_dict(expected)
    assert sum(np.abs(value).max() > 0 for value in expected.values()) > 70
    for path, value in flatten_dict(grads).items():
        error = np.linalg.norm(value - expected[path])
        assert error <= 1e-5 * np.linalg.norm(expected[path]) + 1e-8, path
