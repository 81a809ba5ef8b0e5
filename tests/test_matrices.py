"""Orthogonalising cut matrices: the result of one device, each matrix worked on once, every byte moved there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.matrices import on_whole_matrices
from sharding.mesh import make_mesh, parse_mesh
from v4jax.train.muon import newton_schulz


@pytest.mark.parametrize(
    "shape, spec, seen",  # seen: matrices that one device orthogonalises
    [
        ((4, 4, 16, 24), P(None, "expert", "fsdp", "tensor"), 2),  # 16 matrices on 8 devices
        ((2, 6, 16, 24), P(None, "expert", "fsdp", "tensor"), 2),  # 12: filled up
        ((3, 16, 24), P(None, ("fsdp", "expert"), "tensor"), 1),  # 3: fewer than devices; gathered along the last axis
        ((16, 24), P("fsdp", None), 1),  # one matrix: repeated work is all there is
        ((8, 24, 16), P(), 1),  # copies everywhere: shared out
        ((9, 24, 16), P(None, None, ("expert", "tensor")), 2),  # cut and copied
    ],
)
def test_cut_matrices_are_orthogonalised_once(shape, spec, seen):
    mesh = make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2"))
    x = jax.random.normal(jax.random.key(0), shape)
    stacks = []

    def f(stack):
        stacks.append(len(stack))
        assert stack.shape[1:] == shape[-2:]
        return newton_schulz(stack)

    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, spec)
        run = jax.jit(lambda x: on_whole_matrices(f, x, spec), in_shardings=place, out_shardings=place)
        got = run(jax.device_put(x, place))
    # Ten iterations of a cubic amplify the rounding of differently ordered sums.
    np.testing.assert_allclose(got, newton_schulz(x), atol=2e-5)
    assert set(stacks) == {seen}


def test_a_stack_that_fills_the_devices_moves_by_all_to_all_only():
    mesh = make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2"))
    spec = P(None, "expert", "fsdp", "tensor")
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((4, 4, 16, 24), jnp.float32, sharding=NamedSharding(mesh, spec))
        text = jax.jit(lambda x: on_whole_matrices(newton_schulz, x, spec)).lower(x).compile().as_text()
    assert text.count(" all-to-all(") == 4
    assert not any(kind in text for kind in ("all-gather", "all-reduce", "collective-permute", "reduce-scatter"))
