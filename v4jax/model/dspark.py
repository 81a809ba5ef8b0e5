"""The DSpark drafter: a block of tokens in one pass of a few stages over the trunk's tapped layers.

A stage is a block as the trunk's, whose queries all see the last W tokens before the block, by keys
made from what the trunk computed there, and the whole block. No mask is causal within it
(docs/equations.md#dspark). Training the drafter would add a loss on the logits that `draft_logits`
begins from.

Shapes: B batch, S positions, G tokens of a block, W window, Y keys of a query, X streams, D hidden,
Z width of the joined taps, N heads, H head dim, Q query rank, V vocabulary, R Markov rank.
Next file to read: v4jax/generate/steps.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.embedding import embed_lookup
from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig
from v4jax.context import Context
from v4jax.kernels.attention import WindowKeys, attention
from v4jax.kernels.matmul import dense
from v4jax.kernels.norm import rms_norm
from v4jax.kernels.rotate import Rotation
from v4jax.model.attention import narrowed
from v4jax.model.hyper import HyperConnection, HyperHead, expanded
from v4jax.model.moe import MoE
from v4jax.model.norm import RMSNorm
from v4jax.model.segments import Segments
from v4jax.model.transformer import project_logits
from v4jax.model.weights import Weights
from v4jax.quant.fake import fp8_input, fp8_keys, fp8_weight

ROOT = "dspark"
"""The drafter's key among the parameters."""


class Before(NamedTuple):
    """Context keys/values of a stage, and which of them are there.

    Attributes:
      key_BWH: those of the W positions before the block.
      seen_BW: bool; False before a row's first token.
    """

    key_BWH: jax.Array
    seen_BW: jax.Array


class DraftLogits(NamedTuple):
    """What a pass gives for its G slots.

    Attributes:
      plain_BGV: float32, the head's logits, without the Markov head.
      h_BGD: states before the last norm, which the confidence reads.
    """

    plain_BGV: jax.Array
    h_BGD: jax.Array


# ---- context -------------------------------------------------------------------------------------


def joined_taps(cfg: ModelConfig, dspark: DSparkConfig, taps) -> jax.Array:
    """The tapped layers side by side, [B,S,Z].

    Args:
      taps: group -> block -> [L,B,S,D], as Hidden.taps has them.
    """
    found = []
    for number in dspark.target_layer_ids:
        group = next(
            one
            for one in cfg.layer_groups
            if one.first <= number < one.first + len(one.kinds) * one.repeats
        )
        repeat, block = divmod(number - group.first, len(group.kinds))
        found.append(taps[group.name][f"block_{block}"][repeat])
    return jnp.concatenate(found, axis=-1)


def context_keys(
    ctx: Context,
    cfg: ModelConfig,
    dspark: DSparkConfig,
    drafter,
    tap_BSZ: jax.Array,
    segments: Segments,
) -> list[jax.Array]:
    """Context keys/values [B,S,H] of every stage, normalised and rotated.

    Args:
      drafter: the drafter's parameters.
      segments: of the tapped positions.
    """
    w_ZD = drafter["main_proj"]
    if ctx.quant == "official":
        tap_BSZ, w_ZD = fp8_input(tap_BSZ), fp8_weight(w_ZD)
    w_ZD = ctx.rules.gather(w_ZD.astype(ctx.dtype), (None, "embed_out"))
    m_BSD = dense(tap_BSZ, w_ZD, implementation=ctx.kernels.matmul)
    module = _Context(ctx, cfg, dspark.stages)
    return cast(list, module.apply(_variables(drafter), m_BSD, segments.rope))


class _Context(Weights):
    """The keys of all stages, under the names that their weights have in the tree."""

    stages: int

    @nn.compact
    def __call__(self, m_BSD: jax.Array, rope: Rotation) -> list[jax.Array]:
        return _ContextOf(self.ctx, self.cfg, self.stages, name=ROOT)(m_BSD, rope)


