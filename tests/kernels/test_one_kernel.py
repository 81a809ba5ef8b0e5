"""The model computes a layer's attention in one kernel: the same loss and gradients.

The kernel is interpreted. Whatever it does not cover is refused by name, and nothing else changes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference.weights import random_weights
from test_mesh import MODEL, batch_of
from trees import close

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.names import from_official
from v4jax.context import Context, SparseMode
from v4jax.generate.cache import empty_cache, extend, split_layers
from v4jax.kernels.choice import Kernels
from v4jax.parameter_tree import abstract_params
from v4jax.train.loss import loss_and_routing

CFG = MODEL.replace(
    num_hidden_layers=2, num_hash_layers=0, compress_ratios=(4, 128, 0), index_topk=8
)
"""A CSA layer that chooses 8 of 34 entries by a mask, an HCA layer, and MTP's window alone."""


GATHERS = CFG.replace(index_topk=4)
"""Its CSA layer gathers 4 of 34 entries."""


@functools.partial(jax.jit, static_argnums=(2, 3))
def run(params, batch, ctx, cfg):
    """(loss, gradients)."""
    return jax.value_and_grad(lambda params: loss_and_routing(cfg, params, batch, ctx)[0])(params)


def of(name, batch, mesh="", layout="full", sparse=SparseMode(), cfg=CFG):
    """(loss, gradients) of one batch, by the implementation `name` of its kernels."""
    sizes = parse_mesh(mesh)
    rules = layout_for(layout, sizes) if mesh else AxisRules()
    with jax.set_mesh(make_mesh(sizes)):
        params = jax.tree.map(jnp.asarray, from_official(CFG, random_weights(CFG, 0)))
        found = run(
            params,
            batch,
            Context(rules=rules, kernels=Kernels(fused_attention=name, top_k=name), sparse=sparse),
            cfg,
        )
    return jax.tree.map(np.asarray, found)


def same(got, want, tolerance):
    """Losses and gradients agree; a gradient's fault is measured by its norm."""
    assert float(got[0]) == pytest.approx(float(want[0]), rel=tolerance)
    for path, grad in flatten_dict(want[1]).items():
        fault = np.linalg.norm(flatten_dict(got[1])[path] - grad)
        assert fault <= tolerance * np.linalg.norm(grad) + 1e-8, (path, fault)


BATCHES = {"whole rows": {"tokens": batch_of()["tokens"]}, "packed": batch_of()}


@functools.cache
def expected(batch, sparse=SparseMode(), cfg=CFG):
    """(loss, gradients) of two rows on one device, without the kernel."""
    return of("reference", rows_of(batch), sparse=sparse, cfg=cfg)


def rows_of(batch):
    return {name: jnp.asarray(x[:2]) for name, x in BATCHES[batch].items()}


@pytest.mark.parametrize("batch", [pytest.param("whole rows", marks=pytest.mark.slow), "packed"])
def test_two_layers_have_the_loss_and_gradients_of_the_reference(batch):
    kernel = of("pallas_tpu", rows_of(batch))
    same(kernel, expected(batch), 1e-5)  # sums in another order


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ("fsdp=2,context=2,tensor=2", "full"),
        pytest.param("context=2,expert=2,tensor=2", "pod", marks=pytest.mark.slow),
    ],
)
def test_on_eight_devices_that_cut_positions_and_heads(mesh, layout):
    kernel = of("pallas_tpu", rows_of("packed"), mesh, layout)
    same(kernel, expected("packed"), 1e-5)


@pytest.mark.slow
def test_long_chunks_that_continue_rows_of_a_cache():
    """Two rows of 20 and 7 tokens, and the 40 and 31 that follow them, in HCA and window layers."""
    cfg = CFG.replace(compress_ratios=(0, 128, 0))
    params = split_layers(
        cfg, jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))
    )
    tokens = jnp.asarray(batch_of()["tokens"][:2])

    def second_chunk(name):
        kernels = Kernels(fused_attention=name)
        cache, ctx = empty_cache(cfg, 2, 256), Context(kernels=kernels)
        for first, rows, counts in ((0, 20, (20, 7)), (20, 40, (40, 31))):
            chunk, cache = extend(
                cfg, params, cache, tokens[:, first : first + rows], jnp.array(counts), ctx
            )
        return [chunk.x_BTD[row, : counts[row]] for row in range(2)]

    close(second_chunk("pallas_tpu"), second_chunk("reference"), 1e-5)


@pytest.mark.parametrize(
    ("sparse", "mesh"),
    [
        (SparseMode(train_indexer=True), ""),
        pytest.param(SparseMode(), "fsdp=2,context=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_entries_that_are_gathered_in_the_kernel(sparse, mesh):
    kernel = of("pallas_tpu", rows_of("packed"), mesh, "full", sparse, GATHERS)
    same(kernel, expected("packed", sparse, GATHERS), 1e-5)


TAUGHT = [
    (SparseMode(train_indexer=True), ""),
    pytest.param(SparseMode(train_indexer=True, dense=True), "", marks=pytest.mark.slow),
    pytest.param(SparseMode(train_indexer=True), "context=2,tensor=2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sparse", "mesh"), TAUGHT)
def test_the_indexer_learns_the_same_from_the_kernels_mass(sparse, mesh):
    same(
        of("pallas_tpu", rows_of("packed"), mesh, "full", sparse), expected("packed", sparse), 1e-5
    )


def test_what_the_kernel_does_not_cover_is_refused_by_name():
    ctx = Context(kernels=Kernels(fused_attention="pallas_tpu"))
    params = abstract_params(CFG)

    def decode(params):
        cache = empty_cache(CFG, 1, 256)
        one = jnp.ones(1, jnp.int32)
        return extend(CFG, split_layers(CFG, params), cache, one[:, None], one, ctx)[0].x_BTD

    line = "kernels: fused_attention: got 'pallas_tpu' for "
    with pytest.raises(ValueError, match=line + "a few tokens that continue a row"):
        jax.eval_shape(decode, params)
