"""Diagnostics are what NumPy finds, and measuring them does not change the step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from trees import random_params, small_config

from v4jax.diagnostics import measure, merge, spectral_norm
from v4jax.model.router import Routing
from v4jax.train.watch import plain, rms_by_group, watched

MODEL = small_config(n_routed_experts=4)


def test_spectral_norm():
    rng = np.random.default_rng(0)
    comb = rng.uniform(0.01, 1, (5, 7, 4, 4)).astype(np.float32)
    doubly = comb.copy()
    for _ in range(50):
        doubly /= doubly.sum(-1, keepdims=True)
        doubly /= doubly.sum(-2, keepdims=True)
    for one in (comb, doubly):
        expected = np.linalg.svd(one, compute_uv=False)[..., 0]
        np.testing.assert_allclose(
            spectral_norm(jnp.asarray(one)), expected, rtol=1e-4
        )  # 8 steps of the power method


def test_a_look_at_a_sublayer():
    rng = np.random.default_rng(0)
    pre, post, comb = rng.random((2, 3, 4)), rng.random((2, 3, 4)) * 2, rng.random((2, 3, 4, 4))
    y, x = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 4, 8))
    arrays = [jnp.asarray(a, jnp.float32) for a in (pre, post, comb, y, x)]
    diagnostics = measure(*arrays)
    gates = np.concatenate((pre, post), -1)
    off = 1 - (np.trace(comb, axis1=-2, axis2=-1) / comb.sum((-2, -1))).mean()
    expected = (
        pre.mean(),
        post.mean(),
        np.ptp(gates),
        np.linalg.norm(comb, 2, (-2, -1)).max(),
        off,
        abs(y).max(),
        abs(x).max(),
        np.sqrt((x**2).mean()),
    )
    np.testing.assert_allclose(diagnostics, expected, rtol=1e-5)
    later = merge(
        diagnostics,
        diagnostics._replace(
            pre=diagnostics.pre + 1,
            out_max=diagnostics.out_max + 1,
            stream_rms=diagnostics.stream_rms + 1,
        ),
    )
    assert (
        later.pre == diagnostics.pre + 0.5
        and later.out_max == diagnostics.out_max + 1
        and later.stream_rms == diagnostics.stream_rms + 1
    )


def test_layers_stand_in_order_and_groups_hold_all():
    """Flash's pattern in small: 2 hash-routed layers, then pairs; the MTP layer comes last."""
    params = random_params(MODEL)
    router, trained = params.pop("router"), params
    diagnostics = measure(
        jnp.ones((1, 1, 4)),
        jnp.ones((1, 1, 4)),
        jnp.ones((1, 1, 4, 4)),
        jnp.ones((1, 1, 2)),
        jnp.ones((1, 1, 4, 2)),
    )
    routing, loads = {}, {}
    for group in MODEL.layer_groups:
        routing[group.name] = {}
        for i in range(len(group.kinds)):
            layers = [
                group.first + repeat * len(group.kinds) + i for repeat in range(group.repeats)
            ]
            load = np.array([[4 + layer, 2, 2, 0] for layer in layers], np.float32)
            loads |= dict(zip(layers, load, strict=True))
            stacked = type(diagnostics)(
                *(jnp.stack([value + layer for layer in layers]) for value in diagnostics)
            )
            routing[group.name][f"block_{i}"] = Routing(
                jnp.asarray(load), jnp.zeros(len(layers)), None, stacked
            )
    loads[7] = np.array([1, 1, 1, 1], np.float32)
    routing["mtp"] = {
        "block": Routing(
            jnp.asarray(loads[7]),
            jnp.zeros(()),
            None,
            type(diagnostics)(*(value + 7 for value in diagnostics)),
        )
    }
    found = jax.jit(functools.partial(watched, MODEL))(routing, router, trained, trained)
    layers = found["layers"]
    for layer in range(8):
        share = loads[layer] / loads[layer].sum()
        entropy = -sum(p * math.log(p) for p in share if p) / math.log(4)
        expected = {
            "load_max": 4 * share.max(),
            "load_entropy": entropy,
            "load_dead": float(layer < 7),
            "stream_max": 1.0 + layer,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(layers[name][layer], value, rtol=1e-5, err_msg=name)
        assert math.isnan(layers["bias_max"][layer]) == (layer < 3)
    np.testing.assert_allclose(layers["bias_max"][7], router["mtp"]["block"]["ffn"]["bias"].max())
    np.testing.assert_allclose(
        found["grad_rms"]["embed"], np.sqrt((trained["embed"]["weight"] ** 2).mean()), rtol=1e-5
    )
    assert plain(found)["layers"]["bias_max"][0] is None and plain({"x": [math.inf, 1.0]}) == {
        "x": [None, 1.0]
    }


def test_groups():
    trees = {
        "embed": {"weight": jnp.full((2, 3), 3.0)},
        "head": {"weight": jnp.asarray([3.0, 4.0])},
    }
    assert list(rms_by_group(trees)) == ["embed", "head"]
    np.testing.assert_allclose([*rms_by_group(trees).values()], [3.0, math.sqrt(12.5)], rtol=1e-6)
