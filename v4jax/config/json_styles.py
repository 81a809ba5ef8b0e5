"""Both styles of config.json, official and of transformers 5, read as the official one.

Next file to read: v4jax/model/transformer.py.
"""

import dataclasses
import re
from typing import Any

from v4jax.config.layers import CSA, HCA, WINDOW_ONLY, is_ratio
from v4jax.config.releases import read_dspark, trunk_ratios, vision_layers
from v4jax.config.rope import RopeScaling
from v4jax.config.validation import is_number
from v4jax.storage import Place
from v4jax.untrusted import file_in, read_json

_RATIO_OF_LAYER_TYPE = {
    "sliding_attention": WINDOW_ONLY,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}
FIXED = {  # V4 was published with these values only; others would be another architecture
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def read_config_json(path: Place) -> dict[str, Any]:
    """The contents of a config.json.

    Raises:
      ValueError: no such file, a link out of its directory, or no JSON object.
    """
    try:
        raw = read_json(file_in(path.parent, path.name))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; expected a config.json of a deepseek_v4 model"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path.parent}/{error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def official_style(raw: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json of either style, with the official style's keys.

    Raises:
      ValueError: another architecture, a fixed choice that differs, a value of the wrong type, or
        a drafter or vision tower that cannot be meant.
    """
    _refuse_other_models(raw)
    for name, only in FIXED.items():
        if raw.get(name, only) != only:
            raise ValueError(f"{name}: got {raw[name]!r}; DeepSeek-V4 allows only {only!r}")
    _check_json_types(raw)
    raw = dict(raw)
    if raw.get("compress_ratios") is None and raw.get("layer_types") is not None:
        raw["compress_ratios"] = _compress_ratios(raw)
    if raw.get("num_hash_layers") is None and raw.get("mlp_layer_types") is not None:
        raw["num_hash_layers"] = _hash_layers(raw)
    factor, head_dim = raw.get("partial_rotary_factor"), raw.get("head_dim")
    if raw.get("qk_rope_head_dim") is None and is_number(factor) and is_number(head_dim):
        raw["qk_rope_head_dim"] = round(head_dim * factor)
    if raw.get("rope_parameters"):
        raw |= _rope(raw)
    return _trunk(raw)


def _trunk(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of the trunk: a DSpark drafter and a vision tower are checked, and left out."""
    vision_layers(raw)
    if read_dspark(raw) is not None:
        raw = raw | {"num_nextn_predict_layers": 0}
    modules = raw.get("num_nextn_predict_layers")
    modules = 1 if modules is None else modules
    layers, ratios = raw.get("num_hidden_layers"), raw.get("compress_ratios")
    is_whole = ratios is not None and type(layers) is int and len(ratios) >= layers
    if is_whole and modules in (0, 1):
        raw = raw | {"compress_ratios": trunk_ratios(raw, modules)}
    return raw


def _compress_ratios(raw: dict[str, Any]) -> list[int]:
    """What `layer_types` and `compress_rates` say, and 0 for an MTP layer."""
    unknown = [name for name in raw["layer_types"] if str(name) not in _RATIO_OF_LAYER_TYPE]
    if unknown:
        raise ValueError(
            f"layer_types: got {unknown[0]!r}; allowed: {', '.join(_RATIO_OF_LAYER_TYPE)}"
        )
    ratio_of = dict(_RATIO_OF_LAYER_TYPE)
    for name, ratio in (raw.get("compress_rates") or {}).items():
        own = ratio_of.get(name)
        if own == HCA and is_ratio(ratio) and ratio not in (WINDOW_ONLY, CSA):
            ratio_of[name] = ratio
        elif own != ratio:
            raise ValueError(f"compress_rates: got {name}={ratio}; DeepSeek-V4 allows only {own}")
    ratios = [ratio_of[name] for name in raw["layer_types"]]
    return ratios + [WINDOW_ONLY] * (raw.get("num_nextn_predict_layers") != 0)


def _hash_layers(raw: dict[str, Any]) -> int:
    """The number of first layers that `mlp_layer_types` calls hash-routed."""
    layers = raw.get("num_hidden_layers") or 0
    kinds = list(raw["mlp_layer_types"])
    hashed = kinds.count("hash_moe")
    if len(kinds) != layers or kinds != ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed):
        raise ValueError(
            f"mlp_layer_types: got {kinds}; must be hash_moe layers first, then moe, {layers} "
            "in all"
        )
    return hashed


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The official keys for what `rope_parameters` says of both kinds of layers."""
    main, compress = raw["rope_parameters"]["main"], raw["rope_parameters"]["compress"]
    scaled = compress.get("rope_type", "default") != "default"
    return {
        "rope_theta": main.get("rope_theta", raw.get("rope_theta")),
        "compress_rope_theta": compress.get("rope_theta", raw.get("compress_rope_theta")),
        "rope_scaling": compress if scaled else None,
    }


def _refuse_other_models(raw: dict[str, Any]) -> None:
    names = [str(raw.get("model_type"))] + re.findall(
        r"\w[\w.]*", str(raw.get("architectures") or "")
    )
    if any(mark in name.lower() for name in names for mark in ("v4.1", "v4_1", "v41")):
        raise ValueError(
            f"model_type: got {names[0]!r} {names[1:]}; DeepSeek-V4.1 is another architecture; "
            "allowed: 'deepseek_v4'"
        )
    if raw.get("model_type") != "deepseek_v4":
        raise ValueError(f"model_type: got {raw.get('model_type')!r}; allowed: 'deepseek_v4'")


def _check_json_types(raw: dict[str, Any]) -> None:
    """Refuses a key with a value of the wrong JSON type, before anything looks inside it."""
    kinds = {
        "a list": ((list, tuple), ("compress_ratios", "layer_types", "mlp_layer_types")),
        "an object": ((dict, RopeScaling), ("rope_scaling", "rope_parameters", "compress_rates")),
    }
    for word, (allowed, names) in kinds.items():
        for name in names:
            if raw.get(name) is not None and not isinstance(raw[name], allowed):
                raise ValueError(f"{name}: got {raw[name]!r}; must be {word}")
    rope = raw.get("rope_parameters") or {}
    if rope and not (isinstance(rope.get("main"), dict) and isinstance(rope.get("compress"), dict)):
        raise ValueError(
            f"rope_parameters: got {rope}; must be an object with the objects main and compress"
        )


def read_rope_scaling(raw: Any) -> RopeScaling | None:
    """What `rope_scaling` says: None, a RopeScaling, or an object of config.json.

    Raises:
      ValueError: a kind that V4 does not use, or a missing key.
    """
    if raw is None or isinstance(raw, RopeScaling):
        return raw
    kind = raw.get("type", raw.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"rope_scaling: got type {kind!r}; allowed: 'yarn', or no rope_scaling")
    if raw.get("attention_factor", 1.0) not in (None, 1.0):
        raise ValueError(
            f"rope_scaling: got attention_factor {raw['attention_factor']}; DeepSeek-V4 allows "
            "only 1.0"
        )
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names[:2] if name not in raw]
    if missing:
        raise ValueError(f"rope_scaling: missing key(s) {', '.join(missing)}")
    return RopeScaling(**{name: raw[name] for name in names if name in raw})
