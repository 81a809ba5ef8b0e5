"""The kernels of hyper-connections compiled for a TPU that is not there (extra `tpu`)."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from configs import models
from sharding.mesh import parse_mesh
from sharding.rules import layout_for
from sharding.targets import topology_mesh
from v4jax.context import Context
from v4jax.kernels.choice import Kernels
from v4jax.model.hyper import collapsed, expanded

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the extra `tpu`: pip install -e '.[tpu]'",
    ),
]


@pytest.mark.parametrize(("model", "mesh"), [("flash", "fsdp=2,context=2"), ("pro", "data=4")])
def test_a_site_and_its_gradient_compile_at_full_size(model, mesh):
    """Each kernel is there once, and nothing of its insides is left to XLA."""
    cfg = getattr(models, model)()
    sizes = parse_mesh(mesh)
    rules = layout_for("full", sizes)
    devices = topology_mesh("v5p:2x2x1", sizes)
    ctx = Context(rules=rules, dtype="bfloat16", kernels=Kernels())
    streams, width = cfg.hc_mult, cfg.hidden_size

    def of(shape, names, dtype="bfloat16"):
        place = NamedSharding(devices, rules.spec(names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    rows = ("act_batch", "act_seq")
    x = of((4, 512, streams, width), (*rows, None, None))
    y = of((4, 512, width), (*rows, None))
    weights = (2 + streams) * streams
    parameters = [
        of(shape, (None,) * len(shape), "float32")
        for shape in ((streams * width, weights), (weights,), (3,))
    ]

    def objective(x, y, *parameters):
        site = collapsed(ctx, cfg, x, *parameters)
        new = expanded(ctx, y + site.u_BSD, site)
        return jnp.sum(jnp.square(new.astype(jnp.float32)))

    with jax.set_mesh(devices):
        gradient = jax.jit(jax.grad(objective, argnums=tuple(range(5))))
        text = gradient.lower(x, y, *parameters).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    for name in ("site", "expand", "site_gradients", "expand_gradients"):
        found = [one for one in calls if f"hyper_connection_{name}" in one.split(" = ")[0]]
        assert len(found) >= 1, (name, len(calls))
    assert len(calls) == 4
