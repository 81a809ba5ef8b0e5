"""The network as functions of plain dicts of arrays: fresh parameters, hidden states, logits.

Parameters are one nested dict. Its "router" holds what no gradient moves, selection bias and hash
tables; tables are float32 arrays of integers, so that jax.grad takes the whole dict. It may have
low-rank pairs of one adapter under "lora" (v4jax/adapters/tree.py): weights are then constants.

Shapes: B batch, S positions, X streams, D hidden, V vocabulary, L layers, K active experts.
Next file to read: v4jax/model/transformer.py.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.gradient_sums import LAYER, SUMS, layer_numbers
from v4jax.kernels.choice import kernels_from
from v4jax.model.adapted import DROPOUT
from v4jax.model.router import Routing
from v4jax.model.segments import read_segments
from v4jax.model.transformer import Hidden, Transformer, project_logits
from v4jax.parameter_tree import ADAPTERS, NUMBERS, TEACHERS
from v4jax.quant.fake import check_quant
from v4jax.remat import policy_name


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


def init_params(cfg: ModelConfig, key: jax.Array):
    """Fresh parameters: matrices are normal with standard deviation initializer_range.

    Norms are 1; sinks, ape and biases are 0; hash tables are balanced; hyper-connections start near
    a static mix (docs/equations.md#mhc). Shapes and logical axes alone are those of
    v4jax/parameter_tree.py.
    """
    return jax.jit(lambda key: nn.unbox(_boxed(cfg, key)))(key)


def _boxed(cfg: ModelConfig, key: jax.Array):
    """Parameters in Flax's boxes, which carry the logical axes."""
    tokens_BS = jnp.zeros((1, 1), jnp.int32)
    segments = read_segments(cfg, tokens_BS.shape[1], None)
    variables = Transformer(Context(), cfg).init(key, tokens_BS, segments)
    return dict(variables["params"]) | {"router": dict(variables["router"])}


def apply(
    cfg: ModelConfig,
    params,
    tokens_BS: jax.Array,
    segment_BS: jax.Array | None = None,
    *,
    ctx: Context = Context(),
    chosen=None,
    sums=None,
    key: jax.Array | None = None,
) -> Hidden:
    """Runs the network up to the head; `params` is the public dict, "router" included.

    If it has "lora" too, the weights are constants, and only the pairs there have gradients.

    Args:
      chosen: group -> block -> indices of experts [L,B,S,K], as `Collect(index=True)` returns them;
        None: the scores choose.
      key: of the inputs that `ctx.dropout` drops; None where it drops none.

    Raises:
      ValueError: rows that do not divide over the devices that cut the sequence, sizes that
        `ctx.quant` cannot represent, or several adapters.
    """
    check_quant(cfg, ctx.quant, ctx.rules.shards("expert_hidden"))
    shards = ctx.rules.shards("act_seq")
    if tokens_BS.shape[1] % shards:
        raise ValueError(
            f"tokens: got rows of {tokens_BS.shape[1]}; must divide by {shards}, "
            "the mesh axes that cut the sequence"
        )
    if NUMBERS in params:
        names = ", ".join(map(repr, params[NUMBERS]))
        raise ValueError(
            f"params: have the adapters {names}, of which `generate` takes one for each prompt; "
            "elsewhere choose one with v4jax.adapters.several.only(params, NAME)"
        )
    apart = ("router", ADAPTERS, TEACHERS)
    weights = {name: value for name, value in params.items() if name not in apart}
    variables = {"params": weights, "router": params["router"]}
    if ADAPTERS in params:
        variables[ADAPTERS] = params[ADAPTERS]
        ctx = dataclasses.replace(ctx, frozen=True)
    keys = {} if key is None else {DROPOUT: key}
    if chosen is not None:
        variables["chosen"] = {
            group: {block: {"ffn": {"index": index}} for block, index in blocks.items()}
            for group, blocks in chosen.items()
        }
    segments = read_segments(cfg, tokens_BS.shape[1], segment_BS, shards)
    network = Transformer(ctx, cfg)
    if sums is None:
        return cast(Hidden, network.apply(variables, tokens_BS, segments, rngs=keys))
    groups = {group.name: sums[group.name] for group in cfg.layer_groups}
    variables |= {SUMS: sums, LAYER: layer_numbers(groups)}
    hidden, changed = network.apply(variables, tokens_BS, segments, mutable=SUMS)
    return cast(Hidden, hidden)._replace(sums=changed[SUMS])


def forward(
    cfg: ModelConfig,
    params,
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    quant: str = "none",
    *,
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype | None = None,
    remat: str | bool = "none",
    kernels: str = "",
) -> Output:
    """Logits of every position, differentiable in params.

    Under jit, cfg, quant, rules, dtype, remat and kernels must be static.

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
      remat: what the backward pass recomputes (v4jax/remat.py); True is "layer".
      kernels: implementations of ops, as kernels_from reads them (v4jax/kernels/choice.py); empty:
        the best of the platform.

    Raises:
      ValueError: shapes that do not fit, a quant that does not exist or does not fit the model's
        sizes, or kernels or a remat that do not exist.
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
    dtype = params["embed"]["weight"].dtype if dtype is None else dtype
    ctx = Context(
        rules=rules,
        dtype=dtype,
        quant=quant,
        kernels=kernels_from(kernels),
        remat=policy_name(remat),
    )
    return _forward(cfg, params, tokens_BS, segment_ids_BS, ctx)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _forward(cfg, params, tokens_BS, segment_BS, ctx: Context) -> Output:
    hidden = apply(cfg, params, tokens_BS, segment_BS, ctx=ctx)
    logits = project_logits(ctx, hidden.x_BSD, hidden.head_DV)
    mtp_logits = None
    if hidden.mtp_x_BSD is not None:
        mtp_logits = project_logits(ctx, hidden.mtp_x_BSD, hidden.head_DV)
    return Output(logits, mtp_logits, hidden.routing)
