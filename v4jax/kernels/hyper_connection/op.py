"""A site of hyper-connections around a sublayer: the way in, and the way out to the streams.

The way in collapses the streams with weights that the streams themselves give, and also gives the
weights of the way out (docs/equations.md#mhc). v4jax/model/hyper.py composes them of smaller ops:
that is the reference, which on TPU passes over all streams several times. Here each way is one
kernel, and one for its gradient.

Shapes: B batch, S positions, X streams, D hidden, M weights of a site ((2+X)*X), P those of the way
out ((1+X)*X).
Next file to read: v4jax/kernels/hyper_connection/blocks.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.manual import on_own_tokens, vary_like
from sharding.rules import AxisRules
from v4jax.kernels.choice import Kernels
from v4jax.kernels.hyper_connection import expand_tpu, site_tpu
from v4jax.kernels.hyper_connection.blocks import Site
from v4jax.kernels.hyper_connection.site_tpu import Saved, SiteWeights
from v4jax.kernels.tpu import LANES, beyond_vmem, check_fits, on_tpu

_ROWS = 8
"""Rows of a float32 matrix that lie together."""


class Ways(NamedTuple):
    """One implementation: the way in and the way out."""

    site: Callable
    expand: Callable


class SiteResult(NamedTuple):
    """What the way in gives.

    Attributes:
      x_BSXD: the streams, for the way out: gradients from there are added where those of the way
        in are made.
      u_BSD: the collapsed streams, in their dtype.
      pre_BSX, post_BSX, comb_BSXX: float32; comb is (source, target).
    """

    x_BSXD: jax.Array
    u_BSD: jax.Array
    pre_BSX: jax.Array
    post_BSX: jax.Array
    comb_BSXX: jax.Array


def reference(composed: Callable, *inputs):
    """`composed` of the inputs, as v4jax/model/hyper.py composes it of smaller ops."""
    return composed(*inputs)


def pallas_site(
    rules: AxisRules,
    site: Site,
    x_BSXD: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
) -> SiteResult:
    """The way in, in one kernel; other platforms than TPU interpret it, which is slow.

    Args:
      rules: the layout; each device works on its own tokens.
      fn: float32 [X*D,M].
      base: float32 [M].
      scale: float32 [3], of pre, post and comb.

    Raises:
      ValueError: sizes that the kernel does not take (`unfit`).
    """
    check_fits("hyper_connection", unfit(x_BSXD))
    n, width = site.streams, x_BSXD.shape[3]
    fn_XMD = jnp.swapaxes(fn.reshape(n, width, -1), 1, 2)
    scale_M = jnp.concatenate([jnp.full(size, scale[i]) for i, size in enumerate((n, n, n * n))])

    def local(x_bsxd, parameters: SiteWeights):
        parameters = jax.tree.map(lambda w: vary_like(w, x_bsxd), parameters)
        seq = x_bsxd.shape[1]
        found: tuple[jax.Array, ...] = _site(site, jnp.moveaxis(_filled(x_bsxd), 2, 1), parameters)
        x_bxsd, u_bsd, weights_bms = found
        results = jnp.moveaxis(x_bxsd, 1, 2), u_bsd, jnp.swapaxes(weights_bms, 1, 2)
        return jax.tree.map(lambda x: x[:, :seq], results)

    parameters = SiteWeights(fn_XMD, base[:, None], scale_M[:, None])
    x_BSXD, u_BSD, weights_BSM = on_own_tokens(
        rules, local, x_BSXD, whole=parameters, check_vma=not site.interpret
    )
    comb_BSXX = weights_BSM[..., 2 * n : (2 + n) * n].reshape(*x_BSXD.shape[:2], n, n)
    pre_BSX, post_BSX = weights_BSM[..., :n], weights_BSM[..., n : 2 * n]
    return SiteResult(x_BSXD, u_BSD, pre_BSX, post_BSX, comb_BSXX)


def pallas_expand(
    rules: AxisRules, y_BSD: jax.Array, x_BSXD: jax.Array, post_BSX: jax.Array, comb_BSXX: jax.Array
) -> jax.Array:
    """The way out in one kernel: `expand` of v4jax/kernels/streams.py.

    Raises:
      ValueError: sizes that the kernel does not take (`unfit`).
    """
    check_fits("hyper_connection", unfit(x_BSXD))
    comb_BSP = comb_BSXX.reshape(*comb_BSXX.shape[:2], -1)
    weights_BSP = jnp.concatenate([post_BSX, comb_BSP], axis=-1)

    def local(x_bsxd, y_bsd, weights_bsp):
        x_bxsd, weights_bps = (
            jnp.moveaxis(_filled(x_bsxd), 2, 1),
            jnp.swapaxes(_filled(weights_bsp), 1, 2),
        )
        new_bxsd: jax.Array = _expand(not on_tpu(), x_bxsd, _filled(y_bsd), weights_bps)
        return jnp.moveaxis(new_bxsd, 1, 2)[:, : x_bsxd.shape[1]]

    return on_own_tokens(rules, local, x_BSXD, y_BSD, weights_BSP, check_vma=on_tpu())


def _filled(x: jax.Array) -> jax.Array:
    """`x` with positions (axis 1) of zeros up to a multiple of LANES."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), *((0, 0),) * (x.ndim - 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _site(site: Site, x_BXSD: jax.Array, parameters: SiteWeights) -> tuple[jax.Array, ...]:
    """(the streams, collapsed streams [B,S,D], weights [B,M,S])."""
    return _site_fwd(site, x_BXSD, parameters)[0]


