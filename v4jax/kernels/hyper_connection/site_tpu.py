"""The kernels of a site of hyper-connections: logits, weights, Sinkhorn and collapse in one pass.

The forward pass reads the streams once. The backward pass reads them, and the gradients of what the
site gave, once each; it finds the weights again from the saved logits.

Shapes: B batch, S positions, X streams, J source streams, K target streams, D hidden, M weights of
a site ((2+X)*X), T tokens of a step, R tokens of a strip, P columns that are worked on together, W
columns for a number of each token.
Next file to read: v4jax/kernels/hyper_connection/expand_tpu.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from v4jax.kernels.hyper_connection.blocks import (
    Block,
    Site,
    added,
    by_token,
    call,
    columns,
    exact,
    in_lanes,
    joined,
    spread,
    strips,
)
from v4jax.kernels.sinkhorn import by_factors, unrolled
from v4jax.kernels.tpu import LANES, NN, NT


class SiteWeights(NamedTuple):
    """The parameters of a site, as its kernels read them.

    Attributes:
      fn_XMD: float32.
      base_M1, scale_M1: float32, one number for each weight.
    """

    fn_XMD: jax.Array
    base_M1: jax.Array
    scale_M1: jax.Array

    def inputs(self) -> list[tuple[jax.Array, Block]]:
        return [(x, Block(x.shape)) for x in self]


def forward(site: Site, x_BXSD: jax.Array, parameters: SiteWeights):
    """(collapsed streams [B,S,D], weights [B,M,S], logits [B,M,S], inverse RMS [B,1,S]).

    Logits are those before scale and base. The inverse RMS is what the backward pass takes: 1 for
    streams of zeros. All but the first are float32.
    """
    _, streams, seq, width = x_BXSD.shape
    rows = parameters.base_M1.shape[0]
    return call(
        functools.partial(_forward, site),
        "hyper_connection_site",
        [(x_BXSD, Block((streams, seq, width), tokens=1)), *parameters.inputs()],
        [
            (x_BXSD.dtype, Block((seq, width), tokens=0)),
            (jnp.float32, Block((rows, seq), tokens=1)),
            (jnp.float32, Block((rows, seq), tokens=1)),
            (jnp.float32, Block((1, seq), tokens=1)),
        ],
        site.interpret,
    )


def _forward(site: Site, x, fn, base, scale, u, weights, mix, inverse, square_TW):
    streams, width = site.streams, x.shape[-1]

    def squares(rows):
        total = jnp.zeros((rows.size, LANES), jnp.float32)
        for j in range(streams):
            for part in columns(width):
                x_RP = x[j, rows, part].astype(jnp.float32)
                total = total + in_lanes(x_RP * x_RP)
        square_TW[rows, :] = jnp.broadcast_to(jnp.sum(total, 1, keepdims=True), total.shape)

    strips(squares)
    square_1T = square_TW[...].T[:1] / (streams * width)
    inverse_1T = jax.lax.rsqrt(square_1T + site.norm_eps)
    logits_MT = added(exact(fn[j], x[j], NT) for j in range(streams))
    mix_MT = logits_MT * inverse_1T
    weights_MT = weights_of(site, mix_MT * scale[...] + base[...])
    mix[...], weights[...] = mix_MT, weights_MT
    # Gradients take the RMS of streams of zeros for 1, as `over_rms` does.
    inverse[...] = jnp.where(square_1T == 0, 1.0, inverse_1T)
    square_TW[...] = by_token(weights_MT)

    def collapse(rows):
        pre_RX = [square_TW[rows, j : j + 1] for j in range(streams)]
        for part in columns(width):
            u_RP = added(pre_RX[j] * x[j, rows, part].astype(jnp.float32) for j in range(streams))
            u[rows, part] = u_RP.astype(u.dtype)

    strips(collapse)


def weights_of(site: Site, logits_MT: jax.Array) -> jax.Array:
    """Weights [M,T] of logits: pre, post, and comb, source after source."""
    n = site.streams
    pre_XT = jax.nn.sigmoid(logits_MT[:n]) + site.eps
    post_XT = 2 * jax.nn.sigmoid(logits_MT[n : 2 * n])
    at = [[(2 + j) * n + k for k in range(n)] for j in range(n)]
    targets = [
        jnp.concatenate([logits_MT[at[j][k] : at[j][k] + 1] for j in range(n)]) for k in range(n)
    ]
    comb = _balanced(site, targets)
    rows = [comb[k][j : j + 1] for j in range(n) for k in range(n)]
    return jnp.concatenate([pre_XT, post_XT, *rows])


def _balanced(site: Site, targets: list[jax.Array]) -> list[jax.Array]:
    """comb [J,T] of each target's logits [J,T]."""
    if not site.interpret:
        return unrolled(targets, site.iterations, site.eps)
    # XLA:CPU compiles unrolled iterations and their gradient for minutes, in many gigabytes.
    comb_JKT = by_factors(jnp.stack(targets, axis=1), site.iterations, site.eps)
    return [comb_JKT[:, k] for k in range(site.streams)]


