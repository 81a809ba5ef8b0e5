"""Mixture of experts: hash or score routing, clamped SwiGLU experts, one shared expert.

Router scores, gate weights and activations are float32 (docs/equations.md#moe, official `Gate` and
`Expert`).

Shapes: B batch, S positions, D hidden, E experts, K active experts, P rows sorted by expert (one
per assignment), V vocabulary, R rounds; lower case = this device's share.
Next file to read: v4jax/model/hyper.py.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.counting import running_sum
from sharding.experts import Groups, apply_experts
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.kernels.expert_ffn import (
    JOINED_SHARE,
    Activation,
    ExpertWeights,
    clamped_swiglu,
    every_expert,
    expert_ffn,
    pays_every_expert,
)
from v4jax.kernels.matmul import dense
from v4jax.model.segments import Segments
from v4jax.model.watch import Diagnostics
from v4jax.model.weights import Weights
from v4jax.quant.fake import mxfp4_weight


class Routing(NamedTuple):
    """Results of one layer's router.

    Attributes:
      load_E: float32, tokens of the whole batch that chose each expert; the sum is K per token that
        counts.
      balance: float32 scalar, balance loss (docs/equations.md#losses); 0 in hash layers, where
        nothing that the gate learns would move a token.
      index_BSK: int32, experts that the scores chose; None if hash-routed or without Collect.index.
      diagnostics: those of the whole layer (v4jax/model/watch.py); None without Collect.watch.
    """

    load_E: jax.Array
    balance: jax.Array
    index_BSK: jax.Array | None = None
    diagnostics: Diagnostics | None = None


def router_scores(x_BSD: jax.Array, gate_DE: jax.Array) -> jax.Array:
    """sqrt(softplus(x @ gate)), float32 [B,S,E]."""
    logit = dense(x_BSD.astype(jnp.float32), gate_DE)
    # Below -20, softplus(z) is exp(z) to float32 precision, and its root is exp(z / 2). The split
    # keeps the gradient of the root finite at any logit. The clip at -160 keeps every score above
    # 0, or a token whose experts all score 0 would have no weights.
    low = logit < -20
    small = jnp.exp(jnp.clip(logit, -160, -20) / 2)
    return jnp.where(low, small, jnp.sqrt(jax.nn.softplus(jnp.where(low, 0, logit))))


def gate_weights(score_BSE: jax.Array, index_BSK: jax.Array, scale: float) -> jax.Array:
    """Weights of the chosen experts: score[index] / sum(score[index]) * scale, [B,S,K].

    Scores are unbiased: the bias selects only (docs/equations.md#trap-27).
    """
    chosen = jax.nn.one_hot(index_BSK, score_BSE.shape[-1], dtype=bool)
    picked = jnp.sum(jnp.where(chosen, score_BSE[:, :, None], 0), axis=-1)
    return _shares(picked) * scale


def _shares(score: jax.Array) -> jax.Array:
    """score / sum(score) over the last axis, for scores above 0.

    Scores are first divided by the largest: the gradient of a quotient divides by the square of its
    denominator, which float32 rounds to 0 for a sum below 1e-19. A common factor changes no share,
    so it needs no gradient.
    """
    relative = score / jax.lax.stop_gradient(score.max(-1, keepdims=True))
    return relative / relative.sum(-1, keepdims=True)


def choose(rules: AxisRules, score_BSE: jax.Array, active: int) -> jax.Array:
    """The `active` experts of highest score, int32 [B,S,K].

    On a mesh each device chooses for its own tokens: XLA would gather the scores of the whole batch
    on every device for its top-k.
    """

    def top(score_bse):
        return jax.lax.top_k(score_bse, active)[1]

    if not rules:
        return top(score_BSE)
    act = rules.spec(("act_batch", "act_seq", None))
    return jax.shard_map(top, in_specs=act, out_specs=act)(score_BSE)


def expert_share(
    rules: AxisRules, index_BSK: jax.Array, segments: Segments, experts: int
) -> jax.Array:
    """f_i = E / (K T) * number of tokens that choose expert i, in the document of each token.

    T is the number of the document's tokens that count (docs/equations.md#losses).

    Returns:
      float32 [B,S,E]; [B,1,E] where each row is one document.
    """
    scale = experts / index_BSK.shape[-1]
    if segments.extent_2BS is None:
        count_BS1 = (
            jnp.ones((1, 1, 1)) if segments.counts_BS is None else segments.counts_BS[..., None]
        )
        chosen_B1E = jnp.sum(_chosen(index_BSK, experts) * count_BS1, axis=1, keepdims=True)
        tokens = jnp.sum(
            jnp.broadcast_to(count_BS1, (*index_BSK.shape[:2], 1)), axis=1, keepdims=True
        )
        return chosen_B1E * scale / jnp.maximum(tokens, 1)
    seq = rules.mesh_axes("act_seq")

    def local(index_BsK, counts_Bs, extent_2Bs):
        # Documents cross devices. Indices are gathered, being a few bytes per token; running sums
        # of all experts are far larger.
        if seq:
            gather = functools.partial(jax.lax.all_gather, axis_name=seq, axis=1, tiled=True)
            index_BsK, counts_Bs = gather(index_BsK), gather(counts_Bs)
        one_BS1 = counts_Bs[..., None].astype(jnp.float32)
        chosen_BSE = jnp.concatenate((_chosen(index_BsK, experts) * one_BS1, one_BS1), axis=-1)
        through_BSE = running_sum(chosen_BSE)
        first_Bs, last_Bs = extent_2Bs
        total = _at(through_BSE, last_Bs) - _at(through_BSE - chosen_BSE, first_Bs)
        return total[..., :-1] * scale / jnp.maximum(total[..., -1:], 1)

    if not rules:
        return local(index_BSK, segments.counts_BS, segments.extent_2BS)
    specs = tuple(
        rules.spec(names)
        for names in (
            ("act_batch", "act_seq", None),
            ("act_batch", "act_seq"),
            (None, "act_batch", "act_seq"),
        )
    )
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0])(
        index_BSK, segments.counts_BS, segments.extent_2BS
    )


def balance_loss(score_BSE: jax.Array, share_BSE: jax.Array, segments: Segments) -> jax.Array:
    """Mean over documents, weighted by their tokens, of sum_i f_i P_i; float32 scalar.

    P_i is the mean of s_i / sum_j s_j over the document's tokens that count; share_BSE is f (see
    expert_share). Equation: docs/equations.md#losses.
    """
    each_BS = jnp.sum(share_BSE * _shares(score_BSE), axis=-1)
    if segments.counts_BS is None:
        return jnp.mean(each_BS)
    return jnp.sum(each_BS * segments.counts_BS) / jnp.maximum(segments.counts_BS.sum(), 1)


def _chosen(index_BSK: jax.Array, experts: int) -> jax.Array:
    """How often each token chose each expert, float32 [B,S,E]."""
    return jnp.sum(jax.nn.one_hot(index_BSK, experts), axis=2)


def _at(x_BSE: jax.Array, row_BS: jax.Array) -> jax.Array:
    """x[b, row[b,s]], [B,S,E]."""
    return jax.vmap(lambda x_SE, row_S: x_SE[row_S])(x_BSE, row_BS)


def balanced_table(key: jax.Array, vocab: int, experts: int, active: int) -> jax.Array:
    """A hash table for training from scratch: K different experts per token id, as float32 [V,K].

    Ids are shuffled and dealt in rounds of E. Within a round, column k maps ids one-to-one to
    experts, so every expert serves equally many ids (up to one round). The recipe of the released
    tables is unpublished.
    """
    rounds = -(-vocab // experts)
    shuffle_key, offset_key, order_key = jax.random.split(key, 3)
    place = jax.random.permutation(shuffle_key, vocab)
    offset_RK = jnp.argsort(jax.random.uniform(offset_key, (rounds, experts)), axis=1)[:, :active]
    order_RE = jnp.argsort(jax.random.uniform(order_key, (rounds, experts)), axis=1)
    turn_V, seat_V = place // experts, place % experts
    seat_VK = (seat_V[:, None] + offset_RK[turn_V]) % experts
    return jnp.take_along_axis(order_RE[turn_V], seat_VK, axis=1).astype(jnp.float32)


class MoE(Weights):
    """Routed experts plus the shared expert: (output [B,S,D], Routing).

    A variable "index" [B,S,K] in the collection "chosen" replaces the experts that scores would
    choose (v4jax/train/anticipate.py).
    """

    cfg: ModelConfig
    hash_routed: bool

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, tokens_BS: jax.Array, segments: Segments
    ) -> tuple[jax.Array, Routing]:
        cfg, experts, active = self.cfg, self.cfg.n_routed_experts, self.cfg.num_experts_per_tok
        gate_DE = self.weight(
            "gate", (x_BSD.shape[-1], experts), ("embed", "routes"), _normal(cfg), True
        )
        score_BSE = router_scores(x_BSD, gate_DE)
        if self.hash_routed:
            shape = (cfg.vocab_size, experts, active)
            init = nn.with_logical_partitioning(balanced_table, ("table_rows", "table_slots"))
            table_VK = self.variable(
                "router", "tid2eid", lambda: init(self.make_rng("params"), *shape)
            ).value
            index_BSK = jax.lax.stop_gradient(table_VK)[tokens_BS].astype(jnp.int32)
        else:
            init = nn.with_logical_partitioning(jnp.zeros, ("routes",))
            bias_E = self.variable("router", "bias", lambda: init((experts,), jnp.float32)).value
            index_BSK = self.get_variable("chosen", "index")
            if index_BSK is None:
                index_BSK = choose(
                    self.ctx.rules, jax.lax.stop_gradient(score_BSE + bias_E[None, None]), active
                )
        weight_BSK = gate_weights(score_BSE, index_BSK, cfg.routed_scaling_factor)
        balance = jnp.zeros(())
        if not self.hash_routed:
            balance = balance_loss(
                score_BSE, expert_share(self.ctx.rules, index_BSK, segments, experts), segments
            )
        chosen_BSE = _chosen(index_BSK, experts)
        if segments.counts_BS is not None:
            chosen_BSE = chosen_BSE * segments.counts_BS[..., None]
        asked = self.ctx.collect.index and not self.hash_routed
        routing = Routing(jnp.sum(chosen_BSE, axis=(0, 1)), balance, index_BSK if asked else None)
        x_BSD = self.act_quant(x_BSD)
        y_BSD = Experts(self.ctx, cfg, name="experts")(x_BSD, index_BSK, weight_BSK)
        y_BSD = y_BSD + SharedExpert(self.ctx, cfg, name="shared_experts")(x_BSD)
        return y_BSD, routing


class Experts(Weights):
    """The routed experts; each device casts its own float32 matrices to the compute dtype.

    Without w3, w1 is both matrices side by side (`split_layers` in v4jax/generate/cache.py).
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BSD, index_BSK, weight_BSK):
        cfg, hidden, width = self.cfg, x_BSD.shape[-1], self.cfg.moe_intermediate_size
        into, out = (
            ("experts", "expert_embed", "expert_hidden"),
            ("experts", "expert_hidden", "expert_embed"),
        )
        axes = {"w1": into, "w3": into, "w2": out}
        shapes = {"w1": (hidden, width), "w3": (hidden, width), "w2": (width, hidden)}
        if self.has_variable("params", "w1") and not self.has_variable("params", "w3"):
            weights = {name: self.get_variable("params", name) for name in ("w1", "w2")}
        else:
            weights = {
                name: self.param(
                    name,
                    nn.with_logical_partitioning(_normal(cfg), axes[name]),
                    (cfg.n_routed_experts, *shapes[name]),
                    jnp.float32,
                )
                for name in axes
            }
        if self.ctx.quant == "official":
            weights = {name: mxfp4_weight(w) for name, w in weights.items()}

        form, own = (
            Activation(cfg.swiglu_limit, self.ctx.quant),
            ExpertWeights(**{"w3": None} | weights),
        )
        rows, active = index_BSK.size // index_BSK.shape[-1], index_BSK.shape[-1]
        if pays_every_expert(own, rows, active):
            flat = (
                x_BSD.reshape(rows, hidden),
                index_BSK.reshape(rows, active),
                weight_BSK.reshape(rows, active),
            )
            return every_expert(form, own, *flat).reshape(x_BSD.shape)

        def expert(weights, x_PD, gate_P, groups: Groups):
            return expert_ffn(form, ExpertWeights(**{"w3": None} | weights), x_PD, gate_P, groups)

        apply = functools.partial(apply_experts, self.ctx.rules, expert, weights, axes)
        if own.w3 is not None:
            return apply(x_BSD, index_BSK, weight_BSK)
        large = functools.partial(apply, share=JOINED_SHARE)
        return jax.lax.platform_dependent(x_BSD, index_BSK, weight_BSK, cpu=large, default=apply)


class SharedExpert(Weights):
    """The expert that every token passes through, clamped like the others.

    Its input has already passed `act_quant`.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        hidden, width = x_BSD.shape[-1], self.cfg.moe_intermediate_size
        w1 = self.weight("w1", (hidden, width), ("embed", "hidden"), _normal(self.cfg), fp8=True)
        w3 = self.weight("w3", (hidden, width), ("embed", "hidden"), _normal(self.cfg), fp8=True)
        w2 = self.weight("w2", (width, hidden), ("hidden", "embed"), _normal(self.cfg), fp8=True)
        h = clamped_swiglu(dense(x_BSD, w1), dense(x_BSD, w3), self.cfg.swiglu_limit)
        h = self.act_quant(
            self.ctx.rules.constrain(h.astype(x_BSD.dtype), "act_batch", "act_seq", "act_hidden")
        )
        return dense(h, w2)


def _normal(cfg: ModelConfig):
    return nn.initializers.normal(cfg.initializer_range)
