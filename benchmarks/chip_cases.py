"""The operations that chips.py compiles: each as a function, the shapes of its arrays, and a floor.

Shapes: B batch, S positions of the row, T queries, Y window keys, N heads, H head dim, D hidden, X
streams, C entries, I index heads, J index dim, K chosen entries, Z matrices.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from chip_case import Case, Sizes, of
from chip_experts import experts, numbers_of_experts, packed_experts

from configs import models
from v4jax.cache.attention_inputs import AttentionInputs, IndexInputs, WindowKV
from v4jax.checkpoint.names import leaf_dtypes
from v4jax.config import CSA
from v4jax.context import Context
from v4jax.kernels.choice import kernels_from
from v4jax.kernels.index_scores import index_scores
from v4jax.kernels.norm import rms_norm
from v4jax.kernels.rotate import rotate
from v4jax.kernels.top_k import top_k_mask
from v4jax.model.attend import attend
from v4jax.model.attention import Attention
from v4jax.model.hyper import HyperConnection, expanded
from v4jax.model.rotary import rotation
from v4jax.model.segments import read_segments
from v4jax.model.windows import entries_of, windows_of
from v4jax.parameter_tree import blocks
from v4jax.train.newton_schulz import COEFFICIENTS, newton_schulz

RATIOS = {"window": 0, "hca": 128, "csa": 4}
OPS = (
    *RATIOS,
    "scores",
    "choice",
    "q",
    "output",
    "site",
    "newton_schulz",
    "experts",
    "packed_experts",
    "numbers_of_experts",
    "projections",
    *(f"{name}_layer" for name in RATIOS),
)
FORWARD_ONLY = ("choice", "newton_schulz", "packed_experts", "numbers_of_experts")
"""Ops without a gradient."""

MATRICES = (32, 2048, 4096)
"""One call of Newton-Schulz: matrices of an expert's size."""

_BF16 = jnp.bfloat16
_F32 = jnp.float32


def case_of(op: str, model: str, kernels: str, seq: int, queries: int) -> Case:
    """The case called `op`, of OPS."""
    ctx = Context(dtype="bfloat16", kernels=kernels_from(kernels))
    sizes = Sizes(ctx, getattr(models, model)(), seq, queries)
    if op in RATIOS:
        return _attend(sizes, RATIOS[op])
    if op.endswith("_layer"):
        return _layer(sizes, RATIOS[op.removesuffix("_layer")])
    made = {
        "scores": _scores,
        "choice": _choice,
        "q": _q,
        "output": _output,
        "site": _site,
        "newton_schulz": _newton_schulz,
        "experts": experts,
        "packed_experts": packed_experts,
        "numbers_of_experts": numbers_of_experts,
        "projections": _projections,
    }
    return made[op](sizes)


def _heads(sizes: Sizes) -> jax.ShapeDtypeStruct:
    cfg = sizes.cfg
    return of((1, sizes.queries, cfg.num_attention_heads, cfg.head_dim))


