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


@functools.cache
def expected(sparse=SparseMode(), cfg=CFG):
    """(loss, gradients) of two rows on one device, without the kernel."""
    return of("reference", rows(), sparse=sparse, cfg=cfg)


def rows():
    """Two packed rows."""
    return {name: jnp.asarray(x[:2]) for name, x in batch_of().items()}


def test_two_layers_have_the_loss_and_gradients_of_the_reference():
    same(of("pallas_tpu", rows()), expected(), 1e-5)  # sums in another order


def test_on_eight_devices_that_cut_positions_and_heads():
    """benchmarks/kernel_losses.py runs every named layout."""
    kernel = of("pallas_tpu", rows(), "fsdp=2,context=2,tensor=2", "full")
    same(kernel, expected(), 1e-5)


@pytest.mark.long
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


LEARNS = SparseMode(train_indexer=True)


@pytest.mark.parametrize(
    "mesh", ["", pytest.param("fsdp=2,context=2,tensor=2", marks=pytest.mark.long)]
)
def test_entries_that_are_gathered_in_the_kernel(mesh):
    """The indexer learns from the mass of those that it chose."""
    kernel = of("pallas_tpu", rows(), mesh, "full", LEARNS, GATHERS)
    same(kernel, expected(LEARNS, GATHERS), 1e-5)


def test_the_indexer_learns_the_same_from_the_kernels_mass():
    kernel = of("pallas_tpu", rows(), sparse=LEARNS)
    same(kernel, expected(LEARNS), 1e-5)


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
