"""The whole model: embedding, residual streams, scanned layers, collapse, norm, head, and MTP.

`forward` is the public entry point: it takes a plain dict of arrays and returns logits. Parameters
are one nested dict. Its "router" holds what no gradient moves, selection bias and hash tables;
tables are float32 arrays of integers, so that jax.grad takes the whole dict.

Shapes: B batch, S positions, X streams, D hidden, V vocabulary, L layers, K active experts.
Next file to read: v4jax/model/block.py.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.embedding import embed_lookup
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.kernels.matmul import dense
from v4jax.model.block import stack
from v4jax.model.hyper import HyperHead
from v4jax.model.indexer import IndexLoss
from v4jax.model.moe import Routing
from v4jax.model.mtp import MTP, run_mtp
from v4jax.model.norm import RMSNorm
from v4jax.model.segments import Collect, read_segments, without_last_tokens
from v4jax.model.weights import SparseMode, Weights
from v4jax.quant.fake import check_quant


class Hidden(NamedTuple):
    """Results of the network before the head.

    Attributes:
      x_BSD: normalised final state; x @ head gives the logits of the next token.
      mtp_x_BSD: the same for the token after the next; None without MTP. It is meaningless at a
        document's last position.
      head_DV: the head in the compute dtype, so that a loss can apply it piece by piece.
      routing: group name -> block name -> Routing with a first axis for layers; "mtp" -> "block" ->
        Routing.
      index: group name -> block name -> IndexLoss with a first axis for layers, where the indexer
        is trained.
    """

    x_BSD: jax.Array
    mtp_x_BSD: jax.Array | None
    head_DV: jax.Array
    routing: dict[str, dict[str, Routing]]
    index: dict[str, dict[str, IndexLoss]]


class Output(NamedTuple):
    """Logits of every position, and what the routers did.

    Attributes:
      logits: float32 [B,S,V]; position t predicts token t+1.
      mtp_logits: float32 [B,S,V]; position t predicts token t+2. None without MTP.
      aux: routing (see Hidden).
    """

    logits: jax.Array
    mtp_logits: jax.Array | None
    aux: dict[str, dict[str, Routing]]


class Transformer(Weights):
    """The model up to the head; declares every weight.

    remat: recompute each pattern of layers in the backward pass.
    """

    cfg: ModelConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BS: jax.Array,
        segment_BS: jax.Array | None = None,
        collect: Collect = Collect(),
    ) -> Hidden:
        cfg, context = self.cfg, self.context
        table_VD = Embedding(*context, cfg, name="embed")()
        head_DV = Head(*context, cfg, name="head")()
        segments = read_segments(
            cfg, tokens_BS.shape[1], segment_BS, self.rules.shards("act_seq")
        )._replace(collect=collect)
        with jax.named_scope("embed"):
            x_BSD = embed_lookup(self.rules, table_VD, tokens_BS).astype(self.dtype)
        x_BSXD = jnp.broadcast_to(
            x_BSD[:, :, None], (*x_BSD.shape[:2], cfg.hc_mult, cfg.hidden_size)
        )
        x_BSXD = self.rules.constrain(x_BSXD, "act_batch", "act_seq", "act_streams", "act_embed")
        routing, index = {}, {}
        for group in cfg.layer_groups:
            layers = stack(*context, cfg, group.kinds, group.repeats, self.remat, group.name)
            (x_BSXD, _), (routing[group.name], index[group.name]) = layers(
                (x_BSXD, None), tokens_BS, segments
            )
        mtp_x_BSD = None
        if cfg.num_nextn_predict_layers:
            with jax.named_scope("mtp"):
                next_BS = jnp.pad(tokens_BS[:, 1:], ((0, 0), (0, 1)))
                next_BSD = embed_lookup(self.rules, table_VD, next_BS).astype(self.dtype)
                mtp = nn.remat(MTP) if self.remat else MTP
                counted = without_last_tokens(segments, next_BS)
                mtp_x_BSD, route, _ = run_mtp(
                    mtp(*context, cfg, name="mtp"), x_BSXD, next_BSD, next_BS, counted
                )
                routing["mtp"] = {"block": route}
        x_BSD = HyperHead(*context, cfg, name="hc_head")(x_BSXD)
        return Hidden(
            RMSNorm(*context, cfg.rms_norm_eps, name="norm")(x_BSD),
            mtp_x_BSD,
            head_DV,
            routing,
            index,
        )


class Embedding(Weights):
    """The token table, cut as the layout says, because `embed_lookup` needs no whole table."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(
            nn.initializers.normal(self.cfg.initializer_range), ("vocab", "embed")
        )
        return self.param("weight", init, (self.cfg.vocab_size, self.cfg.hidden_size), jnp.float32)


class Head(Weights):
    """The output matrix, which is not tied to the embedding."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.cfg.initializer_range)
        return self.weight(
            "weight", (self.cfg.hidden_size, self.cfg.vocab_size), ("embed", "vocab"), init
        )


def project_logits(rules: AxisRules, x_BSD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Logits x @ head, float32 [B,S,V]."""
    logits = dense(x_BSD, head_DV, jnp.float32)
    return rules.constrain(logits, "act_batch", "act_seq", "act_vocab")


