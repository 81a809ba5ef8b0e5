"""The routed experts, as chips.py compiles them: in a training step, and packed in decoding."""

import jax
import jax.numpy as jnp
from chip_case import Case, Sizes, of

from sharding.experts import Groups
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights
from v4jax.kernels.expert_ffn.op import expert_ffn
from v4jax.quant.packed import Packed

EXPERTS, BLOCK = 16, 128
"""Experts of a device, and rows of a block."""

NODE = 8
"""Devices that hold the experts of a released model in decoding; each decodes 8 rows."""


def experts(sizes: Sizes) -> Case:
    """The experts of a device on the rows that it gets where all get equally many."""
    cfg = sizes.cfg
    rows, wide = sizes.queries * cfg.num_experts_per_tok, cfg.moe_intermediate_size
    into, out = (EXPERTS, cfg.hidden_size, wide), (EXPERTS, wide, cfg.hidden_size)
    blocks = rows // BLOCK
    shapes = (of((rows, cfg.hidden_size)), of((rows,), jnp.float32), *map(of, (into, into, out)))

    def run(x_PD, gate_P, w1, w3, w2):
        groups = Groups(
            jnp.full(EXPERTS, rows // EXPERTS, jnp.int32),
            jnp.arange(blocks, dtype=jnp.int32) * EXPERTS // blocks,
            jnp.int32(blocks),
        )
        form = Activation(cfg.swiglu_limit)
        return expert_ffn(
            form, ExpertWeights(w1, w3, w2), x_PD, gate_P, groups, sizes.ctx.kernels.expert_ffn
        )

    flops = 2 * rows * 3 * wide * cfg.hidden_size
    moved = 2 * (2 * rows * cfg.hidden_size + EXPERTS * 3 * wide * cfg.hidden_size)
    return Case(run, shapes, len(shapes), flops, moved, 2 * flops, 2 * moved)


def numbers_of_experts(sizes: Sizes) -> Case:
    """`packed_experts` without their kernel: numbers are written out, then multiplied."""
    return packed_experts(sizes, written=True)


def packed_experts(sizes: Sizes, written: bool = False) -> Case:
    """The experts of one device of eight, as released, on the tokens of 64 rows: one block each."""
    cfg, block = sizes.cfg, 16
    count, hidden, wide = cfg.n_routed_experts // NODE, cfg.hidden_size, cfg.moe_intermediate_size
    rows = count * block
    parts = {"w1": (hidden, 2 * wide), "w2": (wide, hidden)}
    codes = {name: of((count, i // 2, o), jnp.uint8) for name, (i, o) in parts.items()}
    scale = {name: of((count, i // 32, o), jnp.uint8) for name, (i, o) in parts.items()}

    def run(x_PD, gate_P, codes, scale):
        w1, w2 = (Packed(codes[name], scale[name], "mxfp4") for name in parts)
        groups = Groups(
            jnp.full(count, block, jnp.int32), jnp.arange(count, dtype=jnp.int32), jnp.int32(count)
        )
        form, kernel = Activation(cfg.swiglu_limit), sizes.ctx.kernels.expert_ffn
        own = ExpertWeights(w1, None, w2)
        own = own.read(x_PD.dtype) if written else own
        return expert_ffn(form, own, x_PD, gate_P, groups, kernel)

    flops = 2 * rows * 3 * wide * hidden
    moved = sum(leaf.size for leaf in jax.tree.leaves((codes, scale))) + 4 * rows * hidden
    return Case(run, (of((rows, hidden)), of((rows,), jnp.float32), codes, scale), 0, flops, moved)
