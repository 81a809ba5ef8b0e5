"""A site of mHC and the expansion in kernels: values and gradients are those of the composition.

The kernels are interpreted.
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
from v4jax.context import Context
from v4jax.kernels.choice import Kernels
from v4jax.kernels.hyper_connection import op
from v4jax.kernels.sinkhorn import reference as sinkhorn
from v4jax.kernels.sinkhorn import unrolled
from v4jax.model.hyper import collapsed, expanded
from v4jax.train.loss import loss_and_routing

CFG = MODEL.replace(num_hidden_layers=2, num_hash_layers=0, compress_ratios=(4, 128, 0))

KERNEL, COMPOSED = Kernels(hyper_connection="pallas_tpu"), Kernels(hyper_connection="reference")


def site_and_expansion(kernels, x_BSXD, y_BSD, fn, base, scale, cfg=CFG):
    """All that a site gives but the streams themselves, and the new streams."""
    ctx = Context(kernels=kernels)
    site = collapsed(ctx, cfg, x_BSXD, fn, base, scale)
    return *site[1:], expanded(ctx, y_BSD + site.u_BSD, site)


def inputs_of(seq, dtype, width=32):
    """Random streams, a sublayer's part, and a site's parameters."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    streams, weights = CFG.hc_mult, (2 + CFG.hc_mult) * CFG.hc_mult
    x = jax.random.normal(next(keys), (2, seq, streams, width)).astype(dtype)
    y = jax.random.normal(next(keys), (2, seq, width)).astype(dtype)
    fn = 0.1 * jax.random.normal(next(keys), (streams * width, weights))
    return x, y, fn, jax.random.normal(next(keys), (weights,)), jnp.array([0.7, 1.1, 0.9])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", 1e-5),
        # Streams' gradients have 8 bits. The composition rounds both summands, the kernel the sum.
        ("bfloat16", 2**-7),
    ],
)
def test_values_and_gradients_of_rows_that_fill_no_whole_step(dtype, tolerance):
    inputs = inputs_of(150, dtype)
    values, pull = zip(
        *(
            jax.vjp(functools.partial(site_and_expansion, kernels), *inputs)
            for kernels in (KERNEL, COMPOSED)
        ),
        strict=True,
    )
    keys = jax.random.split(jax.random.key(1), len(values[1]))
    ct = tuple(
        jax.random.normal(key, x.shape).astype(x.dtype)
        for key, x in zip(keys, values[1], strict=True)
    )
    for got, want in ((values[0], values[1]), (pull[0](ct), pull[1](ct))):
        for one, other in zip(got, want, strict=True):
            one, other = (np.asarray(x, np.float32) for x in (one, other))
            assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def test_streams_of_zeros_have_the_gradient_of_the_composition():
    """One token has streams of zeros, at an eps whose derivative rsqrt(eps) would hide others."""
    cfg = CFG.replace(rms_norm_eps=1e-20)
    x, *others = inputs_of(12, "float32")
    inputs = (x.at[1, 5].set(0), *others)
    found = []
    for kernels in (KERNEL, COMPOSED):
        value, pull = jax.vjp(functools.partial(site_and_expansion, kernels, cfg=cfg), *inputs)
        found.append((value, pull(jax.tree.map(jnp.cos, value))))
    assert 0 < jnp.abs(found[1][1][0][1, 5]).max() < 100
    close(found[0], found[1], 1e-5)  # sums in another order


def test_unrolled():
    """20 iterations without loops, as on TPUs: the divisions as they are written, and gradients.

    Interpreted kernels iterate in a loop, which compiles faster.
    """
    logits_JKT = 3 * jax.random.normal(jax.random.key(0), (4, 4, 5))

    def without_loops(logits_JKT):
        return jnp.stack(unrolled([logits_JKT[:, k] for k in range(4)], 20, 1e-6), axis=1)

    def plain(logits_JKT):
        return sinkhorn(logits_JKT, 20, 1e-6)

    found = [jax.vjp(jax.jit(f), logits_JKT) for f in (without_loops, plain)]
    close(found[0][0], found[1][0], 1e-6)
    ct = jax.random.normal(jax.random.key(1), logits_JKT.shape)
    close(found[0][1](ct)[0], found[1][1](ct)[0], 1e-5)


@functools.partial(jax.jit, static_argnums=2)
def run(params, batch, ctx):
    """(loss, gradients)."""
    return jax.value_and_grad(lambda params: loss_and_routing(CFG, params, batch, ctx)[0])(params)


def of(kernels, mesh="", layout="full"):
    """(loss, gradients) of two packed rows."""
    sizes = parse_mesh(mesh)
    rules = layout_for(layout, sizes) if mesh else AxisRules()
    batch = {name: jnp.asarray(x[:2]) for name, x in batch_of().items()}
    with jax.set_mesh(make_mesh(sizes)):
        params = jax.tree.map(jnp.asarray, from_official(CFG, random_weights(CFG, 0)))
        found = run(params, batch, Context(rules=rules, kernels=kernels))
    return jax.tree.map(np.asarray, found)


@functools.cache
def expected():
    return of(COMPOSED)


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [("", "full"), pytest.param("fsdp=2,context=2,tensor=2", "full", marks=pytest.mark.long)],
)
def test_two_layers_have_the_loss_and_gradients_of_the_composition(mesh, layout):
    (loss, grads), (want, wanted) = of(KERNEL, mesh, layout), expected()
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    for path, grad in flatten_dict(wanted).items():
        fault = np.linalg.norm(flatten_dict(grads)[path] - grad)
        assert fault <= 1e-5 * np.linalg.norm(grad) + 1e-8, (path, fault)  # another order of sums


def test_what_the_kernels_do_not_take_is_named_on_tpu(monkeypatch):
    monkeypatch.setattr(op, "on_tpu", lambda: True)
    for shape, line in (
        ((1, 64, 4, 128), "64 tokens a row"),
        ((1, 128, 4, 96), "hidden size 96"),
        ((1, 128, 3, 128), "3 streams, whose 15 weights"),
        ((1, 128, 4, 16_384), "of fast memory, and 62 are there"),
    ):
        x = jnp.zeros(shape, jnp.bfloat16)
        assert line in op.unfit(x) and not op.in_kernels(Kernels(), x)
        with pytest.raises(ValueError, match="hyper_connection: got 'pallas_tpu' for .*" + line):
            op.pallas_expand(AxisRules(), x[:, :, 0], x, x[..., 0], x[..., :4])
    fits = jnp.zeros((1, 128, 4, 256), jnp.bfloat16)
    assert op.in_kernels(Kernels(), fits) and not op.in_kernels(Kernels(streams="reference"), fits)
