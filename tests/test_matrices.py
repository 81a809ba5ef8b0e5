"""Orthogonalising cut matrices gives the result of one device.

Each matrix is worked on once, and every byte moves there and back.
"""

import functools

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
        (
            (3, 16, 24),
            P(None, ("fsdp", "expert"), "tensor"),
            1,
        ),  # 3: fewer than devices; gathered along the last axis
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
        run = jax.jit(
            lambda x: on_whole_matrices(f, [x], [spec])[0], in_shardings=place, out_shardings=place
        )
        got = run(jax.device_put(x, place))
    # Ten iterations of a cubic amplify the rounding of differently ordered sums.
    np.testing.assert_allclose(got, newton_schulz(x), atol=2e-5)
    assert set(stacks) == {seen}


def test_cut_matrices_are_orthogonalised_in_bfloat16_too():
    mesh = make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2"))
    spec = P(None, "expert", "fsdp", "tensor")
    x = jax.random.normal(jax.random.key(0), (2, 4, 16, 24))
    rounded = functools.partial(newton_schulz, dtype="bfloat16")
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, spec)
        run = jax.jit(lambda x: on_whole_matrices(rounded, [x], [spec])[0], in_shardings=place)
        got = run(jax.device_put(x, place))
    # Sums in another order may round a factor to the neighbouring bfloat16.
    np.testing.assert_allclose(got, rounded(x), atol=0.01)


def test_stacks_with_too_few_matrices_are_shared_out_together():
    """Six arrays of one or two matrices, cut or whole, are 8 matrices on 8 devices."""
    mesh = make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2"))
    specs = [
        P(None, "fsdp", None),
        P(),
        P("fsdp", None),
        P(None, "tensor"),
        P(),
        P(None, None, "fsdp"),
    ]
    shapes = [(1, 16, 24), (16, 24), (16, 24), (16, 24), (2, 16, 24), (2, 16, 24)]
    xs = [
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(0), 6), shapes, strict=True)
    ]
    seen = []

    def f(stack):
        seen.append(len(stack))
        return stack * jnp.sum(stack, axis=(1, 2), keepdims=True)

    with jax.set_mesh(mesh):
        outs = jax.jit(lambda xs: on_whole_matrices(f, xs, specs))(xs)
    for x, out in zip(xs, outs, strict=True):
        np.testing.assert_allclose(
            out, x * jnp.sum(x, axis=(-2, -1), keepdims=True), rtol=1e-5, atol=1e-5
        )
    assert sum(seen) <= 4, seen  # each by itself: 6, on every device


@pytest.mark.parametrize(
    "mesh, shapes, specs, each",
    [  # each: matrices that one device orthogonalises
        ("fsdp=2,expert=2,tensor=2", [(4, 4, 16, 24)], [P(None, "expert", "fsdp", "tensor")], 2),
        (
            "fsdp=2,tensor=2",
            [(2, 16, 24), (1, 16, 24), (16, 24)],
            [P(None, ("fsdp", "tensor"))] * 2 + [P(("fsdp", "tensor"))],
            1,
        ),  # joined
        (
            "fsdp=2,tensor=2",
            [(3, 16, 24)],
            [P(None, ("fsdp", "tensor"))],
            1,
        ),  # none for the fourth device
    ],
)
def test_cut_matrices_move_by_all_to_all_only(mesh, shapes, specs, each):
    mesh, seen = make_mesh(parse_mesh(mesh)), []

    def f(stack):
        seen.append(len(stack))
        return newton_schulz(stack)

    with jax.set_mesh(mesh):
        xs = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        ]
        text = jax.jit(lambda xs: on_whole_matrices(f, xs, specs)).lower(xs).compile().as_text()
    assert set(seen) == {each}
    assert text.count(" all-to-all(") == 4
    assert not any(
        kind in text
        for kind in ("all-gather", "all-reduce", "collective-permute", "reduce-scatter")
    )


def test_small_stacks_of_one_shape_are_one(monkeypatch):
    """Whole and cut arrays join, unless they are too large together."""
    monkeypatch.setattr("sharding.matrices.TOGETHER", 4 * 4 * 16 * 24)  # four matrices
    keys = jax.random.split(jax.random.key(0), 5)
    xs = [
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys, [(2, 16, 24), (24, 16), (1, 2, 16, 24), (5, 16, 24), (16, 24)], strict=True
        )
    ]
    seen = []

    def f(stack):
        seen.append(stack.shape)
        return stack * jnp.sum(stack, axis=(1, 2), keepdims=True)

    want = [x * jnp.sum(x, axis=(-2, -1), keepdims=True) for x in xs]
    for got, expected in zip(on_whole_matrices(f, xs, None), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert sorted(seen) == [(1, 16, 24), (1, 24, 16), (4, 16, 24), (5, 16, 24)]
    mesh, specs = (
        make_mesh(parse_mesh("fsdp=4,expert=2")),
        [P(None, "fsdp"), P("expert"), P(None, "expert"), P(), P(None, "fsdp")],
    )
    with jax.set_mesh(mesh):
        for got, expected in zip(
            jax.jit(lambda *xs: on_whole_matrices(f, xs, specs))(*xs), want, strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
