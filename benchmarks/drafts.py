"""What DSpark's drafts can gain where a step is bound by the bytes of the weights that it reads.

    python benchmarks/drafts.py [tokens of a round]

A round runs the newest token and G drafts of each row through the trunk, and a block through the
drafter. Experts are read once for all rows that chose them. Choices count as independent; real ones
are not, so real rounds read fewer. Weights are as released. KV bytes and products are left out.
2.74 tokens a round is what others measured on Flash-0731 (prose, greedy).

Columns: rows at once; GB of a plain step, of a round and, of these, the drafter's; how many times
the experts of a plain step the trunk reads in a round; the gain; the tokens a round that a gain of
1.8 would need, of 6 at most; the gain if all tokens of a row chose the same experts, which is more
than any text gives.
"""

import math
import sys

from configs.models import flash_0731, pro_0813
from v4jax.checkpoint.names import official_names, official_shapes
from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig
from v4jax.drafter_parameters import drafter_tensors
from v4jax.parameter_tree import leaves

BYTES = {"fp8": 1, "mxfp4": 17 / 32, "bfloat16": 2, "float32": 4, "int64": 0}
"""Bytes of a number, scales of MXFP4 included; a table of experts is read at one row."""
BLOCK, TOKENS, BAR = 5, 2.74, 1.8
HEAD = "model        rows  plain  round  drafter  experts  gain  for 1.8  if shared"


def share(cfg: ModelConfig, rows: int) -> float:
    """The share of a layer's experts that `rows` tokens are expected to choose."""
    return 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** rows


def trunk_bytes(cfg: ModelConfig, rows: int) -> float:
    """Bytes of weights that a step of the trunk reads."""
    declared, slots, total = leaves(cfg), official_names(cfg), 0.0
    for name, shape in official_shapes(cfg).items():
        spec = declared[slots[name].path].spec
        if spec.part != "embed":
            part = share(cfg, rows) if spec.is_expert else 1
            total += part * math.prod(shape) * BYTES[spec.precision]
    return total


def drafter_bytes(cfg: ModelConfig, dspark: DSparkConfig, rows: int) -> float:
    """Bytes that a draft reads: the stages, and the trunk's head once more."""
    total = cfg.hidden_size * cfg.vocab_size * BYTES["bfloat16"]
    for tensor in drafter_tensors(cfg, dspark).values():
        if tensor.path[-1] != "markov_w1":  # a row of it
            part = share(cfg, rows) if tensor.index else 1
            total += part * math.prod(tensor.shape) * BYTES[tensor.precision]
    return total


def main() -> None:
    tokens = float(sys.argv[1]) if len(sys.argv) > 1 else TOKENS
    print(f"{tokens} tokens a round\n{HEAD}")
    for name, cfg, rank in (("Flash-0731", flash_0731(), 256), ("Pro-0813", pro_0813(), 512)):
        last = cfg.num_hidden_layers
        dspark = DSparkConfig(
            stages=3,
            block_size=BLOCK,
            noise_token_id=128799,
            target_layer_ids=(last - 3, last - 2, last - 1),
            markov_rank=rank,
        )
        for rows in (1, 8, 64, 256):
            plain = trunk_bytes(cfg, rows)
            drafts = drafter_bytes(cfg, dspark, rows * BLOCK)
            whole = trunk_bytes(cfg, rows * (BLOCK + 1)) + drafts
            experts = share(cfg, rows * (BLOCK + 1)) / share(cfg, rows)
            shared = tokens * plain / (plain + drafter_bytes(cfg, dspark, rows))
            sizes = f"{plain / 1e9:5.1f}  {whole / 1e9:5.1f}  {drafts / 1e9:7.1f}  {experts:7.2f}"
            gains = f"{tokens * plain / whole:4.2f}  {BAR * whole / plain:7.2f}  {shared:9.2f}"
            print(f"{name:11}  {rows:4}  {sizes}  {gains}")


if __name__ == "__main__":
    main()
