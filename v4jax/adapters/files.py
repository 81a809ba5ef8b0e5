"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

Beside them, base.json names the base that they were trained on (v4jax/adapters/base.py), and
adapter_mtp.safetensors holds pairs of the MTP module, which transformers and PEFT do not have.

Next file to read: v4jax/adapters/peft_config.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from sharding.agreement import wait_for_all
from sharding.process_rows import gather
from sharding.processes import is_first
from v4jax import storage
from v4jax.adapters.base import CONFIG_FILE, Base, write_base
from v4jax.adapters.config import Lora
from v4jax.adapters.names import FACTORS, MODULES, MTP, PARAMETERS, module_of, spots
from v4jax.adapters.stacked import Pair, join, to_peft
from v4jax.checkpoint.atomic import write_json
from v4jax.checkpoint.files import dtype_name, write_file
from v4jax.config import ModelConfig
from v4jax.storage import place

MODEL_FILE = "adapter_model.safetensors"
MTP_FILE = "adapter_mtp.safetensors"
FUSED = PARAMETERS["ffn.experts.w1"]
_EXPERTS = "mlp.experts"


def save_adapter(
    cfg: ModelConfig, adapters: Any, directory, lora: Lora, base: Base | None = None
) -> None:
    """Writes a tree of pairs as PEFT would; files of an earlier adapter are replaced.

    Every process calls it; the first one writes, and the others return when it has. Layer by layer
    is in memory.

    Args:
      adapters: params["lora"]: b holds the scale, which is divided out again.
      lora: its rank, alpha and scaling go to adapter_config.json.
      base: the weights that they were trained on.
    """
    folder = place(directory, "directory")
    pairs = _Pairs(cfg, adapters, lora.scale)
    if is_first():
        storage.make_folder(folder)
    for file, named in ((MODEL_FILE, _peft_tensors(pairs)), (MTP_FILE, _mtp_tensors(pairs))):
        _write(folder / file, named)
    if is_first():
        write_json(folder / CONFIG_FILE, _config(pairs, lora, base))
        if base is not None:
            write_base(folder, base)
    wait_for_all("the adapter is written")


class _Pairs:
    """The pairs of a tree, layer by layer, with b not scaled."""

    def __init__(self, cfg: ModelConfig, adapters: Any, scale: float):
        self._flat: Mapping[Any, Any] = flatten_dict(adapters)
        self._scale = scale
        self._spots = spots(cfg)
        self.there = {
            key: spot for key, spot in self._spots.items() if (*spot.path, "a") in self._flat
        }
        self.layers = list(dict.fromkeys(layer for layer, _ in self._spots))
        self.names = {name for layer, name in self.there if layer != MTP}

    def has(self, layer: str, name: str) -> bool:
        return (layer, name) in self.there

    def pair(self, layer: str, name: str) -> Pair:
        """a [..., I, r] and b [..., r, O], float32."""
        spot = self.there[layer, name]
        a, b = (gather(self._flat[(*spot.path, part)], spot.index) for part in ("a", "b"))
        return a, (b / self._scale if self._scale else b).astype(np.float32)


_Tensors = Iterator[tuple[str, Callable[[], Pair]]]
"""(name of a module, what makes its A and B)."""


def _peft_tensors(pairs: _Pairs) -> _Tensors:
    for layer in pairs.layers:
        if layer == MTP:
            continue
        for name, module in (MODULES | PARAMETERS).items():
            if pairs.has(layer, name) and not name.startswith("ffn.experts."):
                turned = _turned(pairs, layer, name)
                yield module_of(layer, module.removesuffix(".weight")), turned
        yield from _expert_tensors(pairs, layer)


def _expert_tensors(pairs: _Pairs, layer: str) -> _Tensors:
    """w1 and w3 together, then w2; PEFT wraps one in the other, the later one outside."""
    experts = module_of(layer, _EXPERTS)
    w1, w3, w2 = (pairs.has(layer, f"ffn.experts.{name}") for name in ("w1", "w3", "w2"))

    def one(name: str) -> Pair:
        return pairs.pair(layer, f"ffn.experts.{name}")

    def fused() -> Pair:
        return to_peft(join(one("w1") if w1 else None, one("w3") if w3 else None))

    if w1 or w3:
        yield f"{experts}.base_layer" if w2 else experts, fused
    if w2:
        yield experts, lambda: to_peft(one("w2"))


def _turned(pairs: _Pairs, layer: str, name: str) -> Callable[[], Pair]:
    def make() -> Pair:
        a, b = pairs.pair(layer, name)
        return a.swapaxes(-1, -2), b.swapaxes(-1, -2)

    return make


def _mtp_tensors(pairs: _Pairs) -> _Tensors:
    for layer, name in pairs.there:
        if layer == MTP:
            yield f"{MTP}.{name}", _turned(pairs, layer, name)


def _write(path, named: _Tensors) -> None:
    """Writes a file of pairs, or removes it if there are none.

    Shapes come first in the file, so every pair is made twice; only one is in memory.
    """
    made = list(named)
    plan = {}
    for name, make in made:
        for factor, array in zip(FACTORS, make(), strict=True):
            plan[f"{name}.{factor}"] = (dtype_name(array.dtype), array.shape)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, make in made:
            for factor, array in zip(FACTORS, make(), strict=True):
                yield f"{name}.{factor}", np.ascontiguousarray(array)

    if not is_first():
        for _ in arrays():  # every process takes part in gathering its shards
            pass
    elif plan:
        write_file(path, plan, arrays())
    else:
        storage.remove(path)


def _config(pairs: _Pairs, lora: Lora, base: Base | None) -> dict[str, Any]:
    """The contents of adapter_config.json: what PEFT needs to rebuild the same modules."""
    modules = sorted({MODULES[name] for name in pairs.names if name in MODULES})
    parameters = sorted({PARAMETERS[name] for name in pairs.names if name in PARAMETERS})
    ranks, alphas = {}, {}
    if {"ffn.experts.w1", "ffn.experts.w3"} <= pairs.names:  # two pairs in one
        stabilised = lora.scaling == "rank_stabilised"
        ranks[FUSED] = 2 * lora.rank
        alphas[FUSED] = lora.alpha * (2**0.5 if stabilised else 2)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path if base is not None else None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.scaling == "rank_stabilised",
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