def _index_shapes(sizes: Sizes) -> tuple:
    cfg, heads = sizes.cfg, sizes.cfg.index_n_heads
    return (
        of((1, sizes.queries, heads, cfg.index_head_dim)),
        of((1, sizes.queries, heads), _F32),
        of((1, sizes.seq // CSA, cfg.index_head_dim)),
    )


def _attend(sizes: Sizes, ratio: int) -> Case:
    """From q's norm and rotation to the output's, for CSA with scores and choice.

    Queries are [T, N*H], as a product makes them, and the output lies in groups of heads, as a
    product takes it. Scores and choice get no gradient.
    """
    cfg, seq, queries = sizes.cfg, sizes.seq, sizes.queries
    continues = seq > queries
    before = cfg.sliding_window if continues else 0

    def run(q_BTW, kv_BYH, sink_N, *rest):
        position_BT = jnp.arange(queries)[None]
        windows = windows_of(cfg, ratio, jnp.arange(seq)[None], None, 1) if ratio else None
        entries = entries_of(ratio, rest[0] if ratio else None, windows)
        index = IndexInputs(*rest[1:4]) if ratio == CSA else None
        past = None
        if continues:
            # The start is an array, so that the compiler cannot know what the queries see.
            start_B = rest[-1]
            position_BY = start_B[:, None] + jnp.arange(-before, queries, dtype=jnp.int32)[None]
            position_BT = position_BY[:, before:]
            past = WindowKV(kv_BYH, position_BY, start_B)
        rope = rotation(cfg, position_BT, compressed=ratio > 0)
        q_BTNH = q_BTW.reshape(_heads(sizes).shape)
        inputs = AttentionInputs(q_BTNH, rope, kv_BYH, sink_N, None, entries, index, past)
        out_BTNH = attend(sizes.ctx, cfg, inputs)[0]
        return jnp.moveaxis(out_BTNH.reshape(1, queries, cfg.o_groups, -1), 2, 1)

    heads, dim = cfg.num_attention_heads, cfg.head_dim
    shapes = [of((1, queries, heads * dim)), of((1, before + queries, dim)), of((heads,), _F32)]
    if ratio:
        shapes.append(of((1, seq // ratio, dim)))
    if ratio == CSA:
        shapes += _index_shapes(sizes)
    if continues:
        shapes.append(of((1,), jnp.int32))
    flops, moved = _attention_floor(sizes, ratio)
    scored = _scores_flops(sizes) if ratio == CSA else 0
    diff = 4 if ratio else 3
    return Case(run, tuple(shapes), diff, flops + scored, 2 * moved, 2 * flops, 3 * moved)


def _attention_floor(sizes: Sizes, ratio: int) -> tuple[float, float]:
    """(FLOPs of a forward pass, bytes of the queries of all heads)."""
    cfg = sizes.cfg
    wide = cfg.num_attention_heads * cfg.head_dim
    positions = range(sizes.seq - sizes.queries, sizes.seq)
    keys = sum(min(t + 1, cfg.sliding_window) for t in positions)
    if ratio:
        most = cfg.index_topk if ratio == CSA else sizes.seq
        keys += sum(min((t + 1) // ratio, most) for t in positions)
    return 4 * wide * keys, 2 * wide * sizes.queries


def _scores_flops(sizes: Sizes) -> float:
    cfg = sizes.cfg
    return 2 * cfg.index_n_heads * cfg.index_head_dim * sizes.queries * sizes.seq / CSA


def _scores(sizes: Sizes) -> Case:
    """All index scores, in the chunks in which attention makes them."""
    chunk = 128

    def run(q_BTIJ, w_BTI, key_BCJ):
        def one(given):
            return index_scores(*given, key_BCJ, sizes.ctx.kernels.index_scores)

        return jax.lax.map(one, (_chunked(q_BTIJ, chunk), _chunked(w_BTI, chunk)))

    flops = _scores_flops(sizes)
    moved = sum(math.prod(one.shape) * one.dtype.itemsize for one in _index_shapes(sizes))
    moved += 4 * sizes.queries * sizes.seq // CSA
    return Case(run, _index_shapes(sizes), 3, flops, moved, 2 * flops, 2 * moved)


def _chunked(x, chunk: int):
    """[1,T,...] -> [chunks,1,chunk,...]."""
    return x.reshape(-1, 1, chunk, *x.shape[2:])


def _choice(sizes: Sizes) -> Case:
    """The mask of each query's best entries, in the same chunks."""

    def run(score_BTC):
        def one(score_BTC):
            return top_k_mask(score_BTC, sizes.cfg.index_topk, sizes.ctx.kernels.top_k)

        return jax.lax.map(one, _chunked(score_BTC, 128))

    slots = sizes.seq // CSA
    return Case(run, (of((1, sizes.queries, slots), _F32),), 0, 0, 5 * sizes.queries * slots)


def _rope(sizes: Sizes):
    return rotation(sizes.cfg, jnp.arange(sizes.queries)[None], compressed=True).heads()


def _q(sizes: Sizes) -> Case:
    """What comes between the projection of q and attention: norm and rotation of each head."""
    heads = _heads(sizes)

    def run(q_BTW):
        q_BTNH = rms_norm(q_BTW.reshape(heads.shape), sizes.cfg.rms_norm_eps)
        q_BTNH = rotate(q_BTNH, _rope(sizes), implementation=sizes.ctx.kernels.rotate)
        return q_BTNH.reshape(q_BTW.shape)

    return Case(run, (of((1, sizes.queries, heads.shape[2] * heads.shape[3])),), 1)


def _output(sizes: Sizes) -> Case:
    """What comes between attention and the projections of its output: the inverse rotation."""
    heads = _heads(sizes)

    def run(out_BTW):
        kernel, out_BTNH = sizes.ctx.kernels.rotate, out_BTW.reshape(heads.shape)
        turned_BTNH = rotate(out_BTNH, _rope(sizes), inverse=True, implementation=kernel)
        return turned_BTNH.reshape(out_BTW.shape)

    return Case(run, (of((1, sizes.queries, heads.shape[2] * heads.shape[3])),), 1)


class _Placed(nn.Module):
    """A module at the place of a model's tree where the table of parameters knows it."""

    at: tuple[str, ...]
    kind: Any
    fields: tuple

    @nn.compact
    def __call__(self, *arguments):
        if len(self.at) > 1:
            inner = _Placed(self.at[1:], self.kind, self.fields, name=self.at[0])
        else:
            inner = self.kind(*self.fields, name=self.at[0])
        return inner(*arguments)


def _module(sizes: Sizes, ratio: int, name: str, kind, fields: tuple, *inputs):
    """(the module in the first block of this ratio, its abstract parameters as steps use them)."""
    block = next(one for one in blocks(sizes.cfg) if one.kind.compress_ratio == ratio)
    path = (*block.path.split("/"), name)
    module = _Placed(path, kind, (sizes.ctx, sizes.cfg, *fields))
    made = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    dtypes = leaf_dtypes(sizes.cfg, "bfloat16")
    params = jax.tree_util.tree_map_with_path(
        lambda place, leaf: of(leaf.shape, dtypes[tuple(key.key for key in place)]),
        nn.meta.unbox(made),
    )
    return module, params


def _layer(sizes: Sizes, ratio: int) -> Case:
    """The module Attention with its projections, on a whole row."""
    cfg = sizes.cfg
    x = of((1, sizes.seq, cfg.hidden_size))
    segments = jax.eval_shape(lambda: read_segments(cfg, sizes.seq, None))
    module, params = _module(sizes, ratio, "attn", Attention, (ratio,), x, segments)
    leaves, tree = jax.tree.flatten(params)

    def run(x_BSD, *leaves):
        params = jax.tree.unflatten(tree, leaves)
        return module.apply({"params": params}, x_BSD, read_segments(cfg, sizes.seq, None))[0]

    flops, _ = _attention_floor(sizes._replace(queries=sizes.seq), ratio)
    flops += 2 * sizes.seq * sum(math.prod(leaf.shape) for leaf in leaves)
    scored = _scores_flops(sizes._replace(queries=sizes.seq)) if ratio == CSA else 0
    return Case(run, (x, *leaves), 1 + len(leaves), flops + scored, 0, 2 * flops)


def _projections(sizes: Sizes) -> Case:
    """The products of a window layer, with nothing between them."""
    cfg, rows = sizes.cfg, sizes.queries
    wide, ranks = cfg.num_attention_heads * cfg.head_dim, cfg.o_groups * cfg.o_lora_rank

    def run(x_TD, a, b, kv, heads_TW, o_a, o_b):
        grouped = heads_TW.reshape(rows, cfg.o_groups, -1)
        blocks_ = o_a.reshape(o_a.shape[0], cfg.o_groups, -1)
        low = jnp.einsum("TGI,IGO->TGO", grouped, blocks_).reshape(rows, -1)
        return (x_TD @ a) @ b, x_TD @ kv, low @ o_b

    hidden, rank = cfg.hidden_size, cfg.q_lora_rank
    weights = (
        (hidden, rank),
        (rank, wide),
        (hidden, cfg.head_dim),
        (wide // cfg.o_groups, ranks),
        (ranks, hidden),
    )
    a, b, kv, o_a, o_b = map(of, weights)
    shapes = (of((rows, hidden)), a, b, kv, of((rows, wide)), o_a, o_b)
    flops = 2 * rows * sum(math.prod(shape) for shape in weights)
    return Case(run, shapes, len(shapes), flops, 0, 2 * flops)


def _site(sizes: Sizes) -> Case:
    """A site of mHC: logits, Sinkhorn, collapse; then the expansion of a sublayer's output."""
    cfg = sizes.cfg
    x = of((1, sizes.queries, cfg.hc_mult, cfg.hidden_size))
    y = of((1, sizes.queries, cfg.hidden_size))
    module, params = _module(sizes, CSA, "hc_attn", HyperConnection, (), x)
    leaves, tree = jax.tree.flatten(params)

    def run(x_BTXD, y_BTD, *leaves):
        params = jax.tree.unflatten(tree, leaves)
        site = module.apply({"params": params}, x_BTXD)
        return site.u_BSD, expanded(sizes.ctx, y_BTD, site)

    # The streams are read twice and written once, a sublayer's input written, its output read.
    moved = 2 * sizes.queries * cfg.hidden_size * (3 * cfg.hc_mult + 2)
    return Case(run, (x, y, *leaves), 2 + len(leaves), 0, moved, 0, moved)


def _newton_schulz(sizes: Sizes) -> Case:
    """Muon's iteration."""
    del sizes
    count, m, n = MATRICES
    flops = len(COEFFICIENTS) * (4 * m * m * n + 2 * m**3) * count
    return Case(newton_schulz, (of(MATRICES, _F32),), 0, flops)
