"""The next token: mean negative log likelihood over the tokens to be learned.

The head sees a few positions at a time, so logits of a whole batch never exist. Under a layout that
cuts the vocabulary the logits stay cut.

Equations: docs/equations.md#losses.
Shapes: B batch, S positions, D hidden, V vocabulary.
Next file to read: v4jax/train/losses/mtp.py.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sharding.manual import vary, vary_like
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.matmul import dense
from v4jax.model.adapted import Weight, base_product, factors
from v4jax.model.transformer import Hidden
from v4jax.train.losses.term import Batch, Term

LOGIT_BYTES = 2**29
"""Bytes of float32 logits that one device computes at a time.

Each time, the gradient of the head is read, added to and written.
"""


def mean(hidden: Hidden, batch: Batch, ctx: Context):
    """(loss, {"nll": loss}): nats per token."""
    nll = mean_nll(hidden.x_BSD, hidden.head_DV, batch, 1, ctx)
    return nll, {"nll": nll}


def count(cfg: ModelConfig, batch: Batch) -> jax.Array:
    """Number of tokens with a next token to be learned."""
    del cfg
    return targets(batch, 1)[1].sum().astype(jnp.float32)


TERM = Term(mean, count)


def mean_nll(
    x_BSD: jax.Array, head_DV: Weight, batch: Batch, ahead: int, ctx: Context
) -> jax.Array:
    """Mean of -log softmax(x @ head)[token `ahead` positions later] over those that count."""
    label_BS, counts_BS = targets(batch, ahead)
    nll_BS = token_nll(ctx, x_BSD, head_DV, label_BS)
    return jnp.sum(jnp.where(counts_BS, nll_BS, 0)) / jnp.maximum(counts_BS.sum(), 1)


def targets(batch: Batch, ahead: int) -> tuple[jax.Array, jax.Array]:
    """The token `ahead` positions later, int32 [B,S], and whether it counts, bool [B,S].

    It counts if it belongs to the same document, is no padding and is to be learned.
    """
    tokens_BS, segment_BS = batch["tokens"], batch.get("segment_ids")
    seq = tokens_BS.shape[1]

    def shift(x):
        return jnp.pad(x[:, ahead:], ((0, 0), (0, min(ahead, seq))))

    if segment_BS is None:
        counts_BS = jnp.broadcast_to(jnp.arange(seq) < seq - ahead, tokens_BS.shape)
    else:
        # Segments do not interleave: equal ids at both ends mean one document in between.
        counts_BS = (shift(segment_BS) == segment_BS) & (segment_BS > 0)
    return shift(tokens_BS), counts_BS & (
        shift(batch["loss_mask"]) > 0
    ) if "loss_mask" in batch else counts_BS


def token_nll(ctx: Context, x_BSD: jax.Array, head_DV: Weight, label_BS: jax.Array) -> jax.Array:
    """-log softmax(x @ head)[label], float32 [B,S], from the logits of a few positions at a time.

    Where the vocabulary is cut, each device computes the logits of its own tokens of the
    vocabulary. The devices exchange only the maximum, the sum and the label's logit.
    """
    rules = ctx.rules
    rows, columns = zip(*factors(ctx, x_BSD, head_DV), strict=True)
    if not rules:
        return _token_nll(ctx, (), rows, columns, label_BS)
    words = rules.mesh_axes("vocab")
    tokens = rules.spec(("act_batch", "act_seq"))
    return jax.shard_map(
        functools.partial(_token_nll, ctx, words),
        in_specs=(rules.spec(("act_batch", "act_seq", None)), rules.spec((None, "vocab")), tokens),
        out_specs=tokens,
    )(rows, columns, label_BS)


def _token_nll(ctx: Context, words: tuple[str, ...], rows, columns, label_BS) -> jax.Array:
    """`token_nll` of one device's positions.

    Args:
      words: mesh axes that cut the vocabulary.
      rows, columns: the factors of the logits (`factors` in v4jax/model/adapted.py), of which the
        first columns are the head.
      label_BS: ids in the whole vocabulary.
    """
    rows, columns = varying(words, rows, columns)
    batch, vocabulary = label_BS.shape[0], columns[0].shape[1]
    if words:
        label_BS = label_BS - jax.lax.axis_index(words) * vocabulary

    def nll(rows, label_BS):
        logits = chunk_logits(ctx, rows, columns)
        picked = jnp.where(jax.nn.one_hot(label_BS, vocabulary, dtype=bool), logits, 0).sum(-1)
        picked = jax.lax.psum(picked, words) if words else picked
        return log_total(logits, words) - picked

    return in_chunks(nll, LOGIT_BYTES // (4 * batch * vocabulary), (rows, label_BS))


def varying(words: tuple[str, ...], rows, columns):
    """The factors of one device's logits, as what differs between the devices that cut V."""
    rows = tuple(vary(x, words) for x in rows)
    return rows, tuple(vary_like(w, x) for x, w in zip(rows, columns, strict=True))


def chunk_logits(ctx: Context, rows, columns) -> jax.Array:
    """Logits of some positions, float32, from their factors; the first columns are the head."""
    logits = base_product(ctx, rows[0], columns[0], jnp.float32)
    for x, w in zip(rows[1:], columns[1:], strict=True):
        logits = logits + dense(x, w, jnp.float32, ctx.kernels.matmul)
    return logits


def log_total(logits: jax.Array, words: tuple[str, ...]) -> jax.Array:
    """log of the sum of exp(logits) over the whole vocabulary, which mesh axes `words` cut."""
    peak = jax.lax.stop_gradient(logits).max(-1)
    peak = jax.lax.pmax(peak, words) if words else peak
    total = jnp.exp(logits - peak[..., None]).sum(-1)
    total = jax.lax.psum(total, words) if words else total
    return jnp.log(total) + peak


def in_chunks(function: Callable, limit: int, arrays):
    """function(*arrays) [B,S] of trees of arrays [B,S,...], at most `limit` positions at a time.

    The backward pass computes each chunk again instead of keeping what it made.
    """
    batch, seq = jax.tree.leaves(arrays)[0].shape[:2]
    chunks = -(-seq // max(1, min(seq, limit)))
    if chunks == 1:
        return function(*arrays)
    chunk = -(-seq // chunks)

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, chunks * chunk - seq), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

    again = jax.checkpoint(function, prevent_cse=False)
    out = jax.lax.map(lambda args: again(*args), jax.tree.map(cut, arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :seq], out)
