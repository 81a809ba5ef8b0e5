"""Reads adapters that v4jax or PEFT wrote into a tree of pairs.

Next file to read: v4jax/adapters/base.py.
"""

from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from v4jax.adapters.base import ADAPTER, CONFIG_FILE, base_at, check_same_base, read_base
from v4jax.adapters.files import FUSED, MODEL_FILE, MTP_FILE
from v4jax.adapters.names import FACTORS, MODULES, MTP, PARAMETERS, PREFIX, Spot, module_of, spots
from v4jax.adapters.peft_config import PeftConfig, parse_config
from v4jax.adapters.stacked import Pair, from_peft, part
from v4jax.checkpoint.files import Header, headers_of, read_tensor
from v4jax.config import ModelConfig
from v4jax.parameter_tree import leaves
from v4jax.storage import Place, checkpoint_path
from v4jax.untrusted import file_in, read_json


def load_adapter(cfg: ModelConfig, directory, base: str | Place | None = None) -> dict[str, Any]:
    """The tree of pairs for params["lora"], NumPy float32: b times its scale.

    A layer that has no pair where another of its kind has one gets zeros.

    Args:
      base: the checkpoint that they are to be used with. It must be the one of base.json, if the
        adapter has that file.

    Raises:
      ValueError: no adapter, one of another kind, model or base, or a tensor that adapts nothing or
        has another shape; names it.
    """
    folder = checkpoint_path(directory, "adapter", weights=True)
    try:
        return _load(cfg, folder, base)
    except ValueError as error:
        raise ValueError(f"adapter: {folder}: {error}") from None


def _load(cfg: ModelConfig, folder: Place, base: str | Place | None) -> dict[str, Any]:
    if (folder / ADAPTER / CONFIG_FILE).is_file():
        raise ValueError(f"a run, not an adapter; its adapter is {folder / ADAPTER}")
    for name, others in ((CONFIG_FILE, ()), (MODEL_FILE, (MTP_FILE,))):
        if not any((folder / one).is_file() for one in (name, *others)):
            raise ValueError(f"no {name} there; must be a folder as v4jax train or PEFT writes it")
    config = _config(folder)
    known = read_base(folder)
    if known is not None and base is not None:
        check_same_base("it", known, base_at(base))
    found = _read(cfg, config, _headers(folder, MODEL_FILE))
    found |= _read_mtp(cfg, config, _headers(folder, MTP_FILE))
    if not found:
        raise ValueError("has no pairs of this model's matrices")
    return _tree(cfg, found)


def _headers(folder: Place, name: str) -> dict[str, Header]:
    """The tensors of a file by name; none without the file: MTP's pairs have one of their own."""
    if not (folder / name).is_file():
        return {}
    return {header.stored: header for header in headers_of(file_in(folder, name))}


def _config(folder: Place) -> PeftConfig:
    found = read_json(file_in(folder, CONFIG_FILE))
    try:
        return parse_config(found)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from None


_Found = dict[tuple[str, str], Pair]
"""(layer, target name) -> a and b, b times the scale."""


def _read(cfg: ModelConfig, config: PeftConfig, headers: dict[str, Header]) -> _Found:
    # PEFT adds the base's own head if that is adapted.
    left = {name: one for name, one in headers.items() if not name.endswith(".base_layer.weight")}
    found: _Found = {}
    for (layer, name), spot in spots(cfg).items():
        if layer == MTP or name.startswith("ffn.experts."):
            continue
        module = (MODULES | PARAMETERS)[name]
        pair = _take(left, module_of(layer, module.removesuffix(".weight")))
        if pair is not None:
            a, b = (m.T for m in pair)
            scale = config.scale(a.shape[-1], _name(layer, module))
            found[layer, name] = _fitting(cfg, layer, name, spot, (a, b), scale)
    experts = {layer for layer, name in spots(cfg) if name == "ffn.experts.w1" and layer != MTP}
    for layer in sorted(experts):
        found |= _read_experts(cfg, config, layer, left)
    if left:
        raise ValueError(f"{MODEL_FILE}: {min(left)} adapts nothing in this model")
    return found


