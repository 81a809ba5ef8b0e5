"""What adapters change in a layer's memory: matrices are read packed, pairs come in.

The arrays were read off compiled programs, as in v4jax/planner/backward.py.

Shapes: D hidden, F expert hidden, N heads, H head dim.
Next file to read: v4jax/planner/backward.py.
"""

import math
from collections.abc import Mapping

from sharding.rules import AxisRules
from v4jax.planner.terms import Term
from v4jax.planner.weights import RELEASED, trained_weights
from v4jax.train.config import TrainConfig

_READ_AT_ONCE = 3
"""A packed matrix that is read: its numbers, and bytes and scales spread to as many."""


def is_packed(cfg: TrainConfig) -> bool:
    return cfg.lora is not None and cfg.lora.base_dtype == "packed"


def expert_bytes(cfg: TrainConfig, item: int) -> float:
    """Bytes of a number of the experts' matrices, as a layer keeps them for its backward pass.

    Packed ones are read once more there (v4jax/kernels/expert_ffn/adapted.py).
    """
    return RELEASED["mxfp4"] if is_packed(cfg) else item


def read_now(cfg: TrainConfig, matrix: float, item: int) -> list[Term]:
    """The one packed matrix of experts that is read at a time; `matrix` has so many numbers."""
    if not is_packed(cfg):
        return []
    return [Term("", "a matrix as it is read", _READ_AT_ONCE * item * matrix)]


def row_bytes(cfg: TrainConfig, hidden: float, block: int, item: int, pair_item: int) -> float:
    """What a row of experts keeps besides: its share of its block's pairs, and their result.

    Args:
      hidden: F, as far as this device has it.
      block: rows of a block.
      pair_item: bytes of a number of the pairs, as they lie beside each block.
    """
    if cfg.lora is None or not any(
        weight.is_expert and weight.optimizer == cfg.lora.optimizer
        for weight in trained_weights(cfg)
    ):
        return 0.0
    pairs = 3 * cfg.lora.rank * (cfg.model.hidden_size + hidden)
    return pairs * pair_item / block + hidden * item


def spread_scales(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> float:
    """Bytes of the float32 scales of a layer's two widest fp8 matrices, one for each number."""
    if not is_packed(cfg):
        return 0.0
    model = cfg.model
    heads = math.prod(sizes[axis] for axis in rules.mesh_axes("act_heads"))
    queries = model.q_lora_rank * model.num_attention_heads * model.head_dim
    output = model.o_groups * model.o_lora_rank * model.hidden_size
    return 4 * (queries + output) / heads