class _ContextOf(Weights):
    stages: int

    @nn.compact
    def __call__(self, m_BSD: jax.Array, rope: Rotation) -> list[jax.Array]:
        m_BSD = RMSNorm(self.ctx, self.cfg, name="main_norm")(m_BSD)
        names = [f"stage_{stage}" for stage in range(self.stages)]
        return [_StageContext(self.ctx, self.cfg, name=name)(m_BSD, rope) for name in names]


class _StageContext(Weights):
    @nn.compact
    def __call__(self, m_BSD: jax.Array, rope: Rotation) -> jax.Array:
        return _Keys(self.ctx, self.cfg, name="attn")(m_BSD, rope)


class _Keys(Weights):
    """Keys/values of a stage's attention: one head."""

    @nn.compact
    def __call__(self, x_BSD: jax.Array, rope: Rotation) -> jax.Array:
        wkv = self.weight("wkv")
        kv_BSH = RMSNorm(self.ctx, self.cfg, name="kv_norm")(self.dense(self.act_quant(x_BSD), wkv))
        kv_BSH = self.rotate(kv_BSH, rope)
        official = self.ctx.quant == "official"
        return fp8_keys(kv_BSH, self.cfg.qk_rope_head_dim) if official else kv_BSH


# ---- a block -------------------------------------------------------------------------------------


def draft_logits(
    ctx: Context,
    cfg: ModelConfig,
    dspark: DSparkConfig,
    params,
    newest_B: jax.Array,
    before: list[Before],
    segments: Segments,
) -> DraftLogits:
    """One pass of all stages over a block: the newest token, then noise.

    Args:
      params: the trunk's parameters, with the drafter's under ROOT.
      newest_B: the newest token of each row, which the trunk has not run.
      before: what each stage sees of the tokens before it.
      segments: of the block's G positions.
    """
    noise_BG = jnp.full((len(newest_B), dspark.block_size), dspark.noise_token_id, jnp.int32)
    ids_BG = noise_BG.at[:, 0].set(newest_B)
    x_BGD = embed_lookup(ctx.rules, params["embed"]["weight"], ids_BG).astype(ctx.dtype)
    shape = (*ids_BG.shape, cfg.hc_mult, cfg.hidden_size)
    x_BGXD = jnp.broadcast_to(x_BGD[:, :, None], shape)
    module = _Draft(ctx, cfg)
    found: Any = module.apply(_variables(params[ROOT]), x_BGXD, ids_BG, segments, before)
    h_BGD, x_BGD = found
    head = params["head"]["weight"].astype(x_BGD.dtype)
    head_DV = ctx.rules.gather(head, ("embed", "vocab"))
    return DraftLogits(project_logits(ctx, x_BGD, head_DV), h_BGD)


class _Draft(Weights):
    """The stages, under the names that their weights have in the tree."""

    @nn.compact
    def __call__(self, *inputs) -> tuple[jax.Array, jax.Array]:
        return _Stages(self.ctx, self.cfg, name=ROOT)(*inputs)


class _Stages(Weights):
    """(states before the last norm, after it), [B,G,D]."""

    @nn.compact
    def __call__(self, x_BGXD, ids_BG, segments: Segments, before: list[Before]):
        ctx, cfg = self.ctx, self.cfg
        for stage, seen in enumerate(before):
            x_BGXD = _Stage(ctx, cfg, name=f"stage_{stage}")(x_BGXD, ids_BG, segments, seen)
        h_BGD = HyperHead(ctx, cfg, name="hc_head")(x_BGXD)
        return h_BGD, RMSNorm(ctx, cfg, name="norm")(h_BGD)


class _Stage(Weights):
    """A block of the trunk (v4jax/model/block.py), but for what its attention sees."""

    @nn.compact
    def __call__(self, x_BGXD, ids_BG, segments: Segments, before: Before) -> jax.Array:
        cfg, ctx = self.cfg, self.ctx
        site = HyperConnection(ctx, cfg, name="hc_attn")(x_BGXD)
        u_BGD = RMSNorm(ctx, cfg, name="attn_norm")(site.u_BSD)
        y_BGD = _BlockAttention(ctx, cfg, name="attn")(u_BGD, segments.rope, before)
        x_BGXD = expanded(ctx, y_BGD, site)
        site = HyperConnection(ctx, cfg, name="hc_ffn")(x_BGXD)
        u_BGD = RMSNorm(ctx, cfg, name="ffn_norm")(site.u_BSD)
        experts = MoE(ctx, cfg, hash_routed=False, name="ffn")  # scores choose, never a table
        y_BGD, _ = experts(u_BGD, ids_BG, segments)
        return expanded(ctx, y_BGD, site)