def apply(
    cfg: ModelConfig,
    params,
    tokens_BS: jax.Array,
    segment_BS: jax.Array | None = None,
    *,
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    quant: str = "none",
    collect: Collect = Collect(),
    chosen=None,
    sparse: SparseMode = SparseMode(),
) -> Hidden:
    """Runs the network up to the head; `params` is the public dict, "router" included.

    Args:
      collect: what routing holds beside loads and balance loss.
      chosen: group -> block -> indices of experts [L,B,S,K], as `Collect(index=True)` returns them;
        None: the scores choose.

    Raises:
      ValueError: rows that do not divide over the devices that cut the sequence, or sizes that
        `quant` cannot represent.
    """
    check_quant(cfg, quant, rules.shards("expert_hidden"))
    shards = rules.shards("act_seq")
    if tokens_BS.shape[1] % shards:
        raise ValueError(
            f"tokens: got rows of {tokens_BS.shape[1]}; must divide by {shards}, "
            "the mesh axes that cut the sequence"
        )
    weights = {name: value for name, value in params.items() if name != "router"}
    model = Transformer(rules, jnp.dtype(dtype), quant, sparse, cfg, remat)
    variables = {"params": weights, "router": params["router"]}
    if chosen is not None:
        variables["chosen"] = {
            group: {block: {"ffn": {"index": index}} for block, index in blocks.items()}
            for group, blocks in chosen.items()
        }
    return model.apply(variables, tokens_BS, segment_BS, collect)


def forward(
    cfg: ModelConfig,
    params,
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    quant: str = "none",
    *,
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype | None = None,
    remat: bool = False,
) -> Output:
    """Logits of every position, differentiable in params.

    Under jit, cfg, quant, rules, dtype and remat must be static.

    Args:
      params: the nested dict of `v4jax.load` or `init_params`.
      tokens_BS: int [B,S], ids in [0, vocab_size). Other ids are not detected; their logits are
        meaningless.
      segment_ids_BS: int [B,S], documents of packed rows, 0 for padding; None where each row is one
        document.
      quant: "none", or "official" for the low-precision numbers of the served model
        (v4jax/quant/fake.py).
      rules: layout, for the ambient mesh (jax.set_mesh).
      dtype: compute dtype; by default that of the embedding.

    Raises:
      ValueError: shapes that do not fit, or a quant that does not exist or does not fit the model's
        sizes.
    """
    if (
        tokens_BS.ndim != 2
        or tokens_BS.shape[1] < 1
        or not jnp.issubdtype(tokens_BS.dtype, jnp.integer)
    ):
        raise ValueError(
            f"tokens: got {tokens_BS.dtype} {tokens_BS.shape}; must be integers [B, S] with S >= 1"
        )
    if segment_ids_BS is not None and segment_ids_BS.shape != tokens_BS.shape:
        raise ValueError(
            f"segment_ids: got {segment_ids_BS.shape}; must be as tokens, {tokens_BS.shape}"
        )
    dtype = params["embed"]["weight"].dtype if dtype is None else jnp.dtype(dtype)
    return _forward(cfg, params, tokens_BS, segment_ids_BS, rules, dtype, remat, quant)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _forward(cfg, params, tokens_BS, segment_BS, rules, dtype, remat, quant) -> Output:
    hidden = apply(
        cfg, params, tokens_BS, segment_BS, rules=rules, dtype=dtype, remat=remat, quant=quant
    )
    logits = project_logits(rules, hidden.x_BSD, hidden.head_DV)
    mtp_logits = None
    if hidden.mtp_x_BSD is not None:
        mtp_logits = project_logits(rules, hidden.mtp_x_BSD, hidden.head_DV)
    return Output(logits, mtp_logits, hidden.routing)


def init_params(cfg: ModelConfig, key: jax.Array):
    """Fresh parameters: matrices are normal with standard deviation initializer_range.

    Norms are 1; sinks, ape and biases are 0; hash tables are balanced; hyper-connections start near
    a static mix (docs/equations.md#mhc).
    """
    return jax.jit(lambda key: nn.unbox(_boxed(cfg, key)))(key)


def abstract_params(cfg: ModelConfig):
    """Shapes and dtypes of the parameters (jax.ShapeDtypeStruct), without computing anything."""
    return nn.unbox(_abstract_boxed(cfg))


def param_axes(cfg: ModelConfig):
    """Logical axes of the parameters: the same tree, a tuple of names (or None) for each array."""

    def is_box(leaf):
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(lambda leaf: tuple(leaf.names), _abstract_boxed(cfg), is_leaf=is_box)


@functools.cache
def _abstract_boxed(cfg: ModelConfig):
    """Shapes, dtypes and axes; cached, because several callers trace the model and that is slow."""
    return jax.eval_shape(lambda: _boxed(cfg, jax.random.key(0)))


def _boxed(cfg: ModelConfig, key: jax.Array):
    """Parameters in Flax's boxes, which carry the logical axes."""
    variables = Transformer(AxisRules(), jnp.dtype(jnp.float32), "none", SparseMode(), cfg).init(
        key, jnp.zeros((1, 1), jnp.int32)
    )
    return dict(variables["params"]) | {"router": dict(variables["router"])}
