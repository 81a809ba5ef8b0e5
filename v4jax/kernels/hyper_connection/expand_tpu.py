"""The kernels of the streams' expansion: new[k] = post[k] * y + sum_j comb[j,k] * x[j].

Each pass reads and writes every stream once.

Shapes: B batch, S positions, X streams (J sources, K targets), D hidden, M weights of a site, T
tokens of a step, R tokens of a strip, P columns that are worked on together, W columns for a number
of each token.
Next file to read: v4jax/kernels/matmul.py.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.hyper_connection.blocks import (
    LANES,
    Block,
    added,
    by_token,
    call,
    columns,
    in_lanes,
    joined,
    strips,
)


def forward(interpret: bool, x_BXSD, y_BSD, weights_BMS) -> jax.Array:
    """New streams [B,X,S,D]; weights are post and comb (source after source), float32."""
    inputs = _inputs(x_BXSD, y_BSD, weights_BMS)
    outputs = [(x_BXSD.dtype, inputs[0][1])]
    return call(_forward, "hyper_connection_expand", inputs, outputs, interpret)[0]


def _inputs(x_BXSD, y_BSD, weights_BMS) -> list[tuple[jax.Array, Block]]:
    tokens = {0: 1, 1: 0, 2: 1}  # the axis of tokens of each
    arrays = (x_BXSD, y_BSD, weights_BMS)
    return [(a, Block(a.shape[1:], tokens=tokens[n])) for n, a in enumerate(arrays)]


def _forward(x, y, weights, new, number_TW):
    streams, width = x.shape[0], x.shape[2]
    number_TW[...] = by_token(weights[...])

    def expand(rows):
        post_R1, comb_R1 = _weights(number_TW, rows, streams)
        for part in columns(width):
            y_RP = y[rows, part].astype(jnp.float32)
            x_RP = [x[j, rows, part].astype(jnp.float32) for j in range(streams)]
            for k in range(streams):
                mixed_RP = added(comb_R1[j][k] * x_RP[j] for j in range(streams))
                new[k, rows, part] = (post_R1[k] * y_RP + mixed_RP).astype(new.dtype)

    strips(expand)


def _weights(number_TW, rows, streams: int):
    """(post, comb): columns [R,1] of each target, and of each source and target."""
    column = [number_TW[rows, m : m + 1] for m in range(streams * (1 + streams))]
    post, comb = column[:streams], column[streams:]
    return post, [comb[j * streams : (j + 1) * streams] for j in range(streams)]


def backward(interpret: bool, x_BXSD, y_BSD, weights_BMS, ct_BXSD):
    """Gradients of streams, y and weights."""
    inputs = _inputs(x_BXSD, y_BSD, weights_BMS)
    outputs = [(a.dtype, block) for a, block in inputs]
    inputs.append((ct_BXSD, inputs[0][1]))
    name = "hyper_connection_expand_gradients"
    return call(_backward, name, inputs, outputs, interpret)


def _backward(x, y, weights, ct, ct_x, ct_y, ct_weights, number_TW):
    streams, width = x.shape[0], x.shape[2]
    number_TW[...] = by_token(weights[...])

    def undo(rows):
        post_R1, comb_R1 = _weights(number_TW, rows, streams)
        total = [jnp.zeros((rows.size, LANES), jnp.float32)] * (streams * (1 + streams))
        for part in columns(width):
            y_RP = y[rows, part].astype(jnp.float32)
            ct_RP = [ct[k, rows, part].astype(jnp.float32) for k in range(streams)]
            back_RP = added(post_R1[k] * ct_RP[k] for k in range(streams))
            ct_y[rows, part] = back_RP.astype(ct_y.dtype)
            for k in range(streams):
                total[k] = total[k] + in_lanes(y_RP * ct_RP[k])
            for j in range(streams):
                x_RP = x[j, rows, part].astype(jnp.float32)
                back_RP = added(comb_R1[j][k] * ct_RP[k] for k in range(streams))
                ct_x[j, rows, part] = back_RP.astype(ct_x.dtype)
                for k in range(streams):
                    m = streams * (1 + j) + k
                    total[m] = total[m] + in_lanes(x_RP * ct_RP[k])
        number_TW[rows, :] = joined([jnp.sum(one, 1, keepdims=True) for one in total])

    strips(undo)
    ct_weights[...] = number_TW[...].T[: weights.shape[0]]