class _BlockAttention(Weights):
    """Attention of a block: every query sees the window before it, and all of the block."""

    @nn.compact
    def __call__(self, x_BGD: jax.Array, rope: Rotation, before: Before) -> jax.Array:
        cfg, ctx = self.cfg, self.ctx
        wq_a = self.weight("wq_a")
        wq_b = self.weight("wq_b")
        wkv = self.weight("wkv")
        wo_a = self.weight("wo_a")
        wo_b = self.weight("wo_b")
        sink_N = self.weight("attn_sink")
        low_BGD = self.act_quant(x_BGD)
        qr_BGQ = RMSNorm(ctx, cfg, name="q_norm")(self.dense(low_BGD, wq_a))
        shape = (*x_BGD.shape[:2], cfg.num_attention_heads, cfg.head_dim)
        q_BGNH = self.dense(self.act_quant(qr_BGQ), wq_b).reshape(shape)
        q_BGNH = ctx.rules.constrain(q_BGNH, "act_batch", "act_seq", "act_heads", None)
        q_BGNH = self.rotate(rms_norm(q_BGNH, cfg.rms_norm_eps), rope.heads())
        kv_BGH = RMSNorm(ctx, cfg, name="kv_norm")(self.dense(low_BGD, wkv))
        kv_BGH = self.rotate(kv_BGH, rope)
        kv_BGH = fp8_keys(kv_BGH, cfg.qk_rope_head_dim) if ctx.quant == "official" else kv_BGH
        key_BYH = jnp.concatenate((before.key_BWH, kv_BGH), axis=1)
        block = x_BGD.shape[1]
        seen_BY = jnp.pad(before.seen_BW, ((0, 0), (0, block)), constant_values=True)
        mask_BGY = jnp.broadcast_to(seen_BY[:, None], (len(seen_BY), block, seen_BY.shape[1]))
        window = WindowKeys(key_BYH[:, None], mask_BGY[:, None])
        out_BGNH, _ = attention(q_BGNH, window, None, sink_N, ctx.kernels.attention)
        out_BGNH = self.rotate(out_BGNH.astype(x_BGD.dtype), rope.heads(), inverse=True)
        low_BGD = self.act_quant(narrowed(self.ctx, out_BGNH, wo_a, cfg.o_groups))
        return self.dense(low_BGD, wo_b)


def _variables(drafter) -> dict[str, Any]:
    own = {name: value for name, value in drafter.items() if name != "router"}
    return {"params": {ROOT: own}, "router": {ROOT: drafter["router"]}}


# ---- tokens --------------------------------------------------------------------------------------


def choose_block(
    drafter, found: DraftLogits, newest_B: jax.Array, choose: Callable[[int, jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(drafted tokens, logits of their confidence), int32 and float32 [B,G].

    The Markov head adds to a slot's logits what the token before it says. The confidence is the
    chance, before a sigmoid, that the token is accepted if all before it are.

    Args:
      drafter: the drafter's parameters.
      choose: (slot, its logits [B,V]) -> tokens [B].
    """
    w1_VR, w2_RV = (drafter[name].astype(jnp.float32) for name in ("markov_w1", "markov_w2"))
    proj = drafter["confidence"].astype(jnp.float32)
    before_B, tokens, confidences = newest_B, [], []
    for slot in range(found.plain_BGV.shape[1]):
        e_BR = w1_VR[before_B]
        joined = jnp.concatenate((found.h_BGD[:, slot].astype(jnp.float32), e_BR), axis=-1)
        confidences.append(dense(joined, proj)[:, 0])
        before_B = choose(slot, found.plain_BGV[:, slot] + dense(e_BR, w2_RV))
        tokens.append(before_B)
    return jnp.stack(tokens, axis=1), jnp.stack(confidences, axis=1)
