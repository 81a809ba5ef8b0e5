"""Muon's kernels compiled for TPUs that are not there, for every matrix of both models."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import models
from sharding.targets import tpu_devices
from v4jax.planner.weights import weights_of
from v4jax.train.newton_schulz import newton_schulz

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the extra `tpu`: pip install -e '.[tpu]'",
    ),
]


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("flash", "v5p:2x2x1"),
        pytest.param("pro", "v6e:2x2", marks=pytest.mark.long),
        ("pro", "tpu7x:2x2x1"),
    ],
)
def test_every_matrix_but_the_narrow_ones_is_orthogonalised_by_the_kernels(model, target):
    weights = weights_of(getattr(models, model)())
    sides = {tuple(sorted(w.shape[-2:])) for w in weights if w.optimizer == "muon"}
    wide = {(m, n) for m, n in sides if m % 128 == 0}
    assert len(wide) > 5 and {m for m, _ in sides - wide} == {4, 24}  # those of mHC
    mesh = Mesh(np.array(tpu_devices(target)[:1]), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        for m, n in sorted(wide):
            x = jax.ShapeDtypeStruct((1, m, n), jnp.float32, sharding=place)
            text = jax.jit(newton_schulz).lower(x).compile().as_text()
            # Three kernels a step, two steps in the loop.
            assert text.count('custom_call_target="tpu_custom_call"') == 6, (m, n)