def _site_fwd(site: Site, x_BXSD, parameters: SiteWeights):
    u_BSD, weights_BMS, mix_BMS, inverse_B1S = site_tpu.forward(site, x_BXSD, parameters)
    return (x_BXSD, u_BSD, weights_BMS), (x_BXSD, parameters, mix_BMS, inverse_B1S)


def _site_bwd(site: Site, saved, ct):
    x_BXSD, parameters, mix_BMS, inverse_B1S = saved
    ct_x, ct_u, ct_weights = ct
    saved = Saved(mix_BMS, inverse_B1S, ct_u, ct_weights, ct_x)
    ct_x, ct_fn, ct_logits_BMS = site_tpu.backward(site, x_BXSD, parameters, saved)
    ct_base_M1 = ct_logits_BMS.sum((0, 2))[:, None]
    ct_scale_M1 = (ct_logits_BMS * mix_BMS).sum((0, 2))[:, None]
    return ct_x, SiteWeights(ct_fn.sum((0, 1)), ct_base_M1, ct_scale_M1)


_site.defvjp(_site_fwd, _site_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expand(interpret: bool, x_BXSD, y_BSD, weights_BPS) -> jax.Array:
    return expand_tpu.forward(interpret, x_BXSD, y_BSD, weights_BPS)


def _expand_fwd(interpret: bool, x_BXSD, y_BSD, weights_BPS):
    saved = (x_BXSD, y_BSD, weights_BPS)
    return _expand(interpret, *saved), saved


def _expand_bwd(interpret: bool, saved, ct_BXSD):
    x_BXSD, y_BSD, weights_BPS = saved
    return tuple(expand_tpu.backward(interpret, x_BXSD, y_BSD, weights_BPS, ct_BXSD))


_expand.defvjp(_expand_fwd, _expand_bwd)


IMPLEMENTATIONS = {
    "reference": Ways(reference, reference),
    "pallas_tpu": Ways(pallas_site, pallas_expand),
}
"""They take different arguments: `reference` composes the ops that it is given."""


def in_kernels(kernels: Kernels, x_BSXD: jax.Array) -> bool:
    """Whether kernels run: they are named, or are the platform's best and can.

    It is chosen when the program is traced, for the devices of the mesh or the default ones.
    """
    if kernels.hyper_connection is not None:
        return kernels.hyper_connection == "pallas_tpu"
    # Whoever names one of these gets it. `matmul` is named for the products of other layers too.
    named = (kernels.streams, kernels.sinkhorn) != (None, None)
    return not named and on_tpu() and unfit(x_BSXD) == ""


def unfit(x_BSXD: jax.Array) -> str:
    """Why the kernels do not take streams of this shape, in words; "" if they do."""
    _, seq, streams, width = x_BSXD.shape
    if not on_tpu():
        return ""
    if seq < LANES:
        return f"{seq} tokens a row; a step of a kernel takes {LANES}"
    if width % LANES:
        return f"hidden size {width}; on TPU it must divide by {LANES}"
    if (2 + streams) * streams % _ROWS:
        return f"{streams} streams, whose {(2 + streams) * streams} weights fill no whole rows"
    # Streams, two gradients of them and the new one, in two buffers each.
    need = (8 * streams + 2) * LANES * width * x_BSXD.dtype.itemsize
    return beyond_vmem(f"{streams} streams of {width} {x_BSXD.dtype}", need)