class Saved(NamedTuple):
    """What the backward pass reads beside streams and parameters.

    Attributes:
      mix_BMS, inverse_B1S: of the forward pass.
      ct_u_BSD, ct_weights_BMS, ct_x_BXSD: gradients of the collapsed streams, of the weights, and
        of the streams where the way out reads them.
    """

    mix_BMS: jax.Array
    inverse_B1S: jax.Array
    ct_u_BSD: jax.Array
    ct_weights_BMS: jax.Array
    ct_x_BXSD: jax.Array

    def inputs(self) -> list[tuple[jax.Array, Block]]:
        axes = (1, 1, 0, 1, 1)
        return [(x, Block(x.shape[1:], axis)) for x, axis in zip(self, axes, strict=True)]


def backward(
    site: Site, x_BXSD: jax.Array, parameters: SiteWeights, saved: Saved
) -> list[jax.Array]:
    """Gradients of the streams, of fn [B,parts,X,M,D] in parts, and of the logits [B,M,S].

    These logits are those after scale and base.
    """
    _, streams, seq, width = x_BXSD.shape
    return call(
        functools.partial(_backward, site),
        "hyper_connection_site_gradients",
        [(x_BXSD, Block((streams, seq, width), tokens=1)), *parameters.inputs(), *saved.inputs()],
        [
            (x_BXSD.dtype, Block((streams, seq, width), tokens=1)),
            (jnp.float32, Block(parameters.fn_XMD.shape, apart=True)),
            (jnp.float32, Block(saved.mix_BMS.shape[1:], tokens=1)),
        ],
        site.interpret,
    )


def _backward(site: Site, x, fn, base, scale, *others):
    mix, inverse, ct_u, ct_weights, ct_out = others[:5]
    ct_x, ct_fn, ct_logits, number_TW = others[5:]
    streams, width = site.streams, x.shape[-1]

    @pl.when(pl.program_id(2) == 0)
    def _start():
        ct_fn[...] = jnp.zeros_like(ct_fn)

    def of_collapse(rows):
        total = [jnp.zeros((rows.size, LANES), jnp.float32) for _ in range(streams)]
        for part in columns(width):
            ct_RP = ct_u[rows, part].astype(jnp.float32)
            for j in range(streams):
                total[j] = total[j] + in_lanes(ct_RP * x[j, rows, part].astype(jnp.float32))
        number_TW[rows, :] = joined([jnp.sum(one, 1, keepdims=True) for one in total])

    strips(of_collapse)
    mix_MT, inverse_1T = mix[...], inverse[...]
    weights_MT, pull = jax.vjp(functools.partial(weights_of, site), mix_MT * scale[...] + base[...])
    collapsed_MT = number_TW[...].T[: weights_MT.shape[0]]
    (ct_logits_MT,) = pull(ct_weights[...] + collapsed_MT)
    ct_logits[...] = ct_logits_MT
    ct_mix_MT = ct_logits_MT * scale[...]
    # The inverse RMS r scales logits: its gradient adds x * (-r^2 / size) * sum(ct * mix).
    along_1T = jnp.sum(ct_mix_MT * mix_MT, axis=0, keepdims=True)
    along_1T = -along_1T * inverse_1T * inverse_1T / (streams * width)
    ct_MT = ct_mix_MT * inverse_1T
    for j in range(streams):
        ct_fn[j] += exact(ct_MT, x[j], NN)
    numbers = jnp.concatenate([weights_MT[:streams], along_1T])
    number_TW[...] = by_token(numbers)
    for part in columns(width):
        for j in range(streams):
            ct_TP = spread(ct_MT, fn[j, :, part], x.dtype) + ct_out[j, :, part].astype(jnp.float32)
            ct_TP = ct_TP + number_TW[:, j : j + 1] * ct_u[:, part].astype(jnp.float32)
            ct_TP = ct_TP + number_TW[:, streams : streams + 1] * x[j, :, part].astype(jnp.float32)
            ct_x[j, :, part] = ct_TP.astype(ct_x.dtype)