def _read_experts(
    cfg: ModelConfig, config: PeftConfig, layer: str, left: dict[str, Header]
) -> _Found:
    """The pairs of a layer's routed experts; the later of two parameters is the outer wrapper."""
    targets = config.target_parameters
    stacks = (FUSED, PARAMETERS["ffn.experts.w2"])
    names = [name for name in stacks if any(f".{name}".endswith(f".{one}") for one in targets)]
    outer = module_of(layer, "mlp.experts")
    places = dict(zip(names, [f"{outer}.base_layer", outer][-len(names) :], strict=False))
    found: _Found = {}
    for name in names:
        pair = _take(left, places[name])
        if pair is None:
            continue
        if pair[0].shape[0] % cfg.n_routed_experts or pair[1].shape[1] % cfg.n_routed_experts:
            raise ValueError(
                f"{places[name]}: got {pair[0].shape[0]} rows; must divide by "
                f"n_routed_experts={cfg.n_routed_experts}"
            )
        a, b = from_peft(cfg.n_routed_experts, pair)
        scale = config.scale(a.shape[-1], _name(layer, name))
        split = zip(("w1", "w3"), part((a, b)), strict=True) if name == FUSED else [("w2", (a, b))]
        for matrix, own in split:
            key = (layer, f"ffn.experts.{matrix}")
            if own is not None:
                found[key] = _fitting(cfg, *key, spots(cfg)[key], own, scale)
    return found


def _read_mtp(cfg: ModelConfig, config: PeftConfig, left: dict[str, Header]) -> _Found:
    if not cfg.num_nextn_predict_layers:
        return {}  # the base was opened without its MTP module
    found: _Found = {}
    for (layer, name), spot in spots(cfg).items():
        pair = _take(left, f"{MTP}.{name}", MTP_FILE) if layer == MTP else None
        if pair is not None:
            a, b = (m.swapaxes(-1, -2) for m in pair)
            found[layer, name] = _fitting(cfg, layer, name, spot, (a, b), config.scale(a.shape[-1]))
    if left:
        raise ValueError(f"{MTP_FILE}: {min(left)} adapts nothing in this model")
    return found


def _take(left: dict[str, Header], module: str, file: str = MODEL_FILE) -> Pair | None:
    """A and B of a module, float32, which are then no longer left; None if it has none."""
    names = [f"{module}.{factor}" for factor in FACTORS]
    missing = [name for name in names if name not in left]
    if len(missing) == 2:
        return None
    if missing:
        raise ValueError(f"{file} lacks {missing[0]}")
    first, second = (read_tensor(left.pop(name)).astype(np.float32) for name in names)
    for name, array in zip(names, (first, second), strict=True):
        if array.ndim < 2:
            raise ValueError(f"{file}: {name}: got shape {list(array.shape)}; must be a matrix")
        if not np.isfinite(array).all():
            raise ValueError(f"{file}: {name}: has numbers that are not finite")
    return first, second


def _name(layer: str, module: str) -> str:
    """The full name of a layer's module in transformers."""
    return module_of(layer, module).removeprefix(PREFIX)


def _fitting(cfg: ModelConfig, layer: str, name: str, spot: Spot, pair: Pair, scale: float) -> Pair:
    """The pair with its scale, after a check of shapes."""
    a, b = pair
    *lead, rows, columns = leaves(cfg)[spot.path].shape[len(spot.index) :]
    rank = a.shape[-1]
    if a.shape != (*lead, rows, rank) or b.shape != (*lead, rank, columns) or rank < 1:
        raise ValueError(
            f"{layer or 'model'} {name}: got a {list(a.shape)} and b {list(b.shape)}; the matrix "
            f"is {[*lead, rows, columns]}"
        )
    return a, b * np.float32(scale)


def _tree(cfg: ModelConfig, found: _Found) -> dict[str, Any]:
    """The tree of pairs; ranks of a stack are filled up with zeros to the largest."""
    where, ranks = spots(cfg), {}
    for key, (a, _) in found.items():
        path = where[key].path
        ranks[path] = max(ranks.get(path, 0), a.shape[-1])
    flat = {}
    for path, rank in ranks.items():
        *lead, rows, columns = leaves(cfg)[path].shape
        flat[(*path, "a")] = np.zeros((*lead, rows, rank), np.float32)
        flat[(*path, "b")] = np.zeros((*lead, rank, columns), np.float32)
    for key, (a, b) in found.items():
        path, index = where[key]
        flat[(*path, "a")][index][..., : a.shape[-1]] = a
        flat[(*path, "b")][index][..., : a.shape[-1], :] = b
    return unflatten_dict(flat)
