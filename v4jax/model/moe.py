"""Mixture of experts: hash or score routing, clamped SwiGLU experts, one shared expert.

Activations are float32 (docs/equations.md#moe, official `Expert`).

Shapes: B batch, S positions, D hidden, E experts, K active experts, P rows sorted by expert (one
per assignment), V vocabulary.
Next file to read: v4jax/model/router.py.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.document_counts import times_chosen
from sharding.experts import Groups, apply_experts
from v4jax.kernels.expert_ffn.adapted import ExpertPairs, adapted_ffn
from v4jax.kernels.expert_ffn.blocked import JOINED_SHARE
from v4jax.kernels.expert_ffn.every_expert import every_expert, pays_every_expert
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights, clamped_swiglu
from v4jax.kernels.expert_ffn.op import expert_ffn
from v4jax.model.adapted import ROW
from v4jax.model.balance import balance_loss, expert_share
from v4jax.model.router import Routing, choose, gate_weights, router_scores
from v4jax.model.segments import Segments
from v4jax.model.weights import Weights
from v4jax.parameter_tree import ADAPTERS
from v4jax.quant.fake import mxfp4_weight
from v4jax.quant.packed import Packed, is_packed


class MoE(Weights):
    """Routed experts plus the shared expert: (output [B,S,D], Routing).

    A variable "index" [B,S,K] in the collection "chosen" replaces the experts that scores would
    choose (v4jax/train/anticipate.py).
    """

    hash_routed: bool

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, tokens_BS: jax.Array, segments: Segments
    ) -> tuple[jax.Array, Routing]:
        cfg, experts, active = self.cfg, self.cfg.n_routed_experts, self.cfg.num_experts_per_tok
        gate_DE = self.matrix("gate")
        score_BSE = router_scores(x_BSD, gate_DE, self.ctx)
        if self.hash_routed:
            table_VK = self.router_state("tid2eid")
            index_BSK = jax.lax.stop_gradient(table_VK)[tokens_BS].astype(jnp.int32)
        else:
            bias_E = self.router_state("bias")
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
        chosen_BSE = times_chosen(index_BSK, experts)
        if segments.counts_BS is not None:
            chosen_BSE = chosen_BSE * segments.counts_BS[..., None]
        asked = self.ctx.collect.index and not self.hash_routed
        routing = Routing(jnp.sum(chosen_BSE, axis=(0, 1)), balance, index_BSK if asked else None)
        x_BSD = self.act_quant(x_BSD)
        y_BSD = Experts(self.ctx, cfg, name="experts")(x_BSD, index_BSK, weight_BSK)
        y_BSD = y_BSD + SharedExpert(self.ctx, cfg, name="shared_experts")(x_BSD)
        return y_BSD, routing


class Experts(Weights):
    """The routed experts; each device reads its own matrices in the compute dtype.

    Without w3, w1 is both matrices side by side (`split_layers` in v4jax/generate/cache.py). Packed
    weights are read where they are multiplied.
    """

    @nn.compact
    def __call__(self, x_BSD, index_BSK, weight_BSK):
        cfg, hidden = self.cfg, x_BSD.shape[-1]
        axes = {name: self.spec(name).axes for name in ("w1", "w3", "w2")}
        if self.has_variable("params", "w1") and not self.has_variable("params", "w3"):
            weights = {name: self.get_variable("params", name) for name in ("w1", "w2")}
        else:
            weights = {name: self.stored(name) for name in axes}
        if self.ctx.quant == "official":
            weights = {
                name: w if isinstance(w, Packed) else mxfp4_weight(w) for name, w in weights.items()
            }

        form, own = Activation(cfg.swiglu_limit, self.ctx.quant), ExpertWeights.of(weights)
        low, adapter_B = {}, None
        for name in ("w1", "w3", "w2"):
            pair = self.get_variable(ADAPTERS, name)
            if pair is not None:
                low |= {f"{name}.a": pair["a"], f"{name}.b": pair["b"]}
                adapter_B = pair.get(ROW)
                _, rows_axis, columns_axis = axes[name]
                ranks = (None,) * (pair["a"].ndim - 2)
                axes[f"{name}.a"] = ("experts", rows_axis, *ranks)
                axes[f"{name}.b"] = ("experts", *ranks, columns_axis)
        rows, active = index_BSK.size // index_BSK.shape[-1], index_BSK.shape[-1]
        kernel = self.ctx.kernels.expert_ffn
        if not self.ctx.rules and not low and pays_every_expert(own, rows, active, kernel):
            flat = (
                x_BSD.reshape(rows, hidden),
                index_BSK.reshape(rows, active),
                weight_BSK.reshape(rows, active),
            )
            return every_expert(form, own, *flat).reshape(x_BSD.shape)

        if adapter_B is not None:  # its number travels to the experts with the gate
            adapter_BSK = jnp.broadcast_to(adapter_B[:, None, None], weight_BSK.shape)
            weight_BSK = jnp.stack((weight_BSK, adapter_BSK.astype(weight_BSK.dtype)), axis=-1)

        def expert(weights, x_PD, gate_P, groups: Groups):
            own, pairs, adapter_P = ExpertWeights.of(weights), ExpertPairs.of(weights), None
            if adapter_B is not None:
                gate_P, adapter_P = gate_P[:, 0], gate_P[:, 1].astype(jnp.int32)
            if self.ctx.frozen and own.w3 is not None:  # joined ones run forward only
                return adapted_ffn(form, own, pairs, x_PD, gate_P, groups, kernel, adapter_P)
            return expert_ffn(form, own, x_PD, gate_P, groups, kernel)

        names = tuple(weights)
        apply = functools.partial(
            apply_experts,
            self.ctx.rules,
            expert,
            weights | low,
            axes,
            constants=names if self.ctx.frozen or is_packed(weights) else (),
        )
        if own.w3 is not None:
            return apply(x_BSD, index_BSK, weight_BSK)
        large = functools.partial(apply, share=JOINED_SHARE)
        return jax.lax.platform_dependent(x_BSD, index_BSK, weight_BSK, cpu=large, default=apply)


class SharedExpert(Weights):
    """The expert that every token passes through, clamped like the others.

    Its input has already passed `act_quant`.
    """

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        w1 = self.matrix("w1")
        w3 = self.matrix("w3")
        w2 = self.matrix("w2")
        h = clamped_swiglu(self.dense(x_BSD, w1), self.dense(x_BSD, w3), self.cfg.swiglu_limit)
        h = self.act_quant(
            self.ctx.rules.constrain(h.astype(x_BSD.dtype), "act_batch", "act_seq", "act_hidden")
        )
        return self.dense(h, w2)
