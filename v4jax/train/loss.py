"""The training objective: next token + MTP + balance, averaged over the batch's real tokens.

The head sees a few positions at a time, so logits of a whole batch never exist. Under a layout that
cuts the vocabulary the logits stay cut.

Equations: docs/equations.md#losses.
Shapes: B batch, S positions, D hidden, V vocabulary.
Next file to read: v4jax/train/balance.py.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sharding.manual import vary, vary_like
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.kernels.matmul import dense
from v4jax.model.indexer import IndexLoss
from v4jax.model.segments import Collect
from v4jax.model.transformer import apply
from v4jax.model.weights import SparseMode

LOGIT_BYTES = 2**27
"""Bytes of float32 logits that one device computes at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of the loss (docs/equations.md#losses).

    DeepSeek has not published the weight of the indexer's loss.
    """

    mtp: float = 0.3
    """Weight of the multi-token-prediction loss, 0 or more."""
    balance: float = 1e-4
    """Weight of the balance loss of each sequence's experts, 0 or more."""
    index: float = 1.0
    """Weight of the indexer's loss, summed over CSA layers; 0 or more."""

    def __post_init__(self):
        for name in ("mtp", "balance", "index"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"loss weight {name}: got {getattr(self, name)}; must be 0 or above"
                )


def targets(batch: Mapping[str, jax.Array], ahead: int) -> tuple[jax.Array, jax.Array]:
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


def token_nll(
    rules: AxisRules, x_BSD: jax.Array, head_DV: jax.Array, label_BS: jax.Array
) -> jax.Array:
    """-log softmax(x @ head)[label], float32 [B,S], from the logits of a few positions at a time.

    Where the vocabulary is cut, each device computes the logits of its own tokens of the
    vocabulary. The devices exchange only the maximum, the sum and the label's logit.
    """
    if not rules:
        return _token_nll((), x_BSD, head_DV, label_BS)
    words = rules.mesh_axes("vocab")
    tokens = rules.spec(("act_batch", "act_seq"))
    return jax.shard_map(
        functools.partial(_token_nll, words),
        in_specs=(rules.spec(("act_batch", "act_seq", None)), rules.spec((None, "vocab")), tokens),
        out_specs=tokens,
    )(x_BSD, head_DV, label_BS)


def _token_nll(words: tuple[str, ...], x_BSD, head_DV, label_BS) -> jax.Array:
    """`token_nll` of one device's positions.

    Args:
      words: mesh axes that cut the vocabulary.
      label_BS: ids in the whole vocabulary.
    """
    batch, seq, _ = x_BSD.shape
    x_BSD, head_DV = vary(x_BSD, words), vary_like(head_DV, x_BSD)
    if words:
        label_BS = label_BS - jax.lax.axis_index(words) * head_DV.shape[1]
    chunk = max(1, min(seq, LOGIT_BYTES // (4 * batch * head_DV.shape[1])))
    chunks = -(-seq // chunk)
    chunk = -(-seq // chunks)

    def nll(x_BSD, label_BS):
        logits = dense(x_BSD, head_DV, jnp.float32)
        peak = jax.lax.stop_gradient(logits).max(-1)
        peak = jax.lax.pmax(peak, words) if words else peak
        total = jnp.exp(logits - peak[..., None]).sum(-1)
        picked = jnp.where(jax.nn.one_hot(label_BS, logits.shape[-1], dtype=bool), logits, 0).sum(
            -1
        )
        total, picked = jax.lax.psum((total, picked), words) if words else (total, picked)
        return jnp.log(total) + peak - picked

    if chunks == 1:
        return nll(x_BSD, label_BS)
    pad = chunks * chunk - seq
    x = jnp.moveaxis(
        jnp.pad(x_BSD, ((0, 0), (0, pad), (0, 0))).reshape(batch, chunks, chunk, -1), 1, 0
    )
    label = jnp.moveaxis(jnp.pad(label_BS, ((0, 0), (0, pad))).reshape(batch, chunks, chunk), 1, 0)
    out = jax.lax.map(lambda args: jax.checkpoint(nll, prevent_cse=False)(*args), (x, label))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1)[:, :seq]


def loss_and_routing(
    cfg: ModelConfig,
    params,
    batch: Mapping[str, jax.Array],
    *,
    weights: LossWeights = LossWeights(),
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    quant: str = "none",
    collect: Collect = Collect(),
    chosen=None,
    sparse: SparseMode = SparseMode(),
):
    """(loss, (metrics, routing)) of a batch.

        loss = nll + mtp weight * mtp_nll + balance weight * sum of balance losses over layers

    With sparse.train_indexer, index weight * the sum of indexer losses over CSA layers is added; it
    has gradients for the indexer only. Arguments are those of `loss`; `collect` and `chosen` go to
    the model.
    """
    tokens_BS, segment_BS = batch["tokens"], batch.get("segment_ids")
    hidden = apply(
        cfg,
        params,
        tokens_BS,
        segment_BS,
        rules=rules,
        dtype=dtype,
        remat=remat,
        quant=quant,
        sparse=sparse,
        collect=collect,
        chosen=chosen,
    )

    def mean_nll(x_BSD, ahead):
        label_BS, counts_BS = targets(batch, ahead)
        nll_BS = token_nll(rules, x_BSD, hidden.head_DV, label_BS)
        return jnp.sum(jnp.where(counts_BS, nll_BS, 0)) / jnp.maximum(counts_BS.sum(), 1)

    balance = sum(
        jnp.sum(route.balance) for blocks in hidden.routing.values() for route in blocks.values()
    )
    metrics = {"nll": mean_nll(hidden.x_BSD, 1), "balance": balance}
    total = metrics["nll"] + weights.balance * balance
    if hidden.mtp_x_BSD is not None:
        metrics["mtp_nll"] = mean_nll(hidden.mtp_x_BSD, 2)
        total = total + weights.mtp * metrics["mtp_nll"]
    if sparse.train_indexer:
        metrics |= index_metrics(hidden.index)
        total = total + weights.index * metrics["index_kl"]
    return total, (metrics | {"loss": total}, hidden.routing)


def index_metrics(index: Mapping[str, Mapping[str, IndexLoss]]) -> dict[str, jax.Array]:
    """index_kl, index_kl_uniform and index_captured, float32 scalars.

    index_kl is the indexers' loss: the mean over queries, summed over CSA layers. index_kl_uniform
    is the same for scores that are all equal. index_captured is 1 - index_kl / index_kl_uniform.
    """
    layers = [loss for blocks in index.values() for loss in blocks.values()]
    kl, uniform = (
        sum(
            (jnp.sum(getattr(loss, name) / jnp.maximum(loss.count, 1)) for loss in layers),
            jnp.zeros(()),
        )
        for name in ("kl", "uniform")
    )
    captured = 1 - kl / jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)
    return {"index_kl": kl, "index_kl_uniform": uniform, "index_captured": captured}


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("weights", "rules", "dtype", "remat", "quant")
)
def loss(
    cfg: ModelConfig,
    params,
    batch: Mapping[str, jax.Array],
    *,
    weights: LossWeights = LossWeights(),
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    quant: str = "none",
):
    """The training objective (docs/equations.md#losses); differentiable in params.

    Args:
      params: the nested dict of `v4jax.load` or `init_params`.
      batch: "tokens" int [B,S]; optionally "segment_ids" int [B,S], 0 for padding, and "loss_mask"
        int [B,S], 1 on tokens to be learned. Labels are the row's own next tokens.
      quant: "official" computes with low-precision numbers (QAT); gradients pass straight through
        their rounding.

    Returns:
      (loss, metrics): float32 scalars; metrics has loss, nll, mtp_nll (with MTP) and balance.
    """
    total, (metrics, _) = loss_and_routing(
        cfg, params, batch, weights=weights, rules=rules, dtype=dtype, remat=remat, quant=quant
    )
    return total, metrics
