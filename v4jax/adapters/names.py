"""Names of adapted matrices in PEFT's files, which are those of transformers' DeepSeek-V4.

PEFT adapts a module, or with `target_parameters` a parameter: routed experts, which transformers
stacks and whose w1 and w3 it joins, the router's gate, and wo_a, whose module PEFT would not
understand. transformers has no MTP module, so MTP's pairs have names of their own.

Next file to read: v4jax/adapters/files.py.
"""

from typing import NamedTuple

from v4jax.adapters.config import is_adaptable, target_name
from v4jax.config import ModelConfig
from v4jax.parameter_tree import Path, blocks, layer_specs, single_specs

MODULES = {
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    "head": "lm_head",
}
"""What Lora.targets call a matrix -> its module in a layer of transformers."""
PARAMETERS = {
    "attn.wo_a": "self_attn.o_a_proj.weight",
    "ffn.gate": "mlp.gate.weight",
    "ffn.experts.w1": "mlp.experts.gate_up_proj",
    "ffn.experts.w3": "mlp.experts.gate_up_proj",
    "ffn.experts.w2": "mlp.experts.down_proj",
}
"""The same for what PEFT adapts as a parameter."""
PREFIX = "base_model.model."
FACTORS = tuple(f"lora_{factor}.weight" for factor in "AB")
"""What follows a module's name: the two matrices of its pair, [r, I] and [O, r]."""
MTP = "mtp.0"


class Spot(NamedTuple):
    """Where the pair of one layer's matrix is: tree[path]["a"][index]; experts stay stacked."""

    path: Path
    index: tuple[int, ...]


def spots(cfg: ModelConfig) -> dict[tuple[str, str], Spot]:
    """(layer, target name) -> where its pair would be; the layer of the head is ""."""
    found = {}
    for spec in single_specs(cfg):
        if is_adaptable(spec):
            layer = MTP if spec.where == "mtp" else ""
            found[layer, target_name(spec)] = Spot(tuple(spec.path.split("/")), ())
    for block in blocks(cfg):
        for spec in layer_specs(block.kind):
            if not is_adaptable(spec):
                continue
            path = tuple(spec.path.format(block=block.path).split("/"))
            for n, layer in enumerate(block.layers):
                index = (n,) if block.is_stacked else ()
                found[layer, target_name(spec)] = Spot(path, index)
    return found


def module_of(layer: str, module: str) -> str:
    """The full name of a layer's module, as in PEFT's files."""
    return f"{PREFIX}model.{layer}.{module}" if layer else f"{PREFIX}{module}"
